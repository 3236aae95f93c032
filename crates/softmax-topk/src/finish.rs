//! From the best scores of a row to its results: probabilities, cuts, given tokens.

use ndarray::{ArrayView1, ArrayViewMut1, Axis};
use tensor_utils::simd::{Simd, SimdBase, SimdFrom};
use tensor_utils::{Element, Float};

use crate::call::RowOptions;
use crate::mass::Mass;
use crate::score::Score;
use crate::source::Source;
use crate::{Logit, TokenScoresMut};

/// Lanes of a vector of f64 at most.
const MOST_LANES: usize = 8;

/// The results of one row, to write.
#[derive(Debug)]
pub(crate) struct RowMut<'a, A> {
    pub(crate) indices: ArrayViewMut1<'a, u32>,
    pub(crate) probs: ArrayViewMut1<'a, A>,
    pub(crate) lse: &'a mut A,
    pub(crate) kept: &'a mut u32,
}

/// Writes the results of the sorted `keys`; `shares` has room for as many.
pub(crate) fn write<S: Simd, A: Score>(
    simd: S,
    keys: &[A::Key],
    mass: Mass<A>,
    options: RowOptions,
    shares: &mut [f64],
    to: RowMut<'_, A>,
) {
    let RowOptions { temperature, log, renormalise, .. } = options;
    let shares = &mut shares[..keys.len()];
    let are_wanted = !log || renormalise || options.top_p < 1.0 || options.min_p > 0.0;
    if are_wanted {
        write_shares(simd, keys, mass, temperature, shares);
    }
    let (kept, kept_sum) = cut(keys, shares, mass, options);
    let (divisor, subtrahend) =
        if renormalise && kept > 0 { (kept_sum, kept_sum.ln()) } else { (1.0, 0.0) };
    let reciprocal = 1.0 / divisor;
    let (kept_keys, cut_keys) = keys.split_at(kept);
    let mut places = to.indices.into_iter().zip(to.probs);
    for ((&key, share), (index, prob)) in kept_keys.iter().zip(shares).zip(&mut places) {
        *index = A::token(key);
        *prob = if log {
            A::from_f64(mass.logprob(A::of_key(key), temperature) - subtrahend)
        } else {
            flushed(*share * reciprocal)
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
    *to.lse = mass.lse(temperature);
    *to.kept = kept as u32;
}

/// How many of the sorted keys the cuts keep, and the sum of their shares.
fn cut<A: Score>(
    keys: &[A::Key],
    shares: &[f64],
    mass: Mass<A>,
    options: RowOptions,
) -> (usize, f64) {
    let RowOptions { top_p, min_p, renormalise, .. } = options;
    if mass.sum.is_nan() {
        return (0, 0.0);
    }
    // Beside +inf nothing else has a share.
    let least = if mass.max.is_finite() { A::LOWEST } else { A::from_f64(f64::INFINITY) };
    let is_possible = |&key: &A::Key| A::of_key(key) >= least;
    let possible = match keys.last() {
        Some(worst) if is_possible(worst) => keys.len(),
        _ => keys.partition_point(is_possible),
    };
    let shares = &shares[..possible];
    let enough = match (shares.first(), min_p > 0.0) {
        (Some(&best), true) => shares.partition_point(|&share| share >= min_p * best),
        _ => possible,
    };
    if top_p == 1.0 && !renormalise {
        return (enough, 1.0);
    }
    let (mut kept, mut sum) = (0, 0.0);
    for share in &shares[..enough] {
        if top_p < 1.0 && sum >= top_p {
            break;
        }
        sum += share;
        kept += 1;
    }
    (kept, sum)
}

/// Writes the probability of each key.
fn write_shares<S: Simd, A: Score>(
    simd: S,
    keys: &[A::Key],
    mass: Mass<A>,
    temperature: f64,
    shares: &mut [f64],
) {
    let (coldness, of_sum) = (1.0 / temperature, 1.0 / mass.sum);
    simd.vectorize(
        #[inline(always)]
        || {
            for (&key, share) in keys.iter().zip(&mut *shares) {
                let score = A::of_key(key);
                let d = (score.to_f64() - mass.max.to_f64()) * coldness;
                // +inf is as far from itself as any other maximum.
                *share = if score == mass.max { 0.0 } else { d };
            }
            for d in shares.chunks_mut(S::f64s::LEN) {
                let mut buffer = [0.0; MOST_LANES];
                buffer[..d.len()].copy_from_slice(d);
                let d_lanes = S::f64s::from_slice(simd, &buffer[..S::f64s::LEN]);
                let e = f64::exp_nonpositive_vector(simd, d_lanes);
                let share = e * S::f64s::simd_from(simd, of_sum);
                share.store_slice(&mut buffer[..S::f64s::LEN]);
                d.copy_from_slice(&buffer[..d.len()]);
            }
        },
    );
}

/// Writes the results of given tokens, of whose scores `write_ranks` makes ranks.
pub(crate) fn write_tokens<T: Logit>(
    source: &Source<'_, T>,
    tokens: ArrayView1<'_, u32>,
    mass: Mass<T::Acc>,
    temperature: f64,
    to: TokenScoresMut<'_, T::Acc>,
    write_ranks: impl FnOnce(ArrayView1<'_, T::Acc>, ArrayViewMut1<'_, u32>),
) {
    // Until their ranks are known, the scores are where their log-probabilities will be.
    let mut scores = to.logprobs.index_axis_move(Axis(0), 0);
    scores.zip_mut_with(&tokens, |score, &token| *score = source.get(token as usize));
    write_ranks(scores.view(), to.ranks.index_axis_move(Axis(0), 0));
    scores.mapv_inplace(|score| T::Acc::from_f64(mass.logprob(score, temperature)));
}

/// Exactly 0 instead of a subnormal number.
fn flushed<A: Float>(prob: f64) -> A {
    if prob < A::MIN_POSITIVE { A::ZERO } else { A::from_f64(prob) }
}
