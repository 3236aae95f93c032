//! The matrix products of the backward pass, on packed blocks.
//!
//! Each is a function of its own, compiled once per vector type and tile height.

use std::ops::Range;

use tensor_utils::Float;
use tensor_utils::simd::{Select, Simd, SimdBase, SimdFloat, SimdFrom};
use tensor_utils::tile::pack::panel_index;
use tensor_utils::tile::{
    Multiply, Sums, lanes, load, panel_width, product_columns, product_rows, store, tiles,
};

/// A vector of sums.
type Vector<M, X> = <<M as Multiply<X>>::Sum as Float>::Vector<<M as Multiply<X>>::Simd>;

/// `out[i, j] = finish(a_i . b_j)` for the columns of whole panels `columns` of `panels`, packed
/// transposed with `depth` rows each. Rows of `a` are `a_stride` apart, of `out` `out_stride`.
pub(crate) fn dot_rows<const ROWS: usize, M: Multiply<X>, X: Copy>(
    multiply: M,
    depth: usize,
    a: &[X],
    a_stride: usize,
    panels: &[X],
    columns: Range<usize>,
    finish: impl Fn(Vector<M, X>) -> Vector<M, X>,
    out: &mut [M::Sum],
    out_stride: usize,
) {
    multiply.inside(
        #[inline(always)]
        || {
            let width = panel_width::<M::Simd, M::Sum>();
            for column in columns.step_by(width) {
                let panel = &panels[column * depth..][..depth * width];
                let sums = product_rows::<M, X, ROWS, 2>(multiply, depth, a, a_stride, panel);
                for i in 0..ROWS {
                    let out = &mut out[i * out_stride + column..][..width];
                    let sums = [finish(sums[i][0]), finish(sums[i][1])];
                    store::<M::Simd, M::Sum, 2>(&sums, out);
                }
            }
        },
    )
}

/// Rows packed by columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panels<'a, X> {
    pub(crate) panels: &'a [X],
    /// Columns of a row, rounded up to lanes.
    pub(crate) columns: usize,
    /// Rows that a panel has room for.
    pub(crate) capacity: usize,
}

/// `out_i += sum_j a[i, j] b_j` for the rows `rows` of `b`; `a[i, j]` is at `i * a_stride + j`.
pub(crate) fn add_rows<M: Multiply<X>, X: Copy, const ROWS: usize>(
    multiply: M,
    rows: Range<usize>,
    a: &[X],
    a_stride: usize,
    b: Panels<'_, X>,
    out: &mut [M::Sum],
    out_stride: usize,
) {
    multiply.inside(
        #[inline(always)]
        || {
            let (depth, a) = (rows.len(), &a[rows.start..]);
            let width = panel_width::<M::Simd, M::Sum>();
            let panel = |column: usize| {
                let width =
                    panel_index(column, 1, b.columns, b.capacity, width) - column * b.capacity;
                &b.panels[column * b.capacity + rows.start * width..]
            };
            let whole = b.columns / width * width;
            for column in (0..whole).step_by(width) {
                let b = panel(column);
                let sums = product_rows::<M, X, ROWS, 2>(multiply, depth, a, a_stride, b);
                add_to_rows::<M, X, ROWS, 2>(multiply, &sums, &mut out[column..], out_stride);
            }
            if whole < b.columns {
                let b = panel(whole);
                let sums = product_rows::<M, X, ROWS, 1>(multiply, depth, a, a_stride, b);
                add_to_rows::<M, X, ROWS, 1>(multiply, &sums, &mut out[whole..], out_stride);
            }
        },
    )
}

/// `out_j += sum_i a[i, j] b_i` for `depth` rows `b_i`, `stride` apart, as wide as `out_j`, and the
/// columns `columns` of `a`.
pub(crate) fn add_columns<M: Multiply<X>, X: Copy>(
    multiply: M,
    depth: usize,
    a: &[X],
    a_stride: usize,
    columns: Range<usize>,
    b: &[X],
    out: &mut [M::Sum],
    stride: usize,
) {
    for (first, height) in tiles::<M::Simd, M::Sum>(columns.len()) {
        let column = columns.start + first;
        let (a, out) = (&a[column..], &mut out[column * stride..]);
        match height {
            12 => add_column_tile::<M, X, 12>(multiply, depth, a, a_stride, b, out, stride),
            6 => add_column_tile::<M, X, 6>(multiply, depth, a, a_stride, b, out, stride),
            4 => add_column_tile::<M, X, 4>(multiply, depth, a, a_stride, b, out, stride),
            2 => add_column_tile::<M, X, 2>(multiply, depth, a, a_stride, b, out, stride),
            _ => add_column_tile::<M, X, 1>(multiply, depth, a, a_stride, b, out, stride),
        }
    }
}

/// [`add_columns`] for the first `ROWS` columns of `a`.
fn add_column_tile<M: Multiply<X>, X: Copy, const ROWS: usize>(
    multiply: M,
    depth: usize,
    a: &[X],
    a_stride: usize,
    b: &[X],
    out: &mut [M::Sum],
    stride: usize,
) {
    multiply.inside(
        #[inline(always)]
        || {
            let width = panel_width::<M::Simd, M::Sum>();
            let whole = stride / width * width;
            for column in (0..whole).step_by(width) {
                let b = &b[column..];
                let sums =
                    product_columns::<M, X, ROWS, 2>(multiply, depth, a, a_stride, b, stride);
                add_to_rows::<M, X, ROWS, 2>(multiply, &sums, &mut out[column..], stride);
            }
            if whole < stride {
                let b = &b[whole..];
                let sums =
                    product_columns::<M, X, ROWS, 1>(multiply, depth, a, a_stride, b, stride);
                add_to_rows::<M, X, ROWS, 1>(multiply, &sums, &mut out[whole..], stride);
            }
        },
    )
}

#[inline(always)]
fn add_to_rows<M: Multiply<X>, X: Copy, const ROWS: usize, const VECTORS: usize>(
    multiply: M,
    sums: &Sums<M::Simd, M::Sum, ROWS, VECTORS>,
    out: &mut [M::Sum],
    stride: usize,
) {
    for i in 0..ROWS {
        let out = &mut out[i * stride..][..VECTORS * lanes::<M::Simd, M::Sum>()];
        let mut new = load::<M::Simd, M::Sum, VECTORS>(multiply.simd(), out);
        for c in 0..VECTORS {
            new[c] += sums[i][c];
        }
        store::<M::Simd, M::Sum, VECTORS>(&new, out);
    }
}

/// `out += sum of weight * row` over the pairs that are visible: one row of a product in which NaN
/// or infinity must not reach those who do not see it. `terms` are (visible, weight, row), and
/// `index(row, column)` says where in `b` a vector of a row is. Adds in the order of the tiles above.
pub(crate) fn add_visible<S: Simd, A: Float>(
    simd: S,
    terms: impl Iterator<Item = (bool, A, usize)> + Clone,
    b: &[A],
    index: impl Fn(usize, usize) -> usize,
    out: &mut [A],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = lanes::<S, A>();
            for (column, out) in (0..).step_by(lanes).zip(out.chunks_exact_mut(lanes)) {
                let mut sum = A::Vector::<S>::simd_from(simd, A::ZERO);
                for (visible, weight, row) in terms.clone() {
                    if visible {
                        let [row] = load::<S, A, 1>(simd, &b[index(row, column)..]);
                        sum = A::Vector::<S>::simd_from(simd, weight).mul_add(row, sum);
                    }
                }
                let [old] = load::<S, A, 1>(simd, out);
                (old + sum).store_slice(out);
            }
        },
    )
}

/// Turns scores `s` and `dP` of one row into `P = exp(s - lse)` (eq. 2) and
/// `dS = P (dP - delta)` (eq. 6); both exactly 0 where the score is `-inf`. `exp` is that of numbers that
/// are at most 0.
pub(crate) fn softmax_gradient<S: Simd, A: Float>(
    simd: S,
    exp: impl Fn(A::Vector<S>) -> A::Vector<S>,
    lse: A,
    delta: A,
    scores: &mut [A],
    dp: &mut [A],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let splat = |x: A| A::Vector::<S>::simd_from(simd, x);
            let (lse, delta, zero) = (splat(lse), splat(delta), splat(A::ZERO));
            let masked = splat(A::NEG_INFINITY);
            let lanes = lanes::<S, A>();
            for (s, dp) in scores.chunks_exact_mut(lanes).zip(dp.chunks_exact_mut(lanes)) {
                let ([score], [d]) = (load::<S, A, 1>(simd, s), load::<S, A, 1>(simd, dp));
                let masked = score.simd_eq(masked);
                // A score that rounds otherwise than that of the forward pass may be above the lse.
                let x = score - lse;
                let p = exp(x.simd_gt(zero).select(zero, x));
                masked.select(zero, p).store_slice(s);
                masked.select(zero, p * (d - delta)).store_slice(dp);
            }
        },
    )
}

/// Multiplies `ds` by the derivative of the softcap, `1 - (s / c)^2` for capped scores `s` (eq. 7).
pub(crate) fn softcap_gradient<S: Simd, A: Float>(simd: S, cap: A, capped: &[A], ds: &mut [A]) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (cap, one) =
                (A::Vector::<S>::simd_from(simd, cap), A::Vector::<S>::simd_from(simd, A::ONE));
            let zero = A::Vector::<S>::simd_from(simd, A::ZERO);
            let lanes = lanes::<S, A>();
            for (s, ds) in capped.chunks_exact(lanes).zip(ds.chunks_exact_mut(lanes)) {
                let ([s], [d]) = (load::<S, A, 1>(simd, s), load::<S, A, 1>(simd, ds));
                let t = s / cap;
                // A masked pair has ds = 0, and s may be NaN.
                d.simd_eq(zero).select(zero, d * (one - t * t)).store_slice(ds);
            }
        },
    )
}
