//! The arithmetic of one tile: a few query rows against one packed block of keys.
//!
//! Each step is a function of its own, compiled once per vector type and tile height, whatever the
//! element type and the masks of the call.

use std::ops::Range;

use tensor_utils::Float;
use tensor_utils::simd::{Simd, SimdBase, SimdFloat, SimdFrom};
use tensor_utils::tile::pack::panel_index;
use tensor_utils::tile::{
    Multiply, add_product_rows, lanes, load, panel_width, product_rows, store,
};

/// The packed values of a block.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Values<'a, A> {
    /// By `pack_columns`.
    pub(crate) panels: &'a [A],
    /// Keys that a panel has room for.
    pub(crate) capacity: usize,
    /// Value size, rounded up to lanes; row stride of the outputs.
    pub(crate) e: usize,
}

/// A vector of sums.
type Vector<M, X> = <<M as Multiply<X>>::Sum as Float>::Vector<<M as Multiply<X>>::Simd>;

/// Where the score of row `row` and column `column` lies: the scores of a tile are
/// `[panel][ROWS][panel width]`, so that each panel is written and read at fixed distances.
#[inline(always)]
pub(crate) const fn score_index<const ROWS: usize>(
    row: usize,
    column: usize,
    width: usize,
) -> usize {
    (column / width * ROWS + row) * width + column % width
}

/// `scores[i, j] = finish(q_i . k_j)` (eq. 1) for the columns of whole panels `columns`. `queries` are
/// `stride` apart, `keys` packed transposed, `depth` deep.
pub(crate) fn score_tile<M: Multiply<X>, X: Copy, const ROWS: usize>(
    multiply: M,
    (queries, stride): (&[X], usize),
    (keys, depth): (&[X], usize),
    columns: Range<usize>,
    finish: impl Fn(Vector<M, X>) -> Vector<M, X>,
    scores: &mut [M::Sum],
) {
    multiply.inside(
        #[inline(always)]
        || {
            let width = panel_width::<M::Simd, M::Sum>();
            let scores = &mut scores[columns.start * ROWS..columns.end * ROWS];
            let panels = columns.step_by(width).zip(scores.chunks_exact_mut(ROWS * width));
            for (column, scores) in panels {
                let panel = &keys[column * depth..][..depth * width];
                let sums = product_rows::<M, X, ROWS, 2>(multiply, depth, queries, stride, panel);
                for (sums, scores) in sums.iter().zip(scores.chunks_exact_mut(width)) {
                    let sums = [finish(sums[0]), finish(sums[1])];
                    store::<M::Simd, M::Sum, 2>(&sums, scores);
                }
            }
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
    columns: Range<usize>,
    scores: &mut [A],
    m: &mut [A],
    l: &mut [A],
) -> [A; ROWS] {
    simd.vectorize(
        #[inline(always)]
        || {
            let width = panel_width::<S, A>();
            let splat = |x: A| A::Vector::<S>::simd_from(simd, x);
            let scores = &mut scores[columns.start * ROWS..columns.end * ROWS];

            // In a row with NaN the maximum may be anything: the NaN shows in the exponential,
            // whatever it is taken relative to.
            let mut maxima = [splat(A::NEG_INFINITY); ROWS];
            for panel in scores.chunks_exact(ROWS * width) {
                for (max, scores) in maxima.iter_mut().zip(panel.chunks_exact(width)) {
                    let [s0, s1] = load::<S, A, 2>(simd, scores);
                    *max = s0.max(s1).max(*max);
                }
            }
            let mut references = [A::ZERO; ROWS];
            let mut corrections = [A::ZERO; ROWS];
            for i in 0..ROWS {
                let block_max = maxima[i].reduce_max();
                let m_new = if block_max > m[i] { block_max } else { m[i] };
                // Nothing seen so far: -inf - -inf would be NaN, while every weight is 0 against
                // any finite reference.
                references[i] = if m_new == A::NEG_INFINITY { A::ZERO } else { m_new };
                corrections[i] = m[i] - references[i];
                m[i] = m_new;
            }
            exp_all(simd, &mut corrections);

            let mut sums = [splat(A::ZERO); ROWS];
            for i in 0..ROWS {
                let reference = splat(references[i]);
                let (mut even, mut odd) = (splat(A::ZERO), splat(A::ZERO));
                // Two panels at a time: more hides the exponential's latency than the processor finds
                // by itself. A row adds up its panels in their order all the same.
                let mut pairs = scores.chunks_exact_mut(2 * ROWS * width);
                for pair in &mut pairs {
                    let (first, second) = pair.split_at_mut(ROWS * width);
                    let first = &mut first[i * width..][..width];
                    let second = &mut second[i * width..][..width];
                    let [s0, s1] = load::<S, A, 2>(simd, first);
                    let [s2, s3] = load::<S, A, 2>(simd, second);
                    let x = [s0 - reference, s1 - reference, s2 - reference, s3 - reference];
                    let p = A::exp_weights(simd, x);
                    store::<S, A, 2>(&[p[0], p[1]], first);
                    store::<S, A, 2>(&[p[2], p[3]], second);
                    even += p[0];
                    odd += p[1];
                    even += p[2];
                    odd += p[3];
                }
                for panel in pairs.into_remainder().chunks_exact_mut(ROWS * width) {
                    let scores = &mut panel[i * width..][..width];
                    let [s0, s1] = load::<S, A, 2>(simd, scores);
                    let p = A::exp_weights(simd, [s0 - reference, s1 - reference]);
                    store::<S, A, 2>(&p, scores);
                    even += p[0];
                    odd += p[1];
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
    for chunk in x.chunks_mut(lanes::<S, A>()) {
        let vector = A::Vector::<S>::from_fn(simd, |i| chunk.get(i).copied().unwrap_or(A::ZERO));
        let e = A::exp_nonpositive_vector(simd, vector);
        chunk.copy_from_slice(&e.as_slice()[..chunk.len()]);
    }
}

/// `o_i = o_i * correction_i + sum_j p_ij v_j` (eq. 7) over the keys `columns`.
pub(crate) fn value_tile<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    values: Values<'_, A>,
    columns: Range<usize>,
    weights: &[A],
    corrections: &[A; ROWS],
    o: &mut [A],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let width = panel_width::<S, A>();
            let weights = &weights[columns.start * ROWS..columns.end * ROWS];
            let whole = values.e / width * width;
            let panel = |column: usize, width: usize| {
                &values.panels[column * values.capacity + columns.start * width..]
                    [..columns.len() * width]
            };
            for column in (0..whole).step_by(width) {
                let panel = panel(column, width);
                add_values::<S, A, ROWS, 2>(simd, values, weights, panel, corrections, o, column);
            }
            if whole < values.e {
                let panel = panel(whole, lanes::<S, A>());
                add_values::<S, A, ROWS, 1>(simd, values, weights, panel, corrections, o, whole);
            }
        },
    )
}

/// [`value_tile`] for one panel of `VECTORS` vectors.
#[inline(always)]
fn add_values<S: Simd, A: Float, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    values: Values<'_, A>,
    weights: &[A],
    panel: &[A],
    corrections: &[A; ROWS],
    o: &mut [A],
    column: usize,
) {
    let width = VECTORS * lanes::<S, A>();
    let keys = panel_width::<S, A>();
    let mut sums = [[A::Vector::<S>::simd_from(simd, A::ZERO); VECTORS]; ROWS];
    for (weights, panel) in weights.chunks_exact(ROWS * keys).zip(panel.chunks_exact(keys * width))
    {
        sums = add_product_rows(simd, sums, keys, weights, keys, panel);
    }
    for i in 0..ROWS {
        let o = &mut o[i * values.e + column..][..width];
        let old = load::<S, A, VECTORS>(simd, o);
        let correction = A::Vector::<S>::simd_from(simd, corrections[i]);
        let mut new = sums[i];
        for c in 0..VECTORS {
            new[c] = old[c].mul_add(correction, sums[i][c]);
        }
        store::<S, A, VECTORS>(&new, o);
    }
}

/// [`value_tile`] for a block that holds NaN or infinite values: a key that a row does not see is left
/// out, not multiplied by 0. `scores` are those before the exponential. Adds in the same order as the
/// tile, so that the other keys give the same bits.
pub(crate) fn visible_value_tile<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    values: Values<'_, A>,
    columns: Range<usize>,
    scores: &[A],
    weights: &[A],
    corrections: &[A; ROWS],
    o: &mut [A],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (lanes, width) = (lanes::<S, A>(), panel_width::<S, A>());
            for (i, o) in o.chunks_exact_mut(values.e).enumerate() {
                let correction = A::Vector::<S>::simd_from(simd, corrections[i]);
                for (column, out) in (0..).step_by(lanes).zip(o.chunks_exact_mut(lanes)) {
                    let mut sum = A::Vector::<S>::simd_from(simd, A::ZERO);
                    for j in columns.clone() {
                        let weight = score_index::<ROWS>(i, j, width);
                        if scores[weight] != A::NEG_INFINITY {
                            let at = panel_index(column, j, values.e, values.capacity, width);
                            let [v] = load::<S, A, 1>(simd, &values.panels[at..]);
                            sum = A::Vector::<S>::simd_from(simd, weights[weight]).mul_add(v, sum);
                        }
                    }
                    let [old] = load::<S, A, 1>(simd, out);
                    old.mul_add(correction, sum).store_slice(out);
                }
            }
        },
    )
}

/// `o = o / l` (eq. 8); 0 where `l` is 0, because nothing was visible.
pub(crate) fn normalise<S: Simd, A: Float>(simd: S, o: &mut [A], l: A) {
    if l == A::ZERO {
        return o.fill(A::ZERO);
    }
    simd.vectorize(
        #[inline(always)]
        || {
            let l = A::Vector::<S>::simd_from(simd, l);
            for out in o.chunks_exact_mut(lanes::<S, A>()) {
                let [o] = load::<S, A, 1>(simd, out);
                (o / l).store_slice(out);
            }
        },
    )
}
