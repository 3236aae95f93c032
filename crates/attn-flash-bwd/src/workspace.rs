//! Scratch memory that the caller owns.

use tensor_utils::Element;

use crate::{Error, Inputs, Tiling, VarlenInputs};

/// STUB
#[derive(Debug)]
pub struct Workspace<T: Element> {
    scratch: Vec<T::Acc>,
}

impl<T: Element> Workspace<T> {
    /// Room for calls with inputs of these sizes or smaller ones.
    ///
    /// # Errors
    /// STUB
    pub fn new(inputs: &Inputs<'_, T>, tiling: &Tiling) -> Result<Self, Error> {
        let _ = (inputs, tiling);
        Ok(Self { scratch: Vec::new() })
    }

    /// The same for a packed batch.
    ///
    /// # Errors
    /// STUB
    pub fn new_varlen(inputs: &VarlenInputs<'_, T>, tiling: &Tiling) -> Result<Self, Error> {
        let _ = (inputs, tiling);
        Ok(Self { scratch: Vec::new() })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        size_of_val(self.scratch.as_slice())
    }
}
