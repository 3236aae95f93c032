//! burn, with its backend in Rust for the CPU.

use anyhow::{Context, Result, anyhow};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Tensor, TensorData};
use serde_json::Value;

use crate::{Array, Arrays, Operation, Prepared};

pub(crate) const NAME: &str = "burn 0.22.1 (flex)";

pub(crate) fn prepare(op: &str, options: &Value, inputs: &Arrays) -> Prepared {
    if op != "sdpa" {
        return Ok(Err("it has no such operation of its own for the CPU".to_owned()));
    }
    let [q, k, v] = [tensor(inputs, "q")?, tensor(inputs, "k")?, tensor(inputs, "v")?];
    if q.dims()[1] != k.dims()[1] {
        return Ok(Err("its attention has no grouped heads".to_owned()));
    }
    let is_causal = options["causal"].as_bool().unwrap_or_default();
    let options = AttentionModuleOptions { is_causal, ..Default::default() };
    Ok(Ok(Box::new(Attention { q, k, v, options, o: None })))
}

fn tensor(inputs: &Arrays, name: &str) -> Result<Tensor<4>> {
    let Array { shape, values } = inputs.get(name).context("an input is missing")?;
    Ok(Tensor::from_data(TensorData::new(values.clone(), shape.clone()), &Device::flex()))
}

struct Attention {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: AttentionModuleOptions,
    o: Option<Tensor<4>>,
}

impl Operation for Attention {
    fn run(&mut self) -> Result<()> {
        let Self { q, k, v, options, o } = self;
        *o = Some(attention(q.clone(), k.clone(), v.clone(), None, None, options.clone()));
        Ok(())
    }

    fn outputs(&self) -> Result<Arrays> {
        let o = self.o.as_ref().context("it has not run")?;
        let values = o.to_data().try_to_vec().map_err(|error| anyhow!("{error:?}"))?;
        Ok([("o".to_owned(), Array { shape: o.dims().to_vec(), values })].into())
    }
}
