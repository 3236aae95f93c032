//! The matrix products of the backward pass, on packed blocks.
//!
//! Each is a function of its own, compiled once per vector type and tile height.

use std::ops::Range;

use tensor_utils::Float;
use tensor_utils::simd::{Select, Simd, SimdBase, SimdFloat, SimdFrom};
use tensor_utils::tile::pack::panel_index;
use tensor_utils::tile::{lanes, load, panel_width, product_columns, product_rows, store, tiles};

/// `out[i, j] = a_i . b_j` for the columns of whole panels `columns` of `panels`, packed by
/// `pack_transposed` with `depth` rows each. Rows of `a` are `a_stride` apart, of `out`
/// `out_stride`.
pub(crate) fn dot_rows<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    depth: usize,
    a: &[A],
    a_stride: usize,
    panels: &[A],
    columns: Range<usize>,
    out: &mut [A],
    out_stride: usize,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let width = panel_width::<S, A>();
            for column in columns.step_by(width) {
                let panel = &panels[column * depth..][..depth * width];
                let sums = product_rows::<S, A, ROWS, 2>(simd, depth, a, a_stride, panel);
                for i in 0..ROWS {
                    store::<S, A, 2>(&sums[i], &mut out[i * out_stride + column..][..width]);
                }
            }
        },
    )
}

/// Rows packed by `pack_columns`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panels<'a, A> {
    pub(crate) panels: &'a [A],
    /// Columns of a row, rounded up to lanes.
    pub(crate) columns: usize,
    /// Rows that a panel has room for.
    pub(crate) capacity: usize,
}

/// `out_i += sum_j a[i, j] b_j` for the rows `rows` of `b`; `a[i, j]` is at `i * a_stride + j`.
pub(crate) fn add_rows<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    rows: Range<usize>,
    a: &[A],
    a_stride: usize,
    b: Panels<'_, A>,
    out: &mut [A],
    out_stride: usize,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (depth, a) = (rows.len(), &a[rows.start..]);
            let width = panel_width::<S, A>();
            let panel = |column: usize| {
                let width =
                    panel_index(column, 1, b.columns, b.capacity, width) - column * b.capacity;
                &b.panels[column * b.capacity + rows.start * width..]
            };
            let whole = b.columns / width * width;
            for column in (0..whole).step_by(width) {
                let sums = product_rows::<S, A, ROWS, 2>(simd, depth, a, a_stride, panel(column));
                add_to_rows(simd, &sums, &mut out[column..], out_stride);
            }
            if whole < b.columns {
                let sums = product_rows::<S, A, ROWS, 1>(simd, depth, a, a_stride, panel(whole));
                add_to_rows(simd, &sums, &mut out[whole..], out_stride);
            }
        },
    )
}

/// `out_j += sum_i a[i, j] b_i` for `depth` rows `b_i`, `stride` apart, as wide as `out_j`, and the
/// columns `columns` of `a`.
pub(crate) fn add_columns<S: Simd, A: Float>(
    simd: S,
    depth: usize,
    a: &[A],
    a_stride: usize,
    columns: Range<usize>,
    b: &[A],
    out: &mut [A],
    stride: usize,
) {
    for (first, height) in tiles::<S, A>(columns.len()) {
        let column = columns.start + first;
        let (a, out) = (&a[column..], &mut out[column * stride..]);
        match height {
            12 => add_column_tile::<S, A, 12>(simd, depth, a, a_stride, b, out, stride),
            6 => add_column_tile::<S, A, 6>(simd, depth, a, a_stride, b, out, stride),
            4 => add_column_tile::<S, A, 4>(simd, depth, a, a_stride, b, out, stride),
            2 => add_column_tile::<S, A, 2>(simd, depth, a, a_stride, b, out, stride),
            _ => add_column_tile::<S, A, 1>(simd, depth, a, a_stride, b, out, stride),
        }
    }
}

/// [`add_columns`] for the first `ROWS` columns of `a`.
fn add_column_tile<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    depth: usize,
    a: &[A],
    a_stride: usize,
    b: &[A],
    out: &mut [A],
    stride: usize,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let width = panel_width::<S, A>();
            let whole = stride / width * width;
            for column in (0..whole).step_by(width) {
                let b = &b[column..];
                let sums = product_columns::<S, A, ROWS, 2>(simd, depth, a, a_stride, b, stride);
                add_to_rows(simd, &sums, &mut out[column..], stride);
            }
            if whole < stride {
                let b = &b[whole..];
                let sums = product_columns::<S, A, ROWS, 1>(simd, depth, a, a_stride, b, stride);
                add_to_rows(simd, &sums, &mut out[whole..], stride);
            }
        },
    )
}

#[inline(always)]
fn add_to_rows<S: Simd, A: Float, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    sums: &[[A::Vector<S>; VECTORS]; ROWS],
    out: &mut [A],
    stride: usize,
) {
    for i in 0..ROWS {
        let out = &mut out[i * stride..][..VECTORS * lanes::<S, A>()];
        let mut new = load::<S, A, VECTORS>(simd, out);
        for c in 0..VECTORS {
            new[c] += sums[i][c];
        }
        store::<S, A, VECTORS>(&new, out);
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
/// `dS = P (dP - delta)` (eq. 6); both exactly 0 where the score is `-inf`.
pub(crate) fn softmax_gradient<S: Simd, A: Float>(
    simd: S,
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
                let p = A::exp_nonpositive_vector(simd, score - lse);
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
