//! The operations of the model, forward and backward, in `f32` and `f64`.
//!
//! Matrices are views whose rows are contiguous; a token is a row. Work is cut into chunks whose
//! size depends on the shapes alone, and every sum has a fixed order, so the bits do not depend on
//! the number of threads.

mod attention;
mod cross_entropy;
mod elementwise;
mod embedding;
mod error;
mod fake_quant;
mod norm;
mod products;
mod real;
mod rope;
mod swiglu;

pub use attention::{Attention, attention, attention_backward};
pub use cross_entropy::{CrossEntropy, IGNORE, cross_entropy};
pub use embedding::{embed, embed_backward};
pub use error::OpError;
pub use fake_quant::fake_quantize_rows;
pub use norm::{Norm, rms_norm, rms_norm_backward};
pub use products::{Product, Term, products};
pub use real::Real;
pub use rope::{Direction, Rope, rotate};
pub use swiglu::{swiglu, swiglu_backward};

pub(crate) use elementwise::{for_vectors, scan_vectors};
pub(crate) use error::elements;
pub(crate) use products::{slice, slice_mut};
