//! Products with `vpdpbusd`: unsigned codes times signed activations, four columns a step.

#[cfg(target_arch = "x86")]
use std::arch::x86::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::array;

use fearless_simd::{Avx512, SimdBase, SimdFrom, f32x16, u8x64, u16x16};
use ndarray::ArrayViewMut2;
use tensor_utils::prefetch;

use super::Activations;
use super::activations::{Panel, TileGroup};
use super::block::{AHEAD, MAX_WORDS, Stripe, Totals, each_panel, store};
use super::layout::{ROWS, STEP};

/// The codes plus 1 of a group: `[words][rows][4]`.
type Planes = [[u8; STEP]; MAX_WORDS];

fearless_simd::kernel!(
    /// Writes the products of the stripe's rows with 1, 2, 4 or 8 tokens to `y` `[tokens, rows]`.
    pub(super) fn vectors(
        simd: Avx512,
        stripe: Stripe<'_>,
        x: &Activations,
        y: ArrayViewMut2<'_, f32>,
    ) {
        let mut y = y;
        let Some((_, panel)) = x.panels().next() else { return };
        match x.tokens() {
            8 => each_block::<8, 4>(simd, stripe, panel, &mut y),
            4 => each_block::<4, 4>(simd, stripe, panel, &mut y),
            2 => each_block::<2, 2>(simd, stripe, panel, &mut y),
            _ => each_block::<1, 1>(simd, stripe, panel, &mut y),
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
        let empty: Planes = [[0; STEP]; MAX_WORDS];
        let unpack = |codes: &[u8], planes: &mut Planes| unpack(simd, codes, planes);
        each_panel(stripe, x, y, empty, unpack, |planes, scales, x, totals| {
            let pairs = planes.chunks(2).zip(scales.chunks(2)).zip(totals.chunks_mut(2));
            for ((planes, scales), totals) in pairs {
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

/// Products with a single tile of `N` tokens, `M` of them at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn each_block<const N: usize, const M: usize>(
    simd: Avx512,
    stripe: Stripe<'_>,
    x: Panel<'_>,
    y: &mut ArrayViewMut2<'_, f32>,
) {
    for (first_row, block) in stripe.blocks() {
        let mut totals = [_mm512_setzero_ps(); N];
        for ((codes, scales), x) in block.groups(stripe.group_steps).zip(x.groups()) {
            let codes = codes.as_chunks().0;
            let words = x.words.as_chunks::<N>().0.as_chunks().0;
            let parts = totals.as_chunks_mut::<M>().0.iter_mut().zip(x.sums.as_chunks::<M>().0);
            for (part, (totals, offsets)) in parts.enumerate() {
                // The usual group of 128 without a loop.
                let sums = match (codes.as_array::<8>(), words.as_array::<8>()) {
                    (Some(codes), Some(words)) => group_sums(simd, codes, words, part),
                    _ => group_sums::<N, M>(simd, codes, words, part),
                };
                for ((total, sum), offset) in totals.iter_mut().zip(sums).zip(offsets) {
                    let sum = _mm512_sub_epi32(sum, _mm512_set1_epi32(*offset));
                    *total = add_scaled(simd, *total, scales, sum);
                }
            }
        }
        for (token, (total, scale)) in totals.into_iter().zip(x.scales).enumerate() {
            let total = _mm512_mul_ps(total, _mm512_set1_ps(*scale));
            store(y, token, first_row, &floats(simd, total));
        }
    }
}

/// The sums of a group for a part of a tile, `M` of `N` tokens, of codes plus 1.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn group_sums<const N: usize, const M: usize>(
    simd: Avx512,
    codes: &[[u8; STEP]],
    words: &[[[[i8; 4]; N]; 4]],
    part: usize,
) -> [__m512i; M] {
    // Each word of a step has its own sums, so its codes can stay where they are in the byte: the sums
    // are 1, 4, 16 and 64 times too large.
    let masks = [0x03, 0x0c, 0x30, 0xc0_u8].map(|mask| _mm512_set1_epi8(mask as i8));
    let mut sums = [[_mm512_setzero_si512(); 4]; M];
    let codes = &codes[..words.len()];
    for (step, words) in words.iter().enumerate() {
        prefetch(codes, step + AHEAD);
        let codes: __m512i = u8x64::from_slice(simd, &codes[step]).into();
        for k in 0..4 {
            let plane = _mm512_and_si512(codes, masks[k]);
            for (sums, word) in sums.iter_mut().zip(&words[k].as_chunks::<M>().0[part]) {
                sums[k] = _mm512_dpbusd_epi32(sums[k], plane, broadcast(*word));
            }
        }
    }
    sums.map(|[a, b, c, d]| {
        let low = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
        let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
        _mm512_add_epi32(low, high)
    })
}

/// The codes plus 1 of a step, word by word.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn planes(simd: Avx512, codes: &[u8; STEP]) -> [__m512i; 4] {
    let three = _mm512_set1_epi8(3);
    let codes: __m512i = u8x64::from_slice(simd, codes).into();
    [
        _mm512_and_si512(codes, three),
        _mm512_and_si512(_mm512_srli_epi16::<2>(codes), three),
        _mm512_and_si512(_mm512_srli_epi16::<4>(codes), three),
        _mm512_and_si512(_mm512_srli_epi16::<6>(codes), three),
    ]
}

#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn unpack(simd: Avx512, codes: &[u8], out: &mut Planes) {
    let codes = codes.as_chunks::<STEP>().0;
    for (step, (one, out)) in codes.iter().zip(out.as_chunks_mut::<4>().0).enumerate() {
        prefetch(codes, step + AHEAD);
        for (plane, out) in planes(simd, one).into_iter().zip(out) {
            u8x64::simd_from(simd, plane).store_slice(out);
        }
    }
}

/// Adds one group of one or two blocks for a tile of `N` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn add<const N: usize>(
    simd: Avx512,
    planes: &[Planes],
    scales: &[&[u16; ROWS]],
    x: TileGroup<'_>,
    totals: &mut [&mut Totals],
) {
    if let ([a, b], [p, q], [s, t]) = (planes, scales, &mut *totals) {
        add_blocks::<N, 2>(simd, [a, b], [p, q], x, [s, t]);
    } else if let ([a], [p], [s]) = (planes, scales, totals) {
        add_blocks::<N, 1>(simd, [a], [p], x, [s]);
    }
}

/// Adds one group of `B` blocks for a tile of `N` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn add_blocks<const N: usize, const B: usize>(
    simd: Avx512,
    planes: [&Planes; B],
    scales: [&[u16; ROWS]; B],
    x: TileGroup<'_>,
    totals: [&mut Totals; B],
) {
    let words = x.words.as_chunks::<N>().0;
    let planes = planes.map(|planes| &planes[..words.len()]);
    let mut sums = [[_mm512_setzero_si512(); B]; N];
    for (sums, sum) in sums.iter_mut().zip(x.sums) {
        *sums = [_mm512_set1_epi32(-sum); B];
    }
    for (k, words) in words.iter().enumerate() {
        let codes: [__m512i; B] = array::from_fn(|b| u8x64::from_slice(simd, &planes[b][k]).into());
        for (sums, word) in sums.iter_mut().zip(words) {
            let x = broadcast(*word);
            for (sum, codes) in sums.iter_mut().zip(codes) {
                *sum = _mm512_dpbusd_epi32(*sum, codes, x);
            }
        }
    }
    for (b, totals) in totals.into_iter().enumerate() {
        for (total, sums) in totals.iter_mut().zip(&sums) {
            let old = f32x16::from_slice(simd, total).into();
            *total = floats(simd, add_scaled(simd, old, scales[b], sums[b]));
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
