//! Products with `vpmaddubsw`: unsigned codes times signed activations, added up in 16 bits within a
//! group. At most 64 words of 2 * 2 * 127 each: 32512 fits.

#[cfg(target_arch = "x86")]
use std::arch::x86::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use fearless_simd::{Avx2, SimdBase, SimdFrom, f32x8, u8x32, u16x8};
use ndarray::ArrayViewMut2;
use tensor_utils::prefetch;

use super::Activations;
use super::activations::{Panel, TileGroup};
use super::block::{AHEAD, Block, MAX_WORDS, Stripe, Totals, each_panel, store};
use super::layout::{ROWS, STEP};

/// Rows of a vector: half a block.
const HALF: usize = ROWS / 2;
/// The codes plus 1 of a group: `[halves][words][rows][4]`.
type Planes = [[[u8; STEP / 2]; MAX_WORDS]; 2];

fearless_simd::kernel!(
    /// Writes the products of the stripe's rows with one token to `y` `[1, rows]`.
    pub(super) fn vector(
        simd: Avx2,
        stripe: Stripe<'_>,
        x: &Activations,
        y: ArrayViewMut2<'_, f32>,
    ) {
        let mut y = y;
        let Some((_, panel)) = x.panels().next() else { return };
        for (first_row, block) in stripe.blocks() {
            let total = block_product(simd, block, stripe.group_steps, panel);
            store(&mut y, 0, first_row, &total.map(|total| total * panel.scales[0]));
        }
    }
);

fearless_simd::kernel!(
    /// Writes the products of the stripe's rows with every token to `y` `[tokens, rows]`.
    pub(super) fn matrix(
        simd: Avx2,
        stripe: Stripe<'_>,
        x: &Activations,
        y: ArrayViewMut2<'_, f32>,
    ) {
        let empty: Planes = [[[0; STEP / 2]; MAX_WORDS]; 2];
        let unpack = |codes: &[u8], planes: &mut Planes| unpack(simd, codes, planes);
        each_panel(stripe, x, y, empty, unpack, |planes, scales, x, totals| {
            for ((planes, scales), totals) in planes.iter().zip(scales).zip(totals) {
                match x.sums.len() {
                    8 => add::<8>(simd, planes, scales, x, totals),
                    4 => add::<4>(simd, planes, scales, x, totals),
                    2 => add::<2>(simd, planes, scales, x, totals),
                    _ => add::<1>(simd, planes, scales, x, totals),
                }
            }
        });
    }
);

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn block_product(simd: Avx2, block: Block<'_>, group_steps: usize, x: Panel<'_>) -> [f32; ROWS] {
    let mut total = [0.0; ROWS];
    for ((codes, scales), x) in block.groups(group_steps).zip(x.groups()) {
        // Two chains, which together are the whole group and fit 16 bits.
        let mut sums = [[_mm256_setzero_si256(); 2]; 2];
        let codes = codes.as_chunks::<STEP>().0;
        for (step, (one, words)) in codes.iter().zip(x.words.as_chunks::<4>().0).enumerate() {
            prefetch(codes, step + AHEAD);
            let halves = sums.iter_mut().zip(one.as_chunks().0);
            for (sums, codes) in halves {
                for (i, (plane, word)) in planes(simd, codes).into_iter().zip(words).enumerate() {
                    let products = _mm256_maddubs_epi16(plane, broadcast(*word));
                    sums[i % 2] = _mm256_add_epi16(sums[i % 2], products);
                }
            }
        }
        let halves = total.as_chunks_mut::<HALF>().0.iter_mut().zip(scales.as_chunks().0);
        for ((total, scales), [even, odd]) in halves.zip(sums) {
            add_scaled(simd, total, scales, _mm256_add_epi16(even, odd), x.sums[0]);
        }
    }
    total
}

/// The codes plus 1 of half a step, word by word.
#[target_feature(enable = "avx2")]
#[inline]
fn planes(simd: Avx2, codes: &[u8; STEP / 2]) -> [__m256i; 4] {
    let three = _mm256_set1_epi8(3);
    let codes: __m256i = u8x32::from_slice(simd, codes).into();
    [
        _mm256_and_si256(codes, three),
        _mm256_and_si256(_mm256_srli_epi16::<2>(codes), three),
        _mm256_and_si256(_mm256_srli_epi16::<4>(codes), three),
        _mm256_and_si256(_mm256_srli_epi16::<6>(codes), three),
    ]
}

#[target_feature(enable = "avx2")]
#[inline]
fn unpack(simd: Avx2, codes: &[u8], out: &mut Planes) {
    let codes = codes.as_chunks::<STEP>().0;
    for (step, one) in codes.iter().enumerate() {
        prefetch(codes, step + AHEAD);
        for (codes, out) in one.as_chunks().0.iter().zip(&mut *out) {
            for (plane, out) in planes(simd, codes).into_iter().zip(&mut out[4 * step..]) {
                u8x32::simd_from(simd, plane).store_slice(out);
            }
        }
    }
}

/// Adds one group of a block for a tile of `N` tokens.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn add<const N: usize>(
    simd: Avx2,
    planes: &Planes,
    scales: &[u16; ROWS],
    x: TileGroup<'_>,
    totals: &mut Totals,
) {
    for (half, planes) in planes.iter().enumerate() {
        let mut sums = [_mm256_setzero_si256(); N];
        for (codes, words) in planes.iter().zip(x.words.as_chunks::<N>().0) {
            let codes = u8x32::from_slice(simd, codes).into();
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, broadcast(*word)));
            }
        }
        let scales = &scales.as_chunks().0[half];
        for ((total, sums), &offset) in totals.iter_mut().zip(sums).zip(x.sums) {
            add_scaled(simd, &mut total.as_chunks_mut().0[half], scales, sums, offset);
        }
    }
}

/// Adds `scale * (sums - offset)`, with two roundings.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn add_scaled(
    simd: Avx2,
    total: &mut [f32; HALF],
    scales: &[u16; HALF],
    sums: __m256i,
    offset: i32,
) {
    let sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
    let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset)));
    let scales = _mm256_cvtph_ps(u16x8::from_slice(simd, scales).into());
    let old = f32x8::from_slice(simd, total).into();
    *total = f32x8::simd_from(simd, _mm256_add_ps(old, _mm256_mul_ps(scales, sums))).into();
}

#[target_feature(enable = "avx2")]
#[inline]
fn broadcast(word: [i8; 4]) -> __m256i {
    _mm256_set1_epi32(i32::from_le_bytes(word.map(|q| q as u8)))
}
