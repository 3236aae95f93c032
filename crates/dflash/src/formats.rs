//! Trees and results as SGLang and EAGLE hold them.
//!
//! Both count the last prompt token as node 0 of the tree, the *root*, and feed it to the target
//! with the nodes, since its key and value are not in the cache yet. Their node `1 + i` is our node
//! `i`, and their node numbers are our row numbers.

pub mod eagle;
pub mod sglang;

use crate::{Error, TokenTree};

/// The tree below a root: `parents[i]` is the parent of row `1 + i`, itself a row.
fn below_root(
    arg: &'static str,
    tokens: &[u32],
    parents: &[Option<usize>],
) -> Result<TokenTree, Error> {
    let missing = |row: usize| Error::Format { arg, problem: format!("node {row} has no parent") };
    let mut below = Vec::with_capacity(parents.len());
    for (node, parent) in parents.iter().enumerate() {
        let parent = parent.ok_or_else(|| missing(node + 1))?;
        below.push(parent as i64 - 1);
    }
    TokenTree::new(tokens, &below)
}
