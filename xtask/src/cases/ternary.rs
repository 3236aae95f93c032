//! Ternary projection, and packed products.

use anyhow::Result;
use ndarray::Array2;
use serde::Deserialize;
use ternary_train::{Activations, PackedMatrix, Projection, Ternary, Tiling};

use super::inputs::Inputs;
use super::tensor::Output;

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Params {
    group: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { group: Projection::default().group }
    }
}

/// Codes and scales of `in.w` by the absmean rule.
pub(super) fn quantize(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let params: Params = inputs.params()?;
    let w: Array2<f32> = inputs.array("w")?;
    let ternary = Projection { group: params.group, ..Projection::default() }.project(&w)?;
    Ok(vec![Output::new("codes", ternary.codes), Output::new("scales", ternary.scales)])
}

/// The product of `in.x` with a packed matrix.
pub(super) fn matmul(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let params: Params = inputs.params()?;
    let (codes, scales) = (inputs.array("codes")?, inputs.array("scales")?);
    let packed = PackedMatrix::new(&Ternary { codes, scales, group: params.group })?;
    let x: Array2<f32> = inputs.array("x")?;
    let y = packed.product(&Activations::new(&x, params.group)?, &Tiling::default())?;
    Ok(vec![Output::new("y", y)])
}
