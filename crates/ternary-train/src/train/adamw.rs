//! AdamW (Loshchilov and Hutter, Decoupled weight decay regularization, 2019, algorithm 2), and the
//! norm that gradients are clipped by.

use rayon::prelude::*;
use tensor_utils::simd::{Simd, SimdFloat};
use tensor_utils::{Isa, Kernel, dispatch, map_chunks_ordered};

use crate::Error;
use crate::ops::for_vectors;

/// Weights of one task.
const CHUNK: usize = 1 << 14;

/// Factors of one update.
#[derive(Debug, Clone, Copy)]
pub(super) struct Update {
    pub(super) learning_rate: f64,
    pub(super) weight_decay: f64,
    pub(super) beta1: f64,
    pub(super) beta2: f64,
    pub(super) epsilon: f64,
    /// What the gradients are multiplied with first.
    pub(super) scale: f64,
    /// The step, from 1.
    pub(super) step: usize,
}

/// Factors in the type of the weights.
#[derive(Clone, Copy)]
struct Factors {
    keep: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    epsilon: f32,
    scale: f32,
    rate: f32,
    root: f32,
}

/// Moves weights against their gradients, and the moments towards them.
pub(super) fn adamw(
    weights: &mut [f32],
    mean: &mut [f32],
    square: &mut [f32],
    gradients: &[f32],
    update: &Update,
) -> Result<(), Error> {
    let isa = Isa::active()?;
    let power = |beta: f64| 1.0 - beta.powf(update.step as f64);
    let factors = Factors {
        keep: (1.0 - update.learning_rate * update.weight_decay) as f32,
        beta1: update.beta1 as f32,
        rest1: (1.0 - update.beta1) as f32,
        beta2: update.beta2 as f32,
        rest2: (1.0 - update.beta2) as f32,
        epsilon: update.epsilon as f32,
        scale: update.scale as f32,
        rate: (-update.learning_rate / power(update.beta1)) as f32,
        root: (1.0 / power(update.beta2).sqrt()) as f32,
    };
    let states = weights
        .par_chunks_mut(CHUNK)
        .zip(mean.par_chunks_mut(CHUNK))
        .zip(square.par_chunks_mut(CHUNK))
        .zip(gradients.par_chunks(CHUNK));
    states.try_for_each(|(((weights, mean), square), gradients)| {
        Ok(dispatch(isa, Chunk { weights, mean, square, gradients, factors })?)
    })
}

struct Chunk<'a> {
    weights: &'a mut [f32],
    mean: &'a mut [f32],
    square: &'a mut [f32],
    gradients: &'a [f32],
    factors: Factors,
}

impl Kernel for Chunk<'_> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        let f = self.factors;
        simd.vectorize(
            #[inline(always)]
            || {
                for_vectors::<S, f32, 1, 3>(
                    simd,
                    [self.gradients],
                    [self.weights, self.mean, self.square],
                    #[inline(always)]
                    |[gradient], [weight, mean, square]| {
                        let gradient = gradient * f.scale;
                        let mean = mean * f.beta1 + gradient * f.rest1;
                        let square = square * f.beta2 + gradient * gradient * f.rest2;
                        let step = mean * f.rate / (square.sqrt() * f.root + f.epsilon);
                        [weight * f.keep + step, mean, square]
                    },
                );
            },
        );
    }
}

/// The square root of the sum of squares, in `f64` and in a fixed order.
pub(super) fn norm(gradients: &[f32]) -> f64 {
    let sum = |range: std::ops::Range<usize>| {
        let mut parts = [0.0_f64; 16];
        let (chunks, rest) = gradients[range].as_chunks::<16>();
        for chunk in chunks {
            for (part, &x) in parts.iter_mut().zip(chunk) {
                *part += f64::from(x) * f64::from(x);
            }
        }
        parts.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
    };
    map_chunks_ordered(gradients.len(), CHUNK, sum, |left, right| left + right)
        .unwrap_or(0.0)
        .sqrt()
}

#[cfg(test)]
mod tests {
    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    /// Three steps against algorithm 2 in `f64`: moments corrected for their start at 0, decay apart from the
    /// gradient.
    #[test]
    fn steps_are_those_of_the_paper() {
        let rng = &mut ChaCha8Rng::seed_from_u64(3);
        let mut random = || (0..37).map(|_| rng.random_range(-1.0..1.0)).collect::<Vec<f32>>();
        let mut weights = random();
        let (mut mean, mut square) = (vec![0.0; 37], vec![0.0; 37]);
        let mut want: Vec<_> = weights.iter().map(|&w| (f64::from(w), 0.0, 0.0)).collect();
        let (beta1, beta2) = (0.9_f64, 0.95_f64);
        for step in 1..=3 {
            let gradients = random();
            let update = Update {
                learning_rate: 0.1,
                weight_decay: 0.5,
                beta1,
                beta2,
                epsilon: 1e-8,
                scale: 0.25,
                step,
            };
            adamw(&mut weights, &mut mean, &mut square, &gradients, &update).unwrap();
            for ((weight, mean, square), &gradient) in want.iter_mut().zip(&gradients) {
                let gradient = 0.25 * f64::from(gradient);
                *mean = beta1 * *mean + (1.0 - beta1) * gradient;
                *square = beta2 * *square + (1.0 - beta2) * gradient * gradient;
                let corrected = *mean / (1.0 - beta1.powi(step as i32));
                let root = (*square / (1.0 - beta2.powi(step as i32))).sqrt();
                *weight -= 0.1 * (corrected / (root + 1e-8) + 0.5 * *weight);
            }
            for (&got, want) in weights.iter().zip(&want) {
                assert!((f64::from(got) - want.0).abs() < 1e-6, "step {step}: {got} {}", want.0);
            }
        }
    }
}
