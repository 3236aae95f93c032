//! Errors in units of the last place.

use crate::Element;

/// The unit of the last place of `T` at `value`: the distance between neighbours in the binade of
/// `value`, as if the exponent had no upper end. Below the smallest normal number, and so at 0, it
/// is the smallest subnormal number: never 0 and never negative. NaN for infinite `value` and NaN.
pub fn ulp<T: Element>(value: f64) -> f64 {
    if !value.is_finite() {
        return f64::NAN;
    }
    // Without its fraction a normal number is its power of two; a subnormal `value` becomes 0 here
    // and is lifted to the smallest normal number of `T`, as everything below that is.
    let binade = f64::from_bits(value.to_bits() & f64::INFINITY.to_bits());
    binade.max(T::MIN_POSITIVE) * T::EPSILON
}

/// How far `got` is from `want` in units of the last place of `T` at `want`.
///
/// 0 if both are NaN or the same infinity, inf if only one of them is. A finite `want` that `T`
/// rounds to infinity agrees with that infinity.
pub fn ulp_error<T: Element>(got: T, want: f64) -> f64 {
    let rounded = T::from_f64(want).to_f64();
    if !got.to_f64().is_finite() || !rounded.is_finite() {
        return super::error(got.to_f64(), rounded);
    }
    (got.to_f64() - want).abs() / ulp::<T>(want)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn ulp_is_the_gap_to_the_next_number() {
        for value in [1.0_f32, 1.5, -2.0, 3.0e38, 1.2e-38, 1e-40, 0.0, -0.0] {
            let gap = f64::from(value.abs().next_up()) - f64::from(value.abs());
            assert_eq!(ulp::<f32>(value.into()), gap, "{value}");
        }
        assert_eq!(ulp::<f64>(0.0), f64::from_bits(1));
        assert_eq!(ulp::<f64>(1.0), f64::EPSILON);
        assert_eq!(ulp::<bf16>(1.0), bf16::EPSILON.to_f64());
        assert_eq!(ulp::<f16>(1.0), f16::EPSILON.to_f64());
        assert_eq!(ulp::<f16>(0.0), f16::MIN_POSITIVE_SUBNORMAL.to_f64());
        assert!(ulp::<f32>(f64::NAN).is_nan());
    }

    #[test]
    fn error_at_zero_counts_subnormals() {
        assert_eq!(ulp_error(0.0_f32, 0.0), 0.0);
        assert_eq!(ulp_error(f32::from_bits(3), 0.0), 3.0);
        assert_eq!(ulp_error(f32::MIN_POSITIVE, 0.0), f64::from(1 << 23));
    }

    #[test]
    fn specials_agree_only_with_themselves() {
        assert_eq!(ulp_error(f32::NAN, f64::NAN), 0.0);
        assert_eq!(ulp_error(f32::INFINITY, 1e39), 0.0);
        assert_eq!(ulp_error(f32::INFINITY, f64::from(f32::MAX)), f64::INFINITY);
        assert_eq!(ulp_error(f32::NEG_INFINITY, f64::INFINITY), f64::INFINITY);
        assert_eq!(ulp_error(f32::NAN, 1.0), f64::INFINITY);
        assert_eq!(ulp_error(1.0_f32, f64::NAN), f64::INFINITY);
    }
}
