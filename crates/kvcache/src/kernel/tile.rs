//! Results that are computed tile by tile, their sums in registers: 8 rows by 2 vectors where there are
//! many rows, so that a vector is read once for all of them, and up to 4 rows by 4 vectors where there
//! are few.

use tensor_utils::simd::{Simd, SimdBase, SimdFrom};

use super::ahead::Lines;
use crate::form::Part;

/// Lanes of a vector of `f32`.
#[inline(always)]
pub(crate) const fn lanes<S: Simd>() -> usize {
    <S::f32s as SimdBase<S>>::LEN
}

/// What the factors are multiplied by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel<'a, W> {
    /// From the first lane of number 0 on.
    pub(crate) words: &'a [W],
    /// Lanes of a record.
    pub(crate) stride: usize,
    /// Vectors of lanes.
    pub(crate) vectors: usize,
    /// What is fetched meanwhile.
    pub(crate) ahead: Lines<'a>,
}

impl<'a, W> Panel<'a, W> {
    /// Some lanes of a record whose numbers are `words`.
    #[inline(always)]
    pub(crate) fn new<S: Simd>(words: &'a [W], part: &Part, ahead: Lines<'a>) -> Self {
        let vectors = part.lanes.len().div_ceil(lanes::<S>());
        Self { words: &words[part.start..], stride: part.stride, vectors, ahead }
    }
}

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// They begin at 0 and replace what is there.
    Replace,
    /// They begin with what is there.
    Add,
}

/// Results: rows `stride` apart, as many lanes of each as the panel has.
#[derive(Debug)]
pub(crate) struct Results<'a> {
    pub(crate) numbers: &'a mut [f32],
    pub(crate) stride: usize,
}

impl Results<'_> {
    /// `V` vectors of a row from a column on: what its sums begin with.
    #[inline(always)]
    pub(crate) fn begin<S: Simd, const V: usize>(
        &self,
        simd: S,
        row: usize,
        column: usize,
        mode: Mode,
    ) -> [S::f32s; V] {
        let mut sums = [S::f32s::simd_from(simd, 0.0); V];
        if mode == Mode::Add {
            let from = &self.numbers[row * self.stride + column..][..V * lanes::<S>()];
            for v in 0..V {
                sums[v] = S::f32s::from_slice(simd, &from[v * lanes::<S>()..][..lanes::<S>()]);
            }
        }
        sums
    }

    /// Stores them.
    #[inline(always)]
    pub(crate) fn end<S: Simd, const V: usize>(
        &mut self,
        row: usize,
        column: usize,
        sums: [S::f32s; V],
    ) {
        let to = &mut self.numbers[row * self.stride + column..][..V * lanes::<S>()];
        for v in 0..V {
            sums[v].store_slice(&mut to[v * lanes::<S>()..][..lanes::<S>()]);
        }
    }
}

/// A product that is computed tile by tile.
pub(crate) trait Tiles<S: Simd> {
    /// Results `row..row + ROWS` of vectors `vector..vector + V`, fetching `lines`.
    fn tile<const ROWS: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        vector: usize,
        lines: Lines<'_>,
    );
}

/// Computes all rows of all vectors. The height of a tile is chosen by the number of registers, 32 or
/// 16: the sums of a tile, its vectors and a factor.
#[inline(always)]
pub(crate) fn cover<S: Simd, P: Tiles<S>>(
    simd: S,
    product: &mut P,
    rows: usize,
    vectors: usize,
    lines: Lines<'_>,
) {
    // A share is rounded up, so that none is left over.
    let each = ((lines.len() as u64) << 32) / (rows * vectors).max(1) as u64 + 1;
    let mut cover = Cover { rows, vectors, lines, each, row: 0, done: 0 };
    if const { lanes::<S>() == 16 } {
        cover.strips::<S, 8, 2>(simd, product);
        cover.strips::<S, 4, 4>(simd, product);
        cover.strips::<S, 2, 4>(simd, product);
        cover.strips::<S, 1, 4>(simd, product);
    } else {
        cover.strips::<S, 4, 2>(simd, product);
        cover.strips::<S, 2, 2>(simd, product);
        cover.strips::<S, 1, 2>(simd, product);
    }
}

struct Cover<'a> {
    rows: usize,
    vectors: usize,
    lines: Lines<'a>,
    /// Lines for each sum, times 2^32.
    each: u64,
    /// Results before it are done.
    row: usize,
    /// Sums that are done.
    done: usize,
}

impl<'a> Cover<'a> {
    /// As many rows as tiles of this height hold. A few vectors for all rows, then the next ones: these
    /// vectors stay in the first-level cache.
    fn strips<S: Simd, const ROWS: usize, const V: usize>(
        &mut self,
        simd: S,
        product: &mut impl Tiles<S>,
    ) {
        let end = self.rows - (self.rows - self.row) % ROWS;
        let mut vector = 0;
        while vector < self.vectors && self.row < end {
            let wide = self.vectors - vector >= V;
            let width = if wide { V } else { 1 };
            for row in (self.row..end).step_by(ROWS) {
                let lines = self.share(ROWS * width);
                if wide {
                    product.tile::<ROWS, V>(simd, row, vector, lines);
                } else {
                    product.tile::<ROWS, 1>(simd, row, vector, lines);
                }
            }
            vector += width;
        }
        self.row = end;
    }

    /// The lines of a tile of `sums` sums.
    fn share(&mut self, sums: usize) -> Lines<'a> {
        let until =
            |done: usize| (((self.each * done as u64) >> 32) as usize).min(self.lines.len());
        let lines = self.lines.slice(until(self.done)..until(self.done + sums));
        self.done += sums;
        lines
    }
}
