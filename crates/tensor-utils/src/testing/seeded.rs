//! Random arrays that are the same on every run.

use std::f64::consts::TAU;
use std::ops::{Range, RangeInclusive};

use ndarray::{Array, ShapeBuilder};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::Element;

/// A source of random arrays: the same seed and the same calls give the same arrays.
///
/// The elements are drawn in f64 in the order of memory and rounded to `T`, so arrays of different
/// types hold the same values up to that rounding.
#[derive(Debug)]
pub struct Seeded {
    rng: ChaCha8Rng,
}

impl Seeded {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Self {
        Self { rng: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Elements of the standard normal distribution (Box and Muller, 1958).
    pub fn normal<T: Element, Sh: ShapeBuilder>(&mut self, shape: Sh) -> Array<T, Sh::Dim> {
        self.array(shape, |rng| {
            // 1 - [0, 1) is never 0, so the logarithm is finite.
            let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
            radius * (TAU * rng.random::<f64>()).cos()
        })
    }

    /// Elements equally likely anywhere in `range`; all `range.start` if it is empty.
    ///
    /// Rounding to a narrow `T` can give `range.end` itself.
    pub fn uniform<T: Element, Sh: ShapeBuilder>(
        &mut self,
        shape: Sh,
        range: Range<f64>,
    ) -> Array<T, Sh::Dim> {
        let width = (range.end - range.start).max(0.0);
        self.array(shape, |rng| range.start + width * rng.random::<f64>())
    }

    /// Whole numbers in `range`; all `*range.start()` if it is empty.
    ///
    /// Small ones make sums and products exact in every type, so that results can be compared bit
    /// by bit whatever the order of the sum.
    pub fn integers<T: Element, Sh: ShapeBuilder>(
        &mut self,
        shape: Sh,
        range: RangeInclusive<i32>,
    ) -> Array<T, Sh::Dim> {
        let range = if range.is_empty() { *range.start()..=*range.start() } else { range };
        self.array(shape, |rng| f64::from(rng.random_range(range.clone())))
    }

    /// The generator itself, for everything that is not an array of floats.
    pub fn rng(&mut self) -> &mut ChaCha8Rng {
        &mut self.rng
    }

    fn array<T: Element, Sh: ShapeBuilder>(
        &mut self,
        shape: Sh,
        mut draw: impl FnMut(&mut ChaCha8Rng) -> f64,
    ) -> Array<T, Sh::Dim> {
        Array::from_shape_simple_fn(shape, || T::from_f64(draw(&mut self.rng)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use ndarray::{Array1, Array3, ArrayD, Axis, IxDyn};

    #[test]
    fn seed_decides_everything() {
        let draw = |seed| Seeded::new(seed).normal::<f32, _>((3, 4, 5));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let mut seeded = Seeded::new(1);
        let first: Array3<f32> = seeded.normal((3, 4, 5));
        assert_eq!(first, draw(1));
        assert_ne!(first, seeded.normal::<f32, _>((3, 4, 5)));
        assert_eq!(first.mapv(|x| bf16::from_f64(x.into())), Seeded::new(1).normal((3, 4, 5)));
    }

    #[test]
    fn normal_has_the_moments_of_the_distribution() {
        let x: Array1<f64> = Seeded::new(3).normal(100_000);
        let moment = |power| x.mapv(|x| x.powi(power)).mean_axis(Axis(0)).unwrap().into_scalar();
        // Within five standard deviations of the mean of 10^5 draws.
        for (power, expected, deviation) in
            [(1, 0.0, 1.0), (2, 1.0, 2.0_f64), (3, 0.0, 15.0), (4, 3.0, 96.0)]
        {
            let error: f64 = moment(power) - expected;
            assert!(error.abs() < 5.0 * (deviation / 1e5).sqrt(), "moment {power} is off {error}");
        }
    }

    #[test]
    fn ranges_are_filled_and_kept() {
        let x: ArrayD<f64> = Seeded::new(4).uniform(IxDyn(&[1000]), -2.0..3.0);
        assert!(x.iter().all(|x| (-2.0..3.0).contains(x)));
        assert!(x.iter().any(|x| *x < -1.9) && x.iter().any(|x| *x > 2.9));
        let x: Array1<f32> = Seeded::new(5).integers(1000, -2..=2);
        for value in [-2.0, -1.0, 0.0, 1.0, 2.0] {
            assert!(x.iter().any(|x| *x == value));
        }
        assert!(x.iter().all(|x| x.fract() == 0.0 && x.abs() <= 2.0));
    }
}
