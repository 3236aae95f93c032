//! Softmax and top-k.

use anyhow::{Context, Result, bail};
use half::{bf16, f16};
use ndarray::{Array, ArrayD, Dimension, IxDyn};
use safetensors::Dtype;
use serde::Deserialize;
use softmax_topk::{Logit, Options, PerRow, rows, softmax_topk};

use super::inputs::Inputs;
use super::tensor::{Output, Stored};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    k: usize,
    #[serde(default = "one")]
    temperature: f64,
    #[serde(default)]
    log: bool,
}

fn one() -> f64 {
    1.0
}

/// Computes all outputs.
pub(super) fn run(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    match inputs.dtype("logits")? {
        Dtype::F64 => run_as::<f64>(inputs),
        Dtype::F32 => run_as::<f32>(inputs),
        Dtype::F16 => run_as::<f16>(inputs),
        Dtype::BF16 => run_as::<bf16>(inputs),
        other => bail!("`in.logits` is {other:?}, expected F64, F32, F16 or BF16"),
    }
}

fn run_as<T>(inputs: &mut Inputs<'_>) -> Result<Vec<Output>>
where
    T: Logit + Stored,
    T::Acc: Stored,
{
    let Params { k, temperature, log } = inputs.params()?;
    let logits: ArrayD<T> = inputs.array("logits")?;
    let options = Options { temperature: PerRow::All(temperature), log, ..Options::default() };
    let top = softmax_topk(rows("in.logits", logits.view())?, k, &options)?;

    let of_rows = &logits.shape()[..logits.ndim() - 1];
    let mut of_results = of_rows.to_vec();
    of_results.push(k);
    Ok(vec![
        Output::new("indices", reshaped(top.indices.mapv(i64::from), &of_results)?),
        Output::new("probs", reshaped(top.probs.mapv(T::from_acc), &of_results)?),
        inputs.statistic::<T, _>("lse", reshaped(top.lse, of_rows)?),
    ])
}

/// The rows of a result with the axes of the input again.
fn reshaped<T, D: Dimension>(array: Array<T, D>, shape: &[usize]) -> Result<ArrayD<T>> {
    let (elements, _) = array.into_raw_vec_and_offset();
    ArrayD::from_shape_vec(IxDyn(shape), elements).context("the result has another size")
}
