//! Scratch memory that the caller owns.

use std::marker::PhantomData;

use tensor_utils::{Float, Isa, IsaError};

use crate::{Error, Passes, Tiling};

/// Scratch memory for the `_into` functions.
#[derive(Debug)]
pub struct Workspace<A: Float> {
    isa: Isa,
    passes: Passes,
    rows: usize,
    vocabulary: usize,
    k: usize,
    of: PhantomData<A>,
}

impl<A: Float> Workspace<A> {
    /// Scratch for up to `rows` rows of up to `vocabulary` tokens and up to `k` results a row, for the
    /// current rayon pool.
    ///
    /// # Errors
    /// [`Error::Isa`] if this machine does not have the instruction set, [`Error::Shape`] if there is
    /// no memory of that size.
    pub fn new(rows: usize, vocabulary: usize, k: usize, tiling: &Tiling) -> Result<Self, Error> {
        let isa = match tiling.isa {
            None => Isa::active()?,
            Some(isa) if isa.is_available() => isa,
            Some(isa) => return Err(IsaError::Unavailable(isa).into()),
        };
        Ok(Self { isa, passes: tiling.passes, rows, vocabulary, k, of: PhantomData })
    }

    /// The instruction set it was made for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How often the logits are read.
    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// Checks that it is large enough.
    pub(crate) fn check(&self, rows: usize, vocabulary: usize, k: usize) -> Result<(), Error> {
        if rows <= self.rows && vocabulary <= self.vocabulary && k <= self.k {
            return Ok(());
        }
        Err(Error::WorkspaceTooSmall {
            rows,
            vocabulary,
            k,
            made_rows: self.rows,
            made_vocabulary: self.vocabulary,
            made_k: self.k,
        })
    }
}
