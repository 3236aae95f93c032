//! Ternary matrices in two bits a weight, and their products with activations in int8.
//!
//! The codes lie as the products read them (`layout.rs`), so a product with one vector streams the
//! matrix once. Integer sums are exact and the few float operations are the same on every
//! instruction set, so all paths give the same bits.

mod activations;
mod block;
mod layout;
mod product;

#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod avx2;
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod avx512;
mod portable;

pub use activations::Activations;
pub use layout::PackedMatrix;
