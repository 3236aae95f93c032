#![doc = include_str!("../README.md")]

mod element;
mod exp;
mod float;
mod isa;
mod shape;

#[cfg(feature = "testing")]
pub mod testing;

// Elements and arithmetic.
pub use element::Element;
pub use exp::exp_nonpositive_fast;
pub use float::Float;
pub use half::{bf16, f16};

// Shapes and their errors.
pub use shape::{ShapeError, broadcast_4d, check_not_empty, check_shape};

// Instruction sets.
pub use isa::{Isa, IsaError, Kernel, dispatch};

/// The vector types and traits that kernels are written with.
pub mod simd {
    pub use fearless_simd::{Select, Simd, SimdBase, SimdFloat, SimdFrom, SimdInt, SimdMask};
}
