//! Acceptance at temperature 0.

use ndarray::{ArrayView2, Axis};
use rayon::prelude::*;
use tensor_utils::{Element, check_not_empty, check_shape};

use crate::error::invalid;
use crate::{Error, TokenTree, argmax};

/// What a verification yields: the accepted path and the token after it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Accepted {
    /// The nodes from the first below the prompt on; each is a child of the one before.
    pub nodes: Vec<usize>,
    /// Their tokens, then the target's own next token; so one more than the nodes.
    pub tokens: Vec<u32>,
}

impl Accepted {
    /// Ends at the first token of `eos`, which stays as the last token, and after at most `limit`
    /// tokens; says whether one of the two was met.
    ///
    /// Nodes at and past the last token that stays go too: plain decoding would not have run the
    /// model on them, so they have no place in the cache either. A `limit` of 0 counts as 1.
    pub fn truncate(&mut self, eos: &[u32], limit: usize) -> bool {
        let limit = limit.max(1);
        let end = self.tokens.iter().position(|token| eos.contains(token));
        let keep = end.map_or(limit, |end| limit.min(end + 1));
        let ended = end.is_some_and(|end| end < keep) || self.tokens.len() >= limit;
        self.tokens.truncate(keep);
        self.nodes.truncate(self.tokens.len().saturating_sub(1));
        ended
    }
}

/// The longest path whose every token is the target's choice in the context of its parent.
///
/// `logits` `[1 + N, V]`: row 0 follows the last prompt token, row `1 + i` follows node `i`. Node
/// `c` is accepted if its parent is (or it has none) and its token is the [`argmax`] of its
/// *parent's* row; so a rejected node takes its subtree with it. Rows off the accepted path are not
/// read: whatever they hold, NaN included, has no effect.
///
/// Equal to plain greedy decoding, as proven in `docs/derivation.md` (section 2).
///
/// # Errors
/// [`Error::Shape`] if `logits` does not have `1 + N` rows or `V` is 0, [`Error::Token`] if a node's
/// token is not below `V`, [`Error::Nan`] for a NaN in a row that is read.
///
/// ```
/// use dflash::{TokenTree, accept_greedy};
/// use ndarray::array;
///
/// // After the prompt the target wants token 1; the second branch has it.
/// let tree = TokenTree::new(&[0, 1, 2], &[-1, -1, 1])?;
/// let logits = array![[0.0, 9.0, 0.0], [0.0, 0.0, 9.0], [9.0, 0.0, 1.0], [0.0, 0.0, 0.0]];
/// let accepted = accept_greedy(&tree, logits.view())?;
/// assert_eq!(accepted.nodes, [1]); // 1 is accepted, its child 2 is not: row 2 says 0
/// assert_eq!(accepted.tokens, [1, 0]);
/// # Ok::<(), dflash::Error>(())
/// ```
pub fn accept_greedy<T: Element>(
    tree: &TokenTree,
    logits: ArrayView2<'_, T>,
) -> Result<Accepted, Error> {
    check_logits(tree, &logits)?;
    let mut accepted = Accepted::default();
    let mut row = 0;
    loop {
        let token = argmax(logits.index_axis(Axis(0), row), row)?;
        accepted.tokens.push(token);
        let Some(node) = tree.child(row, token) else { return Ok(accepted) };
        accepted.nodes.push(node);
        row = TokenTree::row_of(node);
    }
}

/// [`accept_greedy`] for a batch of trees of any sizes, in parallel: `logits` has the `1 + N` rows
/// of the first tree, then those of the second, and so on. Each result is that of the tree alone.
///
/// # Errors
/// Those of [`accept_greedy`], the first by index; rows in them count from the tree's first.
pub fn accept_greedy_batch<T: Element>(
    trees: &[TokenTree],
    logits: ArrayView2<'_, T>,
) -> Result<Vec<Accepted>, Error> {
    let offsets = row_offsets(trees)?;
    let rows = offsets.last().copied().unwrap_or(0);
    check_shape("logits", logits.shape(), &[rows, logits.ncols()])?;
    // Collected in order, so that the first error does not depend on the threads.
    let results: Vec<_> = trees
        .par_iter()
        .zip(&offsets)
        .map(|(tree, &from)| {
            accept_greedy(tree, logits.slice_axis(Axis(0), (from..from + tree.rows()).into()))
        })
        .collect();
    results.into_iter().collect()
}

/// Where the rows of each tree of a batch begin, and the total.
///
/// # Errors
/// [`Error::Option`] if the total does not fit `usize`.
pub fn row_offsets(trees: &[TokenTree]) -> Result<Vec<usize>, Error> {
    let mut offsets = vec![0];
    let mut total = 0_usize;
    for tree in trees {
        let overflow = || invalid("trees", "rows that can be counted", "more");
        total = total.checked_add(tree.rows()).ok_or_else(overflow)?;
        offsets.push(total);
    }
    Ok(offsets)
}

pub(crate) fn check_logits<T>(tree: &TokenTree, logits: &ArrayView2<'_, T>) -> Result<(), Error> {
    let vocabulary = logits.ncols();
    check_shape("logits", logits.shape(), &[tree.rows(), vocabulary])?;
    check_not_empty("logits", logits.shape(), 1, "vocabulary")?;
    check_tokens("tree", tree.tokens(), vocabulary)
}

pub(crate) fn check_tokens(
    arg: &'static str,
    tokens: &[u32],
    vocabulary: usize,
) -> Result<(), Error> {
    match tokens.iter().find(|&&token| token as usize >= vocabulary) {
        Some(&token) => Err(Error::Token { arg, token, vocabulary }),
        None => Ok(()),
    }
}
