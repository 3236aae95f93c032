//! The ranks of given tokens: how many come before each.

use ndarray::{ArrayView1, ArrayViewMut1};
use tensor_utils::simd::Simd;

use crate::Logit;
use crate::score::Score;
use crate::select::Floor;
use crate::source::{STRIPE, Source};
use crate::sweep::Maxima;

/// Writes the ranks of tokens in a row without NaN, whose scores are `own`. A stripe is looked at once
/// for all of them, if its maxima say that it has to be.
pub(crate) fn write_ranks<S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    maxima: &[Maxima<T::Acc>],
    tokens: ArrayView1<'_, u32>,
    own: ArrayView1<'_, T::Acc>,
    mut ranks: ArrayViewMut1<'_, u32>,
) {
    ranks.fill(0);
    let home = |token: u32| token as usize / STRIPE;
    // Of equal scores the earlier token comes first.
    let floor = |score: T::Acc, is_earlier: bool| Floor { score, above: !is_earlier };
    simd.vectorize(
        #[inline(always)]
        || {
            for (stripe, maxima) in maxima.iter().enumerate() {
                let may_be_before = |(&token, &own): (&u32, &T::Acc)| {
                    floor(own, stripe <= home(token)).count(simd, maxima) > 0
                };
                if !tokens.iter().zip(own).any(may_be_before) {
                    continue;
                }
                source.with(
                    simd,
                    stripe,
                    // Behind the row there is -inf, which is never above a score.
                    #[inline(always)]
                    |scores| {
                        for ((&token, &own), rank) in tokens.iter().zip(own).zip(&mut ranks) {
                            *rank += floor(own, stripe < home(token)).count(simd, scores) as u32;
                            if stripe == home(token) {
                                let earlier = scores[..token as usize % STRIPE].iter();
                                *rank += earlier.filter(|&&score| score == own).count() as u32;
                            }
                        }
                    },
                );
            }
        },
    );
}

/// The same for any row, one score at a time.
pub(crate) fn write_ranks_with_nan<T: Logit>(
    source: &Source<'_, T>,
    tokens: ArrayView1<'_, u32>,
    ranks: ArrayViewMut1<'_, u32>,
) {
    let key = |token: usize| source.get(token).key(token as u32);
    for (&token, rank) in tokens.iter().zip(ranks) {
        let own = key(token as usize);
        *rank = (0..source.len()).filter(|&other| key(other) < own).count() as u32;
    }
}
