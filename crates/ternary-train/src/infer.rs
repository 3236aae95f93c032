//! Running a model: float or packed, many sequences at once, over a cache of keys and values.

mod chunk;
mod float;
mod forward;
mod llama_cpp;
mod matrix;
mod model;

pub use chunk::{Chunk, LogitRows};
pub use llama_cpp::Weights as LlamaCppWeights;
pub use matrix::Matrix;
pub use model::Model;
