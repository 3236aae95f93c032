//! The one product that attention consists of: `sums[row][lane] += sum_i factors[row][i] x[i][lane]`.
//!
//! For scores `i` is the channel, a lane is a key and the factors are the query; for the output `i` is
//! the key, a lane is a channel and the factors are the weights. Each sum is one chain in the order of
//! `i`, so it has the same bits in any company and from any page.
//!
//! Sums stay in registers: tiles of 12 rows by 2 vectors where there are many rows, so that a vector is
//! read once for all of them, and of up to 4 rows by 4 vectors where there are few.
//!
//! Vectors are handled in plain loops: a closure given to the standard library, such as that of
//! `array::from_fn`, would be compiled for the target's baseline.

use std::array;

use tensor_utils::simd::{
    Bytes, Select, Simd, SimdBase, SimdFloat, SimdFrom, SimdInt, SimdIntWiden,
};

use super::ahead::Lines;

/// Lanes of a vector of `f32`.
#[inline(always)]
pub(crate) const fn lanes<S: Simd>() -> usize {
    <S::f32s as SimdBase<S>>::LEN
}

/// Numbers that are stored as floats.
pub(crate) trait Numbers: Copy {
    /// What the slab holds.
    type Word: Copy;
    /// Words that lie next to one another for each lane.
    const WIDTH: usize;

    /// Numbers `2 p` and `2 p + 1` of the first lanes of `panel`.
    fn pair<S: Simd, const V: usize>(
        simd: S,
        panel: &[Self::Word],
        stride: usize,
        p: usize,
    ) -> [[S::f32s; V]; 2];
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
    fn pair<S: Simd, const V: usize>(
        simd: S,
        panel: &[f32],
        stride: usize,
        p: usize,
    ) -> [[S::f32s; V]; 2] {
        let at = 2 * p * stride;
        let rows = [
            &panel[at..at + V * lanes::<S>()],
            &panel[at + stride..at + stride + V * lanes::<S>()],
        ];
        let mut pair = [[S::f32s::simd_from(simd, 0.0); V]; 2];
        for v in 0..V {
            for half in 0..2 {
                let lanes = &rows[half][v * lanes::<S>()..][..lanes::<S>()];
                pair[half][v] = S::f32s::from_slice(simd, lanes);
            }
        }
        pair
    }
}

/// Words of 16 bits, `[i / 2][lane][2]`: a vector of 32 bits has both numbers of a pair in each lane.
macro_rules! sixteen_bits {
    ($name:ident, $widen:ident) => {
        impl Numbers for $name {
            type Word = u16;
            const WIDTH: usize = 2;

            #[inline(always)]
            fn pair<S: Simd, const V: usize>(
                simd: S,
                panel: &[u16],
                stride: usize,
                p: usize,
            ) -> [[S::f32s; V]; 2] {
                let words = &panel[2 * p * stride..][..V * 2 * lanes::<S>()];
                let mut pair = [[S::f32s::simd_from(simd, 0.0); V]; 2];
                for v in 0..V {
                    let words = &words[v * 2 * lanes::<S>()..][..2 * lanes::<S>()];
                    let both: S::u32s = S::u16s::from_slice(simd, words).bitcast();
                    pair[0][v] = $widen(simd, both << 16);
                    pair[1][v] = $widen(simd, both & 0xffff_0000);
                }
                pair
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

/// What [`product`] and [`code_product`] multiply.
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

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They begin at 0 and replace what is there.
    Replace,
    /// They begin with what is there.
    Add,
}

/// Results: rows `stride` apart, as many lanes of each as the panel has.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) numbers: &'a mut [f32],
    pub(crate) stride: usize,
}

/// A product that is computed tile by tile.
trait Tiles<S: Simd> {
    /// Whether tiles of 12 rows are compiled to what they should be, all sums in registers.
    const TALL: bool;

    /// Rows `row..row + ROWS` of vectors `vector..vector + V`, fetching `lines`.
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
fn cover<S: Simd, P: Tiles<S>>(
    simd: S,
    product: &mut P,
    rows: usize,
    vectors: usize,
    lines: Lines<'_>,
) {
    let mut cover = Cover { rows, vectors, lines, row: 0, done: 0 };
    if const { lanes::<S>() == 16 } {
        if const { P::TALL } {
            cover.strips::<S, 12, 2>(simd, product);
        }
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
    /// Rows before it are done.
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
        let until = |done: usize| self.lines.len() * done / (self.rows * self.vectors);
        let lines = self.lines.slice(until(self.done)..until(self.done + sums));
        self.done += sums;
        lines
    }
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
    mode: Into,
    to: &mut Rows<'_>,
) {
    let mut product = Product::<N> { x, range, factors, factor_stride, mode, to };
    cover(simd, &mut product, rows, x.vectors, x.ahead);
}

struct Product<'a, 'b, 'c, N: Numbers> {
    x: Panel<'a, N::Word>,
    range: (usize, usize),
    factors: &'a [f32],
    factor_stride: usize,
    mode: Into,
    to: &'b mut Rows<'c>,
}

impl<S: Simd, N: Numbers> Tiles<S> for Product<'_, '_, '_, N> {
    const TALL: bool = true;

    fn tile<const ROWS: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        vector: usize,
        lines: Lines<'_>,
    ) {
        let Self { x, range: (first, count), factors, factor_stride, mode, ref mut to } = *self;
        let panel = &x.words[vector * N::WIDTH * lanes::<S>()..];
        let column = vector * lanes::<S>();
        simd.vectorize(
            #[inline(always)]
            || {
                let mut sums = [[S::f32s::simd_from(simd, 0.0); V]; ROWS];
                if mode == Into::Add {
                    for r in 0..ROWS {
                        let from = &to.numbers[(row + r) * to.stride + column..];
                        let from = &from[..V * lanes::<S>()];
                        for v in 0..V {
                            let from = &from[v * lanes::<S>()..][..lanes::<S>()];
                            sums[r][v] = S::f32s::from_slice(simd, from);
                        }
                    }
                }
                let factors: [&[f32]; ROWS] =
                    array::from_fn(|r| &factors[(row + r) * factor_stride..][..count]);
                // One number if the first is odd, then two pairs at a time, then the rest.
                let lead = (first % 2).min(count);
                if lead == 1 {
                    let x = N::pair::<S, V>(simd, panel, x.stride, first / 2)[1];
                    add::<S, ROWS, V>(simd, x, &factors.map(|f| f[0]), &mut sums);
                }
                let quads: [&[[f32; 4]]; ROWS] = factors.map(|f| f[lead..].as_chunks::<4>().0);
                let (p, count_quads) = ((first + lead) / 2, (count - lead) / 4);
                sums = add_quads::<S, N, ROWS, V>(
                    simd,
                    panel,
                    x.stride,
                    p,
                    quads,
                    count_quads,
                    lines,
                    sums,
                );
                for i in lead + count_quads * 4..count {
                    let pair = N::pair::<S, V>(simd, panel, x.stride, (first + i) / 2);
                    let x = if (first + i) % 2 == 0 { pair[0] } else { pair[1] };
                    add::<S, ROWS, V>(simd, x, &factors.map(|f| f[i]), &mut sums);
                }
                for r in 0..ROWS {
                    let to = &mut to.numbers[(row + r) * to.stride + column..];
                    let to = &mut to[..V * lanes::<S>()];
                    for v in 0..V {
                        sums[r][v].store_slice(&mut to[v * lanes::<S>()..][..lanes::<S>()]);
                    }
                }
            },
        )
    }
}

/// `sums[r] += factors[r][i] x[i]` for `4 count` numbers from pair `p` on.
///
/// Sums come and go by value: in the loop, and nowhere else, they are certain to be in registers.
#[inline(always)]
fn add_quads<S: Simd, N: Numbers, const ROWS: usize, const V: usize>(
    simd: S,
    panel: &[N::Word],
    stride: usize,
    p: usize,
    factors: [&[[f32; 4]]; ROWS],
    count: usize,
    lines: Lines<'_>,
    mut sums: [[S::f32s; V]; ROWS],
) -> [[S::f32s; V]; ROWS] {
    // A few lines at a time: more of them at once would fill the queue of misses, and the loads of the
    // product would wait behind them. Tall tiles have time for more, but no registers.
    let often = ROWS <= 4;
    let mut ahead = lines.over(if often { 4 * count } else { count });
    for quad in 0..count {
        if !often {
            ahead.step();
        }
        let factors: [&[f32; 4]; ROWS] = array::from_fn(|r| &factors[r][quad]);
        let [a, b] = N::pair::<S, V>(simd, panel, stride, p + 2 * quad);
        let [c, d] = N::pair::<S, V>(simd, panel, stride, p + 2 * quad + 1);
        let x = [a, b, c, d];
        for i in 0..4 {
            if often {
                ahead.step();
            }
            for r in 0..ROWS {
                let f = S::f32s::simd_from(simd, factors[r][i]);
                for v in 0..V {
                    sums[r][v] = f.mul_add(x[i][v], sums[r][v]);
                }
            }
        }
    }
    sums
}

/// `sums[r] += factors[r] x`.
#[inline(always)]
fn add<S: Simd, const ROWS: usize, const V: usize>(
    simd: S,
    x: [S::f32s; V],
    factors: &[f32; ROWS],
    sums: &mut [[S::f32s; V]; ROWS],
) {
    for r in 0..ROWS {
        let f = S::f32s::simd_from(simd, factors[r]);
        for v in 0..V {
            sums[r][v] = f.mul_add(x[v], sums[r][v]);
        }
    }
}

/// The factors of a row as whole numbers, and what they mean.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Scaled {
    /// The row's sums are to be multiplied by this ..
    pub(crate) scale: f32,
    /// .. and this added.
    pub(crate) offset: f32,
}

/// [`product`] for codes: `result = scale[r] * sum_i factors[r][i] code[i] + offset[r]`, where factors
/// are whole numbers of 16 bits in pairs, and the sums exact.
///
/// `factors[r][j]` has `i = 2 j` in its lower half; `range` is the first block of `2 FIELDS` numbers and
/// how many there are, at least 1.
#[inline(always)]
pub(crate) fn code_product<S: Simd, const FIELDS: usize>(
    simd: S,
    x: Panel<'_, u16>,
    range: (usize, usize),
    factors: &[i32],
    factor_stride: usize,
    meaning: &[Scaled],
    mode: Into,
    to: &mut Rows<'_>,
) {
    let mut product = CodeProduct::<FIELDS> { x, range, factors, factor_stride, meaning, mode, to };
    cover(simd, &mut product, meaning.len(), x.vectors, x.ahead);
}

struct CodeProduct<'a, 'b, 'c, const FIELDS: usize> {
    x: Panel<'a, u16>,
    range: (usize, usize),
    factors: &'a [i32],
    factor_stride: usize,
    meaning: &'a [Scaled],
    mode: Into,
    to: &'b mut Rows<'c>,
}

impl<S: Simd, const FIELDS: usize> Tiles<S> for CodeProduct<'_, '_, '_, FIELDS> {
    const TALL: bool = false;

    fn tile<const ROWS: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        vector: usize,
        lines: Lines<'_>,
    ) {
        let Self { x, range: (first, blocks), factors, factor_stride, meaning, mode, ref mut to } =
            *self;
        let panel = &x.words[2 * (first * x.stride + vector * lanes::<S>())..];
        let column = vector * lanes::<S>();
        simd.vectorize(
            #[inline(always)]
            || {
                let factors: [&[[i32; FIELDS]]; ROWS] = array::from_fn(|r| {
                    let factors = &factors[(row + r) * factor_stride..][..blocks * FIELDS];
                    factors.as_chunks::<FIELDS>().0
                });
                let sums =
                    code_sums::<S, FIELDS, ROWS, V>(simd, panel, x.stride, factors, blocks, lines);
                for r in 0..ROWS {
                    let Scaled { scale, offset } = meaning[row + r];
                    let scale = S::f32s::simd_from(simd, scale);
                    let offset = S::f32s::simd_from(simd, offset);
                    let to = &mut to.numbers[(row + r) * to.stride + column..];
                    let to = &mut to[..V * lanes::<S>()];
                    for v in 0..V {
                        let to = &mut to[v * lanes::<S>()..][..lanes::<S>()];
                        let sum: S::f32s = sums[r][v].to_float();
                        let result = sum.mul_add(scale, offset);
                        let result = if mode == Into::Add {
                            S::f32s::from_slice(simd, to) + result
                        } else {
                            result
                        };
                        result.store_slice(to);
                    }
                }
            },
        )
    }
}

/// `sum_i factors[r][i] code[i]` over `blocks` blocks.
#[allow(clippy::assign_op_pattern, reason = "sums by value: `+=` would take a reference")]
#[inline(always)]
fn code_sums<S: Simd, const FIELDS: usize, const ROWS: usize, const V: usize>(
    simd: S,
    panel: &[u16],
    stride: usize,
    factors: [&[[i32; FIELDS]]; ROWS],
    blocks: usize,
    lines: Lines<'_>,
) -> [[S::i32s; V]; ROWS] {
    let mut sums = [[S::i32s::simd_from(simd, 0); V]; ROWS];
    let mask = S::u16s::simd_from(simd, u16::MAX >> (16 - 16 / FIELDS as u32));
    let mut ahead = lines.over(blocks * FIELDS);
    // Field by field: one addition to a sum in each step, which the compiler then fuses with its dot
    // product. The words are in the first-level cache after the first field.
    for field in 0..FIELDS {
        let shift = field as u32 * (16 / FIELDS as u32);
        for block in 0..blocks {
            ahead.step();
            let words = &panel[2 * block * stride..][..V * 2 * lanes::<S>()];
            let factors: [i32; ROWS] = array::from_fn(|r| factors[r][block][field]);
            let mut codes = [mask; V];
            for v in 0..V {
                let words = &words[v * 2 * lanes::<S>()..][..2 * lanes::<S>()];
                codes[v] = (S::u16s::from_slice(simd, words) >> shift) & mask;
            }
            for r in 0..ROWS {
                let f: S::i16s = S::i32s::simd_from(simd, factors[r]).bitcast();
                for v in 0..V {
                    sums[r][v] = sums[r][v] + pair_dot::<S>(codes[v].bitcast(), f);
                }
            }
        }
    }
    sums
}

/// `a[2 l] b[2 l] + a[2 l + 1] b[2 l + 1]` for each lane `l`.
#[inline(always)]
fn pair_dot<S: Simd>(a: S::i16s, b: S::i16s) -> S::i32s {
    a.pairwise_dot_product(b)
}
