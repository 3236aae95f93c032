//! What codes are multiplied by: a row of numbers times the scales of the codes, as whole numbers.
//!
//! `sum_i x[i] (minimum[i] + scale[i] code[i]) = sum_i (x[i] scale[i]) code[i] + sum_i x[i] minimum[i]`
//! (docs/derivation.md, equations 4 and 5).

use tensor_utils::simd::{Bytes, Simd, SimdBase, SimdFloat, SimdFrom, SimdNarrow};

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
use super::bytes;
use super::task::grow;
use super::tile::lanes;

/// Numbers of a row are padded to a multiple of this.
pub(crate) const PADDING: usize = 32;
/// The largest factor: its high byte and its low byte, both with signs, hold it.
const LARGEST: f32 = 32639.0;

/// What the whole numbers of a row mean.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Scaled {
    /// The row's sums are to be multiplied by this ..
    pub(crate) scale: f32,
    /// .. and this added.
    pub(crate) offset: f32,
}

/// Rows of factors, and the scratch to make them.
#[derive(Debug, Default)]
pub(crate) struct Factors {
    /// Scales and minima of the codes.
    scales: Vec<f32>,
    minima: Vec<f32>,
    /// Pairs of 16 bits, `i = 2 j` in the lower half; with AVX-512 bytes, as [`bytes::split`] leaves
    /// them.
    words: Vec<i32>,
    meaning: Vec<Scaled>,
    /// Numbers of a row.
    len: usize,
}

impl Factors {
    pub(crate) fn rows(&self) -> usize {
        self.meaning.len()
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[i32] {
        &self.words[row * self.len / 2..][..self.len / 2]
    }

    #[inline(always)]
    pub(crate) fn meaning(&self) -> &[Scaled] {
        &self.meaning
    }

    pub(crate) fn bytes(&self) -> usize {
        let words = self.scales.capacity() + self.minima.capacity() + self.words.capacity();
        4 * words + size_of::<Scaled>() * self.meaning.capacity()
    }

    /// Takes the scales and minima of the next codes, `lead` zeros before and zeros after up to `len`,
    /// a multiple of [`PADDING`].
    pub(crate) fn load<S: Simd>(
        &mut self,
        simd: S,
        [scales, minima]: [&[u16]; 2],
        lead: usize,
        len: usize,
    ) {
        grow(&mut self.scales, len);
        grow(&mut self.minima, len);
        self.len = len;
        let (to_scales, to_minima) = (&mut self.scales[..len], &mut self.minima[..len]);
        simd.vectorize(
            #[inline(always)]
            || {
                for (from, to) in [(scales, to_scales), (minima, to_minima)] {
                    to[..lead].fill(0.0);
                    to[lead + from.len()..].fill(0.0);
                    for (to, &from) in to[lead..][..from.len()].iter_mut().zip(from) {
                        *to = f32::from_bits(u32::from(from) << 16);
                    }
                }
            },
        )
    }

    /// The factors of `rows` rows of numbers that are `stride` apart. For codes of words of `fields`
    /// fields, of which at most `terms` are summed: so many products of a factor and a code fit into 32
    /// bits.
    pub(crate) fn make<S: Simd>(
        &mut self,
        simd: S,
        numbers: &[f32],
        stride: usize,
        rows: usize,
        terms: usize,
        fields: usize,
    ) {
        let top = if fields == 4 { 15.0 } else { 255.0 };
        let amplitude = (i32::MAX as f32 / (top * terms as f32) * 0.99).min(LARGEST).floor();
        let len = self.len;
        grow(&mut self.words, rows * len / 2);
        self.meaning.clear();
        self.meaning.resize(rows, Scaled::default());
        let (scales, minima) = (&self.scales[..len], &self.minima[..len]);
        let words = &mut self.words[..rows * len / 2];
        let meaning = &mut self.meaning[..];
        simd.vectorize(
            #[inline(always)]
            || {
                for (row, words) in words.chunks_exact_mut(len / 2).enumerate() {
                    let x = &numbers[row * stride..][..len];
                    meaning[row] = whole(simd, x, scales, minima, amplitude, words);
                }
            },
        );
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        if let Some(simd) = simd.level().as_avx512() {
            bytes::split(simd, &mut self.words[..rows * len / 2], fields);
        }
    }
}

/// `x * scales` as whole numbers up to `amplitude`, in pairs, and what they mean: their products with
/// codes, times the scale, plus `sum x * minima`. The length is a multiple of [`PADDING`].
#[inline(always)]
fn whole<S: Simd>(
    simd: S,
    x: &[f32],
    scales: &[f32],
    minima: &[f32],
    amplitude: f32,
    factors: &mut [i32],
) -> Scaled {
    let n = lanes::<S>();
    let zero = S::f32s::simd_from(simd, 0.0);
    let (mut largest, mut offset) = (zero, zero);
    let terms = x.chunks_exact(n).zip(scales.chunks_exact(n)).zip(minima.chunks_exact(n));
    for ((x, scale), minimum) in terms {
        let x = S::f32s::from_slice(simd, x);
        largest = largest.max((x * S::f32s::from_slice(simd, scale)).abs());
        offset = x.mul_add(S::f32s::from_slice(simd, minimum), offset);
    }
    let largest = largest.reduce_max();
    // Products so small that this is not finite are as good as 0.
    let multiplier = S::f32s::simd_from(simd, (amplitude / largest).min(f32::MAX));
    let terms = x.chunks_exact(2 * n).zip(scales.chunks_exact(2 * n));
    for ((x, scale), factors) in terms.zip(factors.chunks_exact_mut(n)) {
        let low = nearest(simd, &x[..n], &scale[..n], multiplier);
        let high = nearest(simd, &x[n..], &scale[n..], multiplier);
        let both: S::i16s = low.narrow(high);
        let both: S::i32s = both.bitcast();
        both.store_slice(factors);
    }
    Scaled { scale: largest / amplitude, offset: offset.reduce_sum() }
}

/// `x * scale * multiplier` to the nearest whole number of 16 bits, ties to even, in the lower halves.
#[inline(always)]
fn nearest<S: Simd>(simd: S, x: &[f32], scale: &[f32], multiplier: S::f32s) -> S::i32s {
    // 1.5 * 2^23: a sum with it has no room for a fraction, and the number in its lowest bits.
    let magic = S::f32s::simd_from(simd, 12_582_912.0);
    let scaled = S::f32s::from_slice(simd, x) * S::f32s::from_slice(simd, scale);
    scaled.mul_add(multiplier, magic).bitcast()
}
