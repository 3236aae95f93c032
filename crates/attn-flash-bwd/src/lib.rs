#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod backward;
mod error;
mod options;
mod workspace;

// Backward.
pub use backward::{
    Gradients, GradientsMut, Inputs, VarlenGradients, VarlenGradientsMut, VarlenInputs,
    attention_backward, attention_backward_into, attention_varlen_backward,
    attention_varlen_backward_into,
};
pub use workspace::Workspace;

// Options and errors.
pub use error::Error;
pub use options::{Strategy, Tiling};
