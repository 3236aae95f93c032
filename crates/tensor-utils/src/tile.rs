//! Register tiles: the matrix products inside fused kernels, whose operands are packed blocks that
//! stay in the cache.
//!
//! A tile is a few rows by one or two vectors; its sums stay in registers while the product runs
//! over the common dimension, one fused multiply-add a step (two operations without FMA). So each
//! sum is one chain in index order, whatever the height of the tile: a row has the same bits alone
//! and among others.
//!
//! All functions but those of [`pack`] are to be inlined into [`Simd::vectorize`]. Operands are
//! slices with strides; a slice that is too short is a bug of the caller and panics.

use std::array;

use fearless_simd::{Simd, SimdBase, SimdFloat, SimdFrom};

use crate::Float;

pub mod pack;

/// Steps that [`product_rows`] takes at once, so that bounds are checked once for all of them.
/// Divides every [`panel_width`].
pub const UNROLL: usize = 4;

/// Sums of a tile: rows of vectors.
pub type Sums<S, A, const ROWS: usize, const VECTORS: usize> =
    [[<A as Float>::Vector<S>; VECTORS]; ROWS];

/// Lanes of the native vector of `A`.
#[inline(always)]
pub const fn lanes<S: Simd, A: Float>() -> usize {
    <A::Vector<S> as SimdBase<S>>::LEN
}

/// Columns of a panel: two vectors.
#[inline(always)]
pub const fn panel_width<S: Simd, A: Float>() -> usize {
    2 * lanes::<S, A>()
}

/// Stride of rows of `columns` numbers that a tile reads by vectors or [`UNROLL`] at a time: at most
/// `columns` rounded up to 16.
#[inline(always)]
pub const fn row_stride<S: Simd, A: Float>(columns: usize) -> usize {
    let lanes = lanes::<S, A>();
    columns.next_multiple_of(if lanes > UNROLL { lanes } else { UNROLL })
}

/// Heights of tiles, largest first. With 64-byte vectors the largest keeps 24 of 32 registers as
/// sums, else 12 of 16. The last is 1, so any number of rows can be cut into tiles.
#[inline(always)]
pub const fn heights<S: Simd, A: Float>() -> [usize; 3] {
    if lanes::<S, A>() * size_of::<A>() == 64 { [12, 4, 1] } else { [6, 2, 1] }
}

/// Cuts `rows` rows into tiles: (first row, height), tallest first.
pub fn tiles<S: Simd, A: Float>(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut row = 0;
    std::iter::from_fn(move || {
        let height = heights::<S, A>().into_iter().find(|&height| row + height <= rows)?;
        row += height;
        Some((row - height, height))
    })
}

/// `sums[i] = sum_k a[i, k] b[k]` for row-major `a`.
///
/// `a[i, k]` is at `i * a_stride + k`, the vectors of `b[k]` at `k * VECTORS * lanes`: a panel.
/// `depth` and `a_stride` are multiples of [`UNROLL`].
#[inline(always)]
pub fn product_rows<S: Simd, A: Float, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    depth: usize,
    a: &[A],
    a_stride: usize,
    panel: &[A],
) -> Sums<S, A, ROWS, VECTORS> {
    debug_assert!(depth.is_multiple_of(UNROLL) && a_stride.is_multiple_of(UNROLL));
    let (a, _) = a.as_chunks::<UNROLL>();
    let mut sums = [[A::Vector::<S>::simd_from(simd, A::ZERO); VECTORS]; ROWS];
    let width = VECTORS * lanes::<S, A>();
    for (chunk, b) in panel[..depth * width].chunks_exact(UNROLL * width).enumerate() {
        let rows: [&[A; UNROLL]; ROWS] = array::from_fn(|i| &a[i * a_stride / UNROLL + chunk]);
        for u in 0..UNROLL {
            let b = load::<S, A, VECTORS>(simd, &b[u * width..]);
            for i in 0..ROWS {
                let a = A::Vector::<S>::simd_from(simd, rows[i][u]);
                for c in 0..VECTORS {
                    sums[i][c] = a.mul_add(b[c], sums[i][c]);
                }
            }
        }
    }
    sums
}

/// `sums[i] = sum_k a[k, i] b[k]`: the product with the transpose of `a`.
///
/// `a[k, i]` is at `k * a_stride + i`, the vectors of `b[k]` at `k * b_stride`.
#[inline(always)]
pub fn product_columns<S: Simd, A: Float, const ROWS: usize, const VECTORS: usize>(
    simd: S,
    depth: usize,
    a: &[A],
    a_stride: usize,
    b: &[A],
    b_stride: usize,
) -> Sums<S, A, ROWS, VECTORS> {
    let mut sums = [[A::Vector::<S>::simd_from(simd, A::ZERO); VECTORS]; ROWS];
    for k in 0..depth {
        let column = &a[k * a_stride..][..ROWS];
        let b = load::<S, A, VECTORS>(simd, &b[k * b_stride..]);
        for i in 0..ROWS {
            let a = A::Vector::<S>::simd_from(simd, column[i]);
            for c in 0..VECTORS {
                sums[i][c] = a.mul_add(b[c], sums[i][c]);
            }
        }
    }
    sums
}

/// The first `VECTORS` vectors of a slice.
#[inline(always)]
pub fn load<S: Simd, A: Float, const VECTORS: usize>(
    simd: S,
    from: &[A],
) -> [A::Vector<S>; VECTORS] {
    let from = &from[..VECTORS * lanes::<S, A>()];
    array::from_fn(|c| A::Vector::from_slice(simd, &from[c * lanes::<S, A>()..][..lanes::<S, A>()]))
}

/// Stores vectors at the start of a slice.
#[inline(always)]
pub fn store<S: Simd, A: Float, const VECTORS: usize>(
    vectors: &[A::Vector<S>; VECTORS],
    to: &mut [A],
) {
    for (vector, to) in vectors.iter().zip(to.chunks_exact_mut(lanes::<S, A>())) {
        vector.store_slice(to);
    }
}
