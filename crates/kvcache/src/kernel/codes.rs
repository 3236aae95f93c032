//! The product of [`super::floats`] for codes: whole numbers, whose sums are exact.

use std::array;

use tensor_utils::simd::{Bytes, Simd, SimdBase, SimdFloat, SimdFrom, SimdInt, SimdIntWiden};

use super::ahead::Lines;
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
use super::bytes;
use super::factors::{Factors, Scaled};
use super::tile::{Mode, Panel, Results, Tiles, cover, lanes};

/// What is multiplied.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Codes<'a> {
    pub(crate) x: Panel<'a, u16>,
    /// Fields of a word: 2 of 8 bits or 4 of 4.
    pub(crate) fields: usize,
    /// The first block of `2 fields` numbers, and how many there are, at least 1.
    pub(crate) first: usize,
    pub(crate) blocks: usize,
    pub(crate) factors: &'a Factors,
}

/// `result[r] = scale[r] * sum_i factors[r][i] code[i] + offset[r]` for all rows of the factors.
pub(crate) fn code_product<S: Simd>(simd: S, codes: &Codes<'_>, mode: Mode, to: &mut Results<'_>) {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(simd) = simd.level().as_avx512() {
        return bytes::product(simd, codes, mode, to);
    }
    let (rows, Panel { vectors, ahead, .. }) = (codes.factors.rows(), codes.x);
    match codes.fields {
        4 => cover(simd, &mut Pairs::<4> { codes, mode, to }, rows, vectors, ahead),
        _ => cover(simd, &mut Pairs::<2> { codes, mode, to }, rows, vectors, ahead),
    }
}

/// Results of integer sums.
#[inline(always)]
pub(crate) fn finish<S: Simd, const ROWS: usize, const V: usize>(
    simd: S,
    sums: [[S::i32s; V]; ROWS],
    meaning: &[Scaled],
    (row, column): (usize, usize),
    mode: Mode,
    to: &mut Results<'_>,
) {
    for r in 0..ROWS {
        let Scaled { scale, offset } = meaning[row + r];
        let scale = S::f32s::simd_from(simd, scale);
        let offset = S::f32s::simd_from(simd, offset);
        let mut results = to.begin::<S, V>(simd, row + r, column, mode);
        for v in 0..V {
            let sum: S::f32s = sums[r][v].to_float();
            let result = sum.mul_add(scale, offset);
            results[v] = if mode == Mode::Add { results[v] + result } else { result };
        }
        to.end::<S, V>(row + r, column, results);
    }
}

/// Two numbers at a time, by the dot product of pairs of 16 bits.
struct Pairs<'a, 'b, 'c, const FIELDS: usize> {
    codes: &'a Codes<'a>,
    mode: Mode,
    to: &'b mut Results<'c>,
}

impl<S: Simd, const FIELDS: usize> Tiles<S> for Pairs<'_, '_, '_, FIELDS> {
    fn tile<const ROWS: usize, const V: usize>(
        &mut self,
        simd: S,
        row: usize,
        vector: usize,
        lines: Lines<'_>,
    ) {
        let Codes { x, first, blocks, factors, .. } = *self.codes;
        let panel = &x.words[2 * (first * x.stride + vector * lanes::<S>())..];
        simd.vectorize(
            #[inline(always)]
            || {
                let rows: [&[[i32; FIELDS]]; ROWS] =
                    array::from_fn(|r| &factors.row(row + r).as_chunks::<FIELDS>().0[..blocks]);
                let sums =
                    pair_sums::<S, FIELDS, ROWS, V>(simd, panel, x.stride, rows, blocks, lines);
                let at = (row, vector * lanes::<S>());
                finish::<S, ROWS, V>(simd, sums, factors.meaning(), at, self.mode, self.to);
            },
        )
    }
}

/// `sum_i factors[r][i] code[i]` over `blocks` blocks.
#[allow(clippy::assign_op_pattern, reason = "sums by value: `+=` would take a reference")]
#[inline(always)]
fn pair_sums<S: Simd, const FIELDS: usize, const ROWS: usize, const V: usize>(
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

#[cfg(test)]
mod tests {
    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};
    use tensor_utils::{Isa, Kernel, dispatch};

    use super::*;
    use crate::kernel::ahead::Ahead;
    use crate::kernel::factors::Groups;

    /// Products of `rows` rows with codes of `lanes` lanes, by one instruction set.
    struct Products<'a> {
        words: &'a [u16],
        x: &'a [f32],
        fields: usize,
        rows: usize,
        len: usize,
        lanes: usize,
    }

    impl Kernel for Products<'_> {
        type Output = Vec<f32>;

        fn run<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self { words, x, fields, rows, len, lanes: stride } = self;
            let mut ahead = Ahead::default();
            let mut factors = Factors::default();
            let (scales, minima) = (vec![0x3f80; len], vec![0; len]);
            let (scales, minima) = (&scales[..], &minima[..]);
            let groups = Groups { scales, minima, lead: 0, fields, terms: len };
            factors.make(simd, groups, x, (rows, len, len));
            let vectors = stride.div_ceil(lanes::<S>());
            let x = Panel { words, stride, vectors, ahead: ahead.share(0) };
            let codes =
                Codes { x, fields, first: 0, blocks: len / (2 * fields), factors: &factors };
            let stride = stride + 64;
            let mut numbers = vec![1.0; rows * stride];
            code_product(simd, &codes, Mode::Add, &mut Results { numbers: &mut numbers, stride });
            numbers
        }
    }

    /// The sums of whole numbers are exact, so pairs and bytes give the same bits; the largest codes
    /// with the largest factors do not overflow.
    #[test]
    fn pairs_and_bytes_give_the_same_bits() {
        if !Isa::Avx512.is_available() {
            return;
        }
        let rng = &mut ChaCha8Rng::seed_from_u64(5);
        for fields in [2, 4] {
            for (rows, len, lanes) in [(1, 32, 16), (4, 128, 64), (7, 96, 48), (5, 512, 16)] {
                for extreme in [false, true] {
                    let words = len / fields * lanes + 64;
                    let words: Vec<u16> =
                        (0..words).map(|_| if extreme { u16::MAX } else { rng.random() }).collect();
                    let x: Vec<f32> = (0..rows * len)
                        .map(|i| {
                            let sign = if extreme && i < len { 1.0 } else { -1.0 };
                            sign * if extreme { 1.0 } else { rng.random_range(-1.0..1.0) }
                        })
                        .collect();
                    let run = |isa| {
                        let (words, x) = (&words[..], &x[..]);
                        dispatch(isa, Products { words, x, fields, rows, len, lanes }).unwrap()
                    };
                    let (bytes, pairs) = (run(Isa::Avx512), run(Isa::Avx2));
                    for row in 0..rows {
                        let at = row * (lanes + 64);
                        let (a, b) = (&bytes[at..at + lanes], &pairs[at..at + lanes]);
                        assert_eq!(a, b, "fields {fields}, rows {rows}, len {len}, row {row}");
                        if extreme {
                            let top = if fields == 4 { 15.0 } else { 255.0 };
                            let sum = if row == 0 { 1.0 } else { -1.0 } * top * len as f32;
                            assert!((a[0] - 1.0 - sum).abs() <= sum.abs() * 1e-6, "{} {sum}", a[0]);
                        }
                    }
                }
            }
        }
    }
}
