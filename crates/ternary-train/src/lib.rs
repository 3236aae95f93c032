#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod error;
mod options;
mod quantize;
mod reference;
mod weights;

// The model: its shape and its weights.
pub use config::{Config, Preset};
pub use weights::{LayerWeights, Named, Weights};

// Ternary matrices.
pub use options::{Projection, Rule};
pub use quantize::{Counts, Ternary};

// Oracle.
pub use reference::project_reference;

// Errors.
pub use error::Error;
