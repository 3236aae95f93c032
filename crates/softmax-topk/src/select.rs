//! The best tokens of a row, from the maxima of its stripes.
//!
//! The k-th largest of the maxima of disjoint groups is not above the k-th largest score, since k
//! groups have a score as large (eq. 5). So only scores that reach it are looked at, and of those that
//! equal the k-th best so far only the first: the work is linear in the row whatever is in it.

use tensor_utils::Float;
use tensor_utils::simd::{Simd, SimdBase, SimdMask};

use crate::Logit;
use crate::score::Score;
use crate::source::{STRIPE, Source, Stripe, splat};
use crate::sweep::{COLUMNS, Maxima};

/// Candidates that are kept at least, so that few calls have to thin them out.
const LEAST: usize = 256;

/// Keys that [`best`] needs room for.
pub(crate) fn capacity(vocabulary: usize, k: usize) -> usize {
    k.saturating_mul(4).max(LEAST).min(vocabulary)
}

/// The `k` best tokens of a row without NaN, in order; `keys` has the [`capacity`] for them.
pub(crate) fn best<'k, S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    maxima: &[Maxima<T::Acc>],
    k: usize,
    keys: &'k mut [<T::Acc as Score>::Key],
) -> &'k [<T::Acc as Score>::Key] {
    let floor = threshold(maxima, k, keys);
    let mut candidates = Candidates { keys, len: 0, k, floor, above: false };
    simd.vectorize(
        #[inline(always)]
        || {
            for (stripe, maxima) in maxima.iter().enumerate() {
                if reaches::<S, T::Acc>(simd, maxima, &candidates) {
                    source.with(
                        simd,
                        stripe,
                        #[inline(always)]
                        |scores| candidates.add(simd, stripe, scores, source.len()),
                    );
                }
            }
        },
    );
    candidates.into_sorted()
}

/// A number that at least `k` scores reach: the k-th largest maximum of 2 k to 4 k groups of columns,
/// or -inf if there are fewer columns.
fn threshold<A: Score>(maxima: &[Maxima<A>], k: usize, keys: &mut [A::Key]) -> A {
    let together = (maxima.len() * COLUMNS / 2) / k;
    if together == 0 {
        return A::NEG_INFINITY;
    }
    // Groups are whole rows of columns, up to twice as many as asked for when rounded up.
    let mut count = 0;
    for group in maxima.chunks(together) {
        let mut largest = [A::NEG_INFINITY; COLUMNS];
        for maxima in group {
            for (largest, &max) in largest.iter_mut().zip(maxima) {
                *largest = if max > *largest { max } else { *largest };
            }
        }
        for largest in largest {
            if count < keys.len() {
                keys[count] = largest.key(0);
                count += 1;
            }
        }
    }
    if count < k {
        return A::NEG_INFINITY;
    }
    A::of_key(*keys[..count].select_nth_unstable(k - 1).1)
}

/// Whether a score of the stripe may be a candidate.
#[inline(always)]
fn reaches<S: Simd, A: Score>(simd: S, maxima: &Maxima<A>, candidates: &Candidates<'_, A>) -> bool {
    let lanes = A::Vector::<S>::LEN;
    let mut any = <A::Vector<S> as SimdBase<S>>::Mask::splat(simd, false);
    for column in (0..COLUMNS).step_by(lanes) {
        any |=
            candidates.passes(simd, A::Vector::<S>::from_slice(simd, &maxima[column..][..lanes]));
    }
    any.any_true()
}

/// Tokens among which the best are.
struct Candidates<'k, A: Score> {
    keys: &'k mut [A::Key],
    len: usize,
    k: usize,
    /// What a score has to reach.
    floor: A,
    /// Whether it has to be above that.
    above: bool,
}

impl<'k, A: Score> Candidates<'k, A> {
    #[inline(always)]
    fn passes<S: Simd>(
        &self,
        simd: S,
        scores: A::Vector<S>,
    ) -> <A::Vector<S> as SimdBase<S>>::Mask {
        let floor = splat::<S, A>(simd, self.floor);
        if self.above { scores.simd_gt(floor) } else { scores.simd_ge(floor) }
    }

    /// Adds the scores of a stripe that pass, of a row of `len`.
    #[inline(always)]
    fn add<S: Simd>(&mut self, simd: S, stripe: usize, scores: &Stripe<A>, len: usize) {
        let lanes = A::Vector::<S>::LEN;
        let start = stripe * STRIPE;
        for half in 0..STRIPE / 64 {
            let mut bits = 0;
            for i in 0..64 / lanes {
                let at = half * 64 + i * lanes;
                let vector = A::Vector::<S>::from_slice(simd, &scores[at..][..lanes]);
                bits |= self.passes(simd, vector).to_bitmask() << (i * lanes);
            }
            while bits != 0 {
                let at = half * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                // Behind the row there is -inf, which passes when all does.
                if start + at < len {
                    self.push(scores[at % STRIPE], start + at);
                }
            }
        }
    }

    #[inline(always)]
    fn push(&mut self, score: A, token: usize) {
        if self.len == self.keys.len() {
            self.thin_out();
        }
        self.keys[self.len] = score.key(token as u32);
        self.len += 1;
    }

    /// Keeps the `k` best; tokens come in ascending order, so a later one has to be above them.
    #[inline(never)]
    fn thin_out(&mut self) {
        let worst = *self.keys[..self.len].select_nth_unstable(self.k - 1).1;
        self.len = self.k;
        self.floor = A::of_key(worst);
        self.above = true;
    }

    fn into_sorted(self) -> &'k [A::Key] {
        let Self { keys, len, k, .. } = self;
        let keys = &mut keys[..len];
        if k < keys.len() {
            keys.select_nth_unstable(k - 1);
        }
        let best = &mut keys[..k];
        best.sort_unstable();
        best
    }
}

/// The `k` best tokens of any row, NaN first, one score at a time.
pub(crate) fn best_with_nan<'k, T: Logit>(
    source: &Source<'_, T>,
    k: usize,
    keys: &'k mut [<T::Acc as Score>::Key],
) -> &'k [<T::Acc as Score>::Key] {
    let mut candidates = Candidates { keys, len: 0, k, floor: T::Acc::NEG_INFINITY, above: false };
    for token in 0..source.len() {
        candidates.push(source.get(token), token);
    }
    candidates.into_sorted()
}

/// How many tokens come before `token` in a row without NaN.
pub(crate) fn rank<S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    maxima: &[Maxima<T::Acc>],
    token: usize,
) -> u32 {
    let score = source.get(token);
    let mut rank = 0;
    simd.vectorize(
        #[inline(always)]
        || {
            for (stripe, maxima) in maxima.iter().enumerate() {
                // Before the token, equal scores count.
                let before = stripe < token / STRIPE;
                let is_better =
                    |&other: &T::Acc| if before { other >= score } else { other > score };
                if stripe == token / STRIPE {
                    for other in stripe * STRIPE..source.len().min((stripe + 1) * STRIPE) {
                        let other_score = source.get(other);
                        let tie = other_score == score && other < token;
                        rank += u32::from(other_score > score || tie);
                    }
                } else if maxima.iter().any(is_better) {
                    source.with(
                        simd,
                        stripe,
                        #[inline(always)]
                        |scores| {
                            let len = STRIPE.min(source.len() - stripe * STRIPE);
                            for other in &scores[..len] {
                                rank += u32::from(is_better(other));
                            }
                        },
                    );
                }
            }
        },
    );
    rank
}

/// The same for any row, one score at a time.
pub(crate) fn rank_with_nan<T: Logit>(source: &Source<'_, T>, token: usize) -> u32 {
    let key = |token: usize| source.get(token).key(token as u32);
    let own = key(token);
    (0..source.len()).filter(|&other| key(other) < own).count() as u32
}
