//! Drafters that say what they are told.

use super::{Draft, Drafter};
use crate::{BoxError, TokenTree};

/// Proposes nothing: plain decoding.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoDraft;

impl Drafter for NoDraft {
    fn draft(&mut self, _: usize, _: &[u32], _: usize) -> Result<Draft, BoxError> {
        Ok(Draft::Tree(TokenTree::empty()))
    }
}

/// Proposes what a function says, given the arguments of [`Drafter::draft`].
#[derive(Debug, Clone)]
pub struct Scripted<F>(pub F);

impl<F: FnMut(usize, &[u32], usize) -> Result<Draft, BoxError>> Drafter for Scripted<F> {
    fn draft(&mut self, sequence: usize, text: &[u32], budget: usize) -> Result<Draft, BoxError> {
        (self.0)(sequence, text, budget)
    }
}
