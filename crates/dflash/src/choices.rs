//! Where random decisions come from: a generator, or every way they can fall.

use rand::{Rng, RngExt};

/// A source of decisions.
///
/// The rules of acceptance and the drawing of trees take all their randomness from here. With
/// [`Random`] they sample; with [`exact::Branch`](crate::exact::Branch) the very same code is walked
/// through every outcome, with its probability.
pub trait Choices {
    /// `true` with probability `p`; always for `p >= 1`, never for `p <= 0`.
    fn accept(&mut self, p: f64) -> bool;

    /// An index, each as likely as its weight says. The weights are not negative; 0 if all of them are,
    /// or if there is none.
    fn pick(&mut self, weights: &[f64]) -> usize;
}

/// Decisions by a random number generator: one uniform number each.
#[derive(Debug, Clone)]
pub struct Random<R>(pub R);

impl<R: Rng> Choices for Random<R> {
    fn accept(&mut self, p: f64) -> bool {
        self.0.random::<f64>() < p
    }

    fn pick(&mut self, weights: &[f64]) -> usize {
        let sum: f64 = weights.iter().sum();
        let target = sum * self.0.random::<f64>();
        let mut cumulative = 0.0;
        let mut last = 0;
        for (index, &weight) in weights.iter().enumerate() {
            if weight > 0.0 {
                cumulative += weight;
                last = index;
                if target < cumulative {
                    break;
                }
            }
        }
        // Rounding can leave the target at the sum itself: the last possible index has that.
        last
    }
}
