//! The forward pass of attention.

use anyhow::{Context, Result, bail, ensure};
use attn_flash::{AncestorMask, Options, Window, attention};
use half::{bf16, f16};
use ndarray::{Array1, Array4, ArrayD, Ix1, IxDyn};
use safetensors::Dtype;
use serde::Deserialize;
use tensor_utils::Element;

use super::inputs::{Inputs, expect_shape};
use super::tensor::{Output, Stored};

#[derive(Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
struct Params {
    causal: bool,
    scale: Option<f64>,
    window: Option<usize>,
    softcap: Option<f64>,
}

/// Computes `o` and `lse` in the type of `in.q`.
pub(super) fn run(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    match inputs.dtype("q")? {
        Dtype::F64 => run_as::<f64>(inputs),
        Dtype::F32 => run_as::<f32>(inputs),
        Dtype::F16 => run_as::<f16>(inputs),
        Dtype::BF16 => run_as::<bf16>(inputs),
        other => bail!("`in.q` is {other:?}, expected F64, F32, F16 or BF16"),
    }
}

fn run_as<T: Element<Acc: Stored> + Stored>(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let case = AttentionCase::<T>::read(inputs)?;
    let result = attention(case.q.view(), case.k.view(), case.v.view(), &case.options())?;
    Ok(vec![Output::new("o", result.o), Output::new("lse", result.lse)])
}

/// The inputs that the forward and the backward pass have in common.
pub(super) struct AttentionCase<T: Element> {
    pub(super) q: Array4<T>,
    pub(super) k: Array4<T>,
    pub(super) v: Array4<T>,
    params: Params,
    window: Window,
    bias: Option<ArrayD<T>>,
    mask: Option<ArrayD<bool>>,
    key_lengths: Option<Vec<usize>>,
    sinks: Option<Vec<T::Acc>>,
    tree: Option<AncestorMask>,
}

impl<T: Element<Acc: Stored> + Stored> AttentionCase<T> {
    pub(super) fn read(inputs: &mut Inputs<'_>) -> Result<Self> {
        let params: Params = inputs.params()?;
        let q: Array4<T> = inputs.array("q")?;
        let k: Array4<T> = inputs.array("k")?;
        let v: Array4<T> = inputs.array("v")?;
        let (batch, heads, queries, _) = q.dim();
        let keys = k.dim().2;
        let pair_shapes: [&[usize]; 2] = [&[queries, keys], &[batch, heads, queries, keys]];

        let bias: Option<ArrayD<T>> = inputs.optional_widened::<T, IxDyn>("bias")?;
        if let Some(bias) = &bias {
            expect_shape("bias", bias, &pair_shapes)?;
        }
        let mask = inputs.optional_booleans("mask")?;
        if let Some(mask) = &mask {
            expect_shape("mask", mask, &pair_shapes)?;
        }
        let key_lengths = inputs.optional::<i64, Ix1>("kv_len")?.map(lengths).transpose()?;
        let sinks = inputs.optional_widened::<T::Acc, Ix1>("sink")?.map(|sinks| sinks.to_vec());
        let tree = match inputs.optional::<i64, Ix1>("tree_parents")? {
            Some(parents) => {
                expect_shape("tree_parents", &parents.clone().into_dyn(), &[&[queries]])?;
                let tree = AncestorMask::from_parents(&parents.to_vec());
                Some(tree.context("`in.tree_parents` is not a tree")?)
            }
            None => None,
        };
        let window = window(&params)?;
        Ok(Self { q, k, v, params, window, bias, mask, key_lengths, sinks, tree })
    }

    pub(super) fn options(&self) -> Options<'_, T> {
        Options {
            scale: self.params.scale,
            causal: self.params.causal,
            window: self.window,
            softcap: self.params.softcap,
            bias: self.bias.as_ref().map(|bias| bias.view()),
            mask: self.mask.as_ref().map(|mask| mask.view()),
            key_lengths: self.key_lengths.as_deref(),
            sinks: self.sinks.as_deref(),
            tree: self.tree.as_ref(),
            ..Options::default()
        }
    }
}

/// A case's window of `w` keys reaches `w - 1` to the left and, unless the mask is causal, to the
/// right.
fn window(params: &Params) -> Result<Window> {
    let Some(width) = params.window else { return Ok(Window::default()) };
    ensure!(width >= 1, "the parameter `window` is 0, expected at least 1");
    let reach = Some(width - 1);
    Ok(Window { left: reach, right: if params.causal { None } else { reach } })
}

fn lengths(lengths: Array1<i64>) -> Result<Vec<usize>> {
    let convert = |length: i64| {
        usize::try_from(length)
            .with_context(|| format!("`in.kv_len` contains {length}, expected at least 0"))
    };
    lengths.into_iter().map(convert).collect()
}
