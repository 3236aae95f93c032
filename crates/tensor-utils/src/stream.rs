//! Stores past the caches.

use fearless_simd::Simd;

use crate::Element;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Copies `from` to `to`, of the same length, past the caches, and waits until other threads can see it.
///
/// An ordinary store first reads the line that it writes to: a quarter of the traffic of a kernel with two
/// inputs and an output. This one does not, but the result is in memory then, not in a cache. So it is for
/// results that are larger than the caches, a row or so at a time, from a buffer that is in the cache. Done on
/// x86-64; elsewhere it is an ordinary copy.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn copy_past_caches<S: Simd, T: Element>(simd: S, from: &[T], to: &mut [T]) {
    assert_eq!(from.len(), to.len(), "a copy needs two slices of the same length");
    // Whole lines only: of a partial one the rest would have to be read.
    let before = to.as_ptr().align_offset(LINE).min(to.len());
    let (from_before, from) = from.split_at(before);
    let (to_before, to) = to.split_at_mut(before);
    to_before.copy_from_slice(from_before);

    let per_line = LINE / size_of::<T>();
    let mut lines = to.chunks_exact_mut(per_line);
    let mut from_lines = from.chunks_exact(per_line);
    for (to, from) in (&mut lines).zip(&mut from_lines) {
        copy_line(simd, from, to);
    }
    lines.into_remainder().copy_from_slice(from_lines.remainder());
    fence();
}

/// Copies the line that `to` is.
#[inline(always)]
#[cfg(target_arch = "x86_64")]
fn copy_line<S: Simd, T: Element>(simd: S, from: &[T], to: &mut [T]) {
    use core::arch::x86_64::{
        __m128i, __m256i, _mm_loadu_si128, _mm_stream_si128, _mm256_loadu_si256,
        _mm256_stream_si256, _mm512_loadu_si512, _mm512_stream_si512,
    };
    assert!(size_of_val(from) == LINE && size_of_val(to) == LINE);
    assert!(to.as_ptr().addr().is_multiple_of(LINE));
    let (from, to) = (from.as_ptr(), to.as_mut_ptr());
    // SAFETY: both slices have the bytes of a line, which the vectors of each arm are together, and all
    // bytes of `from` are initialised, since elements are plain numbers; `to` is aligned to a line,
    // `from` need not be. `level` tells that the processor has the instruction. Nobody reads `to`
    // before the fence: `copy_past_caches` has the only reference to it, and ends with one.
    #[allow(unsafe_code, reason = "the intrinsics take raw pointers")]
    unsafe {
        if simd.level().as_avx512().is_some() {
            _mm512_stream_si512(to.cast(), _mm512_loadu_si512(from.cast()));
        } else if simd.level().as_avx2().is_some() {
            for i in 0..2 {
                let half = _mm256_loadu_si256(from.cast::<__m256i>().add(i));
                _mm256_stream_si256(to.cast::<__m256i>().add(i), half);
            }
        } else {
            for i in 0..4 {
                let quarter = _mm_loadu_si128(from.cast::<__m128i>().add(i));
                _mm_stream_si128(to.cast::<__m128i>().add(i), quarter);
            }
        }
    }
}

/// Copies the line that `to` is.
#[inline(always)]
#[cfg(not(target_arch = "x86_64"))]
fn copy_line<S: Simd, T: Element>(_: S, from: &[T], to: &mut [T]) {
    to.copy_from_slice(from);
}

/// Orders the stores before all that follow.
#[inline(always)]
fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: x86-64 always has the instruction, and it has no operands.
    #[allow(unsafe_code, reason = "the intrinsic wants a target feature that every x86-64 has")]
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use fearless_simd::Simd;

    use super::*;
    use crate::{Isa, Kernel, bf16, dispatch};

    struct Copy<'a, T>(&'a [T], &'a mut [T]);

    impl<T: Element> Kernel for Copy<'_, T> {
        type Output = ();

        fn run<S: Simd>(self, simd: S) {
            simd.vectorize(
                #[inline(always)]
                || copy_past_caches(simd, self.0, self.1),
            );
        }
    }

    /// Every alignment and length around a few lines, with untouched elements on both sides.
    fn check<T: Element>() {
        let from: Vec<T> = (1..=300).map(|i| T::from_f64(f64::from(i % 200))).collect();
        let per_line = LINE / size_of::<T>();
        for isa in Isa::available() {
            for start in 0..=per_line {
                for len in [0, 1, per_line - 1, per_line, 2 * per_line + 3, 100] {
                    let mut to = [T::from_f64(-1.0); 300];
                    let source = &from[start..start + len];
                    dispatch(isa, Copy(source, &mut to[start..start + len])).unwrap();
                    for (i, to) in to.iter().enumerate() {
                        let inside = (start..start + len).contains(&i);
                        let expected = if inside { from[i].to_f64() } else { -1.0 };
                        assert_eq!(to.to_f64(), expected, "{isa} {start} {len} {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn copies_all_and_nothing_else() {
        check::<f32>();
        check::<f64>();
        check::<bf16>();
    }
}
