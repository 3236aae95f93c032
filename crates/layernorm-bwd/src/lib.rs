#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod backward;
mod blocks;
mod call;
mod column_sums;
mod error;
mod forward;
mod gradient;
mod normalise;
mod options;
mod reference;
mod rows;
mod segments;
mod stage;
mod statistics;
mod sweep;
mod workspace;

// Forward.
pub use forward::{Normalised, StatisticsMut, layer_norm, layer_norm_in_place, layer_norm_into};

// Backward.
pub use backward::{Gradients, GradientsMut, Saved, layer_norm_backward, layer_norm_backward_into};
pub use workspace::Workspace;

// Oracle.
pub use reference::{
    layer_norm_backward_naive, layer_norm_backward_reference, layer_norm_naive,
    layer_norm_reference,
};

// Options, shapes and errors.
pub use error::Error;
pub use options::{Kind, Options, Tiling};
pub use rows::{rows, rows_mut};

// Elements (`bf16` and `f16` are those of the crate `half`), and what options and errors hold.
pub use tensor_utils::{Element, Float, Isa, IsaError, ShapeError, bf16, f16};
