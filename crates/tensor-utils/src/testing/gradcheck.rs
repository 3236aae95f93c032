//! Gradients against central finite differences.

use ndarray::{Array, ArrayRef, Dimension, IntoDimension, Zip};
use rand::seq::index;
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use thiserror::Error;

use crate::{ShapeError, check_shape};

/// Checks a gradient in f64 against `(f(x + eps) - f(x - eps)) / (2 eps)`; the defaults are those
/// of `torch.autograd.gradcheck`.
///
/// Each difference costs two calls of the function, so of a large tensor only a random subset of
/// elements is checked one by one (the same on every run), and then all of them at once along a
/// random direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradCheck {
    /// The step; default 1e-6.
    pub eps: f64,
    /// The absolute tolerance; default 1e-5.
    pub atol: f64,
    /// The tolerance relative to the numerical gradient; default 1e-3.
    pub rtol: f64,
    /// The largest number of elements to check one by one; default 200.
    pub max_elements: usize,
    /// The seed of the subset and of the direction; default 0.
    pub seed: u64,
}

impl Default for GradCheck {
    fn default() -> Self {
        Self { eps: 1e-6, atol: 1e-5, rtol: 1e-3, max_elements: 200, seed: 0 }
    }
}

/// What a passed check saw.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct GradStats {
    /// The number of elements checked one by one.
    pub checked: usize,
    /// The largest absolute difference among them.
    pub max_abs: f64,
}

/// A gradient does not agree with finite differences.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum GradError {
    /// The gradient has another shape than the point.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// One element is wrong.
    #[error("gradient at {index:?} is {got:e}, finite differences give {want:e}")]
    Element {
        /// Where; the first found.
        index: Vec<usize>,
        /// The gradient to check.
        got: f64,
        /// The numerical gradient.
        want: f64,
    },
    /// Some element that was not checked alone is wrong.
    #[error("gradient along a random direction is {got:e}, finite differences give {want:e}")]
    Direction {
        /// The gradient to check, times the direction.
        got: f64,
        /// The numerical derivative along the direction.
        want: f64,
    },
}

impl GradCheck {
    /// Checks that `gradient` is that of `function` at `point`.
    ///
    /// # Errors
    /// [`GradError::Element`] or [`GradError::Direction`] if it is not, also if either is NaN;
    /// [`GradError::Shape`] if the shapes differ.
    pub fn check<D: Dimension>(
        &self,
        mut function: impl FnMut(&Array<f64, D>) -> f64,
        point: &ArrayRef<f64, D>,
        gradient: &ArrayRef<f64, D>,
    ) -> Result<GradStats, GradError> {
        check_shape("gradient", gradient.shape(), point.shape())?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut stats = GradStats { checked: 0, max_abs: 0.0 };
        let mut x = point.to_owned();

        let indices: Vec<D> = point.indexed_iter().map(|(i, _)| i.into_dimension()).collect();
        let spot_check = indices.len() > self.max_elements;
        let chosen = if spot_check {
            index::sample(&mut rng, indices.len(), self.max_elements).into_vec()
        } else {
            (0..indices.len()).collect()
        };
        for index in chosen.into_iter().map(|i| indices[i].clone()) {
            let value = x[index.clone()];
            let mut at = |value| {
                x[index.clone()] = value;
                function(&x)
            };
            let want = (at(value + self.eps) - at(value - self.eps)) / (2.0 * self.eps);
            x[index.clone()] = value;
            let got = gradient[index.clone()];
            let difference = (got - want).abs();
            // Not `difference > tolerance`, which NaN would pass.
            let close = difference <= self.atol + self.rtol * want.abs();
            if !close {
                return Err(GradError::Element { index: index.slice().to_vec(), got, want });
            }
            stats.checked += 1;
            stats.max_abs = stats.max_abs.max(difference);
        }
        if spot_check {
            self.check_direction(function, point, gradient, &mut rng)?;
        }
        Ok(stats)
    }

    /// Checks the derivative along a random vector of signs: a wrong element anywhere shows, if its
    /// error is above the tolerance of the whole gradient's norm.
    fn check_direction<D: Dimension>(
        &self,
        mut function: impl FnMut(&Array<f64, D>) -> f64,
        point: &ArrayRef<f64, D>,
        gradient: &ArrayRef<f64, D>,
        rng: &mut ChaCha8Rng,
    ) -> Result<(), GradError> {
        let direction = Array::from_shape_simple_fn(point.raw_dim(), || {
            if rng.random::<bool>() { 1.0 } else { -1.0 }
        });
        let mut at = |eps: f64| {
            let mut x = point.to_owned();
            x.scaled_add(eps, &direction);
            function(&x)
        };
        let want = (at(self.eps) - at(-self.eps)) / (2.0 * self.eps);
        let (got, squares) = Zip::from(gradient).and(&direction).fold(
            (0.0, 0.0_f64),
            |(product, squares), &gradient, &direction| {
                (product + gradient * direction, squares + gradient * gradient)
            },
        );
        let close = (got - want).abs() <= self.atol + self.rtol * squares.sqrt();
        if close { Ok(()) } else { Err(GradError::Direction { got, want }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Seeded;
    use ndarray::{Array1, Array2};

    fn cubes(x: &Array2<f64>) -> f64 {
        x.iter().enumerate().map(|(i, x)| i as f64 * x * x * x).sum()
    }

    fn gradient_of_cubes(x: &Array2<f64>) -> Array2<f64> {
        let mut gradient = x.clone();
        for (i, g) in gradient.iter_mut().enumerate() {
            *g = 3.0 * i as f64 * *g * *g;
        }
        gradient
    }

    #[test]
    fn true_gradient_passes_and_any_wrong_element_fails() {
        let x = Seeded::new(1).normal((3, 4));
        let gradient = gradient_of_cubes(&x);
        let stats = GradCheck::default().check(cubes, &x, &gradient).unwrap();
        assert_eq!(stats.checked, 12);
        assert!(stats.max_abs < 1e-6);
        for index in [[0, 0], [1, 2], [2, 3]] {
            for wrong in [2e-3, f64::NAN] {
                let mut gradient = gradient.clone();
                gradient[index] += wrong * (1.0 + gradient[index]);
                let error = GradCheck::default().check(cubes, &x, &gradient).unwrap_err();
                assert!(matches!(error, GradError::Element { index: i, .. } if i == index));
            }
        }
    }

    #[test]
    fn large_tensor_is_checked_in_part_and_as_a_whole() {
        let x: Array2<f64> = Seeded::new(2).normal((100, 50));
        let point = x.clone();
        let mut calls = 0;
        let counted = |x: &Array2<f64>| {
            calls += 1;
            // One element at a time, and all of them along the direction.
            let moved = x.iter().zip(&point).filter(|(x, point)| x != point).count();
            assert!(moved == 1 || (moved == 5000 && calls > 400));
            x.mapv(|x| x.sin()).sum()
        };
        let gradient = x.mapv(f64::cos);
        let stats = GradCheck::default().check(counted, &x, &gradient).unwrap();
        assert_eq!((stats.checked, calls), (200, 2 * 200 + 2));

        // A wrong element that the subset misses shows along the direction.
        let sines = |x: &Array2<f64>| x.mapv(|x| x.sin()).sum();
        let check = GradCheck { max_elements: 5, ..GradCheck::default() };
        for index in [[0, 0], [50, 25], [99, 49]] {
            let mut gradient = gradient.clone();
            gradient[index] += 0.5;
            assert!(check.check(sines, &x, &gradient).is_err());
        }
    }

    #[test]
    fn nan_in_the_function_fails() {
        let x = Array1::zeros(3);
        let nan = |_: &Array1<f64>| f64::NAN;
        assert!(GradCheck::default().check(nan, &x, &Array1::zeros(3)).is_err());
        assert!(GradCheck::default().check(|_| 0.0, &x, &Array1::zeros(4)).is_err());
    }
}
