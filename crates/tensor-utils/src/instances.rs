//! Kernels compiled once, in the crate that owns them.
//!
//! A generic function is compiled by the crate that calls it, so a kernel generic over its element
//! type would be compiled again, for every instruction set, in each program and each test that
//! uses it. Here the crate of the kernel names one function for each element type, which its own
//! library compiles, and the public generic function picks one.

use half::{bf16, f16};

use crate::Element;

/// A kernel's arguments, a type of their own for each element type.
///
/// ```
/// use tensor_utils::{Element, Instances, PerElement};
///
/// /// The sum of a slice, in the compute type.
/// struct Sum<'a>(std::marker::PhantomData<&'a ()>);
///
/// impl<'a> PerElement for Sum<'a> {
///     type Arguments<T: Element> = &'a [T];
///     type Output = f64;
/// }
///
/// fn run<T: Element>(x: &[T]) -> f64 {
///     x.iter().map(|x| x.to_f64()).sum()
/// }
///
/// // Not generic over types, so this crate compiles the four functions it names.
/// #[inline(never)]
/// fn instances<'a>() -> Instances<Sum<'a>> {
///     Instances { f32: run, f64: run, bf16: run, f16: run }
/// }
///
/// fn sum<T: Element>(x: &[T]) -> f64 {
///     T::instance(&instances())(x)
/// }
/// assert_eq!(sum(&[1.0_f32, 2.0]), 3.0);
/// ```
pub trait PerElement {
    /// The arguments for elements `T`.
    type Arguments<T: Element>;
    /// What the kernel returns.
    type Output;
}

/// The instances of a kernel.
///
/// Build it in a function that is `#[inline(never)]` and generic over nothing but lifetimes: only
/// then are the instances compiled there.
pub struct Instances<P: PerElement + ?Sized> {
    /// For `f32`.
    pub f32: fn(P::Arguments<f32>) -> P::Output,
    /// For `f64`.
    pub f64: fn(P::Arguments<f64>) -> P::Output,
    /// For [`bf16`].
    pub bf16: fn(P::Arguments<bf16>) -> P::Output,
    /// For [`struct@f16`].
    pub f16: fn(P::Arguments<f16>) -> P::Output,
}
