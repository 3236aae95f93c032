//! A one-layer training loop: queries, keys and values are the parameters, and gradient descent
//! moves them until attention gives a target.
//!
//! Run with `cargo run --release -p attn-flash-bwd --example training_step`.

use std::error::Error;

use attn_flash::{Options, attention};
use attn_flash_bwd::{Gradients, Inputs, attention_backward};
use ndarray::Array4;

/// `[batch, heads, length, head size]`; the queries of 4 heads share the keys of 2.
const QUERIES: (usize, usize, usize, usize) = (1, 4, 96, 32);
const KEYS: (usize, usize, usize, usize) = (1, 2, 96, 32);
/// Large, since the loss is an average over 384 rows.
const RATE: f32 = 30.0;

struct Layer {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
}

impl Layer {
    /// One step of gradient descent on `sum((o - target)^2) / 2`, averaged over the rows; returns
    /// the loss before it.
    fn train(&mut self, target: &Array4<f32>) -> Result<f32, Box<dyn Error>> {
        let options = Options { causal: true, ..Options::default() };
        let rows = (target.len() / target.dim().3) as f32;

        // Forward: o and lse are all that has to be kept.
        let forward = attention(self.q.view(), self.k.view(), self.v.view(), &options)?;

        // The loss and its gradient with respect to the output.
        let error = &forward.o - target;
        let loss = error.mapv(|x| x * x).sum() / (2.0 * rows);
        let d_o = error / rows;

        // Backward: the same options as in the forward pass.
        let inputs = Inputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            o: forward.o.view(),
            lse: forward.lse.view(),
            d_o: d_o.view(),
            d_lse: None,
        };
        let Gradients { dq, dk, dv, .. } = attention_backward(&inputs, &options)?;

        // The step.
        self.q.scaled_add(-RATE, &dq);
        self.k.scaled_add(-RATE, &dk);
        self.v.scaled_add(-RATE, &dv);
        Ok(loss)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    // The target is what another layer gives, so that a loss of 0 exists.
    let teacher = Layer { q: wave(QUERIES, 0.71), k: wave(KEYS, 0.23), v: wave(KEYS, 0.47) };
    let options = Options { causal: true, ..Options::default() };
    let target = attention(teacher.q.view(), teacher.k.view(), teacher.v.view(), &options)?.o;

    let mut layer = Layer { q: wave(QUERIES, 0.37), k: wave(KEYS, 0.11), v: wave(KEYS, 0.05) };
    let mut losses = Vec::new();
    for step in 0..=200 {
        let loss = layer.train(&target)?;
        if step % 20 == 0 {
            println!("step {step:3}: loss {loss:.5}");
        }
        losses.push(loss);
    }
    assert!(losses[200] < losses[0] / 10.0, "the loss does not go down");
    Ok(())
}

/// Numbers to begin with.
fn wave(shape: (usize, usize, usize, usize), step: f32) -> Array4<f32> {
    let mut phase = 0.0;
    Array4::from_shape_simple_fn(shape, || {
        phase = (phase + step) % 7.1;
        f32::sin(phase * phase)
    })
}
