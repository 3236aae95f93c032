//! `int8` and `int4` codes: `x = minimum + scale * code`, `code` in `0..levels`.
//!
//! Scale and minimum are bf16, which has the range of f32: the minimum is rounded down and the scale
//! up, so that the codes cover the whole range, and the codes are those nearest under the rounded
//! values. So every element is off by at most half a scale (docs/derivation.md, section 2).

use tensor_utils::{Element, bf16};

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

    /// The nearest code, as a float.
    #[inline(always)]
    pub(crate) fn code(self, x: f32, top: f32) -> f32 {
        let scale = self.scale.to_acc();
        if scale == 0.0 {
            return 0.0;
        }
        // Halves, because the difference of two finite numbers can overflow.
        let above = 0.5 * x - 0.5 * self.minimum.to_acc();
        (above / (0.5 * scale)).round_ties_even().clamp(0.0, top)
    }

    /// At most the largest number, beyond which the scale reaches where it was rounded up.
    #[inline(always)]
    pub(crate) fn value(self, code: u16) -> f32 {
        f32::from(code).mul_add(self.scale.to_acc(), self.minimum.to_acc()).min(f32::MAX)
    }
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
    use super::*;

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
