//! The best tokens of a row, from the maxima of its stripes.
//!
//! The k-th largest of the maxima of disjoint groups is not above the k-th largest score, since k
//! groups have a score as large (eq. 5). So only scores that reach it are looked at, and of those that
//! equal the k-th best so far only the first: the work is linear in the row whatever is in it.

use tensor_utils::Float;
use tensor_utils::simd::{Simd, SimdBase, SimdMask};

use crate::Logit;
use crate::score::Score;
use crate::source::{STRIPE, Source, Stripe, load, splat};
use crate::sweep::{COLUMNS, Maxima};

/// Candidates that there is room for at least, so that few calls have to thin them out.
const LEAST: usize = 256;

/// Stripes whose maxima are compared with the floor at a time.
const BATCH: usize = 32;

/// Keys that are sorted by counting; it is faster than sorting up to here.
const FEW: usize = 96;

/// Keys that [`best`] needs room for: candidates, and those of one stripe more.
pub(crate) fn capacity(vocabulary: usize, k: usize) -> usize {
    k.saturating_mul(4).max(LEAST).min(vocabulary.next_multiple_of(STRIPE)) + STRIPE
}

/// Rows of groups that [`best`] needs room for.
pub(crate) fn group_rows(vocabulary: usize, k: usize) -> usize {
    (k.saturating_mul(4) / COLUMNS + 1).min(vocabulary.div_ceil(STRIPE))
}

/// The `k` best tokens of a row without NaN, in order; `keys` has the [`capacity`] for them or
/// more, `groups` the [`group_rows`].
pub(crate) fn best<'k, S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    maxima: &[Maxima<T::Acc>],
    k: usize,
    groups: &mut [Maxima<T::Acc>],
    keys: &'k mut [<T::Acc as Score>::Key],
) -> &'k [<T::Acc as Score>::Key] {
    simd.vectorize(
        #[inline(always)]
        || {
            let floor = threshold(simd, maxima, k, groups);
            let mut candidates = Candidates::new(keys, source.len(), k, floor);
            let mut hits = [0; BATCH];
            for (batch, maxima) in maxima.chunks(BATCH).enumerate() {
                for &stripe in candidates.hits(simd, maxima, &mut hits) {
                    candidates.make_room();
                    let stripe = batch * BATCH + usize::from(stripe);
                    source.with(
                        simd,
                        stripe,
                        #[inline(always)]
                        |scores| candidates.add(simd, stripe, scores, source.len()),
                    );
                }
            }
            candidates.into_sorted(simd)
        },
    )
}

/// A number that at least `k` scores reach, and hardly more: the k-th largest maximum of 2 k to 4 k
/// groups of columns or a little less; -inf if there are fewer columns.
#[inline(always)]
fn threshold<S: Simd, A: Score>(
    simd: S,
    maxima: &[Maxima<A>],
    k: usize,
    groups: &mut [Maxima<A>],
) -> A {
    let together = (maxima.len() * COLUMNS / 2) / k;
    if together == 0 {
        return A::NEG_INFINITY;
    }
    // Groups are whole rows of columns, up to twice as many as asked for when rounded up.
    let groups = &mut groups[..maxima.len().div_ceil(together)];
    if groups.len() * COLUMNS < k {
        return A::NEG_INFINITY;
    }
    let lanes = A::Vector::<S>::LEN;
    let mut largest = splat(simd, A::NEG_INFINITY);
    let mut smallest = splat(simd, A::from_f64(f64::INFINITY));
    for (together, group) in maxima.chunks(together).zip(&mut *groups) {
        for column in (0..COLUMNS).step_by(lanes) {
            let mut max = splat(simd, A::NEG_INFINITY);
            for maxima in together {
                max = load(simd, maxima, column).max(max);
            }
            max.store_slice(&mut group[column..][..lanes]);
            largest = max.max(largest);
            smallest = max.min(smallest);
        }
    }
    // So many reach `low`.
    let (mut low, mut reached) = (smallest.reduce_min(), groups.len() * COLUMNS);
    let mut high = largest.reduce_max();
    while reached > k + k / 8 {
        let middle = low.middle(high);
        // A NaN would end it, too.
        if !(low < middle && middle < high) {
            break;
        }
        let floor = Floor { score: middle, above: false };
        let of_middle = floor.count(simd, groups.as_flattened());
        if of_middle >= k {
            (low, reached) = (middle, of_middle);
        } else {
            high = middle;
        }
    }
    low
}

/// What a score has to reach.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Floor<A> {
    pub(crate) score: A,
    /// Whether it has to be above that.
    pub(crate) above: bool,
}

impl<A: Score> Floor<A> {
    /// Which of the scores pass.
    #[inline(always)]
    pub(crate) fn passed<S: Simd>(
        self,
        simd: S,
        scores: A::Vector<S>,
    ) -> <A::Vector<S> as SimdBase<S>>::Mask {
        let floor = splat::<S, A>(simd, self.score);
        if self.above { scores.simd_gt(floor) } else { scores.simd_ge(floor) }
    }

    /// How many of the scores pass, which are whole vectors.
    #[inline(always)]
    pub(crate) fn count<S: Simd>(self, simd: S, scores: &[A]) -> usize {
        let mut count = 0;
        for vector in scores.chunks_exact(A::Vector::<S>::LEN) {
            let passed = self.passed(simd, A::Vector::<S>::from_slice(simd, vector));
            count += passed.to_bitmask().count_ones() as usize;
        }
        count
    }
}

/// Tokens among which the best are.
struct Candidates<'k, A: Score> {
    /// With room for a stripe behind those that are kept.
    keys: &'k mut [A::Key],
    len: usize,
    k: usize,
    floor: Floor<A>,
}

impl<'k, A: Score> Candidates<'k, A> {
    /// None yet, of scores that reach `floor`; `keys` has the [`capacity`] or more.
    #[inline(always)]
    fn new(keys: &'k mut [A::Key], vocabulary: usize, k: usize, floor: A) -> Self {
        // More room, as of a workspace made for a larger k, would only be filled with what is thrown away.
        let keys = &mut keys[..capacity(vocabulary, k)];
        Self { keys, len: 0, k, floor: Floor { score: floor, above: false } }
    }

    /// The stripes of a batch with a maximum that passes. Which they are cannot be foreseen, so there
    /// is no branch.
    #[inline(always)]
    fn hits<'h, S: Simd>(
        &self,
        simd: S,
        maxima: &[Maxima<A>],
        hits: &'h mut [u8; BATCH],
    ) -> &'h [u8] {
        let lanes = A::Vector::<S>::LEN;
        let mut count = 0;
        for (stripe, maxima) in maxima.iter().enumerate() {
            let mut any = <A::Vector<S> as SimdBase<S>>::Mask::splat(simd, false);
            for column in (0..COLUMNS).step_by(lanes) {
                let vector = load(simd, maxima, column);
                any |= self.floor.passed(simd, vector);
            }
            hits[count % BATCH] = stripe as u8;
            count += usize::from(any.any_true());
        }
        &hits[..count]
    }

    /// Adds the scores of a stripe that pass, of a row of `len`; there is room for all.
    #[inline(always)]
    fn add<S: Simd>(&mut self, simd: S, stripe: usize, scores: &Stripe<A>, len: usize) {
        let lanes = A::Vector::<S>::LEN;
        let start = stripe * STRIPE;
        for half in (0..STRIPE).step_by(64) {
            let mut bits = 0;
            for lane in (0..64).step_by(lanes) {
                let vector = load(simd, scores, half + lane);
                bits |= self.floor.passed(simd, vector).to_bitmask() << lane;
            }
            if start + STRIPE > len {
                // Behind the row there is -inf, which passes when all does.
                let valid = len.saturating_sub(start + half).min(64) as u32;
                bits &= u64::MAX.checked_shr(64 - valid).unwrap_or(0);
            }
            // Mostly there is none or one, and no telling which: so the first needs no branch.
            let mut push = |bits: u64| {
                let at = half + bits.trailing_zeros() as usize;
                self.keys[self.len] = scores[at % STRIPE].key((start + at) as u32);
                self.len += usize::from(bits != 0);
                bits & bits.wrapping_sub(1)
            };
            bits = push(bits);
            while bits != 0 {
                bits = push(bits);
            }
        }
    }

    /// Keeps the `k` best if there might be no room for another stripe; tokens come in ascending
    /// order, so a later one has to be above them.
    #[inline(always)]
    fn make_room(&mut self) {
        if self.len + STRIPE >= self.keys.len() {
            self.thin_out();
        }
    }

    #[inline(never)]
    fn thin_out(&mut self) {
        let worst = *self.keys[..self.len].select_nth_unstable(self.k - 1).1;
        self.len = self.k;
        self.floor = Floor { score: A::of_key(worst), above: true };
    }

    #[inline(always)]
    fn into_sorted<S: Simd>(self, simd: S) -> &'k [A::Key] {
        // Thinned out, they are no longer in the order of tokens.
        if self.len <= FEW && !self.floor.above {
            return sorted_by_counting::<S, A>(simd, self.keys, self.len, self.k);
        }
        self.into_sorted_keys()
    }

    fn into_sorted_keys(self) -> &'k [A::Key] {
        let Self { keys, len, k, .. } = self;
        let keys = &mut keys[..len];
        // Beside a few more than wanted, sorting all costs less.
        if len > k + k / 4 {
            keys.select_nth_unstable(k - 1);
            keys[..k].sort_unstable();
        } else {
            keys.sort_unstable();
        }
        &keys[..k]
    }
}

/// The `k` first of `len` keys with ascending tokens, in order: the place of each is the number of those
/// before it, which are above it, or equal and earlier.
#[inline(always)]
fn sorted_by_counting<S: Simd, A: Score>(
    simd: S,
    keys: &mut [A::Key],
    len: usize,
    k: usize,
) -> &[A::Key] {
    let lanes = A::Vector::<S>::LEN;
    let (keys, sorted) = keys.split_at_mut(len);
    let mut scores = [A::NEG_INFINITY; FEW];
    for (score, &key) in scores.iter_mut().zip(&*keys) {
        *score = A::of_key(key);
    }
    let scores = &scores[..len.next_multiple_of(lanes)];
    for (i, &key) in keys.iter().enumerate() {
        let [reach, pass] = [false, true].map(|above| Floor { score: scores[i], above });
        let start = i / lanes * lanes;
        let (earlier, later) = (&scores[..start], &scores[start + lanes..]);
        let around = load(simd, scores, start);
        let is_earlier = (1_u64 << (i % lanes)) - 1;
        let reached = reach.passed(simd, around).to_bitmask() & is_earlier;
        let passed = pass.passed(simd, around).to_bitmask() & !is_earlier;
        let place = reach.count(simd, earlier) + pass.count(simd, later);
        sorted[place + (reached | passed).count_ones() as usize] = key;
    }
    &sorted[..k]
}

/// The `k` best tokens of any row, NaN first, one score at a time.
pub(crate) fn best_with_nan<'k, T: Logit>(
    source: &Source<'_, T>,
    k: usize,
    keys: &'k mut [<T::Acc as Score>::Key],
) -> &'k [<T::Acc as Score>::Key] {
    let mut candidates = Candidates::new(keys, source.len(), k, T::Acc::NEG_INFINITY);
    for token in 0..source.len() {
        candidates.make_room();
        candidates.keys[candidates.len] = source.get(token).key(token as u32);
        candidates.len += 1;
    }
    candidates.into_sorted_keys()
}
