//! A look at the intermediate states of the online softmax, for tests.

use tensor_utils::{Float, Isa};

/// Told about every step of every row.
pub trait Observer<A: Float>: Sync {
    /// Called after a block of keys has been added to a row.
    fn step(&self, step: &Step<'_, A>);
}

/// State of one row after a block of keys.
#[derive(Debug)]
pub struct Step<'a, A: Float> {
    /// The instruction set that computed it.
    pub isa: Isa,
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query, `0..N`.
    pub query: usize,
    /// Keys before this one have been seen.
    pub keys_end: usize,
    /// Factor that the sums so far were multiplied by: `exp(m_old - m_new)`.
    pub correction: A,
    /// Largest score so far; `-inf` if nothing was visible.
    pub m: A,
    /// Sum of `exp(score - m)` so far.
    pub l: A,
    /// Sum of `exp(score - m) v` so far, `[E]`.
    pub o: &'a [A],
}
