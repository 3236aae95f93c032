//! The types that kernels compute in, and their vectors.

use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use fearless_simd::{Simd, SimdFloat, SimdFloatElement};

use crate::{Element, exp};

/// A compute type: `f32` or `f64`, with a native vector on every instruction set.
pub trait Float:
    Element<Acc = Self>
    + SimdFloatElement
    + PartialOrd
    + Add<Output = Self>
    + AddAssign
    + Sub<Output = Self>
    + Mul<Output = Self>
    + MulAssign
    + Div<Output = Self>
    + Neg<Output = Self>
    + Sum
{
    /// The native vector of this type on instruction set `S`.
    type Vector<S: Simd>: SimdFloat<S, Element = Self>;

    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The identity of the maximum.
    const NEG_INFINITY: Self;

    /// `e^self`, by the standard library.
    fn exp(self) -> Self;
    /// Natural logarithm, by the standard library.
    fn ln(self) -> Self;
    /// Hyperbolic tangent, by the standard library.
    fn tanh(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// The larger of the two; NaN if either is.
    fn max_nan(self, other: Self) -> Self;
    /// Whether it is neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// Whether it is NaN.
    fn is_nan(self) -> bool;

    /// `e^x` for every lane: within 1 ULP, exactly 0 where that is below the smallest normal number,
    /// inf above the largest. NaN gives NaN.
    fn exp_vector<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S>;

    /// The same for lanes that are at most 0, -inf or NaN, some operations cheaper; other lanes give
    /// anything.
    fn exp_nonpositive_vector<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S>;

    /// Two factors of `e^x` for lanes that are at most 0, -inf or NaN, so that a sum can multiply and
    /// add in one operation. The relative error of their rounded product is at most `1.5 + |x| / 40`
    /// epsilons, 0 at 0; where `e^x` is below the smallest normal number it is that number: nothing beside a 1 in the same
    /// sum.
    ///
    /// Several vectors at a time hide the latency of the operations, whose chain is long.
    fn exp_nonpositive_factors<S: Simd, const N: usize>(
        simd: S,
        x: [Self::Vector<S>; N],
    ) -> ([Self::Vector<S>; N], [Self::Vector<S>; N]);

    /// `e^x` for lanes that are at most 0, -inf or NaN, as weights of a softmax whose largest is 1: the
    /// error is at most 0.6 epsilons, 0 at 0. The relative error grows with `|x|`, to 0.6 `|x|` epsilons
    /// (`f32`: 6e-6 at the smallest results). Exactly 0 from `2^-127` (`f64`: `2^-1023`) down; between
    /// that and the smallest normal number anything from 0 to it. NaN gives NaN.
    ///
    /// Several vectors at a time hide the latency of the operations, whose chain is long.
    fn exp_weights<S: Simd, const N: usize>(
        simd: S,
        x: [Self::Vector<S>; N],
    ) -> [Self::Vector<S>; N];

    /// `tanh(x)` for every lane: within 1.5 ULP for `f32`, 2 ULP for `f64`. NaN gives NaN.
    fn tanh_vector<S: Simd>(simd: S, x: Self::Vector<S>) -> Self::Vector<S>;
}

macro_rules! impl_float {
    (
        $t:ident,
        $vector:ident,
        $exp:ident,
        $exp_nonpositive:ident,
        $factors:path,
        $weights:ident,
        $tanh:ident
    ) => {
        impl Float for $t {
            type Vector<S: Simd> = S::$vector;

            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;

            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }

            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }

            #[inline(always)]
            fn tanh(self) -> Self {
                self.tanh()
            }

            #[inline(always)]
            fn abs(self) -> Self {
                self.abs()
            }

            #[inline(always)]
            fn max_nan(self, other: Self) -> Self {
                if self.is_nan() || self > other { self } else { other }
            }

            #[inline(always)]
            fn is_finite(self) -> bool {
                self.is_finite()
            }

            #[inline(always)]
            fn is_nan(self) -> bool {
                self.is_nan()
            }

            #[inline(always)]
            fn exp_vector<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
                exp::$exp(simd, x)
            }

            #[inline(always)]
            fn exp_nonpositive_vector<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
                exp::$exp_nonpositive(simd, x)
            }

            #[inline(always)]
            fn exp_nonpositive_factors<S: Simd, const N: usize>(
                simd: S,
                x: [S::$vector; N],
            ) -> ([S::$vector; N], [S::$vector; N]) {
                $factors(simd, x)
            }

            #[inline(always)]
            fn exp_weights<S: Simd, const N: usize>(
                simd: S,
                x: [S::$vector; N],
            ) -> [S::$vector; N] {
                exp::$weights(simd, x)
            }

            #[inline(always)]
            fn tanh_vector<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
                exp::$tanh(simd, x)
            }
        }
    };
}

impl_float!(
    f32,
    f32s,
    exp_f32,
    exp_nonpositive_f32,
    exp::table::factors_f32,
    exp_weights_f32,
    tanh_f32
);
impl_float!(
    f64,
    f64s,
    exp_f64,
    exp_nonpositive_f64,
    exp::exp_nonpositive_factors_f64,
    exp_weights_f64,
    tanh_f64
);
