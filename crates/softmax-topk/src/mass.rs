//! Maximum and sum of exponentials of a row, from those of its segments.

use tensor_utils::Float;

/// The largest score and the sum of `e^((score - max) / temperature)`.
///
/// Without a score above -inf: -inf and 0. With scores of +inf: +inf and their number. The sum is NaN
/// if a score is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Mass<A> {
    pub(crate) max: A,
    pub(crate) sum: f64,
}

impl<A: Float> Mass<A> {
    /// Of no scores.
    pub(crate) const NONE: Self = Self { max: A::NEG_INFINITY, sum: 0.0 };

    /// Of the scores of both (eq. 4).
    pub(crate) fn merge(self, other: Self, temperature: f64) -> Self {
        let max = if other.max > self.max { other.max } else { self.max };
        let sum = self.sum_against(max, temperature) + other.sum_against(max, temperature);
        Self { max, sum }
    }

    fn sum_against(self, max: A, temperature: f64) -> f64 {
        if self.max == max {
            self.sum
        } else {
            self.sum * ((self.max.to_f64() - max.to_f64()) / temperature).exp()
        }
    }

    /// The logarithm of the sum of `e^(score / temperature)`.
    pub(crate) fn lse(self, temperature: f64) -> A {
        if self.max == A::NEG_INFINITY && !self.sum.is_nan() {
            return self.max;
        }
        A::from_f64(self.max.to_f64() / temperature + self.sum.ln())
    }

    /// The logarithm of a score's share.
    pub(crate) fn logprob(self, score: A, temperature: f64) -> f64 {
        if self.sum.is_nan() {
            f64::NAN
        } else if score == A::NEG_INFINITY {
            f64::NEG_INFINITY
        } else if score == self.max {
            // Of a certain token 0, not -0.
            0.0 - self.sum.ln()
        } else {
            (score.to_f64() - self.max.to_f64()) / temperature - self.sum.ln()
        }
    }
}
