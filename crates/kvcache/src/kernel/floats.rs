//! The one product that attention consists of: `sums[row][lane] += sum_i factors[row][i] x[i][lane]`.
//!
//! For scores `i` is the channel, a lane is a key and the factors are the query; for the output `i` is
//! the key, a lane is a channel and the factors are the weights. Each sum is one chain in the order of
//! `i`, so it has the same bits in any company and from any page.
//!
//! Vectors are handled in plain loops: a closure given to the standard library, such as that of
//! `array::from_fn`, would be compiled for the target's baseline.

use tensor_utils::simd::{Bytes, Select, Simd, SimdBase, SimdFloat, SimdFrom};

use super::ahead::Lines;
use super::tile::{Mode, Panel, Results, Tiles, cover, lanes};

/// Numbers that are stored as floats.
pub(crate) trait Numbers: Copy {
    /// What the slab holds.
    type Word: Copy;
    /// Words that lie next to one another for each lane.
    const WIDTH: usize;

    /// The first lanes of a pair of numbers, which `from` begins with. The last vector may reach beyond a
    /// record.
    fn pair<S: Simd, const V: usize>(
        simd: S,
        from: &[Self::Word],
        stride: usize,
    ) -> [[S::f32s; V]; 2];

    /// One number of a pair: its half `half`, 0 or 1. Where the two lie in rows of their own it reads
    /// nothing of the other, which a record with an odd number of rows does not have.
    #[inline(always)]
    fn one<S: Simd, const V: usize>(
        simd: S,
        from: &[Self::Word],
        stride: usize,
        half: usize,
    ) -> [S::f32s; V] {
        Self::pair(simd, from, stride)[half]
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct F32;
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16;
#[derive(Debug, Clone, Copy)]
pub(crate) struct F16;

impl Numbers for F32 {
    type Word = f32;
    const WIDTH: usize = 1;

    #[inline(always)]
    fn pair<S: Simd, const V: usize>(simd: S, from: &[f32], stride: usize) -> [[S::f32s; V]; 2] {
        let rows = [&from[..V * lanes::<S>()], &from[stride..][..V * lanes::<S>()]];
        let mut numbers = [[S::f32s::simd_from(simd, 0.0); V]; 2];
        for v in 0..V {
            for half in 0..2 {
                let lanes = &rows[half][v * lanes::<S>()..][..lanes::<S>()];
                numbers[half][v] = S::f32s::from_slice(simd, lanes);
            }
        }
        numbers
    }

    #[inline(always)]
    fn one<S: Simd, const V: usize>(
        simd: S,
        from: &[f32],
        stride: usize,
        half: usize,
    ) -> [S::f32s; V] {
        let row = &from[half * stride..][..V * lanes::<S>()];
        let mut numbers = [S::f32s::simd_from(simd, 0.0); V];
        for v in 0..V {
            numbers[v] = S::f32s::from_slice(simd, &row[v * lanes::<S>()..][..lanes::<S>()]);
        }
        numbers
    }
}

/// Words of 16 bits, `[i / 2][lane][2]`: a vector of 32 bits has both numbers of a pair in each lane.
macro_rules! sixteen_bits {
    ($name:ident, $widen:ident) => {
        impl Numbers for $name {
            type Word = u16;
            const WIDTH: usize = 2;

            #[inline(always)]
            fn pair<S: Simd, const V: usize>(simd: S, from: &[u16], _: usize) -> [[S::f32s; V]; 2] {
                let words = &from[..V * 2 * lanes::<S>()];
                let mut numbers = [[S::f32s::simd_from(simd, 0.0); V]; 2];
                for v in 0..V {
                    let words = &words[v * 2 * lanes::<S>()..][..2 * lanes::<S>()];
                    let both: S::u32s = S::u16s::from_slice(simd, words).bitcast();
                    numbers[0][v] = $widen(simd, both << 16);
                    numbers[1][v] = $widen(simd, both & 0xffff_0000);
                }
                numbers
            }
        }
    };
}

sixteen_bits!(Bf16, widen_bf16);
sixteen_bits!(F16, widen_f16);

/// A bf16 is the upper half of an f32.
#[inline(always)]
fn widen_bf16<S: Simd>(_: S, upper: S::u32s) -> S::f32s {
    upper.bitcast()
}

/// An f16 in the upper half: exponent and fraction moved into place and scaled by the difference of the
/// exponents' biases, which subnormal numbers need too.
#[inline(always)]
fn widen_f16<S: Simd>(simd: S, upper: S::u32s) -> S::f32s {
    let sign = upper & S::u32s::simd_from(simd, 0x8000_0000);
    let magnitude = (upper & S::u32s::simd_from(simd, 0x7fff_0000)) >> 3;
    let scaled: S::f32s = magnitude.bitcast();
    let scaled = scaled * S::f32s::simd_from(simd, f32::from_bits(0x7780_0000));
    // Infinity and NaN keep the largest exponent.
    let special = magnitude.simd_ge(S::u32s::simd_from(simd, 0x0f80_0000));
    let special_bits: S::f32s = (magnitude | S::u32s::simd_from(simd, 0x7f80_0000)).bitcast();
    let value = special.select(special_bits, scaled);
    (value.bitcast::<S::u32s>() | sign).bitcast()
}

/// Adds `factors[r][i] x[i]` for `i` in `first..first + count`, over all vectors and `rows` rows.
///
/// `factors[r][i - first]` is at `r * factor_stride + i - first`.
#[inline(always)]
pub(crate) fn product<S: Simd, N: Numbers>(
    simd: S,
    x: Panel<'_, N::Word>,
    range: (usize, usize),
    factors: &[f32],
    factor_stride: usize,
    rows: usize,
    mode: Mode,
    to: &mut Results<'_>,
) {
    let mut product = Product::<N> { x, range, factors, factor_stride, mode, to };
    cover(simd, &mut product, rows, x.vectors, x.ahead);
}

struct Product<'a, 'b, 'c, N: Numbers> {
    x: Panel<'a, N::Word>,
    range: (usize, usize),
    factors: &'a [f32],
    factor_stride: usize,
    mode: Mode,
    to: &'b mut Results<'c>,
}

impl<S: Simd, N: Numbers> Tiles<S> for Product<'_, '_, '_, N> {
    fn tile<const ROWS: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        vector: usize,
        lines: Lines<'_>,
    ) {
        let Self { x, range: (first, count), factors, factor_stride, mode, ref mut to } = *self;
        let panel = &x.words[vector * N::WIDTH * lanes::<S>()..];
        let pair = |number: usize| &panel[number / 2 * 2 * x.stride..];
        let column = vector * lanes::<S>();
        simd.vectorize(
            #[inline(always)]
            || {
                let mut sums = [[S::f32s::simd_from(simd, 0.0); V]; ROWS];
                let mut rows: [&[f32]; ROWS] = [&[]; ROWS];
                for r in 0..ROWS {
                    sums[r] = to.begin(simd, row + r, column, mode);
                    rows[r] = &factors[(row + r) * factor_stride..][..count];
                }
                // One number if the first is odd, then pairs, then the rest.
                let lead = (first % 2).min(count);
                if lead == 1 {
                    let x = N::one::<S, V>(simd, pair(first), x.stride, 1);
                    sums = add(simd, x, &rows, 0, sums);
                }
                let mut pairs: [&[[f32; 2]]; ROWS] = [&[]; ROWS];
                for r in 0..ROWS {
                    pairs[r] = rows[r][lead..].as_chunks().0;
                }
                // Behind a lead that is all there may be the end of the slab.
                if count > lead {
                    let panel = pair(first + lead);
                    sums = add_pairs::<S, N, ROWS, V>(simd, panel, x.stride, pairs, lines, sums);
                }
                if (count - lead) % 2 == 1 {
                    let x = N::one::<S, V>(simd, pair(first + count), x.stride, 0);
                    sums = add(simd, x, &rows, count - 1, sums);
                }
                for r in 0..ROWS {
                    to.end::<S, V>(row + r, column, sums[r]);
                }
            },
        )
    }
}

/// `sums[r] += factors[r][i] x[i]` for as many pairs as there are factors, from the beginning of `panel` on.
///
/// Sums come and go by value: in the loop, and nowhere else, they are certain to be in registers.
#[inline(always)]
fn add_pairs<S: Simd, N: Numbers, const ROWS: usize, const V: usize>(
    simd: S,
    panel: &[N::Word],
    stride: usize,
    factors: [&[[f32; 2]]; ROWS],
    lines: Lines<'_>,
    mut sums: [[S::f32s; V]; ROWS],
) -> [[S::f32s; V]; ROWS] {
    let count = factors[0].len();
    // A few lines at a time: more of them at once would fill the queue of misses, and the loads of the
    // product would wait behind them.
    let mut ahead = lines.over(count);
    let mut rows = factors;
    for row in &mut rows {
        *row = &row[..count];
    }
    for pair in 0..count {
        ahead.step();
        let x = N::pair::<S, V>(simd, &panel[2 * pair * stride..], stride);
        for i in 0..2 {
            for r in 0..ROWS {
                let f = S::f32s::simd_from(simd, rows[r][pair][i]);
                for v in 0..V {
                    sums[r][v] = f.mul_add(x[i][v], sums[r][v]);
                }
            }
        }
    }
    sums
}

/// `sums[r] += factors[r][i] x`.
#[inline(always)]
fn add<S: Simd, const ROWS: usize, const V: usize>(
    simd: S,
    x: [S::f32s; V],
    factors: &[&[f32]; ROWS],
    i: usize,
    mut sums: [[S::f32s; V]; ROWS],
) -> [[S::f32s; V]; ROWS] {
    for r in 0..ROWS {
        let f = S::f32s::simd_from(simd, factors[r][i]);
        for v in 0..V {
            sums[r][v] = f.mul_add(x[v], sums[r][v]);
        }
    }
    sums
}
