//! The state of one row's softmax while its scores arrive piece by piece.
//!
//! M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", 2018,
//! [arXiv:1805.02867](https://arxiv.org/abs/1805.02867), algorithm 3 and section 3.1. With `m` the
//! largest score so far and `l` the sum of `e^(score - m)`, a further score `s` gives
//!
//! ```text
//! m' = max(m, s)
//! l' = l e^(m - m') + e^(s - m')
//! ```
//!
//! The factor `e^(m - m')` is at most 1, because the maximum only grows. Everything else that was
//! summed with weights against `m`, such as the output of attention, is multiplied by it too. Two
//! states over different scores merge by the same rule.

use crate::Float;

/// Running maximum and sum of one row of scores.
///
/// | scores so far | `max` | `sum` | [`lse`](Self::lse) |
/// | --- | --- | --- | --- |
/// | none, or all -inf | -inf | 0 | -inf |
/// | finite and -inf | the largest | in `[1, count]` | finite |
/// | one is +inf | +inf | NaN | NaN |
/// | one is NaN | NaN | NaN | NaN |
///
/// The bits of `sum` depend on the order of the scores and on how they were divided into blocks;
/// `max` does not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OnlineSoftmax<A> {
    /// The largest score; -inf before the first.
    pub max: A,
    /// The sum of `e^(score - max)` over all scores.
    pub sum: A,
}

impl<A: Float> OnlineSoftmax<A> {
    /// The state before the first score, neutral under [`merge`](Self::merge).
    pub const IDENTITY: Self = Self { max: A::NEG_INFINITY, sum: A::ZERO };

    /// The state after `scores`.
    pub fn from_scores(scores: &[A]) -> Self {
        let mut state = Self::IDENTITY;
        state.push_block(scores);
        state
    }

    /// Adds one score.
    pub fn push(&mut self, score: A) {
        self.push_block(&[score]);
    }

    /// Adds a block of scores, with one correction for all of them.
    pub fn push_block(&mut self, scores: &[A]) {
        let block_max = scores.iter().copied().fold(A::NEG_INFINITY, A::max_nan);
        self.rescale_to(block_max);
        // While every score is -inf there is no finite maximum to subtract, and -inf - -inf is NaN:
        // such scores weigh nothing.
        if self.max != A::NEG_INFINITY {
            self.sum += scores.iter().map(|&score| (score - self.max).exp()).sum::<A>();
        }
    }

    /// Raises the maximum to `new_max`, unless it is that high already, and multiplies `sum` by the
    /// correction `e^(max - new_max)`, which is returned: in `[0, 1]`, or NaN if either is NaN.
    /// Multiply by it whatever else has been summed with these weights.
    pub fn rescale_to(&mut self, new_max: A) -> A {
        let new_max = self.max.max_nan(new_max);
        let factor = correction(self.max, new_max);
        self.max = new_max;
        self.sum *= factor;
        factor
    }

    /// The state after the scores of both. Commutes to the bit, but for the sign of a `max` of 0, and is
    /// associative up to rounding.
    #[must_use]
    pub fn merge(mut self, mut other: Self) -> Self {
        self.rescale_to(other.max);
        other.rescale_to(self.max);
        self.sum += other.sum;
        self
    }

    /// The logarithm of the sum of `e^score`: -inf before the first finite score.
    pub fn lse(&self) -> A {
        self.max + self.sum.ln()
    }
}

impl<A: Float> Default for OnlineSoftmax<A> {
    fn default() -> Self {
        Self::IDENTITY
    }
}

/// `e^(old - new)` for `old <= new`, 0 instead of a subnormal number.
///
/// Equal maxima, -inf included, need no correction: without this case the first finite score would
/// never come, as -inf - -inf is NaN and NaN stays. An `old` of -inf under a finite `new` gives 0.
fn correction<A: Float>(old: A, new: A) -> A {
    if old == new {
        return A::ONE;
    }
    let factor = (old - new).exp();
    if factor < A::from_f64(A::MIN_POSITIVE) { A::ZERO } else { factor }
}
