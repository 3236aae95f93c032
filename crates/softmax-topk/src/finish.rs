//! From the best scores of a row to its results: probabilities, cuts, given tokens.

use ndarray::{ArrayView1, ArrayViewMut1, Axis};
use tensor_utils::Float;

use crate::TokenScoresMut;
use crate::call::RowOptions;
use crate::mass::Mass;
use crate::score::Score;

/// The results of one row, to write.
#[derive(Debug)]
pub(crate) struct RowMut<'a, A> {
    pub(crate) indices: ArrayViewMut1<'a, u32>,
    pub(crate) probs: ArrayViewMut1<'a, A>,
    pub(crate) lse: &'a mut A,
    pub(crate) kept: &'a mut u32,
}

/// Writes the results of the sorted `keys`.
pub(crate) fn write<A: Score>(
    keys: &[A::Key],
    mass: Mass<A>,
    options: RowOptions,
    to: RowMut<'_, A>,
) {
    let RowOptions { log, renormalise, .. } = options;
    let shares = Shares::new(mass, options.temperature);
    let (kept, kept_sum) = cut(keys, shares, options);
    let (divisor, subtrahend) =
        if renormalise && kept > 0 { (kept_sum, kept_sum.ln()) } else { (1.0, 0.0) };
    let reciprocal = 1.0 / divisor;
    let (kept_keys, cut_keys) = keys.split_at(kept);
    let mut places = to.indices.into_iter().zip(to.probs);
    for (&key, (index, prob)) in kept_keys.iter().zip(&mut places) {
        let score = A::of_key(key);
        *index = A::token(key);
        *prob = if log {
            A::from_f64(shares.logprob(score) - subtrahend)
        } else {
            flushed(shares.prob(score) * reciprocal)
        };
    }
    let nothing = match (mass.sum.is_nan(), log) {
        (true, _) => f64::NAN,
        (false, true) => f64::NEG_INFINITY,
        (false, false) => 0.0,
    };
    for (&key, (index, prob)) in cut_keys.iter().zip(places) {
        *index = A::token(key);
        *prob = A::from_f64(nothing);
    }
    *to.lse = mass.lse(options.temperature);
    *to.kept = kept as u32;
}

/// How many of the sorted keys the cuts keep, and the sum of their probabilities.
fn cut<A: Score>(keys: &[A::Key], shares: Shares<A>, options: RowOptions) -> (usize, f64) {
    let RowOptions { top_p, min_p, renormalise, .. } = options;
    if shares.mass.sum.is_nan() {
        return (0, 0.0);
    }
    // Beside +inf nothing else has a share.
    let least = if shares.mass.max.is_finite() { A::LOWEST } else { A::from_f64(f64::INFINITY) };
    let is_possible = |&key: &A::Key| A::of_key(key) >= least;
    let possible = match keys.last() {
        Some(worst) if is_possible(worst) => keys.len(),
        _ => keys.partition_point(is_possible),
    };
    let keys = &keys[..possible];
    let enough = match (keys.first(), min_p > 0.0) {
        (Some(&best), true) => {
            let least = min_p * shares.prob(A::of_key(best));
            keys.partition_point(|&key| shares.prob(A::of_key(key)) >= least)
        }
        _ => possible,
    };
    if top_p == 1.0 && !renormalise {
        return (enough, 1.0);
    }
    let (mut kept, mut sum) = (0, 0.0);
    for &key in &keys[..enough] {
        if top_p < 1.0 && sum >= top_p {
            break;
        }
        sum += shares.prob(A::of_key(key));
        kept += 1;
    }
    (kept, sum)
}

/// Writes the results of given tokens, of which `score` and `rank` tell.
pub(crate) fn write_tokens<A: Score>(
    tokens: ArrayView1<'_, u32>,
    mass: Mass<A>,
    temperature: f64,
    score: impl Fn(usize) -> A,
    rank: impl Fn(usize) -> u32,
    mut to: TokenScoresMut<'_, A>,
) {
    let shares = Shares::new(mass, temperature);
    let logprobs = to.logprobs.index_axis_mut(Axis(0), 0);
    let ranks = to.ranks.index_axis_mut(Axis(0), 0);
    for (&token, (logprob, to)) in tokens.iter().zip(logprobs.into_iter().zip(ranks)) {
        *logprob = A::from_f64(shares.logprob(score(token as usize)));
        *to = rank(token as usize);
    }
}

/// The probability of a score.
#[derive(Debug, Clone, Copy)]
struct Shares<A> {
    mass: Mass<A>,
    temperature: f64,
    /// Reciprocals.
    coldness: f64,
    of_sum: f64,
}

impl<A: Score> Shares<A> {
    fn new(mass: Mass<A>, temperature: f64) -> Self {
        Self { mass, temperature, coldness: 1.0 / temperature, of_sum: 1.0 / mass.sum }
    }

    fn logprob(self, score: A) -> f64 {
        self.mass.logprob(score, self.temperature)
    }

    /// Of a row with a score above -inf.
    fn prob(self, score: A) -> f64 {
        if score == self.mass.max {
            return self.of_sum;
        }
        let d = (score.to_f64() - self.mass.max.to_f64()) * self.coldness;
        A::from_f64(d).exp().to_f64() * self.of_sum
    }
}

/// Exactly 0 instead of a subnormal number.
fn flushed<A: Float>(prob: f64) -> A {
    if prob < A::MIN_POSITIVE { A::ZERO } else { A::from_f64(prob) }
}
