//! The element types a kernel accepts, and the type it computes in for each.

use std::fmt::Debug;

use bytemuck::Zeroable;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use ndarray::{ArrayViewMut, Dimension};

use crate::{Float, Instances, PerElement};

/// A type that tensors are stored in: `f32`, `f64`, [`bf16`] or [`struct@f16`].
///
/// The 16-bit types are storage only: kernels widen them to `f32`, compute there, and round the
/// result once (to nearest, ties to even).
pub trait Element: Zeroable + Copy + Debug + Default + PartialEq + Send + Sync + 'static {
    /// The type that kernels compute in: `f64` for `f64`, `f32` for everything else.
    type Acc: Float;

    /// The name of the type as Rust writes it.
    const NAME: &'static str;

    /// The distance from 1 to the next larger number; rounding to nearest is off by at most half of
    /// it, relatively.
    const EPSILON: f64;

    /// The smallest normal number.
    const MIN_POSITIVE: f64;

    /// Whether kernels compute in this very type.
    const IS_COMPUTE_TYPE: bool;

    /// Widens to the compute type; exact.
    fn to_acc(self) -> Self::Acc;

    /// Rounds from the compute type, to nearest, ties to even.
    fn from_acc(acc: Self::Acc) -> Self;

    /// Widens to `f64`; exact.
    fn to_f64(self) -> f64;

    /// Rounds from `f64`, to nearest, ties to even.
    fn from_f64(value: f64) -> Self;

    /// The bits of the representation, at the low end.
    fn bits(self) -> u64;

    /// The view itself if this type is its own compute type, so that sums can grow in place; else
    /// the view is handed back.
    ///
    /// # Errors
    /// The view, for types that are computed in another one.
    #[inline(always)]
    fn as_acc_mut<D: Dimension>(
        view: ArrayViewMut<'_, Self, D>,
    ) -> Result<ArrayViewMut<'_, Self::Acc, D>, ArrayViewMut<'_, Self, D>> {
        Err(view)
    }

    /// The slice itself if this type is its own compute type.
    #[inline(always)]
    fn as_acc_slice(_: &[Self]) -> Option<&[Self::Acc]> {
        None
    }

    /// The slice itself if this is its own compute type.
    #[inline(always)]
    fn from_acc_slice_mut(_: &mut [Self::Acc]) -> Option<&mut [Self]> {
        None
    }

    /// The instance of a kernel for this type.
    fn instance<P: PerElement>(instances: &Instances<P>) -> fn(P::Arguments<Self>) -> P::Output;

    /// See the function [`widen`](crate::widen).
    #[doc(hidden)]
    #[inline(always)]
    fn widen_slice(from: &[Self], to: &mut [Self::Acc]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from.to_acc();
        }
    }

    /// See the function [`narrow`](crate::narrow).
    #[doc(hidden)]
    #[inline(always)]
    fn narrow_slice(from: &[Self::Acc], to: &mut [Self]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = Self::from_acc(from);
        }
    }
}

impl Element for f32 {
    type Acc = f32;
    const NAME: &'static str = "f32";
    const EPSILON: f64 = f32::EPSILON as f64;
    const MIN_POSITIVE: f64 = f32::MIN_POSITIVE as f64;
    const IS_COMPUTE_TYPE: bool = true;

    #[inline(always)]
    fn to_acc(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_acc(acc: f32) -> Self {
        acc
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }

    fn instance<P: PerElement>(instances: &Instances<P>) -> fn(P::Arguments<Self>) -> P::Output {
        instances.f32
    }

    #[inline(always)]
    fn as_acc_slice(slice: &[Self]) -> Option<&[f32]> {
        Some(slice)
    }

    #[inline(always)]
    fn from_acc_slice_mut(slice: &mut [f32]) -> Option<&mut [Self]> {
        Some(slice)
    }

    #[inline(always)]
    fn as_acc_mut<D: Dimension>(
        view: ArrayViewMut<'_, Self, D>,
    ) -> Result<ArrayViewMut<'_, f32, D>, ArrayViewMut<'_, Self, D>> {
        Ok(view)
    }
}

impl Element for f64 {
    type Acc = f64;
    const NAME: &'static str = "f64";
    const EPSILON: f64 = f64::EPSILON;
    const MIN_POSITIVE: f64 = f64::MIN_POSITIVE;
    const IS_COMPUTE_TYPE: bool = true;

    #[inline(always)]
    fn to_acc(self) -> f64 {
        self
    }

    #[inline(always)]
    fn from_acc(acc: f64) -> Self {
        acc
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        self.to_bits()
    }

    fn instance<P: PerElement>(instances: &Instances<P>) -> fn(P::Arguments<Self>) -> P::Output {
        instances.f64
    }

    #[inline(always)]
    fn as_acc_slice(slice: &[Self]) -> Option<&[f64]> {
        Some(slice)
    }

    #[inline(always)]
    fn from_acc_slice_mut(slice: &mut [f64]) -> Option<&mut [Self]> {
        Some(slice)
    }

    #[inline(always)]
    fn as_acc_mut<D: Dimension>(
        view: ArrayViewMut<'_, Self, D>,
    ) -> Result<ArrayViewMut<'_, f64, D>, ArrayViewMut<'_, Self, D>> {
        Ok(view)
    }
}

impl Element for bf16 {
    type Acc = f32;
    const NAME: &'static str = "bf16";
    const EPSILON: f64 = 1.0 / 128.0;
    const MIN_POSITIVE: f64 = f32::MIN_POSITIVE as f64;
    const IS_COMPUTE_TYPE: bool = false;

    // A bf16 is the upper half of an f32. `bf16::to_f32` also quiets NaN, a branch that keeps the
    // compiler from vectorising the loop; the shift alone maps NaN to NaN.
    #[inline(always)]
    fn to_acc(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    // Without `bf16::from_f32`'s branch on NaN, for the same reason.
    #[inline(always)]
    fn from_acc(acc: f32) -> Self {
        let bits = acc.to_bits();
        // To nearest: add just under half of the last place kept; to even: and 1 if that is odd.
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // A carry would turn a NaN into infinity or zero, and losing its low bits into infinity.
        let quiet_nan = bits >> 16 | 0x40;
        Self::from_bits(if acc.is_nan() { quiet_nan } else { rounded } as u16)
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self.to_acc())
    }

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }

    fn instance<P: PerElement>(instances: &Instances<P>) -> fn(P::Arguments<Self>) -> P::Output {
        instances.bf16
    }
}

impl Element for f16 {
    type Acc = f32;
    const NAME: &'static str = "f16";
    const EPSILON: f64 = 1.0 / 1024.0;
    const MIN_POSITIVE: f64 = 1.0 / 16384.0;
    const IS_COMPUTE_TYPE: bool = false;

    #[inline(always)]
    fn to_acc(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn from_acc(acc: f32) -> Self {
        Self::from_f32(acc)
    }

    #[inline(always)]
    fn to_f64(self) -> f64 {
        Self::to_f64(self)
    }

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }

    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }

    fn instance<P: PerElement>(instances: &Instances<P>) -> fn(P::Arguments<Self>) -> P::Output {
        instances.f16
    }

    // `half` uses the processor's conversion of eight at once where there is one.
    #[inline]
    fn widen_slice(from: &[Self], to: &mut [f32]) {
        let len = from.len().min(to.len());
        from[..len].convert_to_f32_slice(&mut to[..len]);
    }

    #[inline]
    fn narrow_slice(from: &[f32], to: &mut [Self]) {
        let len = from.len().min(to.len());
        to[..len].convert_from_f32_slice(&from[..len]);
    }
}
