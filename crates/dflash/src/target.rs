//! The model that is to be sped up.

use std::error::Error as StdError;

use kvcache::{Cache, Queries, Rows, SeqId};
use ndarray::ArrayViewMut2;

use crate::TokenTree;

/// What a model or a drafter reports when it fails.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// The rows of one sequence in a pass of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pass<'a> {
    /// The sequence in the cache.
    pub seq: SeqId,
    /// The token of each row.
    pub tokens: Vec<u32>,
    /// The position of each row in its sequence, for position embeddings.
    pub positions: Vec<usize>,
    /// What each row sees, once the rows are appended.
    pub rows: Rows<'a>,
}

impl<'a> Pass<'a> {
    /// The pass that verifies `tree` below the token `last`, which is not cached yet either and
    /// becomes row `base`; `parents` are [`TokenTree::pass_parents`].
    pub(crate) fn of_tree(
        seq: SeqId,
        base: usize,
        last: u32,
        tree: &TokenTree,
        parents: &'a [i64],
    ) -> Self {
        let depths = tree.depths().iter();
        Self {
            seq,
            tokens: std::iter::once(last).chain(tree.tokens().iter().copied()).collect(),
            positions: std::iter::once(base).chain(depths.map(|depth| base + depth)).collect(),
            // Rows of a tree are read in full precision. Alone, the last token is read as in plain decoding.
            rows: if tree.is_empty() { Rows::Last(1) } else { Rows::Tree(parents) },
        }
    }

    /// The queries of this pass for [`Cache::attend`].
    pub fn queries(&self) -> Queries<'_> {
        Queries { seq: self.seq, rows: self.rows }
    }
}

/// A language model that keeps its keys and values in a [`Cache`].
///
/// The output is exact to the last token if a row of the result does not depend on the other rows of
/// the call, to the bit. [`Cache::attend`] and [`tensor_utils::gemm`] guarantee that; a sum whose
/// order depends on the number of rows does not.
pub trait Target {
    /// Size of the vocabulary.
    fn vocabulary(&self) -> usize;

    /// Runs the rows of `batch`, one sequence after the other: in each layer appends their keys and
    /// values to `cache`, then attends with [`Pass::queries`].
    ///
    /// `logits` `[total rows, V]` receives the logits after each row; without it, the pass only
    /// fills the cache.
    ///
    /// # Errors
    /// Whatever goes wrong; the caller undoes what was appended.
    fn forward(
        &mut self,
        cache: &mut Cache,
        batch: &[Pass<'_>],
        logits: Option<ArrayViewMut2<'_, f32>>,
    ) -> Result<(), BoxError>;
}

impl<M: Target + ?Sized> Target for &mut M {
    fn vocabulary(&self) -> usize {
        (**self).vocabulary()
    }

    fn forward(
        &mut self,
        cache: &mut Cache,
        batch: &[Pass<'_>],
        logits: Option<ArrayViewMut2<'_, f32>>,
    ) -> Result<(), BoxError> {
        (**self).forward(cache, batch, logits)
    }
}
