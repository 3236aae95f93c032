//! The kernel: one task of attention, from scores to weighted values.

mod ahead;
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod bytes;
mod codes;
mod factors;
mod floats;
#[cfg(target_arch = "x86_64")]
mod pairs;
pub(crate) mod queries;
mod softmax;
pub(crate) mod task;
mod tile;
