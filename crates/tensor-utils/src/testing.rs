//! Tools for tests and benches: every kernel crate measures its errors, checks its gradients and
//! counts its memory with these (feature `testing`).

mod cases;
mod compare;
mod effort;
mod error_ratio;
mod error_stats;
mod gradcheck;
mod guarded;
mod peak_alloc;
mod seeded;
mod ulp;

// Agreement of arrays.
pub use compare::{CompareError, Tolerance, check_close, check_same_bits};
pub use error_ratio::{ErrorRatioError, ErrorRatios, error_ratio};
pub use error_stats::{ErrorStats, Worst, error, largest_difference};
pub use ulp::{ulp, ulp_error};

// Gradients.
pub use gradcheck::{GradCheck, GradError, GradStats};

// Inputs and outputs.
pub use cases::{Case, recorded, recorded_cases};
pub use guarded::{GuardError, Guarded, Poison};
pub use seeded::Seeded;

// How much to do.
pub use effort::{
    batch_sizes, in_pool, isas, property_cases, property_config, repeats, started_pool,
    thread_counts,
};

// Memory.
pub use peak_alloc::PeakAlloc;
