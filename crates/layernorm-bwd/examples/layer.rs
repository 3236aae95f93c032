//! A layer to copy: layer norm and a linear map, trained by gradient descent on plain arrays.
//!
//! `cargo run --release -p layernorm-bwd --example layer`

use layernorm_bwd::{Error, Options, Saved, layer_norm, layer_norm_backward};
use ndarray::{Array1, Array2, ArrayView2, Axis};

/// Layer norm with its parameters, and what the backward pass needs of the last forward pass.
struct LayerNorm {
    gamma: Array1<f32>,
    beta: Array1<f32>,
    saved: Option<Activations>,
}

struct Activations {
    x: Array2<f32>,
    mean: Array1<f32>,
    rstd: Array1<f32>,
}

/// Gradients of the parameters of a [`LayerNorm`].
struct ParameterGradients {
    gamma: Array1<f32>,
    beta: Array1<f32>,
}

impl LayerNorm {
    fn new(size: usize) -> Self {
        Self { gamma: Array1::ones(size), beta: Array1::zeros(size), saved: None }
    }

    fn options(&self) -> Options<'_, f32> {
        Options {
            gamma: Some(self.gamma.view()),
            beta: Some(self.beta.view()),
            ..Options::default()
        }
    }

    fn forward(&mut self, x: Array2<f32>) -> Result<Array2<f32>, Error> {
        let result = layer_norm(x.view(), &self.options())?;
        self.saved = Some(Activations { x, mean: result.mean, rstd: result.rstd });
        Ok(result.y)
    }

    /// The gradients of the input and the parameters, for that of the output; `None` before a
    /// forward pass.
    fn backward(
        &mut self,
        dy: ArrayView2<'_, f32>,
    ) -> Result<Option<(Array2<f32>, ParameterGradients)>, Error> {
        let Some(Activations { x, mean, rstd }) = self.saved.take() else { return Ok(None) };
        let saved = Saved::Statistics { x: x.view(), mean: mean.view(), rstd: rstd.view() };
        let gradients = layer_norm_backward(dy, saved, &self.options())?;
        let of_parameters = ParameterGradients { gamma: gradients.dgamma, beta: gradients.dbeta };
        Ok(Some((gradients.dx, of_parameters)))
    }

    fn step(&mut self, gradients: &ParameterGradients, rate: f32) {
        self.gamma.scaled_add(-rate, &gradients.gamma);
        self.beta.scaled_add(-rate, &gradients.beta);
    }
}

fn main() -> Result<(), Error> {
    const ROWS: usize = 256;
    const SIZE: usize = 32;
    // Inputs far from 0, which the norm takes care of, and targets that no linear map of them hits.
    let x = Array2::from_shape_fn((ROWS, SIZE), |(i, j)| {
        100.0 + ((i * 7 + j * 13) as f32).sin() * (1.0 + i as f32 / 50.0)
    });
    let target = Array2::from_shape_fn((ROWS, 1), |(i, _)| ((i * 7 + 3) as f32).sin());
    let mut norm = LayerNorm::new(SIZE);
    let mut weights = Array2::<f32>::from_elem((SIZE, 1), 0.01);

    let mut first_loss = None;
    let mut loss = f32::NAN;
    for step in 0..200 {
        let normalised = norm.forward(x.clone())?;
        let error = normalised.dot(&weights) - &target;
        loss = error.mapv(|e| e * e).sum() / ROWS as f32;
        first_loss.get_or_insert(loss);
        if step % 50 == 0 {
            println!("step {step:3}: loss {loss:.6}");
        }
        // Backwards: d loss / d prediction, then through the linear map, then through the norm.
        let d_prediction = error * (2.0 / ROWS as f32);
        let d_weights = normalised.t().dot(&d_prediction);
        let dy = d_prediction.dot(&weights.t());
        if let Some((dx, gradients)) = norm.backward(dy.view())? {
            // A layer in front of the norm would go on from here; its gradient has no mean.
            debug_assert!(dx.sum_axis(Axis(1)).iter().all(|sum| sum.abs() < 1e-4));
            norm.step(&gradients, 0.1);
        }
        weights.scaled_add(-0.1, &d_weights);
    }
    println!("finally:  loss {loss:.6}");
    assert!(first_loss.is_some_and(|first| loss < 0.1 * first), "training did not help");
    Ok(())
}
