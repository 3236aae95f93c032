//! The kernel: one task of attention, from scores to weighted values.

mod ahead;
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
mod bytes;
mod codes;
pub(crate) mod factors;
mod floats;
mod softmax;
pub(crate) mod task;
mod tile;
