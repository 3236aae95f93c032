//! `e^x` for sums of exponentials, in fewer operations where a register can be a table: AVX-512 picks
//! 16 lanes of one by the lanes of another.
//!
//! `e^x = 2^(n/16) e^r` with `n` the integer nearest to `16 x / ln 2` and `|r| <= ln 2 / 32`:
//!
//! 1. `t = 16 x / ln 2 + magic`, as in [the other way](super), so that the last bits of `t` are `n` plus 16
//!    times the exponent bias.
//! 2. `r = x - n (ln 2 / 16)`, with `ln 2 / 16` in one part, which is off by 2.8e-9 of itself.
//! 3. `e^r = 1 + r + r^2 q(r)` with `q` of degree 1 instead of 4: `r` is a sixteenth as large.
//! 4. The last four bits of `t` pick `2^(i/16)` from the table, the others are added to its exponent.
//!
//! That is 8 multiplications, additions and comparisons where the other way has 11, and a shift, a
//! permutation and an addition of integers, which other units of the processor do meanwhile.

use fearless_simd::Simd;

use super::exp_nonpositive_factors_f32;

/// See [`Float::exp_nonpositive_factors`](crate::Float::exp_nonpositive_factors).
#[inline(always)]
pub(crate) fn factors_f32<S: Simd, const N: usize>(
    simd: S,
    x: [S::f32s; N],
) -> ([S::f32s; N], [S::f32s; N]) {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    if let Some(avx512) = simd.level().as_avx512() {
        return avx512::factors(simd, avx512, x);
    }
    exp_nonpositive_factors_f32(simd, x)
}

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod avx512 {
    #[cfg(target_arch = "x86")]
    use std::arch::x86::*;
    #[cfg(target_arch = "x86_64")]
    use std::arch::x86_64::*;
    use std::f32::consts::{LN_2, LOG2_E, SQRT_2};

    use fearless_simd::{Avx512, Simd, SimdBase, SimdFloat, SimdFrom, f32x16, u32x16};

    use crate::exp::at_least;

    /// `2^(i/16)`.
    const POWERS: [f32; 16] = [
        1.0,
        1.044_273_7,
        1.090_507_7,
        1.138_788_6,
        1.189_207_1,
        1.241_857_8,
        1.296_839_6,
        1.354_255_6,
        SQRT_2,
        1.476_826_2,
        1.542_210_8,
        1.610_490_3,
        1.681_792_9,
        1.756_252_2,
        1.834_008_1,
        1.915_206_6,
    ];

    /// The bits of [`POWERS`], less those of the exponent and of `i` that `t` adds to them.
    const TABLE: [u32; 16] = {
        let mut table = [0; 16];
        let mut i = 0;
        while i < 16 {
            table[i] = (POWERS[i].to_bits() - 1.0_f32.to_bits()).wrapping_sub((i as u32) << 19);
            i += 1;
        }
        table
    };

    #[inline(always)]
    pub(super) fn factors<S: Simd, const N: usize>(
        simd: S,
        avx512: Avx512,
        mut x: [S::f32s; N],
    ) -> ([S::f32s; N], [S::f32s; N]) {
        let splat = |value: f32| S::f32s::simd_from(simd, value);
        let magic = splat(12_582_912.0 + 16.0 * 127.0);
        let table: __m512i = u32x16::from_slice(avx512, &TABLE).into();
        for x in &mut x {
            *x = at_least(simd, *x, splat(-87.336_54));
        }
        let mut t = x;
        for t in &mut t {
            *t = t.mul_add(splat(16.0 * LOG2_E), magic);
        }
        let mut r = x;
        for i in 0..N {
            r[i] = (t[i] - magic).mul_add(splat(LN_2 / -16.0), x[i]);
        }
        // Relative error 4.6e-9.
        let mut e = [splat(0.166_666_67); N];
        for c in [0.500_009_8, 1.0, 1.0] {
            for i in 0..N {
                e[i] = e[i].mul_add(r[i], splat(c));
            }
        }
        for t in &mut t {
            let bits = u32x16::from_slice(avx512, t.to_bits().as_slice()).into();
            let power = f32x16::simd_from(avx512, power(avx512, bits, table));
            *t = S::f32s::from_slice(simd, power.as_slice());
        }
        (e, t)
    }

    fearless_simd::kernel!(
        /// `2^(n/16)`, `n` plus 16 times the bias in the last bits of `t`.
        #[inline]
        fn power(simd: Avx512, t: __m512i, table: __m512i) -> __m512 {
            let i = _mm512_permutexvar_epi32(t, table);
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32::<19>(t), i))
        }
    );
}
