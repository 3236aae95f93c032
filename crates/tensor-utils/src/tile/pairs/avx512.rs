//! `vdpbf16ps` and the rounding to bf16.

use core::arch::x86_64::{
    __m512bh, __m512i, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_permutexvar_epi16,
};
use std::mem::transmute;

use fearless_simd::{Avx512, Level, SimdBase, SimdFrom, SimdSplit, f32x16, u16x32, u32x8, u32x16};

use super::Pair;
use crate::tile::Multiply;

/// Proof that the processor has AVX-512 and its products of bf16 pairs; from [`Isa::bf16_dot`].
///
/// [`Isa::bf16_dot`]: crate::Isa::bf16_dot
#[derive(Debug, Clone, Copy)]
pub struct Bf16Dot {
    simd: Avx512,
}

/// Two vectors rounded to bf16.
#[derive(Debug, Clone, Copy)]
pub struct Rounded {
    /// Pairs of neighbouring lanes of the first.
    pub first: u32x8<Avx512>,
    /// Pairs of neighbouring lanes of the second.
    pub second: u32x8<Avx512>,
    /// Each lane of the first with that of the second.
    pub zipped: u32x16<Avx512>,
}

impl Bf16Dot {
    /// If this processor has it.
    pub(crate) fn detect() -> Option<Self> {
        let simd = Level::new().as_avx512()?;
        std::arch::is_x86_feature_detected!("avx512bf16").then_some(Self { simd })
    }

    /// Rounds to nearest, ties to even; what is below the smallest normal number to 0. To be inlined into
    /// [`Multiply::inside`].
    #[inline(always)]
    pub fn round(self, first: f32x16<Avx512>, second: f32x16<Avx512>) -> Rounded {
        // Halves 0..16 are the first vector's, the others the second's.
        const ZIP: [u16; 32] = {
            let mut zip = [0; 32];
            let mut i = 0;
            while i < 32 {
                zip[i] = (i / 2 + i % 2 * 16) as u16;
                i += 1;
            }
            zip
        };
        let zip = u16x32::from_slice(self.simd, &ZIP);
        // SAFETY: `self` exists only where the processor has AVX-512 and its products of bf16 pairs; the
        // types on both sides of `transmute` are vectors of 64 bytes in which any bits are valid.
        #[allow(unsafe_code, reason = "the token does not know the instruction")]
        let (neighbours, zipped) = unsafe {
            let halves = _mm512_cvtne2ps_pbh(second.into(), first.into());
            let halves = transmute::<__m512bh, __m512i>(halves);
            (halves, _mm512_permutexvar_epi16(zip.into(), halves))
        };
        let (first, second) = u32x16::simd_from(self.simd, neighbours).split();
        Rounded { first, second, zipped: u32x16::simd_from(self.simd, zipped) }
    }
}

impl Multiply<Pair> for Bf16Dot {
    type Simd = Avx512;
    type Sum = f32;
    type Vector = u32x16<Avx512>;

    #[inline(always)]
    fn inside<R>(self, f: impl FnOnce() -> R) -> R {
        // What `Avx512` stands for, and the products.
        #[target_feature(
            enable = "adx,aes,avx512bitalg,avx512bw,avx512cd,avx512dq,avx512f,avx512ifma,avx512vbmi,\
                      avx512vbmi2,avx512vl,avx512vnni,avx512vpopcntdq,bmi1,bmi2,cmpxchg16b,fma,fxsr,\
                      gfni,lzcnt,movbe,pclmulqdq,popcnt,rdrand,rdseed,sha,vaes,vpclmulqdq,xsave,\
                      xsavec,xsaveopt,xsaves,avx512bf16"
        )]
        #[inline]
        fn with_instructions<R>(f: impl FnOnce() -> R) -> R {
            f()
        }
        // SAFETY: `self` exists only where the processor has all of these.
        #[allow(unsafe_code, reason = "the compiler does not know what the token proves")]
        unsafe {
            with_instructions(f)
        }
    }

    #[inline(always)]
    fn splat(self, x: Pair) -> u32x16<Avx512> {
        u32x16::simd_from(self.simd, x)
    }

    #[inline(always)]
    fn load(self, from: &[Pair]) -> u32x16<Avx512> {
        u32x16::from_slice(self.simd, &from[..16])
    }

    #[inline(always)]
    fn mul_add(self, a: u32x16<Avx512>, b: u32x16<Avx512>, sum: f32x16<Avx512>) -> f32x16<Avx512> {
        // SAFETY: as in `round`.
        #[allow(unsafe_code, reason = "the token does not know the instruction")]
        let sum = unsafe {
            let [a, b] = [a, b].map(|x| transmute::<__m512i, __m512bh>(x.into()));
            _mm512_dpbf16_ps(sum.into(), a, b)
        };
        f32x16::simd_from(self.simd, sum)
    }

    #[inline(always)]
    fn simd(self) -> Avx512 {
        self.simd
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::{Element, Isa};

    fn bits(x: f64) -> Pair {
        Pair::from(bf16::from_f64(x).to_bits())
    }

    #[test]
    fn products_of_pairs_add_up() {
        let Some(dot) = Isa::Avx512Bf16.bf16_dot() else { return };
        let product = |a: [f64; 2], b: [f64; 2], sum: f32| {
            dot.inside(
                #[inline(always)]
                || {
                    let [a, b] = [a, b].map(|[low, high]| dot.splat(bits(low) | bits(high) << 16));
                    dot.mul_add(a, b, f32x16::simd_from(dot.simd, sum)).as_slice()[5]
                },
            )
        };
        assert_eq!(product([3.0, -5.0], [7.0, 0.5], 1.25), 19.75);
        assert_eq!(product([1e30, 0.0], [1e30, 1.0], 0.0), f32::INFINITY);
        assert!(product([0.0, 1.0], [f64::NAN, 1.0], 0.0).is_nan());
        assert!(product([1.0, 0.0], [1.0, f64::INFINITY], 0.0).is_nan());
        // Below the smallest normal number.
        assert_eq!(product([1e-39, 1.0], [1e20, 2.0], 0.0), 2.0);
    }

    #[test]
    fn rounding_and_its_layouts() {
        let Some(dot) = Isa::Avx512Bf16.bf16_dot() else { return };
        // Every bf16 with what decides between it and its neighbours, over and over.
        for x in (0..=u32::MAX).step_by(0x7ffb) {
            let numbers: [f32; 32] = std::array::from_fn(|i| {
                let low = [0, 0x7fff, 0x8000, 0x8001, 0xffff][i % 5];
                f32::from_bits((x.wrapping_add((i as u32) << 16) & 0xffff_0000) | low)
            });
            let (zipped, neighbours) = dot.inside(
                #[inline(always)]
                || {
                    let first = f32x16::from_slice(dot.simd, &numbers[..16]);
                    let rounded = dot.round(first, f32x16::from_slice(dot.simd, &numbers[16..]));
                    let neighbours = [rounded.first, rounded.second].map(|x| x.as_slice().to_vec());
                    (rounded.zipped.as_slice().to_vec(), neighbours.concat())
                },
            );
            let half = |i: usize| {
                let x = numbers[i];
                let flushed = if x.is_subnormal() { 0.0_f32.copysign(x) } else { x };
                Pair::from(<bf16 as Element>::from_acc(flushed).to_bits())
            };
            for i in 0..16 {
                assert_eq!(zipped[i], half(i) | half(i + 16) << 16, "{x:#x}");
                assert_eq!(neighbours[i], half(2 * i) | half(2 * i + 1) << 16, "{x:#x}");
            }
        }
    }
}
