//! The public entry points of the backward pass.

use attn_flash::internals::{Call, Sizes, check_sizes, longest};
use attn_flash::{Mask, Options};
use ndarray::{
    Array1, Array2, Array3, Array4, ArrayD, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut1,
    ArrayViewMut2, ArrayViewMut3, ArrayViewMut4, ArrayViewMutD, Axis,
};
use tensor_utils::{Element, check_shape, try_array};

use crate::run::{Outputs, Saved, run};
use crate::workspace::Room;
use crate::{Error, Tiling, Workspace};

/// What the forward pass got and gave, and the gradients that come in.
#[derive(Debug, Clone)]
pub struct Inputs<'a, T: Element> {
    /// `[B, H, N, D]`.
    pub q: ArrayView4<'a, T>,
    /// `[B, G, M, D]`.
    pub k: ArrayView4<'a, T>,
    /// `[B, G, M, E]`.
    pub v: ArrayView4<'a, T>,
    /// `[B, H, N, E]`, as the forward pass returned it.
    pub o: ArrayView4<'a, T>,
    /// `[B, H, N]`, as the forward pass returned it.
    pub lse: ArrayView3<'a, T::Acc>,
    /// `[B, H, N, E]`: the gradient of `o`.
    pub d_o: ArrayView4<'a, T>,
    /// `[B, H, N]`: the gradient of `lse`. `None`: 0.
    pub d_lse: Option<ArrayView3<'a, T::Acc>>,
}

/// The gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<T: Element> {
    /// `[B, H, N, D]`.
    pub dq: Array4<T>,
    /// `[B, G, M, D]`.
    pub dk: Array4<T>,
    /// `[B, G, M, E]`.
    pub dv: Array4<T>,
    /// `[B, H, N]`: `rowsum(do * o)`, a by-product.
    pub delta: Array3<T::Acc>,
    /// In the shape of the bias; `None` if there is none.
    pub dbias: Option<ArrayD<T>>,
    /// `[H]`; `None` if there are no sinks.
    pub dsinks: Option<Array1<T::Acc>>,
}

/// Where the gradients go; all are overwritten.
#[derive(Debug)]
pub struct GradientsMut<'a, T: Element> {
    /// `[B, H, N, D]`.
    pub dq: ArrayViewMut4<'a, T>,
    /// `[B, G, M, D]`.
    pub dk: ArrayViewMut4<'a, T>,
    /// `[B, G, M, E]`.
    pub dv: ArrayViewMut4<'a, T>,
    /// `[B, H, N]`; `None`: not wanted.
    pub delta: Option<ArrayViewMut3<'a, T::Acc>>,
    /// In the shape of the bias; `None`: not wanted (it costs two matrix products of its own).
    pub dbias: Option<ArrayViewMutD<'a, T>>,
    /// `[H]`; `None`: not wanted.
    pub dsinks: Option<ArrayViewMut1<'a, T::Acc>>,
}

/// [`Inputs`] of a packed batch.
#[derive(Debug, Clone)]
pub struct VarlenInputs<'a, T: Element> {
    /// `[total queries, H, D]`.
    pub q: ArrayView3<'a, T>,
    /// `[total keys, G, D]`.
    pub k: ArrayView3<'a, T>,
    /// `[total keys, G, E]`.
    pub v: ArrayView3<'a, T>,
    /// `[sequences + 1]`, where the queries of each sequence begin.
    pub query_offsets: &'a [usize],
    /// `[sequences + 1]`, where the keys of each sequence begin.
    pub key_offsets: &'a [usize],
    /// `[total queries, H, E]`, as the forward pass returned it.
    pub o: ArrayView3<'a, T>,
    /// `[total queries, H]`, as the forward pass returned it.
    pub lse: ArrayView2<'a, T::Acc>,
    /// `[total queries, H, E]`: the gradient of `o`.
    pub d_o: ArrayView3<'a, T>,
    /// `[total queries, H]`: the gradient of `lse`. `None`: 0.
    pub d_lse: Option<ArrayView2<'a, T::Acc>>,
}

/// [`Gradients`] of a packed batch.
#[derive(Debug, Clone, PartialEq)]
pub struct VarlenGradients<T: Element> {
    /// `[total queries, H, D]`.
    pub dq: Array3<T>,
    /// `[total keys, G, D]`.
    pub dk: Array3<T>,
    /// `[total keys, G, E]`.
    pub dv: Array3<T>,
    /// `[total queries, H]`: `rowsum(do * o)`, a by-product.
    pub delta: Array2<T::Acc>,
    /// In the shape of the bias; `None` if there is none.
    pub dbias: Option<ArrayD<T>>,
    /// `[H]`; `None` if there are no sinks.
    pub dsinks: Option<Array1<T::Acc>>,
}

/// [`GradientsMut`] of a packed batch.
#[derive(Debug)]
pub struct VarlenGradientsMut<'a, T: Element> {
    /// `[total queries, H, D]`.
    pub dq: ArrayViewMut3<'a, T>,
    /// `[total keys, G, D]`.
    pub dk: ArrayViewMut3<'a, T>,
    /// `[total keys, G, E]`.
    pub dv: ArrayViewMut3<'a, T>,
    /// `[total queries, H]`; `None`: not wanted.
    pub delta: Option<ArrayViewMut2<'a, T::Acc>>,
    /// In the shape of the bias; `None`: not wanted (it costs two matrix products of its own).
    pub dbias: Option<ArrayViewMutD<'a, T>>,
    /// `[H]`; `None`: not wanted.
    pub dsinks: Option<ArrayViewMut1<'a, T::Acc>>,
}

/// The gradients of [`attn_flash::attention`] with respect to queries, keys and values, and to the
/// bias and the sinks if there are any, from the gradients of `o` and `lse`.
///
/// `options` must be those of the forward pass: every one of them is differentiated through or
/// masks the same pairs. `P` is recomputed from `lse` tile by tile; no N x M matrix is held.
///
/// At the edges:
/// - A query that saw nothing gets `dq = 0` and adds nothing to the others, exactly.
/// - `N = 0`, `M = 0`, `B = 0` and `H = 0` are fine: gradients that nothing adds to are 0. `D = 0` and `E = 0`
///   are errors.
/// - NaN or infinity has no effect through a pair that is not visible.
/// - No weight in `P` is above 1, however large the scores. A score `s` is off by some roundings of
///   itself, here and in `lse`, and `P` as much relatively: where the largest `|s|` is above `2^14`, by
///   more than a rounding to bf16. In `f32` and `f64` a weight of 1 is exact if the forward pass ran on the
///   same instruction set.
/// - Gradients of heads that share keys add up in `dk` and `dv`, those of axes along which the bias
///   is broadcast in `dbias`. 16-bit types add up in `f32` and are rounded once.
///
/// The same bits come out for any number of threads and for a batch entry alone or among others.
///
/// Source: Dao, FlashAttention-2 (2023), algorithm 2; equations in `docs/derivation.md`.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
///
/// # Examples
/// ```
/// use attn_flash::{Options, attention};
/// use attn_flash_bwd::{Inputs, attention_backward};
/// use ndarray::Array4;
///
/// let q = Array4::<f32>::from_shape_fn((1, 4, 8, 16), |(_, h, n, d)| ((h + n * d) % 7) as f32 * 0.1);
/// let k = Array4::from_shape_fn((1, 2, 8, 16), |(_, g, m, d)| ((g + m + d) % 5) as f32 * 0.1);
/// let v = Array4::from_shape_fn((1, 2, 8, 16), |(_, _, m, _)| m as f32);
/// let options = Options { causal: true, ..Options::default() };
/// let forward = attention(q.view(), k.view(), v.view(), &options)?;
///
/// let d_o = Array4::ones(forward.o.dim());
/// let inputs = Inputs {
///     q: q.view(),
///     k: k.view(),
///     v: v.view(),
///     o: forward.o.view(),
///     lse: forward.lse.view(),
///     d_o: d_o.view(),
///     d_lse: None,
/// };
/// let gradients = attention_backward(&inputs, &options)?;
/// // The weights of each of the 4 x 8 queries sum to 1, and go into dv for each of 16 columns.
/// assert!((gradients.dv.sum() - 512.0).abs() < 1e-3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn attention_backward<T: Element, M: Mask>(
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Gradients<T>, Error> {
    let sizes = inputs.check()?;
    let mut workspace = Workspace::new(inputs, &Tiling::default())?;
    let mut dq = try_array("dq", inputs.q.dim())?;
    let mut dk = try_array("dk", inputs.k.dim())?;
    let mut dv = try_array("dv", inputs.v.dim())?;
    let mut delta = try_array("delta", inputs.lse.dim())?;
    let (mut dbias, mut dsinks) = option_gradients(options, sizes)?;
    let gradients = GradientsMut {
        dq: dq.view_mut(),
        dk: dk.view_mut(),
        dv: dv.view_mut(),
        delta: Some(delta.view_mut()),
        dbias: dbias.as_mut().map(|dbias| dbias.view_mut()),
        dsinks: dsinks.as_mut().map(|dsinks| dsinks.view_mut()),
    };
    attention_backward_into(gradients, inputs, options, &mut workspace)?;
    Ok(Gradients { dq, dk, dv, delta, dbias, dsinks })
}

/// [`attention_backward`] into the caller's arrays, all overwritten. Allocates nothing. (Rayon's
/// queues may, the first time a pool is entered.)
///
/// # Errors
/// As [`attention_backward`]; [`Error::NoInput`] if a gradient is wanted of an option that is not
/// set, [`Error::WorkspaceTooSmall`] if the workspace was made for a smaller call. The gradients are
/// untouched then.
pub fn attention_backward_into<T: Element, M: Mask>(
    gradients: GradientsMut<'_, T>,
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T>,
) -> Result<(), Error> {
    let sizes = inputs.check()?;
    let GradientsMut { dq, dk, dv, delta, dbias, dsinks } = gradients;
    check_shape("dq", dq.shape(), inputs.q.shape())?;
    check_shape("dk", dk.shape(), inputs.k.shape())?;
    check_shape("dv", dv.shape(), inputs.v.shape())?;
    if let Some(delta) = &delta {
        check_shape("delta", delta.shape(), inputs.lse.shape())?;
    }
    let saved = Saved::Dense(inputs);
    let outputs = Outputs::Dense([dq, dk, dv]);
    run(&saved, sizes, inputs.room(), outputs, dbias, dsinks, options, workspace)?;
    if let Some(mut delta) = delta {
        // The workspace holds delta, head by head.
        delta.iter_mut().zip(&workspace.delta).for_each(|(out, &delta)| *out = delta);
    }
    Ok(())
}

/// [`attention_backward`] for sequences of different lengths, packed one after the other, as
/// [`attn_flash::attention_varlen`] takes them. A sequence gets the same bits as in a call of its
/// own.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn attention_varlen_backward<T: Element, M: Mask>(
    inputs: &VarlenInputs<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<VarlenGradients<T>, Error> {
    let sizes = inputs.check()?;
    let mut workspace = Workspace::new_varlen(inputs, &Tiling::default())?;
    let mut dq = try_array("dq", inputs.q.dim())?;
    let mut dk = try_array("dk", inputs.k.dim())?;
    let mut dv = try_array("dv", inputs.v.dim())?;
    let mut delta = try_array("delta", inputs.lse.dim())?;
    let (mut dbias, mut dsinks) = option_gradients(options, sizes)?;
    let gradients = VarlenGradientsMut {
        dq: dq.view_mut(),
        dk: dk.view_mut(),
        dv: dv.view_mut(),
        delta: Some(delta.view_mut()),
        dbias: dbias.as_mut().map(|dbias| dbias.view_mut()),
        dsinks: dsinks.as_mut().map(|dsinks| dsinks.view_mut()),
    };
    attention_varlen_backward_into(gradients, inputs, options, &mut workspace)?;
    Ok(VarlenGradients { dq, dk, dv, delta, dbias, dsinks })
}

/// [`attention_varlen_backward`] into the caller's arrays, all overwritten. Allocates nothing.
///
/// # Errors
/// As [`attention_backward_into`].
pub fn attention_varlen_backward_into<T: Element, M: Mask>(
    gradients: VarlenGradientsMut<'_, T>,
    inputs: &VarlenInputs<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T>,
) -> Result<(), Error> {
    let sizes = inputs.check()?;
    let VarlenGradientsMut { dq, dk, dv, delta, dbias, dsinks } = gradients;
    check_shape("dq", dq.shape(), inputs.q.shape())?;
    check_shape("dk", dk.shape(), inputs.k.shape())?;
    check_shape("dv", dv.shape(), inputs.v.shape())?;
    if let Some(delta) = &delta {
        check_shape("delta", delta.shape(), inputs.lse.shape())?;
    }
    let saved = Saved::Packed(inputs);
    let outputs = Outputs::Packed([dq, dk, dv]);
    run(&saved, sizes, inputs.room(), outputs, dbias, dsinks, options, workspace)?;
    // Without rows there may be very many heads.
    if let Some(mut delta) = delta.filter(|delta| !delta.is_empty()) {
        // The workspace holds delta, head by head of each sequence.
        let mut from = workspace.delta.iter();
        for rows in inputs.query_offsets.windows(2) {
            let mut sequence = delta.slice_axis_mut(Axis(0), (rows[0]..rows[1]).into());
            for head in sequence.axis_iter_mut(Axis(1)) {
                head.into_iter().zip(&mut from).for_each(|(out, &delta)| *out = delta);
            }
        }
    }
    Ok(())
}

/// Room for the gradients of the bias and the sinks of a call, once its options have been checked.
fn option_gradients<T: Element, M: Mask>(
    options: &Options<'_, T, M>,
    sizes: Sizes,
) -> Result<(Option<ArrayD<T>>, Option<Array1<T::Acc>>), Error> {
    Call::new(options, sizes)?;
    let dbias = options.bias.as_ref().map(|bias| try_array("dbias", bias.raw_dim()));
    let dsinks = options.sinks.map(|sinks| try_array("dsinks", sinks.len()));
    Ok((dbias.transpose()?, dsinks.transpose()?))
}

impl<T: Element> Inputs<'_, T> {
    /// Checks the shapes; returns the sizes.
    fn check(&self) -> Result<Sizes, Error> {
        let (b, h, n, d) = self.q.dim();
        let (_, g, m, _) = self.k.dim();
        let e = self.v.dim().3;
        let sizes = Sizes { batch: b, heads: h, key_heads: g, queries: n, keys: m, d, e };
        check_sizes(&sizes, self.q.shape(), self.v.shape())?;
        check_shape("k", self.k.shape(), &[b, g, m, d])?;
        check_shape("v", self.v.shape(), &[b, g, m, e])?;
        check_shape("o", self.o.shape(), &[b, h, n, e])?;
        check_shape("lse", self.lse.shape(), &[b, h, n])?;
        check_shape("d_o", self.d_o.shape(), &[b, h, n, e])?;
        if let Some(d_lse) = &self.d_lse {
            check_shape("d_lse", d_lse.shape(), &[b, h, n])?;
        }
        Ok(sizes)
    }

    /// What a workspace must have room for.
    pub(crate) fn room(&self) -> Room {
        let (b, h, n, d) = self.q.dim();
        Room {
            head_size: d,
            value_size: self.v.dim().3,
            rows: b * h * n,
            gradients: [self.q.len(), self.k.len(), self.v.len()],
        }
    }
}

impl<T: Element> VarlenInputs<'_, T> {
    /// Checks the shapes; returns the sizes, with the lengths of the longest sequence.
    fn check(&self) -> Result<Sizes, Error> {
        let (total, h, d) = self.q.dim();
        let (total_keys, g, _) = self.k.dim();
        let e = self.v.dim().2;
        let queries = longest("query_offsets", self.query_offsets, total)?;
        let keys = longest("key_offsets", self.key_offsets, total_keys)?;
        let offsets = [self.key_offsets.len()];
        check_shape("key_offsets", &offsets, &[self.query_offsets.len()])?;
        let batch = self.query_offsets.len() - 1;
        let sizes = Sizes { batch, heads: h, key_heads: g, queries, keys, d, e };
        check_sizes(&sizes, self.q.shape(), self.v.shape())?;
        check_shape("k", self.k.shape(), &[total_keys, g, d])?;
        check_shape("v", self.v.shape(), &[total_keys, g, e])?;
        check_shape("o", self.o.shape(), &[total, h, e])?;
        check_shape("lse", self.lse.shape(), &[total, h])?;
        check_shape("d_o", self.d_o.shape(), &[total, h, e])?;
        if let Some(d_lse) = &self.d_lse {
            check_shape("d_lse", d_lse.shape(), &[total, h])?;
        }
        Ok(sizes)
    }

    /// What a workspace must have room for.
    pub(crate) fn room(&self) -> Room {
        let (total, h, d) = self.q.dim();
        Room {
            head_size: d,
            value_size: self.v.dim().2,
            rows: total * h,
            gradients: [self.q.len(), self.k.len(), self.v.len()],
        }
    }
}
