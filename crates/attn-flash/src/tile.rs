//! The arithmetic of one tile: a few query rows against one packed block of keys.
//!
//! Each step is a function of its own, compiled once per vector type and tile height, whatever the
//! element type and the masks of the call.

use std::array;
use std::ops::Range;

use tensor_utils::Float;
use tensor_utils::simd::{Simd, SimdBase, SimdFloat, SimdFrom};

use crate::pack::lanes;

/// Heights of register tiles, largest first. With 64-byte vectors the largest keeps 24 of 32
/// registers as sums, else 12 of 16. The last is 1, so any number of rows can be cut into tiles.
pub(crate) const fn heights<S: Simd, A: Float>() -> [usize; 3] {
    if lanes::<S, A>() * size_of::<A>() == 64 { [12, 4, 1] } else { [6, 2, 1] }
}

/// Keys whose weights are fetched together in [`value_tile`], so that bounds are checked once for
/// all of them. Divides every panel width.
const UNROLL: usize = 4;

/// A packed block of keys and values; see [`crate::pack`] for the layouts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Block<'a, A> {
    /// Panels of keys.
    pub(crate) keys: &'a [A],
    /// Panels of values.
    pub(crate) values: &'a [A],
    /// Keys that a panel of values has room for, and row stride of the scores.
    pub(crate) capacity: usize,
    /// Head size.
    pub(crate) d: usize,
    /// Value size, rounded up to lanes; row stride of the outputs.
    pub(crate) e: usize,
}

/// `scores[i, j] = q_i . k_j` (eq. 1) for the columns of whole panels `columns`. Returns the largest
/// of each row, lane by lane, while they are still in registers.
///
/// Each score is one chain of fused multiply-adds over `d`, whatever the height of the tile, so a
/// row has the same bits alone and among others.
pub(crate) fn score_tile<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    queries: &[A],
    block: Block<'_, A>,
    columns: Range<usize>,
    scores: &mut [A],
) -> Maxima<S, A, ROWS> {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = lanes::<S, A>();
            let width = 2 * lanes;
            let mut maxima = no_maxima::<S, A, ROWS>(simd);
            let (queries, _) = queries.as_chunks::<ROWS>();
            let queries = &queries[..block.d];
            for column in columns.step_by(width) {
                let panel = &block.keys[column * block.d..][..block.d * width];
                let mut sums = [[A::Vector::<S>::simd_from(simd, A::ZERO); 2]; ROWS];
                for (q, k) in queries.iter().zip(panel.chunks_exact(width)) {
                    let k0 = A::Vector::<S>::from_slice(simd, &k[..lanes]);
                    let k1 = A::Vector::<S>::from_slice(simd, &k[lanes..]);
                    for i in 0..ROWS {
                        let q = A::Vector::<S>::simd_from(simd, q[i]);
                        sums[i][0] = q.mul_add(k0, sums[i][0]);
                        sums[i][1] = q.mul_add(k1, sums[i][1]);
                    }
                }
                for i in 0..ROWS {
                    let row = &mut scores[i * block.capacity + column..][..width];
                    sums[i][0].store_slice(&mut row[..lanes]);
                    sums[i][1].store_slice(&mut row[lanes..]);
                    maxima[i] = sums[i][0].max(sums[i][1]).max(maxima[i]);
                }
            }
            maxima
        },
    )
}

/// The largest scores of each row of a tile, lane by lane. In a row with NaN they may be anything:
/// the NaN shows in the exponential, whatever it is taken relative to.
pub(crate) type Maxima<S, A, const ROWS: usize> = [<A as Float>::Vector<S>; ROWS];

/// The [`Maxima`] of no scores.
#[inline(always)]
fn no_maxima<S: Simd, A: Float, const ROWS: usize>(simd: S) -> Maxima<S, A, ROWS> {
    [A::Vector::<S>::simd_from(simd, A::NEG_INFINITY); ROWS]
}

/// The [`Maxima`] of scores that have been changed since [`score_tile`].
pub(crate) fn row_maxima<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    stride: usize,
    columns: Range<usize>,
    scores: &[A],
) -> Maxima<S, A, ROWS> {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = lanes::<S, A>();
            let mut maxima = no_maxima::<S, A, ROWS>(simd);
            for column in columns.step_by(lanes) {
                for i in 0..ROWS {
                    let s =
                        A::Vector::<S>::from_slice(simd, &scores[i * stride + column..][..lanes]);
                    maxima[i] = s.max(maxima[i]);
                }
            }
            maxima
        },
    )
}

/// One step of the online softmax for each row (eqs. 4 to 6): `scores` become `exp(s - m)`, `m` and
/// `l` move on, and the factors `exp(m_old - m_new)` for the sums so far are returned.
///
/// All rows take each stage together, so that the latency of one row's reduction hides behind the
/// others'.
pub(crate) fn softmax_tile<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    stride: usize,
    columns: Range<usize>,
    maxima: &Maxima<S, A, ROWS>,
    scores: &mut [A],
    m: &mut [A],
    l: &mut [A],
) -> [A; ROWS] {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = lanes::<S, A>();
            let splat = |x: A| A::Vector::<S>::simd_from(simd, x);

            let mut references = [A::ZERO; ROWS];
            let mut corrections = [A::ZERO; ROWS];
            for i in 0..ROWS {
                let block_max = maxima[i].reduce_max();
                let m_new = if block_max > m[i] { block_max } else { m[i] };
                // Nothing seen so far: -inf - -inf would be NaN, while every weight is 0 against any
                // finite reference.
                references[i] = if m_new == A::NEG_INFINITY { A::ZERO } else { m_new };
                corrections[i] = m[i] - references[i];
                m[i] = m_new;
            }
            exp_all(simd, &mut corrections);

            let mut sums = [splat(A::ZERO); ROWS];
            for (i, row) in scores.chunks_exact_mut(stride).take(ROWS).enumerate() {
                let reference = splat(references[i]);
                let (mut even, mut odd) = (splat(A::ZERO), splat(A::ZERO));
                for pair in row[columns.clone()].chunks_exact_mut(2 * lanes) {
                    let (low, high) = pair.split_at_mut(lanes);
                    let p0 = A::exp_nonpositive_vector(
                        simd,
                        A::Vector::from_slice(simd, low) - reference,
                    );
                    let p1 = A::exp_nonpositive_vector(
                        simd,
                        A::Vector::from_slice(simd, high) - reference,
                    );
                    p0.store_slice(low);
                    p1.store_slice(high);
                    even += p0;
                    odd += p1;
                }
                sums[i] = even + odd;
            }
            for i in 0..ROWS {
                l[i] = l[i] * corrections[i] + sums[i].reduce_sum();
            }
            corrections
        },
    )
}

/// `e^x` of numbers that are at most 0, by the same arithmetic as that of a vector.
#[inline(always)]
fn exp_all<S: Simd, A: Float, const N: usize>(simd: S, x: &mut [A; N]) {
    let lanes = lanes::<S, A>();
    for chunk in x.chunks_mut(lanes) {
        let vector = A::Vector::<S>::from_fn(simd, |i| chunk.get(i).copied().unwrap_or(A::ZERO));
        let e = A::exp_nonpositive_vector(simd, vector);
        chunk.copy_from_slice(&e.as_slice()[..chunk.len()]);
    }
}

/// `o_i = o_i * correction_i + sum_j p_ij v_j` (eq. 7) over the keys `columns`.
pub(crate) fn value_tile<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    block: Block<'_, A>,
    columns: Range<usize>,
    weights: &[A],
    corrections: &[A; ROWS],
    o: &mut [A],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = lanes::<S, A>();
            let width = 2 * lanes;
            let weights = &weights[columns.start..];
            let whole = block.e / width * width;
            for column in (0..whole).step_by(width) {
                let panel = &block.values[column * block.capacity..][..block.capacity * width];
                let panel = &panel[columns.start * width..columns.end * width];
                value_columns::<S, A, ROWS, 2>(simd, block, weights, panel, corrections, o, column);
            }
            if whole < block.e {
                let panel = &block.values[whole * block.capacity..][..block.capacity * lanes];
                let panel = &panel[columns.start * lanes..columns.end * lanes];
                value_columns::<S, A, ROWS, 1>(simd, block, weights, panel, corrections, o, whole);
            }
        },
    )
}

/// [`value_tile`] for one panel of `VECTORS` vectors.
#[inline(always)]
fn value_columns<S: Simd, A: Float, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    block: Block<'_, A>,
    weights: &[A],
    panel: &[A],
    corrections: &[A; ROWS],
    o: &mut [A],
    column: usize,
) {
    let lanes = lanes::<S, A>();
    let (weights, _) = weights.as_chunks::<UNROLL>();
    let mut sums = [[A::Vector::<S>::simd_from(simd, A::ZERO); VECTORS]; ROWS];
    for (j, v) in panel.chunks_exact(UNROLL * VECTORS * lanes).enumerate() {
        let p: [&[A; UNROLL]; ROWS] = array::from_fn(|i| &weights[i * block.capacity / UNROLL + j]);
        for (u, v) in v.chunks_exact(VECTORS * lanes).enumerate().take(UNROLL) {
            let v: [A::Vector<S>; VECTORS] =
                array::from_fn(|c| A::Vector::from_slice(simd, &v[c * lanes..][..lanes]));
            for i in 0..ROWS {
                let p = A::Vector::<S>::simd_from(simd, p[i][u]);
                for c in 0..VECTORS {
                    sums[i][c] = p.mul_add(v[c], sums[i][c]);
                }
            }
        }
    }
    for (i, row) in o.chunks_exact_mut(block.e).take(ROWS).enumerate() {
        let correction = A::Vector::<S>::simd_from(simd, corrections[i]);
        for (c, out) in row[column..][..VECTORS * lanes].chunks_exact_mut(lanes).enumerate() {
            let old = A::Vector::<S>::from_slice(simd, out);
            old.mul_add(correction, sums[i][c]).store_slice(out);
        }
    }
}

/// [`value_tile`] for one row of a block that holds NaN or infinite values: a key that the row does
/// not see is left out, not multiplied by 0. `scores` are those before the exponential. Adds in the
/// same order as the tile, so that the other keys give the same bits.
pub(crate) fn value_row<S: Simd, A: Float>(
    simd: S,
    block: Block<'_, A>,
    columns: Range<usize>,
    scores: &[A],
    weights: &[A],
    correction: A,
    o: &mut [A],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = lanes::<S, A>();
            let width = 2 * lanes;
            let correction = A::Vector::<S>::simd_from(simd, correction);
            for (c, out) in o[..block.e].chunks_exact_mut(lanes).enumerate() {
                let panel = c * lanes / width * width;
                let panel_width = width.min(block.e - panel);
                let mut sum = A::Vector::<S>::simd_from(simd, A::ZERO);
                for j in columns.clone() {
                    if scores[j] != A::NEG_INFINITY {
                        let at = panel * block.capacity + j * panel_width + c * lanes % width;
                        let v = A::Vector::<S>::from_slice(simd, &block.values[at..][..lanes]);
                        sum = A::Vector::<S>::simd_from(simd, weights[j]).mul_add(v, sum);
                    }
                }
                A::Vector::<S>::from_slice(simd, out).mul_add(correction, sum).store_slice(out);
            }
        },
    )
}

/// `out = o / l`; 0 where `l` is 0, because nothing was visible.
pub(crate) fn normalise<S: Simd, A: Float>(simd: S, o: &mut [A], l: A) {
    simd.vectorize(
        #[inline(always)]
        || {
            if l == A::ZERO {
                return o.fill(A::ZERO);
            }
            let l = A::Vector::<S>::simd_from(simd, l);
            for out in o.chunks_exact_mut(lanes::<S, A>()) {
                (A::Vector::<S>::from_slice(simd, out) / l).store_slice(out);
            }
        },
    )
}
