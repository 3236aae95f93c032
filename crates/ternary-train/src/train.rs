//! Training: options, data, optimizer, checkpoints.

mod adamw;
mod baselines;
mod batches;
mod checkpoint;
mod corpus;
mod evaluate;
mod leakage;
mod options;
mod schedule;
mod trainer;
mod verify;

pub use baselines::{NGram, xz_bits_per_byte};
pub use checkpoint::{load_checkpoint, save_checkpoint};
pub use corpus::Corpus;
pub use evaluate::windows_of;
pub use leakage::{Leak, find_leak};
pub use options::TrainOptions;
pub use trainer::{StepReport, Trainer};
pub use verify::{TernaryCheck, check_ternary};
