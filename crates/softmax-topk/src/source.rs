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
        let score = self.adjusted(token, self.logits[token].to_acc());
        if self.ignore_nan && score.is_nan() { T::Acc::NEG_INFINITY } else { score }
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
        let len = STRIPE.min(self.len() - start);
        let bias = self.bias.and_then(|bias| bias.to_slice());
        if len == STRIPE && bias.is_some() == self.bias.is_some() {
            let bias = bias.map(|bias| &bias[start..start + STRIPE]);
            self.stage_whole(simd, start, bias, to);
        } else {
            self.widen(start, &mut to[..len]);
            for (token, to) in (start..).zip(&mut to[..len]) {
                *to = self.adjusted(token, *to);
            }
            to[len..].fill(T::Acc::NEG_INFINITY);
        }
        if self.ignore_nan {
            for to in to {
                *to = if to.is_nan() { T::Acc::NEG_INFINITY } else { *to };
            }
        }
    }

    /// A whole stripe, in one go where the logits need not be widened.
    #[inline(always)]
    fn stage_whole<S: Simd>(
        &self,
        simd: S,
        start: usize,
        bias: Option<&[T::Acc]>,
        to: &mut Stripe<T::Acc>,
    ) {
        let lanes = <T::Acc as Float>::Vector::<S>::LEN;
        let logits = self.contiguous.and_then(T::as_acc_slice);
        let logits = logits.map(|logits| &logits[start..start + STRIPE]);
        if logits.is_none() {
            self.widen(start, to);
            if bias.is_none() && self.mask.is_none() {
                return;
            }
        }
        let forbidden = splat(simd, T::Acc::NEG_INFINITY);
        let mut bits = 0;
        for at in (0..STRIPE).step_by(lanes) {
            let mut scores = match logits {
                Some(logits) => load(simd, logits, at),
                None => load(simd, &to[..], at),
            };
            if let Some(bias) = bias {
                scores += load(simd, bias, at);
            }
            if let Some(mask) = self.mask {
                if at % 32 == 0 {
                    bits = u64::from(mask.word((start + at) / 32));
                }
                scores = allowed::<S, <T::Acc as Float>::Vector<S>>(simd, bits >> (at % 32))
                    .select(scores, forbidden);
            }
            scores.store_slice(&mut to[at..at + lanes]);
        }
    }

    /// Logits from `start` on in the compute type.
    #[inline(always)]
    fn widen(&self, start: usize, to: &mut [T::Acc]) {
        match self.contiguous {
            Some(logits) => widen(&logits[start..start + to.len()], to),
            None => {
                for (i, to) in to.iter_mut().enumerate() {
                    *to = self.logits[start + i].to_acc();
                }
            }
        }
    }

    /// The score of a logit, but for NaN.
    #[inline(always)]
    fn adjusted(&self, token: usize, logit: T::Acc) -> T::Acc {
        if self.mask.is_some_and(|mask| !mask.allows(token)) {
            return T::Acc::NEG_INFINITY;
        }
        self.bias.map_or(logit, |bias| logit + bias[token])
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

/// The numbers of a slice from `at` on.
#[inline(always)]
pub(crate) fn load<S: Simd, A: Float>(simd: S, numbers: &[A], at: usize) -> A::Vector<S> {
    A::Vector::<S>::from_slice(simd, &numbers[at..][..A::Vector::<S>::LEN])
}

/// A mask of the lowest bits.
#[inline(always)]
fn allowed<S: Simd, V: SimdBase<S>>(simd: S, bits: u64) -> V::Mask {
    V::Mask::from_bitmask(simd, bits & ((1 << V::LEN) - 1))
}

/// The same number in all lanes.
#[inline(always)]
pub(crate) fn splat<S: Simd, A: Float>(simd: S, x: A) -> A::Vector<S> {
    tensor_utils::simd::SimdFrom::simd_from(simd, x)
}
