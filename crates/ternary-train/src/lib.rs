#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod config;
mod error;
mod model;
mod options;
mod packed;
mod quantize;
mod reference;
mod report;
mod tokenizer;
mod train;
mod weights;

pub mod formats;
pub mod generate;
pub mod infer;
pub mod ops;

// The model: its shape and its weights.
pub use config::{Config, Preset};
pub use weights::{LayerWeights, Named, Weights};

// Training.
pub use model::{Layout, Loss, Model, View};
pub use train::{
    Corpus, Leak, NGram, StepReport, TernaryCheck, TrainOptions, Trainer, check_ternary, find_leak,
    load_checkpoint, save_checkpoint, windows_of, xz_bits_per_byte,
};

// Reports.
pub use report::{Leakage, Point, TrainReport, Validation, peak_memory, shell_line};

// Text.
pub use tokenizer::Tokenizer;

// Ternary matrices.
pub use options::{Projection, Rule, Tiling};
pub use packed::{Activations, PackedMatrix};
pub use quantize::{Counts, Ternary};

// Oracle.
pub use reference::{activations_reference, matmul_reference, project_reference};

// Errors.
pub use error::Error;

// Compute types, and what options and errors hold.
pub use tensor_utils::{Float, Isa, IsaError, ShapeError};
