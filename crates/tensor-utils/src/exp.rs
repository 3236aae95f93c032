//! Exponential and hyperbolic tangent of vectors.
//!
//! `e^x = 2^n e^r` with `n` the integer nearest to `x / ln 2` and `|r| <= ln 2 / 2`:
//!
//! 1. `t = x / ln 2 + magic`, where `magic` is so large that the sum has no room for a fraction:
//!    its last bits are `n` plus the exponent bias (which `magic` also carries).
//! 2. `r = x - n ln 2`, with `ln 2 = HIGH + LOW` and `HIGH` so short that `x - n HIGH` is exact
//!    even without fused multiply-add (Cody and Waite, 1980); its value is `h` below.
//! 3. `e^r = 1 + r + r^2 q(r)`, `q` the polynomial with the smallest largest relative error (Remez),
//!    refitted after the rounding of each coefficient from the highest down.
//! 4. The last bits of `t`, shifted into the exponent, are `2^n`.
//!
//! Step 3 has two forms. The result of `e^r < 1` has its last place at 2^-24 in f32, and there the
//! roundings add up to, in units of that place, where `r` is near `-ln 2 / 2`:
//!
//! - fused multiply-add: `e^r = (q r + 1) r + 1` by Horner's rule: 1/2 for the last operation, 1/5
//!   for the rounding of `r`, 1/6 for that of the inner sum, and 1/20 for all that comes before;
//! - separate multiplication and addition: Horner's rule would lose another 1/4 by rounding the
//!   product and reach more than 1. Instead the rounding of `r` is kept out of the leading term,
//!   `e^r = 1 + (h + (r^2 q - n LOW))`: 1/2 for the last operation, 1/4 for the one before, 1/10 for
//!   all others.
//!
//! Largest errors measured, over all 2^32 inputs of f32 and 400 thousand of f64 (`tests/exp.rs`), in
//! ULP of the exact result:
//!
//! | | fused | separate |
//! | --- | --- | --- |
//! | `exp` f32 | 0.894 | 0.915 |
//! | `exp` f64 | 0.867 | 0.887 |
//! | `tanh` f32 | 1.36 | 1.32 |
//! | `tanh` f64 | 1.27 | 1.26 |
//! | `exp_weights` f32, error in epsilons | 0.342 | 0.471 |
//! | `exp_weights` f64, error in epsilons | 0.500 | 0.500 |
//! | `exp_nonpositive_fast`, relative error | 3.86e-6 | 7.64e-6 |
//!
//! `exp_weights` takes `ln 2` in one part in step 2, and Horner's rule always: that adds half an
//! epsilon times `|x|` to the relative error where the multiplication rounds, and little elsewhere.
//! Beside the largest weight of a softmax, which is 1, it is nothing: `|x| e^x` is at most 0.37.
//!
//! Results below the smallest normal number are exactly 0: a subnormal probability changes nothing
//! and costs a hundred cycles in the product that follows. The threshold is the smallest argument
//! whose exact result is normal. Those of `exp_weights` are exactly 0 from half of that number down, and
//! anything from 0 to it in between; the factors of [`Float::exp_nonpositive_factors`] multiply to it
//! instead. NaN gives NaN.
//!
//! [`Float::exp_nonpositive_factors`]: crate::Float::exp_nonpositive_factors

pub(crate) mod table;

use fearless_simd::{Select, Simd, SimdBase, SimdFloat, SimdFrom};

macro_rules! exp_functions {
    (
        $float:ident, $vector:ident,
        exp = $exp:ident, nonpositive = $nonpositive:ident, factors = $factors:ident,
        weights = $weights:ident, reduced = $reduced:ident, scaled = $scaled:ident,
        mantissa = $mantissa:literal, magic = $magic:expr,
        high = $high:expr, low = $low:expr,
        underflow = $underflow:expr, overflow = $overflow:expr,
        q = [$last:expr, $($coefficient:expr),+ $(,)?]
    ) => {
        /// Steps 1 to 3: `(t, e^r)`, with `ln 2` in two parts if `SPLIT`. Each step for all vectors
        /// before the next: the chain of one is 40 to 50 cycles long, more than the processor looks
        /// ahead.
        #[inline(always)]
        fn $reduced<S: Simd, const N: usize, const SPLIT: bool>(
            simd: S,
            x: [S::$vector; N],
        ) -> ([S::$vector; N], [S::$vector; N]) {
            let splat = |value: $float| S::$vector::simd_from(simd, value);
            let one = splat(1.0);
            let mut t = x;
            for t in &mut t {
                *t = t.mul_add(splat(std::$float::consts::LOG2_E), splat($magic));
            }
            let mut n = t;
            for n in &mut n {
                *n -= splat($magic);
            }
            let high = splat(if SPLIT { -$high } else { -std::$float::consts::LN_2 });
            let mut h = x;
            for i in 0..N {
                h[i] = n[i].mul_add(high, h[i]);
            }
            let mut r = h;
            if SPLIT {
                for i in 0..N {
                    r[i] = n[i].mul_add(splat(-$low), r[i]);
                }
            }
            let mut e = [splat($last); N];
            $(
                for i in 0..N {
                    e[i] = e[i].mul_add(r[i], splat($coefficient));
                }
            )+
            if is_fused(simd) || !SPLIT {
                for i in 0..N {
                    e[i] = e[i].mul_add(r[i], one);
                }
                for i in 0..N {
                    e[i] = e[i].mul_add(r[i], one);
                }
            } else {
                for i in 0..N {
                    e[i] = (h[i] + n[i].mul_add(splat(-$low), e[i] * r[i] * r[i])) + one;
                }
            }
            (t, e)
        }

        /// `e^x` for lanes that are at most 0, -inf or NaN; within 1 ULP, 0 below the smallest
        /// normal number.
        #[inline(always)]
        pub(crate) fn $nonpositive<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
            let ([t], [e]) = $reduced::<S, 1, true>(simd, [x]);
            let scale = S::$vector::from_bits(t.to_bits() << $mantissa);
            let underflow = x.simd_lt(S::$vector::simd_from(simd, $underflow));
            underflow.select(S::$vector::simd_from(simd, 0.0), e * scale)
        }

        /// Steps 1 to 4 for lanes that are at most 0, -inf or NaN, no less than `least`: `e^r` and `2^n`.
        #[inline(always)]
        fn $scaled<S: Simd, const N: usize, const SPLIT: bool>(
            simd: S,
            mut x: [S::$vector; N],
            least: $float,
        ) -> ([S::$vector; N], [S::$vector; N]) {
            let least = S::$vector::simd_from(simd, least);
            for x in &mut x {
                *x = at_least(simd, *x, least);
            }
            let (mut t, e) = $reduced::<S, N, SPLIT>(simd, x);
            for t in &mut t {
                *t = S::$vector::from_bits(t.to_bits() << $mantissa);
            }
            (e, t)
        }

        /// Two factors of `e^x` for lanes that are at most 0, -inf or NaN. Their product is within
        /// 1 ULP, and the smallest normal number instead of anything less. [`table`] has another way.
        #[inline(always)]
        pub(crate) fn $factors<S: Simd, const N: usize>(
            simd: S,
            x: [S::$vector; N],
        ) -> ([S::$vector; N], [S::$vector; N]) {
            $scaled::<S, N, true>(simd, x, $underflow)
        }

        /// `e^x` for lanes that are at most 0, -inf or NaN, as weights beside a 1.
        #[inline(always)]
        pub(crate) fn $weights<S: Simd, const N: usize>(
            simd: S,
            x: [S::$vector; N],
        ) -> [S::$vector; N] {
            // There 2^n has an exponent of 0 in its bits, and is 0.
            let zero = ($float::MIN_EXP - 2) as $float * std::$float::consts::LN_2;
            let (mut e, scale) = $scaled::<S, N, false>(simd, x, zero);
            for i in 0..N {
                e[i] *= scale[i];
            }
            e
        }

        /// `e^x` for every lane; within 1 ULP, 0 below the smallest normal number, inf above the
        /// largest.
        #[inline(always)]
        pub(crate) fn $exp<S: Simd>(simd: S, x: S::$vector) -> S::$vector {
            let splat = |value: $float| S::$vector::simd_from(simd, value);
            let capped = x.simd_gt(splat($overflow)).select(splat($overflow), x);
            let ([t], [e]) = $reduced::<S, 1, true>(simd, [capped]);
            // 2^n with the largest n has no representation, 2 * 2^(n-1) has.
            let top = t.simd_gt(splat($magic + ($float::MAX_EXP - 1) as $float));
            let t = top.select(t - splat(1.0), t);
            let scale = S::$vector::from_bits(t.to_bits() << $mantissa);
            let y = e * scale;
            let y = top.select(y + y, y);
            x.simd_lt(splat($underflow)).select(splat(0.0), y)
        }
    };
}

exp_functions!(
    f32,
    f32s,
    exp = exp_f32,
    nonpositive = exp_nonpositive_f32,
    factors = exp_nonpositive_factors_f32,
    weights = exp_weights_f32,
    reduced = reduced_f32,
    scaled = scaled_f32,
    mantissa = 23,
    magic = 12_582_912.0 + 127.0,
    high = 0.693_145_75,
    low = 1.428_606_8e-6,
    underflow = -87.336_54,
    overflow = 89.0,
    // Relative error 3.8e-9.
    q = [1.381_459_9e-3, 8.368_717e-3, 4.166_839e-2, 1.666_652_1e-1, 4.999_999_4e-1]
);

exp_functions!(
    f64,
    f64s,
    exp = exp_f64,
    nonpositive = exp_nonpositive_f64,
    factors = exp_nonpositive_factors_f64,
    weights = exp_weights_f64,
    reduced = reduced_f64,
    scaled = scaled_f64,
    mantissa = 52,
    magic = 6_755_399_441_055_744.0 + 1023.0,
    high = 0.693_147_180_369_123_8,
    low = 1.908_214_929_270_587_7e-10,
    underflow = -708.396_418_532_264_1,
    overflow = 710.0,
    // Relative error 1.1e-17.
    q = [
        2.500_005_888_228_444_4e-8,
        2.763_024_841_494_738_6e-7,
        2.755_758_638_208_372_7e-6,
        2.480_149_309_880_779e-5,
        1.984_126_950_656_993_3e-4,
        1.388_888_894_363_020_3e-3,
        8.333_333_333_494_465e-3,
        4.166_666_666_653_015_5e-2,
        1.666_666_666_666_641_3e-1,
        5.000_000_000_000_011e-1,
    ]
);

/// `max(x, least)`, NaN where `x` is.
#[inline(always)]
fn at_least<S: Simd, V: SimdFloat<S>>(simd: S, x: V, least: V) -> V {
    if cfg!(any(target_arch = "x86", target_arch = "x86_64")) {
        // Of two operands of which one is NaN, x86 returns the second.
        least.max(x)
    } else {
        let _ = simd;
        x.simd_lt(least).select(least, x)
    }
}

/// Whether `mul_add` rounds once on this instruction set; a constant after inlining.
#[inline(always)]
fn is_fused<S: Simd>(simd: S) -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    {
        simd.level().as_avx2().is_some()
    }
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
    {
        // NEON fuses as well; the form for separate operations is right there too, only slower.
        let _ = simd;
        false
    }
}

/// `e^x` for lanes that are at most 0, -inf or NaN, for results that are rounded to 16 bits:
/// relative error under 4e-6 with fused multiply-add and 8e-6 without (rounding to f16 alone is up
/// to 5e-4, to bf16 4e-3), exactly 1 at 0, and 0 below the smallest normal number.
///
/// The polynomial has degree 4 instead of 6, and `ln 2` one part instead of two.
#[inline(always)]
pub fn exp_nonpositive_fast<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value: f32| S::f32s::simd_from(simd, value);
    let magic = splat(12_582_912.0 + 127.0);
    let t = x.mul_add(splat(std::f32::consts::LOG2_E), magic);
    let r = (t - magic).mul_add(splat(-std::f32::consts::LN_2), x);
    // Relative error 3.6e-6, the smallest with a constant term of 1.
    let e = splat(4.238_068e-2)
        .mul_add(r, splat(1.680_866_2e-1))
        .mul_add(r, splat(4.999_596_2e-1))
        .mul_add(r, splat(9.999_515_4e-1))
        .mul_add(r, splat(1.0));
    let scale = S::f32s::from_bits(t.to_bits() << 23);
    x.simd_lt(splat(-87.336_54)).select(splat(0.0), e * scale)
}

/// `tanh(x)` for every lane, within 1.5 ULP; NaN gives NaN.
///
/// Near 0 an odd polynomial, elsewhere `1 - 2 / (e^(2 |x|) + 1)` with the sign of `x`
/// (coefficients: Cephes, `tanhf`).
#[inline(always)]
pub(crate) fn tanh_f32<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let splat = |value: f32| S::f32s::simd_from(simd, value);
    let z = x * x;
    let p = splat(-5.704_988_7e-3)
        .mul_add(z, splat(2.063_909e-2))
        .mul_add(z, splat(-5.373_971_5e-2))
        .mul_add(z, splat(1.333_144_2e-1))
        .mul_add(z, splat(-3.333_328e-1));
    let near = (p * z).mul_add(x, x);
    let magnitude = magnitude::<S, S::f32s>(simd, x);
    let far = splat(1.0) - splat(2.0) / (exp_f32(simd, magnitude + magnitude) + splat(1.0));
    magnitude.simd_lt(splat(0.625)).select(near, far).copysign(x)
}

/// `tanh(x)` for every lane, within 2 ULP; NaN gives NaN (coefficients: Cephes, `tanh`).
#[inline(always)]
pub(crate) fn tanh_f64<S: Simd>(simd: S, x: S::f64s) -> S::f64s {
    let splat = |value: f64| S::f64s::simd_from(simd, value);
    let z = x * x;
    let p = splat(-9.643_991_794_250_523e-1)
        .mul_add(z, splat(-9.928_772_310_019_185e1))
        .mul_add(z, splat(-1.614_687_684_417_084_5e3));
    let q = (z + splat(1.128_116_784_916_329_3e2))
        .mul_add(z, splat(2.235_488_390_601_004_5e3))
        .mul_add(z, splat(4.844_063_053_251_255e3));
    let near = (p / q * z).mul_add(x, x);
    let magnitude = magnitude::<S, S::f64s>(simd, x);
    let far = splat(1.0) - splat(2.0) / (exp_f64(simd, magnitude + magnitude) + splat(1.0));
    magnitude.simd_lt(splat(0.625)).select(near, far).copysign(x)
}

#[inline(always)]
fn magnitude<S: Simd, V: SimdFloat<S>>(simd: S, x: V) -> V
where
    V::Element: From<i8>,
{
    x.copysign(V::simd_from(simd, V::Element::from(1_i8)))
}
