//! Layer norm and RMS norm, forward and backward.

use anyhow::{Result, bail};
use half::{bf16, f16};
use layernorm_bwd::{Kind, Options, Saved, layer_norm, layer_norm_backward, rows};
use ndarray::{Array1, ArrayD};
use safetensors::Dtype;
use serde::Deserialize;
use tensor_utils::Element;

use super::inputs::{Inputs, expect_rows, expect_shape};
use super::tensor::{Output, Stored, reshaped};

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Params {
    eps: f64,
    kind: KindName,
}

impl Default for Params {
    fn default() -> Self {
        Self { eps: Options::<f32>::default().eps, kind: KindName::default() }
    }
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum KindName {
    #[default]
    LayerNorm,
    RmsNorm,
}

/// Computes all outputs; gamma, beta and their gradients may have the compute type of `in.x`.
pub(super) fn run(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let (x, gamma) = (inputs.dtype("x")?, inputs.dtype("gamma")?);
    match (x, gamma) {
        (Dtype::F64, _) => run_as::<f64, f64>(inputs),
        (Dtype::F32, _) => run_as::<f32, f32>(inputs),
        (Dtype::F16, Dtype::F32) => run_as::<f16, f32>(inputs),
        (Dtype::F16, _) => run_as::<f16, f16>(inputs),
        (Dtype::BF16, Dtype::F32) => run_as::<bf16, f32>(inputs),
        (Dtype::BF16, _) => run_as::<bf16, bf16>(inputs),
        (other, _) => bail!("`in.x` is {other:?}, expected F64, F32, F16 or BF16"),
    }
}

fn run_as<T, W>(inputs: &mut Inputs<'_>) -> Result<Vec<Output>>
where
    T: Element<Acc: Stored> + Stored,
    W: Element<Acc = T::Acc> + Stored,
{
    let params: Params = inputs.params()?;
    let x: ArrayD<T> = inputs.array("x")?;
    expect_rows("x", &x)?;
    let dy: ArrayD<T> = inputs.array("dy")?;
    expect_shape("dy", &dy, &[x.shape()])?;
    let gamma: Array1<W> = inputs.array("gamma")?;
    let (kind, beta): (_, Option<Array1<W>>) = match params.kind {
        KindName::LayerNorm => (Kind::LayerNorm, Some(inputs.array("beta")?)),
        KindName::RmsNorm => (Kind::RmsNorm, None),
    };
    let options = Options {
        kind,
        eps: params.eps,
        gamma: Some(gamma.view()),
        beta: beta.as_ref().map(|beta| beta.view()),
        ..Options::default()
    };

    let (x_rows, dy_rows) = (rows("in.x", x.view())?, rows("in.dy", dy.view())?);
    let forward = layer_norm(x_rows, &options)?;
    let (mean, rstd) = (forward.mean.view(), forward.rstd.view());
    let saved = Saved::Statistics { x: x_rows, mean, rstd };
    let backward = layer_norm_backward(dy_rows, saved, &options)?;

    let of_rows = &x.shape()[..x.ndim() - 1];
    let mut outputs = vec![
        Output::new("y", reshaped(forward.y, x.shape())?),
        Output::new("dx", reshaped(backward.dx, x.shape())?),
        Output::new("dgamma", backward.dgamma),
        Output::new("rstd", reshaped(forward.rstd, of_rows)?),
    ];
    if kind == Kind::LayerNorm {
        outputs.push(Output::new("dbeta", backward.dbeta));
        outputs.push(Output::new("mean", reshaped(forward.mean, of_rows)?));
    }
    Ok(outputs)
}
