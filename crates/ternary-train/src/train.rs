//! Training: options, data, optimizer, checkpoints.

mod adamw;
mod batches;
mod checkpoint;
mod corpus;
mod evaluate;
mod leakage;
mod options;
mod schedule;
mod trainer;

pub use checkpoint::{load_checkpoint, save_checkpoint};
pub use corpus::Corpus;
pub use evaluate::windows_of;
pub use leakage::{Leak, find_leak};
pub use options::TrainOptions;
pub use trainer::{StepReport, Trainer};
