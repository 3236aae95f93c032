//! Conversion of slices between the element type and the compute type.

use crate::Element;

/// Widens `from` into `to`; exact. Converts as many elements as the shorter slice has.
///
/// For bf16 this is a plain loop, which compiles for the instruction set of the caller when it is
/// called inside [`Simd::vectorize`](crate::simd::Simd::vectorize).
#[inline(always)]
pub fn widen<T: Element>(from: &[T], to: &mut [T::Acc]) {
    T::widen_slice(from, to);
}

/// Rounds `from` into `to`, to nearest, ties to even; NaN stays NaN. Converts as many elements as
/// the shorter slice has.
#[inline(always)]
pub fn narrow<T: Element>(from: &[T::Acc], to: &mut [T]) {
    T::narrow_slice(from, to);
}
