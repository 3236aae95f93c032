//! The product of codes with `vpdpbusd`, which multiplies four codes as they lie in memory and adds them
//! up, in place of two that must be unpacked first.
//!
//! A factor of 16 bits is `256 high + low` with bytes that have signs. Both are multiplied and summed on
//! their own; all of it is exact, so the sums are those of [`super::codes`] to the bit.

#[cfg(target_arch = "x86")]
use std::arch::x86::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use fearless_simd::{Avx512, SimdBase, SimdFrom, i32x16, u8x64, u16x32};

use super::ahead::Lines;
use super::codes::{Codes, finish};
use super::tile::{Mode, Results};

/// Lanes of a vector of sums.
const LANES: usize = 16;

fearless_simd::kernel!(
    /// Takes factors apart, 32 whole numbers of 16 bits at a time: the high bytes of those that meet the
    /// four codes of a lane, then their low bytes. `fields` is that of [`Codes`].
    pub(super) fn split(simd: Avx512, factors: &mut [i32], fields: usize) {
        let order: __m512i =
            u8x64::from_slice(simd, if fields == 4 { &INT4 } else { &INT8 }).into();
        for numbers in factors.as_chunks_mut::<LANES>().0 {
            let low: __m512i = i32x16::from_slice(simd, numbers).into();
            // A byte with a sign is less by 256 where it is negative.
            let high = _mm512_add_epi16(low, _mm512_set1_epi16(128));
            let bytes = _mm512_permutex2var_epi8(low, order, high);
            i32x16::simd_from(simd, bytes).store_slice(numbers);
        }
    }
);

/// Which bytes [`split`] takes, from 64 on of the high ones.
const INT8: [u8; 64] = order::<4>([0, 2, 1, 3]);
const INT4: [u8; 64] = order::<8>([0, 4, 1, 5, 2, 6, 3, 7]);

/// The order for blocks of `BLOCK` numbers whose codes lie as `places` says.
const fn order<const BLOCK: usize>(places: [u8; BLOCK]) -> [u8; 64] {
    let mut order = [0; 64];
    let mut at = 0;
    while at < 64 {
        let (quad, byte) = (at / 8, at % 8);
        let number = quad * 4 + byte % 4;
        let number = (number / BLOCK * BLOCK) as u8 + places[number % BLOCK];
        order[at] = if byte < 4 { 64 + 2 * number + 1 } else { 2 * number };
        at += 1;
    }
    order
}

fearless_simd::kernel!(
    /// [`super::codes::code_product`] for factors that [`split`] has taken apart.
    pub(super) fn product(simd: Avx512, codes: &Codes<'_>, mode: Mode, to: &mut Results<'_>) {
        match codes.fields {
            4 => strips::<4>(simd, codes, mode, to),
            _ => strips::<2>(simd, codes, mode, to),
        }
    }
);

/// All vectors, two at a time and then the last one; for each all rows, four at a time and then each.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn strips<const FIELDS: usize>(simd: Avx512, codes: &Codes<'_>, mode: Mode, to: &mut Results<'_>) {
    let rows = codes.factors.rows();
    let lines = codes.x.ahead;
    // Lines for each sum, a little more than there are.
    let each = (lines.len() / (rows * codes.x.vectors)) + 1;
    let mut given = 0;
    let mut share = |sums: usize| {
        let from = given;
        given = lines.len().min(from + sums * each);
        lines.slice(from..given)
    };
    for vector in (0..codes.x.vectors).step_by(2) {
        let wide = vector + 2 <= codes.x.vectors;
        for row in (0..rows - rows % 4).step_by(4) {
            if wide {
                tile::<FIELDS, 4, 2>(simd, codes, row, vector, share(8), mode, to);
            } else {
                tile::<FIELDS, 4, 1>(simd, codes, row, vector, share(4), mode, to);
            }
        }
        for row in rows - rows % 4..rows {
            if wide {
                tile::<FIELDS, 1, 2>(simd, codes, row, vector, share(2), mode, to);
            } else {
                tile::<FIELDS, 1, 1>(simd, codes, row, vector, share(1), mode, to);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn tile<const FIELDS: usize, const ROWS: usize, const V: usize>(
    simd: Avx512,
    codes: &Codes<'_>,
    row: usize,
    vector: usize,
    lines: Lines<'_>,
    mode: Mode,
    to: &mut Results<'_>,
) {
    let Codes { x, first, blocks, factors, .. } = *codes;
    let mut rows: [&[[i32; FIELDS]]; ROWS] = [&[]; ROWS];
    for r in 0..ROWS {
        rows[r] = &factors.row(row + r).as_chunks::<FIELDS>().0[..blocks];
    }
    let panel = &x.words[2 * (first * x.stride + vector * LANES)..];
    let halves = sums::<FIELDS, ROWS, V>(simd, panel, x.stride, rows, blocks, lines);
    let mut sums = [[i32x16::simd_from(simd, 0); V]; ROWS];
    for r in 0..ROWS {
        for v in 0..V {
            let [high, low] = halves[r][v];
            let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
            sums[r][v] = i32x16::simd_from(simd, sum);
        }
    }
    let at = (row, vector * LANES);
    finish::<Avx512, ROWS, V>(simd, sums, factors.meaning(), at, mode, to);
}

/// The sums of high and of low bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn sums<const FIELDS: usize, const ROWS: usize, const V: usize>(
    simd: Avx512,
    panel: &[u16],
    stride: usize,
    factors: [&[[i32; FIELDS]]; ROWS],
    blocks: usize,
    lines: Lines<'_>,
) -> [[[__m512i; 2]; V]; ROWS] {
    let mut sums = [[[_mm512_setzero_si512(); 2]; V]; ROWS];
    let mask = _mm512_set1_epi8(0x0f);
    let mut ahead = lines.over(blocks);
    for block in 0..blocks {
        ahead.step();
        let words = &panel[2 * block * stride..][..V * 2 * LANES];
        let mut codes = [_mm512_setzero_si512(); V];
        for v in 0..V {
            codes[v] = u16x32::from_slice(simd, &words[v * 2 * LANES..][..2 * LANES]).into();
        }
        for quad in 0..FIELDS / 2 {
            let mut bytes = codes;
            for v in 0..V {
                if FIELDS == 4 {
                    let shifted =
                        if quad == 0 { codes[v] } else { _mm512_srli_epi16::<4>(codes[v]) };
                    bytes[v] = _mm512_and_si512(shifted, mask);
                }
            }
            for r in 0..ROWS {
                for half in 0..2 {
                    let factors = _mm512_set1_epi32(factors[r][block][2 * quad + half]);
                    for v in 0..V {
                        sums[r][v][half] = _mm512_dpbusd_epi32(sums[r][v][half], bytes[v], factors);
                    }
                }
            }
        }
    }
    sums
}
