//! The backward pass of attention, after the forward pass that it needs.

use anyhow::{Result, bail};
use attn_flash::attention;
use attn_flash_bwd::{Inputs as Saved, attention_backward};
use half::{bf16, f16};
use ndarray::{Array4, ArrayD};
use safetensors::Dtype;
use tensor_utils::Element;

use super::attn_flash::AttentionCase;
use super::inputs::{Inputs, expect_shape};
use super::tensor::{Output, Stored};

/// Computes the gradients in the type of `in.q`, and `o` and `lse` of the forward pass.
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
    let d_o: ArrayD<T> = inputs.array("do")?;
    let (batch, heads, queries, _) = case.q.dim();
    expect_shape("do", &d_o, &[&[batch, heads, queries, case.v.dim().3]])?;
    let d_o: Array4<T> = d_o.into_dimensionality()?;
    let options = case.options();
    let forward = attention(case.q.view(), case.k.view(), case.v.view(), &options)?;
    let saved = Saved {
        q: case.q.view(),
        k: case.k.view(),
        v: case.v.view(),
        o: forward.o.view(),
        lse: forward.lse.view(),
        d_o: d_o.view(),
        d_lse: None,
    };
    let gradients = attention_backward(&saved, &options)?;
    let mut outputs = vec![
        Output::new("dq", gradients.dq),
        Output::new("dk", gradients.dk),
        Output::new("dv", gradients.dv),
        Output::new("delta", gradients.delta),
        Output::new("o", forward.o),
        inputs.statistic::<T, _>("lse", forward.lse),
    ];
    outputs.extend(gradients.dbias.map(|dbias| Output::new("dbias", dbias)));
    outputs.extend(gradients.dsinks.map(|dsinks| Output::new("dsink", dsinks)));
    Ok(outputs)
}
