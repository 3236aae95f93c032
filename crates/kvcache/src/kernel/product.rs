//! The one product that attention consists of: `sums[row][lane] += sum_i factors[row][i] x[i][lane]`.
//!
//! For scores `i` is the channel, a lane is a key and the factors are the query; for the output `i` is
//! the key, a lane is a channel and the factors are the weights. Each sum is one chain in the order of
//! `i`, so it has the same bits in any company and from any page.
//!
//! Vectors are handled in plain loops: a closure given to the standard library, such as that of
//! `array::from_fn`, would be compiled for the target's baseline.

use std::array;

use tensor_utils::prefetch;
use tensor_utils::simd::{
    Bytes, Select, Simd, SimdBase, SimdFloat, SimdFrom, SimdInt, SimdIntWiden,
};

/// Lanes of a vector of `f32`.
#[inline(always)]
pub(crate) const fn lanes<S: Simd>() -> usize {
    <S::f32s as SimdBase<S>>::LEN
}

/// Numbers that are stored as floats.
pub(crate) trait Numbers: Copy {
    /// What the slab holds.
    type Word: Copy;

    /// Where lane `lane` of a record that begins at `record` is.
    fn start(record: usize, lane: usize) -> usize;

    /// Numbers `2 pair` and `2 pair + 1` of `lanes` lanes from `start` on; `stride` lanes in all.
    fn pair<S: Simd>(
        simd: S,
        words: &[Self::Word],
        start: usize,
        stride: usize,
        pair: usize,
    ) -> [S::f32s; 2];

    /// Number `i` alone.
    fn single<S: Simd>(
        simd: S,
        words: &[Self::Word],
        start: usize,
        stride: usize,
        i: usize,
    ) -> S::f32s;
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct F32;
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16;
#[derive(Debug, Clone, Copy)]
pub(crate) struct F16;

impl Numbers for F32 {
    type Word = f32;

    #[inline(always)]
    fn start(record: usize, lane: usize) -> usize {
        record + lane
    }

    #[inline(always)]
    fn pair<S: Simd>(
        simd: S,
        words: &[f32],
        start: usize,
        stride: usize,
        pair: usize,
    ) -> [S::f32s; 2] {
        let at = start + 2 * pair * stride;
        [
            S::f32s::from_slice(simd, &words[at..at + lanes::<S>()]),
            S::f32s::from_slice(simd, &words[at + stride..at + stride + lanes::<S>()]),
        ]
    }

    #[inline(always)]
    fn single<S: Simd>(simd: S, words: &[f32], start: usize, stride: usize, i: usize) -> S::f32s {
        let at = start + i * stride;
        S::f32s::from_slice(simd, &words[at..at + lanes::<S>()])
    }
}

/// Words of 16 bits, `[i / 2][lane][2]`, as vectors of 32 bits: one lane has both numbers of a pair.
#[inline(always)]
fn load_words<S: Simd>(simd: S, words: &[u16], at: usize) -> S::u32s {
    S::u16s::from_slice(simd, &words[at..at + 2 * lanes::<S>()]).bitcast()
}

macro_rules! sixteen_bits {
    ($name:ident, $widen:ident) => {
        impl Numbers for $name {
            type Word = u16;

            #[inline(always)]
            fn start(record: usize, lane: usize) -> usize {
                record + 2 * lane
            }

            #[inline(always)]
            fn pair<S: Simd>(
                simd: S,
                words: &[u16],
                start: usize,
                stride: usize,
                pair: usize,
            ) -> [S::f32s; 2] {
                let both = load_words(simd, words, start + 2 * pair * stride);
                [$widen(simd, both << 16), $widen(simd, both & 0xffff_0000)]
            }

            #[inline(always)]
            fn single<S: Simd>(
                simd: S,
                words: &[u16],
                start: usize,
                stride: usize,
                i: usize,
            ) -> S::f32s {
                Self::pair(simd, words, start, stride, i / 2)[i % 2]
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

/// Operands of [`product`] and [`code_product`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lanes<'a, W> {
    pub(crate) words: &'a [W],
    /// Where the lanes of each vector begin in the record of each.
    pub(crate) starts: &'a [usize],
    /// Lanes of a record.
    pub(crate) stride: usize,
    /// What the next product will read.
    pub(crate) ahead: Ahead<'a>,
}

/// Memory to be fetched while a product is computed, so that the next one need not wait: the hardware
/// does not guess the way from record to record.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ahead<'a> {
    Nothing,
    F32(&'a [f32]),
    Words(&'a [u16]),
}

impl Ahead<'_> {
    /// Cache lines.
    #[inline(always)]
    fn lines(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::F32(slice) => slice.len().div_ceil(16),
            Self::Words(slice) => slice.len().div_ceil(32),
        }
    }

    /// Fetches lines `from..to`.
    #[inline(always)]
    fn fetch(self, from: usize, to: usize) {
        match self {
            Self::Nothing => {}
            Self::F32(slice) => (from..to).for_each(|line| prefetch(slice, line * 16)),
            Self::Words(slice) => (from..to).for_each(|line| prefetch(slice, line * 32)),
        }
    }
}

/// Which lines a step of a product fetches: `share` of them at each of its steps.
#[inline(always)]
fn shares(lines: usize, (part, parts): (usize, usize), steps: usize) -> (usize, usize) {
    let (from, to) = (lines * part / parts, lines * (part + 1) / parts);
    (from, (to - from).div_ceil(steps.max(1)))
}

/// What becomes of the sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They begin at 0 and replace what is there.
    Replace,
    /// They begin with what is there.
    Add,
}

/// Rows of a matrix: `rows` rows `stride` apart.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) numbers: &'a mut [f32],
    pub(crate) stride: usize,
    /// Where in a row the result of each vector goes.
    pub(crate) columns: &'a [usize],
}

/// Adds `factors[r][i] x[i]` for `i` in `first..first + count`, over all vectors and `rows` rows.
///
/// `factors[r][i - first]` is at `r * factor_stride + i - first`.
#[inline(always)]
pub(crate) fn product<S: Simd, N: Numbers>(
    simd: S,
    x: Lanes<'_, N::Word>,
    (first, count): (usize, usize),
    factors: &[f32],
    factor_stride: usize,
    rows: usize,
    mode: Into,
    to: &mut Rows<'_>,
) {
    let mut row = 0;
    while row < rows {
        let f = &factors[row * factor_stride..];
        let left = rows - row;
        row += if left >= 4 {
            columns::<S, N, 4>(simd, x, (first, count), f, factor_stride, row, mode, to)
        } else if left >= 2 {
            columns::<S, N, 2>(simd, x, (first, count), f, factor_stride, row, mode, to)
        } else {
            columns::<S, N, 1>(simd, x, (first, count), f, factor_stride, row, mode, to)
        };
    }
}

/// Four vectors at a time with 32 registers, else two; returns `ROWS`.
#[inline(always)]
fn columns<S: Simd, N: Numbers, const ROWS: usize>(
    simd: S,
    x: Lanes<'_, N::Word>,
    range: (usize, usize),
    factors: &[f32],
    stride: usize,
    row: usize,
    mode: Into,
    to: &mut Rows<'_>,
) -> usize {
    let vectors = x.starts.len();
    let mut v = 0;
    while v < vectors {
        let left = vectors - v;
        v += if lanes::<S>() == 16 && left >= 4 {
            tile::<S, N, ROWS, 4>(simd, x, range, factors, stride, row, v, mode, to)
        } else if lanes::<S>() < 16 && left >= 2 {
            tile::<S, N, ROWS, 2>(simd, x, range, factors, stride, row, v, mode, to)
        } else {
            tile::<S, N, ROWS, 1>(simd, x, range, factors, stride, row, v, mode, to)
        };
    }
    ROWS
}

fn tile<S: Simd, N: Numbers, const ROWS: usize, const V: usize>(
    simd: S,
    x: Lanes<'_, N::Word>,
    (first, count): (usize, usize),
    factors: &[f32],
    factor_stride: usize,
    row: usize,
    vector: usize,
    mode: Into,
    to: &mut Rows<'_>,
) -> usize {
    simd.vectorize(
        #[inline(always)]
        || {
            let starts: [usize; V] = array::from_fn(|v| x.starts[vector + v]);
            let at: [[usize; V]; ROWS] = array::from_fn(|r| {
                array::from_fn(|v| (row + r) * to.stride + to.columns[vector + v])
            });
            let mut sums: [[S::f32s; V]; ROWS] = [[S::f32s::simd_from(simd, 0.0); V]; ROWS];
            if mode == Into::Add {
                for r in 0..ROWS {
                    for v in 0..V {
                        let from = &to.numbers[at[r][v]..at[r][v] + lanes::<S>()];
                        sums[r][v] = S::f32s::from_slice(simd, from);
                    }
                }
            }
            let mut factors: [&[f32]; ROWS] =
                array::from_fn(|r| &factors[r * factor_stride..][..count]);
            let (words, stride) = (x.words, x.stride);
            let (mut i, end) = (first, first + count);
            if i % 2 == 1 && i < end {
                add_single::<S, N, ROWS, V>(simd, words, starts, stride, i, factors, &mut sums);
                factors = factors.map(|f| &f[1..]);
                i += 1;
            }
            let pairs = (end - i) / 2;
            let ahead = if row == 0 { x.ahead } else { Ahead::Nothing };
            let part = (vector / V, x.starts.len().div_ceil(V));
            let (mut line, share) = shares(ahead.lines(), part, pairs);
            let paired: [&[[f32; 2]]; ROWS] = factors.map(|f| &f.as_chunks::<2>().0[..pairs]);
            for p in 0..pairs {
                ahead.fetch(line, line + share);
                line += share;
                let mut x = [[S::f32s::simd_from(simd, 0.0); 2]; V];
                for v in 0..V {
                    x[v] = N::pair(simd, words, starts[v], stride, i / 2 + p);
                }
                for half in 0..2 {
                    for r in 0..ROWS {
                        let f = S::f32s::simd_from(simd, paired[r][p][half]);
                        for v in 0..V {
                            sums[r][v] = f.mul_add(x[v][half], sums[r][v]);
                        }
                    }
                }
            }
            i += 2 * pairs;
            if i < end {
                let factors = factors.map(|f| &f[2 * pairs..]);
                add_single::<S, N, ROWS, V>(simd, words, starts, stride, i, factors, &mut sums);
            }
            for r in 0..ROWS {
                for v in 0..V {
                    sums[r][v].store_slice(&mut to.numbers[at[r][v]..at[r][v] + lanes::<S>()]);
                }
            }
            V
        },
    )
}

#[inline(always)]
fn add_single<S: Simd, N: Numbers, const ROWS: usize, const V: usize>(
    simd: S,
    words: &[N::Word],
    starts: [usize; V],
    stride: usize,
    i: usize,
    factors: [&[f32]; ROWS],
    sums: &mut [[S::f32s; V]; ROWS],
) {
    for v in 0..V {
        let x = N::single(simd, words, starts[v], stride, i);
        for r in 0..ROWS {
            let f = S::f32s::simd_from(simd, factors[r][0]);
            sums[r][v] = f.mul_add(x, sums[r][v]);
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
/// `factors[r][j]` has `i = 2 j` in its lower half; `blocks` blocks of `2 FIELDS` numbers from block
/// `first` on.
#[inline(always)]
pub(crate) fn code_product<S: Simd, const FIELDS: usize>(
    simd: S,
    x: Lanes<'_, u16>,
    (first, blocks): (usize, usize),
    factors: &[i32],
    factor_stride: usize,
    meaning: &[Scaled],
    mode: Into,
    to: &mut Rows<'_>,
) {
    let mut row = 0;
    while row < meaning.len() {
        let f = &factors[row * factor_stride..];
        let left = meaning.len() - row;
        let m = &meaning[row..];
        row += if left >= 4 {
            code_columns::<S, FIELDS, 4>(
                simd,
                x,
                (first, blocks),
                f,
                factor_stride,
                m,
                row,
                mode,
                to,
            )
        } else if left >= 2 {
            code_columns::<S, FIELDS, 2>(
                simd,
                x,
                (first, blocks),
                f,
                factor_stride,
                m,
                row,
                mode,
                to,
            )
        } else {
            code_columns::<S, FIELDS, 1>(
                simd,
                x,
                (first, blocks),
                f,
                factor_stride,
                m,
                row,
                mode,
                to,
            )
        };
    }
}

#[inline(always)]
fn code_columns<S: Simd, const FIELDS: usize, const ROWS: usize>(
    simd: S,
    x: Lanes<'_, u16>,
    range: (usize, usize),
    factors: &[i32],
    stride: usize,
    meaning: &[Scaled],
    row: usize,
    mode: Into,
    to: &mut Rows<'_>,
) -> usize {
    let vectors = x.starts.len();
    let mut v = 0;
    while v < vectors {
        let left = vectors - v;
        v += if lanes::<S>() == 16 && left >= 4 {
            code_tile::<S, FIELDS, ROWS, 4>(
                simd, x, range, factors, stride, meaning, row, v, mode, to,
            )
        } else if lanes::<S>() < 16 && left >= 2 {
            code_tile::<S, FIELDS, ROWS, 2>(
                simd, x, range, factors, stride, meaning, row, v, mode, to,
            )
        } else {
            code_tile::<S, FIELDS, ROWS, 1>(
                simd, x, range, factors, stride, meaning, row, v, mode, to,
            )
        };
    }
    ROWS
}

fn code_tile<S: Simd, const FIELDS: usize, const ROWS: usize, const V: usize>(
    simd: S,
    x: Lanes<'_, u16>,
    (first, blocks): (usize, usize),
    factors: &[i32],
    factor_stride: usize,
    meaning: &[Scaled],
    row: usize,
    vector: usize,
    mode: Into,
    to: &mut Rows<'_>,
) -> usize {
    simd.vectorize(
        #[inline(always)]
        || {
            let starts: [usize; V] = array::from_fn(|v| x.starts[vector + v]);
            let mut sums: [[S::i32s; V]; ROWS] = [[S::i32s::simd_from(simd, 0); V]; ROWS];
            let factors: [&[[i32; FIELDS]]; ROWS] = array::from_fn(|r| {
                &factors[r * factor_stride..][..blocks * FIELDS].as_chunks::<FIELDS>().0[..blocks]
            });
            let mask = S::u16s::simd_from(simd, u16::MAX >> (16 - 16 / FIELDS as u32));
            let ahead = if row == 0 { x.ahead } else { Ahead::Nothing };
            let part = (vector / V, x.starts.len().div_ceil(V));
            let (mut line, share) = shares(ahead.lines(), part, blocks);
            // Field by field: one addition to a sum in each step, which the compiler then fuses with
            // its dot product. The words are in the first-level cache after the first field.
            for field in 0..FIELDS {
                let shift = field as u32 * (16 / FIELDS as u32);
                for block in 0..blocks {
                    if field == 0 {
                        ahead.fetch(line, line + share);
                        line += share;
                    }
                    let mut codes = [mask; V];
                    for v in 0..V {
                        let at = starts[v] + 2 * (first + block) * x.stride;
                        let words = &x.words[at..at + 2 * lanes::<S>()];
                        codes[v] = (S::u16s::from_slice(simd, words) >> shift) & mask;
                    }
                    for r in 0..ROWS {
                        let f = S::i32s::simd_from(simd, factors[r][block][field]);
                        let f: S::i16s = f.bitcast();
                        for v in 0..V {
                            sums[r][v] += pair_dot::<S>(codes[v].bitcast(), f);
                        }
                    }
                }
            }
            for r in 0..ROWS {
                let Scaled { scale, offset } = meaning[r];
                let scale = S::f32s::simd_from(simd, scale);
                let offset = S::f32s::simd_from(simd, offset);
                for v in 0..V {
                    let at = (row + r) * to.stride + to.columns[vector + v];
                    let to = &mut to.numbers[at..at + lanes::<S>()];
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
            V
        },
    )
}

/// `a[2 l] b[2 l] + a[2 l + 1] b[2 l + 1]` for each lane `l`.
#[inline(always)]
fn pair_dot<S: Simd>(a: S::i16s, b: S::i16s) -> S::i32s {
    a.pairwise_dot_product(b)
}

/// The scale and minimum of group `group` of a record of codes.
#[inline(always)]
pub(crate) fn affine(words: &[u16], scales: usize, groups: usize, group: usize) -> (f32, f32) {
    let number = |at: usize| f32::from_bits(u32::from(words[at]) << 16);
    (number(scales + group), number(scales + groups + group))
}
