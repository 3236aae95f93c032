//! Softmax and top-k.

use anyhow::{Result, bail, ensure};
use half::{bf16, f16};
use ndarray::ArrayD;
use safetensors::Dtype;
use serde::Deserialize;
use softmax_topk::{Logit, Options, PerRow, rows, softmax_topk};

use super::inputs::{Inputs, expect_rows};
use super::tensor::{Output, Stored, reshaped};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    // Signed, so that the message for a negative one is that for 0.
    k: i64,
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
    ensure!(k > 0, "the parameter `k` is {k}, expected at least 1");
    let k = usize::try_from(k)?;
    let logits: ArrayD<T> = inputs.array("logits")?;
    expect_rows("logits", &logits)?;
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
