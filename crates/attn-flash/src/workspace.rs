//! Scratch memory that the caller owns.

use tensor_utils::Float;

use crate::{Error, Tiling};

/// STUB: scratch for heads up to `head_size` and values up to `value_size`.
#[derive(Debug)]
pub struct Workspace<A: Float> {
    _scratch: Vec<A>,
}

impl<A: Float> Workspace<A> {
    /// STUB
    pub fn new(head_size: usize, value_size: usize, tiling: &Tiling) -> Result<Self, Error> {
        let _ = (head_size, value_size, tiling);
        Ok(Self { _scratch: Vec::new() })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self._scratch.len() * size_of::<A>()
    }
}
