#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arithmetic;
mod backward;
mod bias_gradient;
mod block;
mod delta;
mod error;
mod options;
mod products;
mod reference;
mod run;
mod schedule;
mod workspace;

/// The forward pass, whose options and results the backward pass takes.
pub use attn_flash;

// Backward.
pub use backward::{
    Gradients, GradientsMut, Inputs, VarlenGradients, VarlenGradientsMut, VarlenInputs,
    attention_backward, attention_backward_into, attention_varlen_backward,
    attention_varlen_backward_into,
};
pub use workspace::Workspace;

// Oracle.
pub use reference::{
    attention_backward_naive, attention_backward_reference, attention_varlen_backward_reference,
};

// Options and errors.
pub use error::Error;
pub use options::{Strategy, Tiling};

// Elements (`bf16` and `f16` are those of the crate `half`), and what options and errors hold.
pub use tensor_utils::{Element, Float, Isa, IsaError, ShapeError, bf16, f16};
