//! `int8` and `int4` codes: `x = minimum + scale * code`, `code` in `0..levels`.
//!
//! Scale and minimum are bf16, which has the range of f32: the minimum is rounded down and the scale
//! up, so that the codes cover the whole range, and the codes are those nearest under the rounded
//! values. So every element is off by at most half a scale (docs/derivation.md, section 2).

use tensor_utils::simd::{Bytes, Simd, SimdBase, SimdFrom};
use tensor_utils::{Element, Kernel, bf16};

use crate::form::Form;

/// Groups whose codes share a word and its neighbour, at most.
const BLOCK: usize = 8;

/// What codes of a group mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Affine {
    pub(crate) minimum: bf16,
    pub(crate) scale: bf16,
}

impl Affine {
    /// Covers `min ..= max`, both finite, with codes up to `top`.
    pub(crate) fn covering(min: f32, max: f32, top: f32) -> Self {
        let minimum = round_down(min);
        // In f64, where the difference of two finite f32 cannot overflow.
        let range = f64::from(max) - f64::from(minimum.to_acc());
        let scale = round_up((range / f64::from(top)) as f32);
        Self { minimum, scale }
    }

    /// Half of the minimum and of the scale: the difference of two finite numbers can overflow, that of their
    /// halves cannot. A scale of 0 is infinite, so that all codes are 0.
    #[inline(always)]
    fn halves(self) -> (f32, f32) {
        let scale = 0.5 * self.scale.to_acc();
        (0.5 * self.minimum.to_acc(), if scale == 0.0 { f32::INFINITY } else { scale })
    }

    /// The nearest code, as a float.
    #[cfg(test)]
    fn code(self, x: f32, top: f32) -> f32 {
        let (minimum, scale) = self.halves();
        ((0.5 * x - minimum) / scale).round_ties_even().clamp(0.0, top)
    }

    /// At most the largest number, beyond which the scale reaches where it was rounded up.
    #[inline(always)]
    pub(crate) fn value(self, code: u16) -> f32 {
        f32::from(code).mul_add(self.scale.to_acc(), self.minimum.to_acc()).min(f32::MAX)
    }
}

/// Quantises a full record.
pub(crate) struct Quantise<'a> {
    pub(crate) form: Form,
    /// The same record in full precision, from its first number on. Vectors are loaded past its end.
    pub(crate) from: &'a [f32],
    pub(crate) to: &'a mut [u16],
}

impl Kernel for Quantise<'_> {
    type Output = ();

    /// Block by block of the groups whose codes share words.
    fn run<S: Simd>(self, simd: S) {
        let Self { form, from, to } = self;
        let (raw, top, block) = (form.raw(), form.top(), 2 * form.fields);
        let (affine, words) = to.split_at_mut(form.head());
        let (scales, minima) = affine.split_at_mut(form.groups);
        let mut block_affine = [Affine { minimum: bf16::ZERO, scale: bf16::ZERO }; BLOCK];
        for first in (0..form.groups).step_by(block) {
            let affine = &mut block_affine[..block.min(form.groups - first)];
            for (affine, group) in affine.iter_mut().zip(first..) {
                let (mut min, mut max) = (f32::INFINITY, f32::NEG_INFINITY);
                for panel in raw.panels(0..form.lanes) {
                    let lanes = &from[panel.start + group * panel.stride..][..panel.lanes.len()];
                    let (a, b) = extremes(simd, lanes);
                    (min, max) = (min.min(a), max.max(b));
                }
                *affine = Affine::covering(min, max, top);
                scales[group] = affine.scale.to_bits();
                minima[group] = affine.minimum.to_bits();
            }
            for (panel, raw) in form.panels(0..form.lanes).zip(raw.panels(0..form.lanes)) {
                let from = &from[raw.start + first * raw.stride..];
                let words = &mut words[panel.start + first / block * panel.stride * 2..];
                let words = &mut words[..panel.lanes.len() * 2];
                pack(simd, affine, (top, 16 / form.fields), from, raw.stride, words);
            }
        }
    }
}

/// The least and the largest number.
fn extremes<S: Simd>(simd: S, numbers: &[f32]) -> (f32, f32) {
    simd.vectorize(
        #[inline(always)]
        || {
            let mut min = S::f32s::simd_from(simd, f32::INFINITY);
            let mut max = S::f32s::simd_from(simd, f32::NEG_INFINITY);
            let mut chunks = numbers.chunks_exact(S::f32s::LEN);
            for chunk in &mut chunks {
                let x = S::f32s::from_slice(simd, chunk);
                (min, max) = (min.min(x), max.max(x));
            }
            let whole = (min.reduce_min(), max.reduce_max());
            let rest = chunks.remainder().iter();
            rest.fold(whole, |(min, max), &x| (min.min(x), max.max(x)))
        },
    )
}

/// The words of a panel of a block: two for each lane, with the codes of `bits` bits of the groups 0, 2, ..
/// in the first and of 1, 3, .. in the second, from the lowest bits on. The numbers of a group are `stride` from
/// those of the one before.
fn pack<S: Simd>(
    simd: S,
    affine: &[Affine],
    (top, bits): (f32, usize),
    from: &[f32],
    stride: usize,
    words: &mut [u16],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let lanes = S::f32s::LEN;
            // With 2^23 added a number up to 2^23 has no room for a fraction, and is rounded to even.
            let magic = S::f32s::simd_from(simd, 8_388_608.0);
            let half = S::f32s::simd_from(simd, 0.5);
            let (zero, top) = (S::f32s::simd_from(simd, 0.0), S::f32s::simd_from(simd, top));
            for (chunk, words) in words.chunks_mut(2 * lanes).enumerate() {
                let mut both = S::u32s::simd_from(simd, 0);
                for (group, affine) in affine.iter().enumerate() {
                    let (minimum, scale) = affine.halves();
                    let x =
                        S::f32s::from_slice(simd, &from[group * stride + chunk * lanes..][..lanes]);
                    // As [`Affine::code`].
                    let above = x * half - S::f32s::simd_from(simd, minimum);
                    let code = (above / S::f32s::simd_from(simd, scale)).max(zero).min(top);
                    let code: S::u32s = (code + magic).bitcast();
                    let shift = group / 2 * bits + group % 2 * 16;
                    both |= (code & 0xff) << shift as u32;
                }
                let both: S::u16s = both.bitcast();
                if words.len() == 2 * lanes {
                    both.store_slice(words);
                } else {
                    words.copy_from_slice(&both.as_slice()[..words.len()]);
                }
            }
        },
    )
}

/// The largest bf16 that is not above `x`, which is finite; the lowest finite one below its range.
fn round_down(x: f32) -> bf16 {
    let truncated = x.to_bits() >> 16;
    let exact = x.to_bits() & 0xffff == 0;
    // Dropping bits rounds towards 0: right for positive numbers, one step short for negative ones.
    let bits = if x.is_sign_negative() && !exact { truncated + 1 } else { truncated };
    let rounded = bf16::from_bits(bits as u16);
    if rounded.is_infinite() { bf16::MIN } else { rounded }
}

/// The smallest bf16 that is not below `x >= 0`; the largest finite one above its range.
fn round_up(x: f32) -> bf16 {
    let bits = (x.to_bits() >> 16) + u32::from(x.to_bits() & 0xffff != 0);
    let rounded = bf16::from_bits(bits as u16);
    if rounded.is_infinite() || rounded.is_nan() { bf16::MAX } else { rounded }
}

#[cfg(test)]
mod tests {
    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};
    use tensor_utils::{Isa, dispatch};

    use super::*;
    use crate::Storage;
    use crate::form::Side;
    use crate::store::{SLACK, write_row};

    /// Whole vectors, what is left of them, several panels; a group of one value, one whose range is below
    /// the smallest scale, and one that reaches from end to end of `f32`.
    #[test]
    fn records_have_the_nearest_codes_on_every_instruction_set() {
        let rng = &mut ChaCha8Rng::seed_from_u64(6);
        for (rows, columns) in [(64, 128), (16, 70), (5, 33), (1, 1), (130, 3)] {
            for (side, storage) in [Side::Keys, Side::Values]
                .into_iter()
                .flat_map(|side| [Storage::Int8, Storage::Int4].map(|storage| (side, storage)))
            {
                let form = Form::new(side, storage, 1, columns, rows, 1);
                let raw = form.raw();
                let (top, fields) = (form.top(), form.fields);
                let mut from = vec![f32::NAN; raw.record + SLACK];
                let numbers: Vec<f32> =
                    (0..rows * columns).map(|_| rng.random_range(-2.0..3.0)).collect();
                let group = |row: usize, column: usize| match side {
                    Side::Keys => column,
                    Side::Values => row,
                };
                let number = |row: usize, column: usize| {
                    let x = numbers[row * columns + column];
                    match group(row, column) {
                        1 => 0.7,
                        2 => x.signum() * 1e-45,
                        3 => x.signum() * f32::MAX,
                        _ => x,
                    }
                };
                let places = || (0..rows).flat_map(|row| (0..columns).map(move |c| (row, c)));
                for row in 0..rows {
                    let numbers: Vec<f32> = (0..columns).map(|c| number(row, c)).collect();
                    write_row(raw, &mut from, row, &numbers);
                }
                for isa in Isa::available() {
                    // What was there before is no code.
                    let mut to = vec![u16::MAX; form.record];
                    let record = Quantise { form, from: &from, to: &mut to };
                    dispatch(isa, record).unwrap();
                    for (row, column) in places() {
                        let of_group = places()
                            .filter(|&(r, c)| group(r, c) == group(row, column))
                            .map(|(r, c)| number(r, c));
                        let (min, max) =
                            of_group.fold((f32::MAX, f32::MIN), |(a, b), x| (a.min(x), b.max(x)));
                        let want = Affine::covering(min, max, top);
                        let [scale, minimum] = form
                            .affine(&to, group(row, column)..group(row, column) + 1)
                            .map(|bits| bf16::from_bits(bits[0]));
                        assert_eq!(Affine { minimum, scale }, want, "{form:?}");
                        let (word, shift) = form.word_at(row, column);
                        let code = to[form.head() + word] >> shift & form.field_mask();
                        let want = want.code(number(row, column), top);
                        assert_eq!(f32::from(code), want, "{isa:?} {form:?} {row} {column}");
                    }
                    // Fields that no number has are 0.
                    let codes = to[form.head()..].iter().map(|word| word.count_ones()).sum::<u32>();
                    let used = places().map(|(row, column)| {
                        let (word, shift) = form.word_at(row, column);
                        (to[form.head() + word] >> shift & form.field_mask()).count_ones()
                    });
                    assert_eq!(codes, used.sum::<u32>(), "{isa:?} {form:?} {fields} fields");
                }
            }
        }
    }

    #[test]
    fn every_code_is_the_nearest_and_the_range_is_covered() {
        for (min, max) in [
            (-1.0, 1.0),
            (0.1, 0.3),
            (-3.7, -3.6),
            (5.0, 5.0),
            (0.0, 0.0),
            (-1e-30, 2e-30),
            (-3e38, 3e38),
            (1e-42, 2e-42),
            (f32::MIN, f32::MAX),
        ] {
            for top in [255.0, 15.0] {
                let affine = Affine::covering(min, max, top);
                let scale = affine.scale.to_f64();
                assert!(affine.value(top as u16).is_finite() && affine.value(0).is_finite());
                assert!(affine.minimum.to_f64() <= f64::from(min) || min == f32::MIN);
                for step in 0..=20 {
                    let t = step as f32 / 20.0;
                    let x = min * (1.0 - t) + max * t;
                    let code = affine.code(x, top);
                    let got = affine.minimum.to_f64() + scale * f64::from(code);
                    let error = (got - f64::from(x)).abs();
                    let bound = scale * 0.5001 + f64::from(x).abs() * 1e-6 + 1e-44;
                    let extreme = max > 1e38;
                    assert!(
                        error <= bound || extreme && error <= scale,
                        "{min} {max} {x}: {error}"
                    );
                }
            }
        }
    }
}
