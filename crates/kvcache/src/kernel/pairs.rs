//! The product of [`super::floats`] for queries and keys in bf16, two channels at a time: products of two
//! bf16 are exact in `f32`, in which the sums are.
//!
//! Keys lie in pairs of neighbouring channels already. The scale comes last, since a query times it is no
//! bf16. Weights and values are multiplied in `f32`: a weight rounded to bf16 would cost as much accuracy as
//! rounding the output.

use tensor_utils::simd::{Bytes, Simd, SimdBase, SimdFrom};
use tensor_utils::tile::Multiply;
use tensor_utils::tile::pairs::{Bf16Dot, Pair};

use super::ahead::Lines;
use super::tile::{Panel, Results, Tiles, cover, lanes};

type Avx512 = <Bf16Dot as Multiply<Pair>>::Simd;
type Sum = <Avx512 as Simd>::f32s;
type Words = <Avx512 as Simd>::u16s;

/// Queries in pairs of channels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PairRows<'a> {
    pub(crate) dot: Bf16Dot,
    /// What the products of queries and keys are multiplied by.
    pub(crate) scale: f32,
    pub(crate) rows: &'a [Pair],
    /// From one row to the next.
    pub(crate) stride: usize,
}

impl<'a> PairRows<'a> {
    fn starting_at(self, row: usize) -> Self {
        Self { rows: &self.rows[row * self.stride..], ..self }
    }
}

/// `scale sum_i queries[row][i] x[i][lane]` for the first `rows` rows and `pairs` pairs of channels.
pub(crate) fn product(
    queries: PairRows<'_>,
    x: Panel<'_, u16>,
    (rows, pairs): (usize, usize),
    to: &mut Results<'_>,
) {
    let mut product = Product { queries, x, pairs, to };
    cover(queries.dot.simd(), &mut product, rows, x.vectors, x.ahead);
}

struct Product<'a, 'b, 'c> {
    queries: PairRows<'a>,
    x: Panel<'a, u16>,
    pairs: usize,
    to: &'b mut Results<'c>,
}

impl Tiles<Avx512> for Product<'_, '_, '_> {
    fn tile<const ROWS: usize, const V: usize>(
        &mut self,
        simd: Avx512,
        row: usize,
        vector: usize,
        lines: Lines<'_>,
    ) {
        let Self { queries: PairRows { dot, scale, .. }, x, pairs, ref mut to } = *self;
        let panel = &x.words[vector * 2 * lanes::<Avx512>()..];
        let mut rows: [&[Pair]; ROWS] = [&[]; ROWS];
        for r in 0..ROWS {
            rows[r] = &self.queries.starting_at(row + r).rows[..pairs];
        }
        dot.inside(
            #[inline(always)]
            || {
                let scale = Sum::simd_from(simd, scale);
                let mut sums = sums::<ROWS, V>(dot, panel, x.stride, rows, lines);
                for r in 0..ROWS {
                    for v in 0..V {
                        sums[r][v] *= scale;
                    }
                    to.end::<Avx512, V>(row + r, vector * lanes::<Avx512>(), sums[r]);
                }
            },
        );
    }
}

/// `sum_i rows[r][i] x[i]` over as many pairs as the rows have.
#[inline(always)]
fn sums<const ROWS: usize, const V: usize>(
    dot: Bf16Dot,
    panel: &[u16],
    stride: usize,
    mut rows: [&[Pair]; ROWS],
    lines: Lines<'_>,
) -> [[Sum; V]; ROWS] {
    let width = 2 * lanes::<Avx512>();
    let mut sums = [[dot.zero(); V]; ROWS];
    let count = rows[0].len();
    let mut ahead = lines.over(count);
    for row in &mut rows {
        *row = &row[..count];
    }
    for pair in 0..count {
        ahead.step();
        let words = &panel[2 * pair * stride..][..V * width];
        let mut x = [dot.splat(0); V];
        for v in 0..V {
            x[v] = Words::from_slice(dot.simd(), &words[v * width..][..width]).bitcast();
        }
        for r in 0..ROWS {
            let query = dot.splat(rows[r][pair]);
            for v in 0..V {
                sums[r][v] = dot.mul_add(query, x[v], sums[r][v]);
            }
        }
    }
    sums
}
