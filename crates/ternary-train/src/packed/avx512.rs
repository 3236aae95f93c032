//! Products with `vpdpbusd`: unsigned codes times signed activations, four columns a step.

#[cfg(target_arch = "x86")]
use std::arch::x86::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::array;

use fearless_simd::{Avx512, SimdBase, SimdFrom, f32x16, u8x64, u16x16};
use ndarray::ArrayViewMut2;

use super::Activations;
use super::block::{Block, MAX_STEPS, Stripe, TOKENS, Token, store};
use super::layout::{ROWS, STEP};

/// Sums of a tile: `TOKENS` tokens by `BLOCKS` blocks of rows.
type Sums<const N: usize, const B: usize> = [[__m512i; B]; N];
/// Codes of a group of two blocks, a byte each.
type Planes = [[[u8; STEP]; 2]; 4 * MAX_STEPS];
/// Totals of two blocks.
type Totals = [[[f32; ROWS]; 2]; TOKENS];

fearless_simd::kernel!(
    /// Writes the products of the stripe's rows with one token to `y` `[1, rows]`.
    pub(super) fn vector(
        simd: Avx512,
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
        simd: Avx512,
        stripe: Stripe<'_>,
        x: &Activations,
        y: ArrayViewMut2<'_, f32>,
    ) {
        let mut y = y;
        let mut planes: Planes = [[[0; STEP]; 2]; 4 * MAX_STEPS];
        for first in (0..x.tokens()).step_by(TOKENS) {
            let mut blocks = stripe.blocks();
            while let Some(one) = blocks.next() {
                let count = TOKENS.min(x.tokens() - first);
                let mut totals: Totals = [[[0.0; ROWS]; 2]; TOKENS];
                let totals = &mut totals[..count];
                let two = blocks.next();
                match two {
                    Some((_, two)) => {
                        let blocks = [one.1, two];
                        panel::<2>(simd, blocks, stripe.group_steps, x, first, &mut planes, totals)
                    }
                    None => {
                        let blocks = [one.1];
                        panel::<1>(simd, blocks, stripe.group_steps, x, first, &mut planes, totals)
                    }
                }
                for (token, total) in (first..).zip(totals) {
                    let scale = x.token(token).scale;
                    for (block, total) in [Some(one), two].iter().flatten().zip(total) {
                        store(&mut y, token, block.0, &total.map(|total| total * scale));
                    }
                }
            }
        }
    }
);

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn block_vector(simd: Avx512, block: Block<'_>, group_steps: usize, x: Token<'_>) -> [f32; ROWS] {
    let three = _mm512_set1_epi8(3);
    let mut total = _mm512_setzero_ps();
    let words = x.words.chunks(group_steps * 4);
    for (((codes, scales), words), &sum) in block.groups(group_steps).zip(words).zip(x.sums) {
        // Four chains, so that additions do not wait for each other.
        let mut sums = [_mm512_setzero_si512(); 4];
        sums[0] = _mm512_set1_epi32(-sum);
        for (codes, x) in codes.as_chunks::<STEP>().0.iter().zip(words.as_chunks::<4>().0) {
            let codes: __m512i = u8x64::from_slice(simd, codes).into();
            let planes = [
                codes,
                _mm512_srli_epi16::<2>(codes),
                _mm512_srli_epi16::<4>(codes),
                _mm512_srli_epi16::<6>(codes),
            ];
            for i in 0..4 {
                let plane = _mm512_and_si512(planes[i], three);
                sums[i] = _mm512_dpbusd_epi32(sums[i], plane, broadcast(x[i]));
            }
        }
        let low = _mm512_add_epi32(sums[0], sums[1]);
        let sum = _mm512_add_epi32(low, _mm512_add_epi32(sums[2], sums[3]));
        total = add_scaled(simd, total, scales, sum);
    }
    floats(simd, _mm512_mul_ps(total, _mm512_set1_ps(x.scale)))
}

/// Adds the products of `B` blocks with the tokens from `first` on, without the tokens' scales, to
/// `totals`.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn panel<const B: usize>(
    simd: Avx512,
    blocks: [Block<'_>; B],
    group_steps: usize,
    x: &Activations,
    first: usize,
    planes: &mut Planes,
    totals: &mut [[[f32; ROWS]; 2]],
) {
    let mut groups = blocks.map(|block| block.groups(group_steps));
    for g in 0..x.columns.div_ceil(x.group) {
        let mut scales = [&[0; ROWS]; B];
        let mut words = 0;
        for (b, groups) in groups.iter_mut().enumerate() {
            if let Some((codes, group_scales)) = groups.next() {
                scales[b] = group_scales;
                words = codes.len() / STEP * 4;
                unpack(simd, codes, planes, b);
            }
        }
        let planes = &planes[..words];
        let mut token = first;
        let mut rest = &mut *totals;
        while rest.len() >= 8 {
            let (tile, others) = rest.split_at_mut(8);
            tile_group::<8, B>(simd, planes, scales, x, token, g, tile);
            (token, rest) = (token + 8, others);
        }
        if rest.len() >= 4 {
            let (tile, others) = rest.split_at_mut(4);
            tile_group::<4, B>(simd, planes, scales, x, token, g, tile);
            (token, rest) = (token + 4, others);
        }
        for tile in rest.chunks_mut(1) {
            tile_group::<1, B>(simd, planes, scales, x, token, g, tile);
            token += 1;
        }
    }
}

/// The codes plus 1 of a group of block `b`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn unpack(simd: Avx512, codes: &[u8], planes: &mut Planes, b: usize) {
    let three = _mm512_set1_epi8(3);
    let steps = codes.as_chunks::<STEP>().0.iter().zip(planes.as_chunks_mut::<4>().0);
    for (codes, planes) in steps {
        let codes: __m512i = u8x64::from_slice(simd, codes).into();
        let shifted = [
            codes,
            _mm512_srli_epi16::<2>(codes),
            _mm512_srli_epi16::<4>(codes),
            _mm512_srli_epi16::<6>(codes),
        ];
        for (plane, shifted) in planes.iter_mut().zip(shifted) {
            let plane_codes = _mm512_and_si512(shifted, three);
            u8x64::simd_from(simd, plane_codes).store_slice(&mut plane[b]);
        }
    }
}

/// Adds one group of `B` blocks for `N` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn tile_group<const N: usize, const B: usize>(
    simd: Avx512,
    planes: &[[[u8; STEP]; 2]],
    scales: [&[u16; ROWS]; B],
    x: &Activations,
    first: usize,
    g: usize,
    totals: &mut [[[f32; ROWS]; 2]],
) {
    let words = planes.len();
    let x: [(&[[i8; 4]], i32); N] = array::from_fn(|i| {
        let token = x.token(first + i);
        (&token.words[g * x.group / 4..][..words], token.sums[g])
    });
    let mut sums: Sums<N, B> = x.map(|(_, sum)| [_mm512_set1_epi32(-sum); B]);
    for (k, plane) in planes.iter().enumerate() {
        let codes: [__m512i; B] = array::from_fn(|b| u8x64::from_slice(simd, &plane[b]).into());
        for i in 0..N {
            let x = broadcast(x[i].0[k]);
            for b in 0..B {
                sums[i][b] = _mm512_dpbusd_epi32(sums[i][b], codes[b], x);
            }
        }
    }
    for (total, sums) in totals.iter_mut().zip(sums) {
        for b in 0..B {
            let old = f32x16::from_slice(simd, &total[b]).into();
            total[b] = floats(simd, add_scaled(simd, old, scales[b], sums[b]));
        }
    }
}

/// `total + scale * sum`, with two roundings.
#[target_feature(enable = "avx512f")]
#[inline]
fn add_scaled(simd: Avx512, total: __m512, scales: &[u16; ROWS], sum: __m512i) -> __m512 {
    let scales = _mm512_cvtph_ps(u16x16::from_slice(simd, scales).into());
    _mm512_add_ps(total, _mm512_mul_ps(scales, _mm512_cvtepi32_ps(sum)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn broadcast(word: [i8; 4]) -> __m512i {
    _mm512_set1_epi32(i32::from_le_bytes(word.map(|q| q as u8)))
}

#[target_feature(enable = "avx512f")]
#[inline]
fn floats(simd: Avx512, vector: __m512) -> [f32; ROWS] {
    f32x16::simd_from(simd, vector).into()
}
