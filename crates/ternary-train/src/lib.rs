#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod error;
mod options;
mod packed;
mod quantize;
mod reference;
mod weights;

// The model: its shape and its weights.
pub use config::{Config, Preset};
pub use weights::{LayerWeights, Named, Weights};

// Ternary matrices.
pub use options::{Projection, Rule, Tiling};
pub use packed::{Activations, PackedMatrix};
pub use quantize::{Counts, Ternary};

// Oracle.
pub use reference::{activations_reference, matmul_reference, project_reference};

// Errors.
pub use error::Error;
