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
pub mod pairs;

/// How a tile multiplies what its operands hold: numbers of a compute type, for which every
/// instruction set does it, or [`Pair`](pairs::Pair)s.
pub trait Multiply<X: Copy>: Copy {
    /// The instruction set, see [`Multiply::simd`].
    type Simd: Simd;
    /// What the sums are.
    type Sum: Float;
    /// As many `X` as a vector has sums.
    type Vector: Copy;

    /// Runs `f` with the instructions of the product; as [`Simd::vectorize`].
    fn inside<R>(self, f: impl FnOnce() -> R) -> R;

    /// The same `X` in every lane.
    fn splat(self, x: X) -> Self::Vector;

    /// The first lanes of a slice.
    fn load(self, from: &[X]) -> Self::Vector;

    /// `sum + a * b`, lane by lane.
    fn mul_add(
        self,
        a: Self::Vector,
        b: Self::Vector,
        sum: <Self::Sum as Float>::Vector<Self::Simd>,
    ) -> <Self::Sum as Float>::Vector<Self::Simd>;

    /// The instruction set.
    fn simd(self) -> Self::Simd;

    /// Sums of nothing.
    #[inline(always)]
    fn zero(self) -> <Self::Sum as Float>::Vector<Self::Simd> {
        <Self::Sum as Float>::Vector::<Self::Simd>::simd_from(self.simd(), Self::Sum::ZERO)
    }
}

impl<S: Simd, A: Float> Multiply<A> for S {
    type Simd = S;
    type Sum = A;
    type Vector = A::Vector<S>;

    #[inline(always)]
    fn inside<R>(self, f: impl FnOnce() -> R) -> R {
        self.vectorize(f)
    }

    #[inline(always)]
    fn splat(self, x: A) -> A::Vector<S> {
        A::Vector::<S>::simd_from(self, x)
    }

    #[inline(always)]
    fn load(self, from: &[A]) -> A::Vector<S> {
        A::Vector::from_slice(self, &from[..lanes::<S, A>()])
    }

    #[inline(always)]
    fn mul_add(self, a: A::Vector<S>, b: A::Vector<S>, sum: A::Vector<S>) -> A::Vector<S> {
        a.mul_add(b, sum)
    }

    #[inline(always)]
    fn simd(self) -> S {
        self
    }
}

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
pub fn product_rows<M: Multiply<X>, X: Copy, const ROWS: usize, const VECTORS: usize>(
    multiply: M,
    depth: usize,
    a: &[X],
    a_stride: usize,
    panel: &[X],
) -> Sums<M::Simd, M::Sum, ROWS, VECTORS> {
    let sums = [[multiply.zero(); VECTORS]; ROWS];
    add_product_rows(multiply, sums, depth, a, a_stride, panel)
}

/// [`product_rows`], going on from `sums`.
#[inline(always)]
pub fn add_product_rows<M: Multiply<X>, X: Copy, const ROWS: usize, const VECTORS: usize>(
    multiply: M,
    mut sums: Sums<M::Simd, M::Sum, ROWS, VECTORS>,
    depth: usize,
    a: &[X],
    a_stride: usize,
    panel: &[X],
) -> Sums<M::Simd, M::Sum, ROWS, VECTORS> {
    debug_assert!(depth.is_multiple_of(UNROLL) && a_stride.is_multiple_of(UNROLL));
    let (a, _) = a.as_chunks::<UNROLL>();
    let lanes = lanes::<M::Simd, M::Sum>();
    let width = VECTORS * lanes;
    for (chunk, b) in panel[..depth * width].chunks_exact(UNROLL * width).enumerate() {
        let rows: [&[X; UNROLL]; ROWS] = array::from_fn(|i| &a[i * a_stride / UNROLL + chunk]);
        for u in 0..UNROLL {
            let b = &b[u * width..][..width];
            let b: [M::Vector; VECTORS] = array::from_fn(|c| multiply.load(&b[c * lanes..]));
            for i in 0..ROWS {
                let a = multiply.splat(rows[i][u]);
                for c in 0..VECTORS {
                    sums[i][c] = multiply.mul_add(a, b[c], sums[i][c]);
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
pub fn product_columns<M: Multiply<X>, X: Copy, const ROWS: usize, const VECTORS: usize>(
    multiply: M,
    depth: usize,
    a: &[X],
    a_stride: usize,
    b: &[X],
    b_stride: usize,
) -> Sums<M::Simd, M::Sum, ROWS, VECTORS> {
    let mut sums = [[multiply.zero(); VECTORS]; ROWS];
    let lanes = lanes::<M::Simd, M::Sum>();
    for k in 0..depth {
        let column = &a[k * a_stride..][..ROWS];
        let b = &b[k * b_stride..][..VECTORS * lanes];
        let b: [M::Vector; VECTORS] = array::from_fn(|c| multiply.load(&b[c * lanes..]));
        for i in 0..ROWS {
            let a = multiply.splat(column[i]);
            for c in 0..VECTORS {
                sums[i][c] = multiply.mul_add(a, b[c], sums[i][c]);
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
