//! The online softmax of a block of scores (docs/derivation.md, section 1).

use tensor_utils::Float;
use tensor_utils::simd::{Simd, SimdBase, SimdFrom};

use super::task::{BLOCK, SCORES};
use super::tile::lanes;

/// Results `rows` of `scores` become weights against the new maximum; `m` is raised, `correction` is what
/// all older sums are to be multiplied by, and `l` (a vector for each row) adds up the weights.
pub(crate) fn weigh<S: Simd>(
    simd: S,
    scores: &mut [f32],
    m: &mut [f32],
    l: &mut [f32],
    correction: &mut [f32],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = lanes::<S>();
            for (row, scores) in scores.chunks_exact_mut(SCORES).enumerate() {
                let scores = &mut scores[..BLOCK];
                let mut max = S::f32s::from_slice(simd, &scores[..lanes]);
                for chunk in scores[lanes..].chunks_exact(lanes) {
                    max = max.max(S::f32s::from_slice(simd, chunk));
                }
                let new = m[row].max(max.reduce_max());
                correction[row] = m[row] - new;
                m[row] = new;
            }
            correct(simd, correction);
            for (row, scores) in scores.chunks_exact_mut(SCORES).enumerate() {
                // While every score is -inf, their weights are e^(-inf - 0).
                let max = if m[row] == f32::NEG_INFINITY { 0.0 } else { m[row] };
                let max = S::f32s::simd_from(simd, max);
                let l = &mut l[row * 16..row * 16 + lanes];
                let factor = S::f32s::simd_from(simd, correction[row]);
                let mut sum = S::f32s::from_slice(simd, l) * factor;
                for scores in scores[..BLOCK].chunks_exact_mut(4 * lanes) {
                    let mut x = [max; 4];
                    for (x, chunk) in x.iter_mut().zip(scores.chunks_exact(lanes)) {
                        *x = S::f32s::from_slice(simd, chunk) - max;
                    }
                    let weights = f32::exp_weights(simd, x);
                    for (weight, chunk) in weights.iter().zip(scores.chunks_exact_mut(lanes)) {
                        weight.store_slice(chunk);
                        sum += *weight;
                    }
                }
                sum.store_slice(l);
            }
        },
    )
}

/// `e^x` of differences of maxima; -inf less -inf means that nothing was summed yet.
#[inline(always)]
fn correct<S: Simd>(simd: S, differences: &mut [f32]) {
    for difference in differences.iter_mut().filter(|difference| difference.is_nan()) {
        *difference = 0.0;
    }
    let lanes = lanes::<S>();
    let mut chunks = differences.chunks_exact_mut(lanes);
    for chunk in &mut chunks {
        f32::exp_nonpositive_vector(simd, S::f32s::from_slice(simd, chunk)).store_slice(chunk);
    }
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        let mut padded = [0.0; 16];
        padded[..rest.len()].copy_from_slice(rest);
        let padded = &mut padded[..lanes];
        f32::exp_nonpositive_vector(simd, S::f32s::from_slice(simd, padded)).store_slice(padded);
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

/// `cap tanh(s / cap)`.
pub(crate) fn cap_scores<S: Simd>(simd: S, scores: &mut [f32], cap: f32) {
    simd.vectorize(
        #[inline(always)]
        || {
            let inverse = S::f32s::simd_from(simd, 1.0 / cap);
            let cap = S::f32s::simd_from(simd, cap);
            for chunk in scores.chunks_exact_mut(lanes::<S>()) {
                let x = S::f32s::from_slice(simd, chunk);
                (cap * f32::tanh_vector(simd, x * inverse)).store_slice(chunk);
            }
        },
    )
}

/// Multiplies rows by their corrections, those that are not 1.
pub(crate) fn rescale<S: Simd>(simd: S, o: &mut [f32], stride: usize, correction: &[f32]) {
    simd.vectorize(
        #[inline(always)]
        || {
            for (o, &factor) in o.chunks_exact_mut(stride).zip(correction) {
                if factor != 1.0 {
                    let factor = S::f32s::simd_from(simd, factor);
                    for chunk in o.chunks_exact_mut(lanes::<S>()) {
                        (S::f32s::from_slice(simd, chunk) * factor).store_slice(chunk);
                    }
                }
            }
        },
    )
}
