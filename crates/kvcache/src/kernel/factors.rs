//! What codes are multiplied by: a row of numbers times the scales of the codes, as whole numbers.
//!
//! `sum_i x[i] (minimum[i] + scale[i] code[i]) = sum_i (x[i] scale[i]) code[i] + sum_i x[i] minimum[i]`
//! (docs/derivation.md, equations 4 and 5).

use tensor_utils::Aligned;
use tensor_utils::simd::{Bytes, Simd, SimdBase, SimdFloat, SimdFrom, SimdNarrow};

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
use super::bytes;
use super::tile::lanes;

/// Numbers of a row are padded to a multiple of this.
pub(crate) const PADDING: usize = 32;
/// Results whose factors are made at a time.
const TOGETHER: usize = 4;
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

/// The groups of codes that factors are made for: what their codes mean, in bf16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Groups<'a> {
    pub(crate) scales: &'a [u16],
    pub(crate) minima: &'a [u16],
    /// Numbers of a row that meet no code, before the first that does; those after the last are as many
    /// as are left.
    pub(crate) lead: usize,
    /// Fields of a word of codes.
    pub(crate) fields: usize,
    /// At most so many products of a factor and a code are summed, and fit into 32 bits.
    pub(crate) terms: usize,
}

/// Results of factors, and the scratch to make them.
#[derive(Debug, Default)]
pub(crate) struct Factors {
    /// Scales and minima of the codes.
    scales: Aligned<f32>,
    minima: Aligned<f32>,
    /// Pairs of 16 bits, `i = 2 j` in the lower half; with AVX-512 bytes, as [`bytes::split`] leaves
    /// them.
    words: Aligned<i32>,
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
        let words = self.scales.bytes() + self.minima.bytes() + self.words.bytes();
        words + size_of::<Scaled>() * self.meaning.capacity()
    }

    /// The factors of `rows` rows of `len` numbers, a multiple of [`PADDING`], that are `stride` apart.
    pub(crate) fn make<S: Simd>(
        &mut self,
        simd: S,
        groups: Groups<'_>,
        numbers: &[f32],
        (rows, stride, len): (usize, usize, usize),
    ) {
        self.len = len;
        self.scales.grow(len);
        self.minima.grow(len);
        self.words.grow(rows * len / 2);
        self.meaning.clear();
        self.meaning.resize(rows, Scaled::default());
        let (scales, minima) = (&mut self.scales[..len], &mut self.minima[..len]);
        let mut words = &mut self.words[..rows * len / 2];
        let mut meaning = &mut self.meaning[..];
        let fields = groups.fields;
        simd.vectorize(
            #[inline(always)]
            || {
                widen(groups.scales, groups.lead, scales);
                widen(groups.minima, groups.lead, minima);
                let top = if fields == 4 { 15.0 } else { 255.0 };
                let fits = i32::MAX as f32 / (top * groups.terms as f32) * 0.99;
                let widened = Widened { scales, minima, amplitude: fits.min(LARGEST).floor() };
                let mut row = 0;
                while row < rows {
                    let numbers = &numbers[row * stride..];
                    let together = if rows - row >= TOGETHER { TOGETHER } else { 1 };
                    let (now, later) = words.split_at_mut(together * len / 2);
                    let (means, rest) = meaning.split_at_mut(together);
                    if together == TOGETHER {
                        whole::<S, TOGETHER>(simd, numbers, stride, &widened, now, means);
                    } else {
                        whole::<S, 1>(simd, numbers, stride, &widened, now, means);
                    }
                    (words, meaning) = (later, rest);
                    row += together;
                }
            },
        );
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        if let Some(simd) = simd.level().as_avx512() {
            bytes::split(simd, &mut self.words[..rows * len / 2], fields);
        }
    }
}

/// bf16 to f32, after `lead` zeros and before more of them.
#[inline(always)]
fn widen(from: &[u16], lead: usize, to: &mut [f32]) {
    to[..lead].fill(0.0);
    to[lead + from.len()..].fill(0.0);
    for (to, &from) in to[lead..][..from.len()].iter_mut().zip(from) {
        *to = f32::from_bits(u32::from(from) << 16);
    }
}

/// What codes mean in f32, one for each number of a row, and how large a factor may be.
struct Widened<'a> {
    scales: &'a [f32],
    minima: &'a [f32],
    amplitude: f32,
}

/// `x * scales` of `ROWS` rows as whole numbers up to the amplitude, in pairs, and what they mean: their
/// products with codes, times the scale, plus `sum x * minima`. Results together hide how long each takes to
/// find its largest product. The length is a multiple of [`PADDING`].
#[inline(always)]
fn whole<S: Simd, const ROWS: usize>(
    simd: S,
    numbers: &[f32],
    stride: usize,
    groups: &Widened<'_>,
    factors: &mut [i32],
    meaning: &mut [Scaled],
) {
    let n = lanes::<S>();
    let Widened { scales, minima, amplitude } = *groups;
    let len = scales.len();
    let minima = &minima[..len];
    let mut x: [&[f32]; ROWS] = [&[]; ROWS];
    for r in 0..ROWS {
        x[r] = &numbers[r * stride..][..len];
    }
    let zero = S::f32s::simd_from(simd, 0.0);
    let (mut largest, mut offset) = ([zero; ROWS], [zero; ROWS]);
    for at in (0..len).step_by(n) {
        let scale = S::f32s::from_slice(simd, &scales[at..at + n]);
        let minimum = S::f32s::from_slice(simd, &minima[at..at + n]);
        for r in 0..ROWS {
            let x = S::f32s::from_slice(simd, &x[r][at..at + n]);
            largest[r] = largest[r].max((x * scale).abs());
            offset[r] = x.mul_add(minimum, offset[r]);
        }
    }
    let mut multiplier = [zero; ROWS];
    for r in 0..ROWS {
        let largest = largest[r].reduce_max();
        // Products so small that this is not finite are as good as 0.
        multiplier[r] = S::f32s::simd_from(simd, (amplitude / largest).min(f32::MAX));
        meaning[r] = Scaled { scale: largest / amplitude, offset: offset[r].reduce_sum() };
    }
    for at in (0..len).step_by(2 * n) {
        let scale = &scales[at..at + 2 * n];
        for r in 0..ROWS {
            let x = &x[r][at..at + 2 * n];
            let low = nearest(simd, &x[..n], &scale[..n], multiplier[r]);
            let high = nearest(simd, &x[n..], &scale[n..], multiplier[r]);
            let both: S::i16s = low.narrow(high);
            let both: S::i32s = both.bitcast();
            both.store_slice(&mut factors[(r * len + at) / 2..][..n]);
        }
    }
}

/// `x * scale * multiplier` to the nearest whole number of 16 bits, ties to even, in the lower halves.
#[inline(always)]
fn nearest<S: Simd>(simd: S, x: &[f32], scale: &[f32], multiplier: S::f32s) -> S::i32s {
    // 1.5 * 2^23: a sum with it has no room for a fraction, and the number in its lowest bits.
    let magic = S::f32s::simd_from(simd, 12_582_912.0);
    let scaled = S::f32s::from_slice(simd, x) * S::f32s::from_slice(simd, scale);
    scaled.mul_add(multiplier, magic).bitcast()
}
