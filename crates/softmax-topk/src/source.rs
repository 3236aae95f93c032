//! The scores of a row, stripe by stripe: where the logits are, or widened, biased and masked on the
//! way.

use std::ops::Range;

use ndarray::{ArrayView1, Axis};
use tensor_utils::simd::{Select, Simd, SimdBase, SimdMask};
use tensor_utils::{Float, prefetch, widen};

use crate::Logit;
use crate::call::{Call, MaskRow};

/// Scores that are taken together.
pub(crate) const STRIPE: usize = 128;

/// Stripes that memory is asked for ahead of its use.
const AHEAD: usize = 16;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The scores of a stripe.
pub(crate) type Stripe<A> = [A; STRIPE];

/// A stripe that is staged, at a line of the caches: a vector that crosses two waits for its stores.
#[repr(align(64))]
struct Staged<A>(Stripe<A>);

/// The scores of a row.
#[derive(Debug)]
pub(crate) struct Source<'a, T: Logit> {
    logits: ArrayView1<'a, T>,
    contiguous: Option<&'a [T]>,
    bias: Option<ArrayView1<'a, T::Acc>>,
    mask: Option<MaskRow<'a>>,
    ignore_nan: bool,
    /// The logits, if they are the scores.
    scores: Option<&'a [T::Acc]>,
    /// The partial stripe of those.
    last: Stripe<T::Acc>,
}

impl<'a, T: Logit> Source<'a, T> {
    /// The scores of a row of a call; NaN counts as -inf if it is ignored.
    pub(crate) fn new(call: &'a Call<'_, '_, T>, row: usize, ignore_nan: bool) -> Self {
        let logits = call.logits.index_axis_move(Axis(0), row).reborrow();
        let (bias, mask) = (call.bias(row), call.mask(row));
        let contiguous = logits.to_slice();
        let plain = bias.is_none() && mask.is_none() && !ignore_nan;
        let scores = if plain { contiguous.and_then(T::as_acc_slice) } else { None };
        let last = scores.map_or([T::Acc::NEG_INFINITY; STRIPE], padded);
        Self { logits, contiguous, bias, mask, ignore_nan, scores, last }
    }

    /// Tokens of the row.
    pub(crate) fn len(&self) -> usize {
        self.logits.len()
    }

    /// Stripes of the row, the last of which may be partial.
    pub(crate) fn stripes(&self) -> usize {
        self.len().div_ceil(STRIPE)
    }

    /// One score.
    #[inline(always)]
    pub(crate) fn get(&self, token: usize) -> T::Acc {
        if let Some(scores) = self.scores {
            return scores[token];
        }
        let mut score = self.logits[token].to_acc();
        if let Some(bias) = self.bias {
            score += bias[token];
        }
        let masked = self.mask.is_some_and(|mask| !mask.allows(token));
        if masked || (self.ignore_nan && score.is_nan()) { T::Acc::NEG_INFINITY } else { score }
    }

    /// Calls `f` with each stripe; behind the row it has -inf.
    #[inline(always)]
    pub(crate) fn for_each<S: Simd>(
        &self,
        simd: S,
        stripes: Range<usize>,
        mut f: impl FnMut(usize, &Stripe<T::Acc>),
    ) {
        let Some(scores) = self.scores else {
            let mut staged = Staged([T::Acc::NEG_INFINITY; STRIPE]);
            for stripe in stripes {
                if let Some(logits) = self.contiguous {
                    ask_ahead(logits, stripe);
                }
                self.stage(simd, stripe, &mut staged.0);
                f(stripe, &staged.0);
            }
            return;
        };
        let (whole, _) = scores.as_chunks();
        let end = stripes.end.min(whole.len());
        for (i, chunk) in whole[stripes.start..end].iter().enumerate() {
            ask_ahead(scores, stripes.start + i);
            f(stripes.start + i, chunk);
        }
        if end < stripes.end {
            f(end, &self.last);
        }
    }

    /// Calls `f` with one stripe.
    #[inline(always)]
    pub(crate) fn with<S: Simd>(&self, simd: S, stripe: usize, f: impl FnOnce(&Stripe<T::Acc>)) {
        let Some(scores) = self.scores else {
            let mut staged = Staged([T::Acc::NEG_INFINITY; STRIPE]);
            self.stage(simd, stripe, &mut staged.0);
            return f(&staged.0);
        };
        let (whole, _) = scores.as_chunks();
        f(whole.get(stripe).unwrap_or(&self.last))
    }

    /// Writes the scores of a stripe, behind the row -inf.
    #[inline(always)]
    fn stage<S: Simd>(&self, simd: S, stripe: usize, to: &mut Stripe<T::Acc>) {
        let start = stripe * STRIPE;
        let left = self.len() - start;
        if left >= STRIPE {
            // Its loops have a length that the compiler knows.
            self.stage_scores(simd, start, STRIPE, to);
        } else {
            self.stage_scores(simd, start, left, to);
            to[left..].fill(T::Acc::NEG_INFINITY);
        }
    }

    /// Writes `len` scores from `start` on.
    #[inline(always)]
    fn stage_scores<S: Simd>(&self, simd: S, start: usize, len: usize, to: &mut Stripe<T::Acc>) {
        match self.contiguous {
            Some(logits) => widen(&logits[start..start + len], &mut to[..len]),
            None => {
                for i in 0..len {
                    to[i] = self.logits[start + i].to_acc();
                }
            }
        }
        if let Some(bias) = self.bias {
            match bias.to_slice() {
                Some(bias) => {
                    for (to, bias) in to.iter_mut().zip(&bias[start..start + len]) {
                        *to += *bias;
                    }
                }
                None => {
                    for i in 0..len {
                        to[i] += bias[start + i];
                    }
                }
            }
        }
        if let Some(mask) = self.mask {
            for first in (0..len).step_by(32) {
                let bits = u64::from(mask.word((start + first) / 32));
                forbid(simd, bits, &mut to[first..first + 32]);
            }
        }
        if self.ignore_nan {
            for to in to.iter_mut() {
                *to = if to.is_nan() { T::Acc::NEG_INFINITY } else { *to };
            }
        }
    }
}

/// Asks for a stripe that comes later.
#[inline(always)]
fn ask_ahead<T>(elements: &[T], stripe: usize) {
    let per_line = LINE / size_of::<T>();
    let start = (stripe + AHEAD) * STRIPE;
    for line in 0..STRIPE / per_line {
        prefetch(elements, start + line * per_line);
    }
}

/// The scores behind the whole stripes, with -inf behind them.
#[inline(always)]
fn padded<A: Float>(scores: &[A]) -> Stripe<A> {
    let (whole, rest) = scores.as_chunks::<STRIPE>();
    let mut stripe = [A::NEG_INFINITY; STRIPE];
    if whole.is_empty() {
        stripe[..rest.len()].copy_from_slice(rest);
    } else if !rest.is_empty() {
        // Copies of fixed length are a few instructions.
        let mut wide = [A::NEG_INFINITY; 2 * STRIPE];
        wide[..STRIPE].copy_from_slice(&scores[scores.len() - STRIPE..]);
        stripe.copy_from_slice(&wide[STRIPE - rest.len()..][..STRIPE]);
    }
    stripe
}

/// -inf for scores whose bit is 0.
#[inline(always)]
fn forbid<S: Simd, A: Float>(simd: S, bits: u64, scores: &mut [A]) {
    let lanes = A::Vector::<S>::LEN;
    let forbidden = splat(simd, A::NEG_INFINITY);
    for (i, chunk) in scores.chunks_exact_mut(lanes).enumerate() {
        let allowed = <A::Vector<S> as SimdBase<S>>::Mask::from_bitmask(
            simd,
            bits >> (i * lanes) & low_bits(lanes),
        );
        allowed.select(A::Vector::<S>::from_slice(simd, chunk), forbidden).store_slice(chunk);
    }
}

/// So many low bits set.
fn low_bits(count: usize) -> u64 {
    (1 << count) - 1
}

/// The same number in all lanes.
#[inline(always)]
pub(crate) fn splat<S: Simd, A: Float>(simd: S, x: A) -> A::Vector<S> {
    tensor_utils::simd::SimdFrom::simd_from(simd, x)
}
