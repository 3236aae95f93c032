//! Products with `vpmaddubsw`: unsigned codes times signed activations, added up in 16 bits within a
//! group. At most 64 words of 2 * 2 * 127 each: 32512 fits.

#[cfg(target_arch = "x86")]
use std::arch::x86::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::array;

use fearless_simd::{Avx2, SimdBase, SimdFrom, f32x8, u8x32, u16x8};
use ndarray::ArrayViewMut2;

use super::Activations;
use super::block::{Block, MAX_STEPS, Stripe, TOKENS, Token, store};
use super::layout::{ROWS, STEP};

/// A block of rows in two vectors.
type Halves = [__m256i; 2];

fearless_simd::kernel!(
    /// Writes the products of the stripe's rows with one token to `y` `[1, rows]`.
    pub(super) fn vector(
        simd: Avx2,
        stripe: Stripe<'_>,
        x: &Activations,
        y: ArrayViewMut2<'_, f32>,
    ) {
        let mut y = y;
        let token = x.token(0);
        for (first_row, block) in stripe.blocks() {
            let total = block_vector(simd, block, stripe.group_steps, token);
            store(&mut y, 0, first_row, &total);
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
        let mut y = y;
        let mut planes = [[0; STEP]; 4 * MAX_STEPS];
        for first in (0..x.tokens()).step_by(TOKENS) {
            for (first_row, block) in stripe.blocks() {
                let mut totals = [[0.0; ROWS]; TOKENS];
                let totals = &mut totals[..TOKENS.min(x.tokens() - first)];
                for (g, (codes, scales)) in block.groups(stripe.group_steps).enumerate() {
                    unpack(simd, codes, &mut planes);
                    let planes = &planes[..codes.len() / STEP * 4];
                    let tiles = totals.chunks_mut(4).zip((first..).step_by(4));
                    for (tile, token) in tiles {
                        if tile.len() == 4 {
                            tile_group::<4>(simd, planes, scales, x, token, g, tile);
                        } else {
                            for (tile, token) in tile.chunks_mut(1).zip(token..) {
                                tile_group::<1>(simd, planes, scales, x, token, g, tile);
                            }
                        }
                    }
                }
                for (token, total) in (first..).zip(totals) {
                    let scale = x.token(token).scale;
                    store(&mut y, token, first_row, &total.map(|total| total * scale));
                }
            }
        }
    }
);

#[target_feature(enable = "avx2,f16c")]
#[inline]
fn block_vector(simd: Avx2, block: Block<'_>, group_steps: usize, x: Token<'_>) -> [f32; ROWS] {
    let three = _mm256_set1_epi8(3);
    let mut total = [0.0; ROWS];
    let words = x.words.chunks(group_steps * 4);
    for (((codes, scales), words), &sum) in block.groups(group_steps).zip(words).zip(x.sums) {
        let mut sums = [[_mm256_setzero_si256(); 2]; 2];
        for (codes, x) in codes.as_chunks::<STEP>().0.iter().zip(words.as_chunks::<4>().0) {
            let codes = load(simd, codes);
            for half in 0..2 {
                let planes = [
                    codes[half],
                    _mm256_srli_epi16::<2>(codes[half]),
                    _mm256_srli_epi16::<4>(codes[half]),
                    _mm256_srli_epi16::<6>(codes[half]),
                ];
                for i in 0..4 {
                    let plane = _mm256_and_si256(planes[i], three);
                    let products = _mm256_maddubs_epi16(plane, broadcast(x[i]));
                    sums[half][i % 2] = _mm256_add_epi16(sums[half][i % 2], products);
                }
            }
        }
        // The two chains together are the whole group, which fits 16 bits.
        let sums = sums.map(|[even, odd]| _mm256_add_epi16(even, odd));
        add_scaled(simd, &mut total, scales, sums, sum);
    }
    total.map(|total| total * x.scale)
}

/// The codes plus 1 of a group.
#[target_feature(enable = "avx2")]
#[inline]
fn unpack(simd: Avx2, codes: &[u8], planes: &mut [[u8; STEP]]) {
    let three = _mm256_set1_epi8(3);
    let steps = codes.as_chunks::<STEP>().0.iter().zip(planes.as_chunks_mut::<4>().0);
    for (codes, planes) in steps {
        let codes = load(simd, codes);
        for half in 0..2 {
            let shifted = [
                codes[half],
                _mm256_srli_epi16::<2>(codes[half]),
                _mm256_srli_epi16::<4>(codes[half]),
                _mm256_srli_epi16::<6>(codes[half]),
            ];
            for (plane, shifted) in planes.iter_mut().zip(shifted) {
                let codes = u8x32::simd_from(simd, _mm256_and_si256(shifted, three));
                codes.store_slice(&mut plane[half * STEP / 2..][..STEP / 2]);
            }
        }
    }
}

/// Adds one group of a block for `N` tokens.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn tile_group<const N: usize>(
    simd: Avx2,
    planes: &[[u8; STEP]],
    scales: &[u16; ROWS],
    x: &Activations,
    first: usize,
    g: usize,
    totals: &mut [[f32; ROWS]],
) {
    let words = planes.len();
    let x: [(&[[i8; 4]], i32); N] = array::from_fn(|i| {
        let token = x.token(first + i);
        (&token.words[g * x.group / 4..][..words], token.sums[g])
    });
    let mut sums = [[_mm256_setzero_si256(); 2]; N];
    for (k, plane) in planes.iter().enumerate() {
        let codes = load(simd, plane);
        for i in 0..N {
            let x = broadcast(x[i].0[k]);
            for half in 0..2 {
                let products = _mm256_maddubs_epi16(codes[half], x);
                sums[i][half] = _mm256_add_epi16(sums[i][half], products);
            }
        }
    }
    for ((total, sums), x) in totals.iter_mut().zip(sums).zip(x) {
        add_scaled(simd, total, scales, sums, x.1);
    }
}

/// Adds `scale * (sums - offset)`, with two roundings.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn add_scaled(
    simd: Avx2,
    total: &mut [f32; ROWS],
    scales: &[u16; ROWS],
    sums: Halves,
    offset: i32,
) {
    let halves = total.as_chunks_mut::<8>().0.iter_mut().zip(scales.as_chunks::<8>().0);
    for ((total, scales), sums) in halves.zip(sums) {
        let sums = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        let sums = _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_set1_epi32(offset)));
        let scales = _mm256_cvtph_ps(u16x8::from_slice(simd, scales).into());
        let old = f32x8::from_slice(simd, total).into();
        let new = _mm256_add_ps(old, _mm256_mul_ps(scales, sums));
        *total = f32x8::simd_from(simd, new).into();
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(simd: Avx2, codes: &[u8; STEP]) -> Halves {
    let (low, high) = codes.split_at(STEP / 2);
    [u8x32::from_slice(simd, low).into(), u8x32::from_slice(simd, high).into()]
}

#[target_feature(enable = "avx2")]
#[inline]
fn broadcast(word: [i8; 4]) -> __m256i {
    _mm256_set1_epi32(i32::from_le_bytes(word.map(|q| q as u8)))
}
