//! Running a model: float or packed, many sequences at once, over a cache of keys and values.

mod chunk;
mod float;
mod forward;
mod matrix;
mod model;

pub use chunk::{Chunk, LogitRows};
pub use matrix::Matrix;
pub use model::Model;
