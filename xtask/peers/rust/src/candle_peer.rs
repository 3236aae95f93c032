//! candle: its attention for the CPU, and the gradients of its norms by its autograd.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor, Var};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::ops::{layer_norm_slow, rms_norm_slow};
use serde_json::Value;

use crate::{Array, Arrays, Operation, Prepared};

pub(crate) const NAME: &str = "candle 0.11.1";

pub(crate) fn prepare(op: &str, options: &Value, inputs: &Arrays) -> Prepared {
    let eps = options["eps"].as_f64().unwrap_or_default() as f32;
    Ok(Ok(match op {
        "sdpa" => Box::new(Attention::new(options, inputs)?),
        "layer_norm_backward" => Box::new(NormBackward::new(inputs, |x, gamma, beta| {
            Ok(layer_norm_slow(x, gamma, beta, eps)?)
        })?),
        "rms_norm_backward" => {
            Box::new(NormBackward::new(inputs, |x, gamma, _| Ok(rms_norm_slow(x, gamma, eps)?))?)
        }
        _ => return Ok(Err("it has no such operation for the CPU".to_owned())),
    }))
}

fn tensor(inputs: &Arrays, name: &str) -> Result<Tensor> {
    let Array { shape, values } = inputs.get(name).context("an input is missing")?;
    Ok(Tensor::from_slice(values, shape.as_slice(), &Device::Cpu)?)
}

fn array(tensor: &Tensor) -> Result<Array> {
    Ok(Array { shape: tensor.dims().to_vec(), values: tensor.flatten_all()?.to_vec1()? })
}

struct Attention {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f32,
    mask: AttnMask,
    o: Option<Tensor>,
}

impl Attention {
    fn new(options: &Value, inputs: &Arrays) -> Result<Self> {
        // It wants [batch, length, heads, head size].
        let turned = |name| -> Result<_> { Ok(tensor(inputs, name)?.transpose(1, 2)?.contiguous()?) };
        let [q, k, v] = [turned("q")?, turned("k")?, turned("v")?];
        let scale = 1.0 / (q.dim(3)? as f32).sqrt();
        let causal = options["causal"].as_bool().unwrap_or_default();
        let mask = if causal { AttnMask::causal() } else { AttnMask::None };
        Ok(Self { q, k, v, scale, mask, o: None })
    }
}

impl Operation for Attention {
    fn run(&mut self) -> Result<()> {
        let Self { q, k, v, scale, mask, o } = self;
        *o = Some(flash_attn::<f32>(q, k, v, *scale, mask.clone(), None, None)?);
        Ok(())
    }

    fn outputs(&self) -> Result<Arrays> {
        let o = array(self.o.as_ref().context("it has not run")?)?;
        Ok([("o".to_owned(), o)].into())
    }
}

/// The backward pass alone: the forward pass runs once. The fused norms have no gradient.
struct NormBackward {
    x: Var,
    gamma: Var,
    beta: Var,
    /// The sum of `y * dy`, whose gradient is that of the norm.
    product: Tensor,
    gradients: Vec<(&'static str, Tensor)>,
}

impl NormBackward {
    fn new(
        inputs: &Arrays,
        norm: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let x = Var::from_tensor(&tensor(inputs, "x")?)?;
        let gamma = Var::from_tensor(&tensor(inputs, "gamma")?)?;
        let beta = Var::from_tensor(&gamma.zeros_like()?)?;
        let y = norm(&x, &gamma, &beta)?;
        let product = (y * tensor(inputs, "dy")?)?.sum_all()?;
        Ok(Self { x, gamma, beta, product, gradients: Vec::new() })
    }
}

impl Operation for NormBackward {
    fn run(&mut self) -> Result<()> {
        let store = self.product.backward()?;
        let variables = [("dx", &self.x), ("dgamma", &self.gamma), ("dbeta", &self.beta)];
        self.gradients = variables
            .into_iter()
            .filter_map(|(name, variable)| Some((name, store.get(variable)?.clone())))
            .collect();
        Ok(())
    }

    fn outputs(&self) -> Result<Arrays> {
        self.gradients.iter().map(|(name, tensor)| Ok(((*name).to_owned(), array(tensor)?))).collect()
    }
}
