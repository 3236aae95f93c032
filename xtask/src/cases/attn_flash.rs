//! The forward pass of attention.

use anyhow::{Context, Result, bail, ensure};
use attn_flash::{AncestorMask, Options, Window, attention};
use half::{bf16, f16};
use ndarray::{Array4, ArrayD, IxDyn};
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
    Ok(vec![Output::new("o", result.o), inputs.statistic::<T, _>("lse", result.lse)])
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
        let key_lengths = match inputs.optional::<i64, IxDyn>("kv_len")? {
            Some(lengths) => {
                expect_shape("kv_len", &lengths, &[&[batch]])?;
                let lengths = lengths.iter().map(|&length| key_length(length, keys));
                Some(lengths.collect::<Result<_>>()?)
            }
            None => None,
        };
        let sinks = inputs.optional_widened::<T::Acc, IxDyn>("sink")?;
        if let Some(sinks) = &sinks {
            expect_shape("sink", sinks, &[&[heads]])?;
        }
        let sinks = sinks.map(|sinks| sinks.iter().copied().collect());
        let tree = match inputs.optional::<i64, IxDyn>("tree_parents")? {
            Some(parents) => {
                expect_shape("tree_parents", &parents, &[&[queries]])?;
                let parents: Vec<_> = parents.iter().copied().collect();
                let tree = AncestorMask::from_parents(&parents);
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

fn key_length(length: i64, keys: usize) -> Result<usize> {
    let length_in_range = usize::try_from(length).ok().filter(|&length| length <= keys);
    length_in_range.with_context(|| format!("`in.kv_len` contains {length}, expected 0 to {keys}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use safetensors::tensor::TensorView;
    use safetensors::{Dtype, serialize};

    use super::super::run_bytes;

    /// The error of a call with one query and two keys of size 1, whose tensor `name` has the shape `shape`
    /// and only zeros.
    fn error(kernel: &str, name: &str, dtype: Dtype, shape: &[usize]) -> String {
        let zeros = vec![0; 8 * shape.iter().product::<usize>().max(2)];
        let tensor = |dtype: Dtype, shape: &[usize]| {
            let bytes = dtype.bitsize() / 8 * shape.iter().product::<usize>();
            TensorView::new(dtype, shape.to_vec(), &zeros[..bytes]).unwrap()
        };
        let metadata = [
            ("format", "kernel-case/1"),
            ("kernel", kernel),
            ("params", "{}"),
            ("atol", "0"),
            ("rtol", "0"),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let tensors = [
            ("in.q", tensor(Dtype::F32, &[1, 1, 1, 1])),
            ("in.k", tensor(Dtype::F32, &[1, 1, 2, 1])),
            ("in.v", tensor(Dtype::F32, &[1, 1, 2, 1])),
            ("out.o", tensor(Dtype::F32, &[1, 1, 1, 1])),
            (name, tensor(dtype, shape)),
        ];
        let bytes = serialize(tensors, Some(metadata)).unwrap();
        run_bytes(&bytes, Path::new(".")).err().map_or_else(String::new, |error| error.to_string())
    }

    #[test]
    fn wrong_shapes_are_named_as_in_the_file() {
        for kernel in ["attn-flash", "attn-flash-bwd"] {
            let kv_len = error(kernel, "in.kv_len", Dtype::I64, &[2]);
            assert_eq!(kv_len, "`in.kv_len` has shape [2], expected [1]");
            let sink = error(kernel, "in.sink", Dtype::F32, &[1, 1]);
            assert_eq!(sink, "`in.sink` has shape [1, 1], expected [1]");
        }
        let d_o = error("attn-flash-bwd", "in.do", Dtype::F32, &[1, 1, 2, 1]);
        assert_eq!(d_o, "`in.do` has shape [1, 1, 2, 1], expected [1, 1, 1, 1]");
    }
}
