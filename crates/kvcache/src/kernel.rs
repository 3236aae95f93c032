//! The kernel: one task of attention, from scores to weighted values.

mod ahead;
pub(crate) mod product;
pub(crate) mod softmax;
pub(crate) mod task;
