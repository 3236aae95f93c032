//! Scores as keys whose order is the order of the results.

use std::fmt::Debug;

use tensor_utils::Float;

/// A type that scores are computed in.
pub trait Score: Float {
    /// A score and its token as an integer: the smaller comes first in the results, so the score is
    /// in the high bits, turned over, and the token in the low ones.
    type Key: Copy + Debug + Default + Ord + Send;

    /// The smallest finite number.
    const LOWEST: Self;

    /// The key of a score. 0 and -0 are equal; NaN comes first.
    fn key(self, token: u32) -> Self::Key;

    /// The token of a key.
    fn token(key: Self::Key) -> u32;

    /// The score of a key, 0 for -0.
    fn of_key(key: Self::Key) -> Self;

    /// The number in the middle of those from `self` up to a larger one, counted, not measured; `self`
    /// if there is none between.
    fn middle(self, larger: Self) -> Self;
}

macro_rules! impl_score {
    ($t:ident, $bits:ident, $signed:ident, $key:ident) => {
        impl Score for $t {
            type Key = $key;

            const LOWEST: Self = $t::MIN;

            #[inline(always)]
            fn key(self, token: u32) -> $key {
                const SIGN: $bits = 1 << ($bits::BITS - 1);
                // Adding 0 makes 0 of -0.
                let bits = (self + 0.0).to_bits();
                // Of positive numbers all bits but the sign are turned over, of negative ones none.
                let descending = if bits & SIGN == 0 { !(bits | SIGN) } else { bits };
                let descending = if self.is_nan() { 0 } else { descending };
                $key::from(descending) << 32 | $key::from(token)
            }

            #[inline(always)]
            fn token(key: $key) -> u32 {
                key as u32
            }

            #[inline(always)]
            fn of_key(key: $key) -> Self {
                const SIGN: $bits = 1 << ($bits::BITS - 1);
                let descending = (key >> 32) as $bits;
                if descending & SIGN == 0 {
                    $t::from_bits(!descending & !SIGN)
                } else {
                    $t::from_bits(descending)
                }
            }

            #[inline(always)]
            fn middle(self, larger: Self) -> Self {
                // Of negative numbers all bits but the sign are turned over; that is its own inverse.
                let ordered = |bits: $signed| bits ^ ((bits >> ($bits::BITS - 1)) & $signed::MAX);
                let low = ordered(self.to_bits() as $signed);
                let high = ordered(larger.to_bits() as $signed);
                // The mean, rounded down, without overflow.
                let middle = (low & high) + ((low ^ high) >> 1);
                $t::from_bits(ordered(middle) as $bits)
            }
        }
    };
}

impl_score!(f32, u32, i32, u64);
impl_score!(f64, u64, i64, u128);

#[cfg(test)]
mod tests {
    use super::*;

    fn descending<A: Score>(scores: &[f64]) {
        for pair in scores.windows(2) {
            let [x, y] = [A::from_f64(pair[0]), A::from_f64(pair[1])];
            assert!(x.key(9) < y.key(0), "{x:?} comes before {y:?}");
            assert!(x.key(9) < x.key(10));
            assert_eq!((A::of_key(y.key(3)), A::token(y.key(3))), (y, 3));
        }
        assert_eq!(A::ZERO.key(5), (-A::ZERO).key(5));
        assert!(A::from_f64(f64::NAN).key(9) < A::from_f64(f64::INFINITY).key(0));
        assert!(A::from_f64(-f64::NAN).key(9) < A::from_f64(f64::INFINITY).key(0));
    }

    #[test]
    fn the_middle_halves_the_numbers_between() {
        let inf = f32::INFINITY;
        for (low, high) in [(1.0, 2.0), (-2.0, -1.0), (-1.0, 1.0), (-inf, inf), (-0.0, 1e-45)] {
            let (mut low, mut steps): (f32, _) = (low, 0);
            while low.middle(high) != low {
                low = low.middle(high);
                steps += 1;
            }
            assert!(low.next_up() >= high && steps <= 32, "{low} {high} {steps}");
        }
        assert_eq!(1.0_f64.middle(2.0), 1.5);
        assert_eq!((-2.0_f64).middle(-1.0), -1.5);
        assert_eq!((-1.0_f32).middle(1.0), 0.0);
        assert_eq!(1.0_f64.middle(1.0), 1.0);
    }

    #[test]
    fn keys_are_in_the_order_of_results() {
        let inf = f64::INFINITY;
        let scores = [inf, 3e38, 2.0, 1.5, 1e-40, 0.0, -1e-40, -1.0, -3e38, -inf];
        descending::<f32>(&scores);
        descending::<f64>(&scores);
    }
}
