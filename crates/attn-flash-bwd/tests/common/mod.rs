//! What the tests of this crate share: calls with all their arguments, drawn from a seed.

#![allow(dead_code, reason = "each test binary uses its own part")]

/// Sizes, options and masks are drawn as for the tests of the forward pass (a link, which a package holds as
/// a file).
pub(crate) mod forward;
pub(crate) mod ways;

use attn_flash::{Options, Window};
use attn_flash_bwd::{
    Error, Gradients, GradientsMut, Inputs, Strategy, Tiling, VarlenGradients, Workspace,
    attention_backward_into, attention_backward_naive, attention_backward_reference,
};
use ndarray::{Array, Array3, Array4, ArrayD, ArrayRef, ArrayViewMut, Dimension, IntoDimension};
use tensor_utils::testing::{
    CompareError, Guarded, Poison, Seeded, Tolerance, check_close, check_same_bits, isas,
};
use tensor_utils::{Element, Isa};

pub(crate) use forward::{Broadcast, Features, Setting, Sizes, UserMask};

/// Options that meet in models: all that can be combined with a softcap, and all masks at once.
pub(crate) fn everything() -> Features {
    Features {
        scale: Some(0.3),
        causal: true,
        window: Window { left: Some(40), right: None },
        softcap: Some(4.0),
        bias: Some(Broadcast::Nothing),
        bias_masks: true,
        mask: Some(Broadcast::Batch),
        key_lengths: true,
        alibi_slopes: Some(true),
        sinks: true,
        tree: true,
        user_mask: UserMask::Dilated(2),
        query_offset: None,
    }
}

/// Small blocks, whose edges small inputs straddle, and the default ones, with either strategy, on
/// every instruction set.
pub(crate) fn tilings() -> Vec<Tiling> {
    let ways = [
        ((768, 256), Strategy::SavedOutput),
        ((768, 256), Strategy::TwoPass),
        ((1, 32), Strategy::SavedOutput),
        ((13, 64), Strategy::TwoPass),
    ];
    let all = isas().into_iter().flat_map(|isa| ways.map(|(b, strategy)| tiling(b, strategy, isa)));
    all.collect()
}

pub(crate) fn tiling(
    (query_block, key_block): (usize, usize),
    strategy: Strategy,
    isa: Isa,
) -> Tiling {
    Tiling { query_block, key_block, strategy, isa: Some(isa) }
}

/// A backward pass with all that goes into it.
#[derive(Debug, Clone)]
pub(crate) struct Call<T: Element> {
    pub(crate) sizes: Sizes,
    pub(crate) setting: Setting<T>,
    pub(crate) q: Array4<T>,
    pub(crate) k: Array4<T>,
    pub(crate) v: Array4<T>,
    pub(crate) o: Array4<T>,
    pub(crate) lse: Array3<T::Acc>,
    pub(crate) d_o: Array4<T>,
    pub(crate) d_lse: Option<Array3<T::Acc>>,
}

impl<T> Call<T>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    /// Normal inputs; a gradient of the lse comes in if `seed` is odd.
    pub(crate) fn new(sizes: Sizes, features: &Features, seed: u64) -> Self {
        let Sizes { batch, n, e, .. } = sizes;
        let heads = sizes.heads();
        let forward::Inputs { q, k, v } = forward::Inputs::normal(sizes, seed);
        let mut seeded = Seeded::new(seed ^ 0xbac2);
        let mut call = Self {
            sizes,
            setting: Setting::new(features, sizes, seed),
            q,
            k,
            v,
            o: Array4::default((batch, heads, n, e)),
            lse: Array3::default((batch, heads, n)),
            d_o: seeded.normal((batch, heads, n, e)),
            d_lse: (seed % 2 == 1).then(|| seeded.normal((batch, heads, n))),
        };
        call.forward();
        call
    }

    /// Computes `o` and `lse` from what `q`, `k`, `v` and the options are now.
    pub(crate) fn forward(&mut self) {
        let views = (self.q.view(), self.k.view(), self.v.view());
        let tiling = attn_flash::Tiling::default();
        let result = forward::attention_tiled(views, &self.setting.options(), &tiling).unwrap();
        (self.o, self.lse) = (result.o, result.lse);
    }

    pub(crate) fn inputs(&self) -> Inputs<'_, T> {
        Inputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            o: self.o.view(),
            lse: self.lse.view(),
            d_o: self.d_o.view(),
            d_lse: self.d_lse.as_ref().map(|d_lse| d_lse.view()),
        }
    }

    pub(crate) fn options(&self) -> Options<'_, T, &UserMask> {
        self.setting.options()
    }

    pub(crate) fn run(&self, tiling: &Tiling) -> Gradients<T> {
        backward_tiled(&self.inputs(), &self.options(), tiling).unwrap()
    }

    pub(crate) fn reference(&self) -> Gradients<f64> {
        attention_backward_reference(&self.inputs(), &self.options()).unwrap()
    }

    pub(crate) fn naive(&self) -> Gradients<T> {
        attention_backward_naive(&self.inputs(), &self.options()).unwrap()
    }
}

/// The backward pass with tiles of our choice, all gradients wanted, into outputs that show every
/// element that was not written and every one beside them that was.
pub(crate) fn backward_tiled<T, M>(
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
    tiling: &Tiling,
) -> Result<Gradients<T>, Error>
where
    T: Element + Poison,
    T::Acc: Poison,
    M: attn_flash::Mask,
{
    let mut workspace = Workspace::new(inputs, tiling)?;
    backward_with(inputs, options, &mut workspace)
}

/// The same in a workspace of our choice.
pub(crate) fn backward_with<T, M>(
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T>,
) -> Result<Gradients<T>, Error>
where
    T: Element + Poison,
    T::Acc: Poison,
    M: attn_flash::Mask,
{
    let mut dq = Output::new(inputs.q.raw_dim());
    let mut dk = Output::new(inputs.k.raw_dim());
    let mut dv = Output::new(inputs.v.raw_dim());
    let mut delta = Output::new(inputs.lse.raw_dim());
    let mut dbias = options.bias.as_ref().map(|bias| Output::new(bias.raw_dim()));
    let mut dsinks = options.sinks.map(|sinks| Output::new(ndarray::Ix1(sinks.len())));
    let gradients = GradientsMut {
        dq: dq.view_mut(),
        dk: dk.view_mut(),
        dv: dv.view_mut(),
        delta: Some(delta.view_mut()),
        dbias: dbias.as_mut().map(|dbias| dbias.view_mut()),
        dsinks: dsinks.as_mut().map(|dsinks| dsinks.view_mut()),
    };
    attention_backward_into(gradients, inputs, options, workspace)?;
    Ok(Gradients {
        dq: dq.finish(),
        dk: dk.finish(),
        dv: dv.finish(),
        delta: delta.finish(),
        dbias: dbias.map(Output::finish),
        dsinks: dsinks.map(Output::finish),
    })
}

/// A guarded output, or one without elements, around which there is nothing to guard.
#[derive(Debug)]
pub(crate) enum Output<T, D: Dimension> {
    Guarded(Guarded<T, D>),
    Empty(Array<T, D>),
}

impl<T: Poison, D: Dimension> Output<T, D> {
    pub(crate) fn new(shape: impl IntoDimension<Dim = D>) -> Self {
        let shape = shape.into_dimension();
        if shape.size() == 0 {
            Self::Empty(Array::default(shape))
        } else {
            Self::Guarded(Guarded::padded(shape))
        }
    }

    pub(crate) fn view_mut(&mut self) -> ArrayViewMut<'_, T, D> {
        match self {
            Self::Guarded(output) => output.view_mut(),
            Self::Empty(output) => output.view_mut(),
        }
    }

    pub(crate) fn finish(self) -> Array<T, D> {
        match self {
            Self::Guarded(output) => output.finish().unwrap(),
            Self::Empty(output) => output,
        }
    }
}

/// Gradients as arrays with a name, in `f64`, which tells all bits of the narrower types apart.
pub(crate) trait ByName {
    fn by_name(&self) -> Vec<(&'static str, ArrayD<f64>)>;
}

macro_rules! impl_by_name {
    ($($gradients:ident),+) => {$(
        impl<T: Element> ByName for $gradients<T> {
            fn by_name(&self) -> Vec<(&'static str, ArrayD<f64>)> {
                let mut all = vec![
                    ("dq", widen(&self.dq)),
                    ("dk", widen(&self.dk)),
                    ("dv", widen(&self.dv)),
                    ("delta", widen(&self.delta)),
                ];
                all.extend(self.dbias.iter().map(|dbias| ("dbias", widen(dbias))));
                all.extend(self.dsinks.iter().map(|dsinks| ("dsinks", widen(dsinks))));
                all
            }
        }
    )+};
}

impl_by_name!(Gradients, VarlenGradients);

fn widen<T: Element, D: Dimension>(x: &ArrayRef<T, D>) -> ArrayD<f64> {
    x.mapv(T::to_f64).into_dyn()
}

/// Checks gradients computed in `T` against exact ones.
pub(crate) fn check_gradients<T: Element>(
    got: &impl ByName,
    want: &impl ByName,
) -> Result<(), String> {
    let (got, want) = (got.by_name(), want.by_name());
    let tolerance = tolerance::<T>(&want);
    compare(&got, &want, |got, want| check_close(got, want, tolerance))
}

/// Checks that gradients have the same bits.
pub(crate) fn check_same(got: &impl ByName, want: &impl ByName) -> Result<(), String> {
    compare(&got.by_name(), &want.by_name(), |got, want| check_same_bits(got, want))
}

fn compare(
    got: &[(&str, ArrayD<f64>)],
    want: &[(&str, ArrayD<f64>)],
    check: impl Fn(&ArrayD<f64>, &ArrayD<f64>) -> Result<(), CompareError>,
) -> Result<(), String> {
    let names = |all: &[(&str, _)]| all.iter().map(|(name, _)| name.to_string()).collect();
    let (got_names, want_names): (Vec<_>, Vec<_>) = (names(got), names(want));
    if got_names != want_names {
        return Err(format!("got {got_names:?}, want {want_names:?}"));
    }
    for ((name, got), (_, want)) in got.iter().zip(want) {
        check(got, want).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

/// Some roundings of the largest gradient: the small ones are differences of large terms. A 16-bit
/// `o` is off by half an [`Element::EPSILON`], and so is what comes of it.
fn tolerance<T: Element>(want: &[(&str, ArrayD<f64>)]) -> Tolerance {
    let rel = match T::NAME {
        "f64" => 2e-14,
        "f32" => 1e-5,
        _ => 4.0 * T::EPSILON,
    };
    let finite = want.iter().flat_map(|(_, want)| want).filter(|x| x.is_finite());
    Tolerance { abs: rel * finite.fold(1.0, |largest, x| f64::max(largest, x.abs())), rel }
}
