//! SGLang's `retrieve_index`, `retrieve_next_token`, `retrieve_next_sibling` (also spelled
//! `retrive_*`), as its kernels `build_tree_efficient` and `verify_tree_greedy` use them.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};
use tensor_utils::{check_not_empty, check_shape, try_array};

use super::below_root;
use crate::error::invalid;
use crate::{Accepted, Error, TokenTree};

/// A batch of trees of the same size, `N` nodes each with the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trees {
    /// `[B, N]`: the tokens; column 0 is the last prompt token.
    pub candidates: Array2<i64>,
    /// `[B, N]`: the node's row in arrays over the whole batch, `b N + i`.
    pub retrieve_index: Array2<i64>,
    /// `[B, N]`: the first child, -1 for none.
    pub retrieve_next_token: Array2<i64>,
    /// `[B, N]`: the next child of the same parent, -1 for none.
    pub retrieve_next_sibling: Array2<i64>,
}

impl Trees {
    /// From the last prompt token and the tree of each sequence; children in ascending order.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many roots as trees, [`Error::Option`] if the trees
    /// differ in size, which this format has no way to say.
    pub fn from_trees(roots: &[u32], trees: &[TokenTree]) -> Result<Self, Error> {
        check_shape("roots", &[roots.len()], &[trees.len()])?;
        let rows = trees.first().map_or(1, TokenTree::rows);
        if let Some(other) = trees.iter().find(|tree| tree.rows() != rows) {
            let expected = format!("trees of {} nodes, like the first", rows - 1);
            return Err(invalid("trees", expected, other.len()));
        }
        let shape = (trees.len(), rows);
        let index = |node: Option<&usize>| node.map_or(-1, |&node| node as i64 + 1);
        let mut result = Self {
            candidates: Array2::zeros(shape),
            retrieve_index: Array2::from_shape_fn(shape, |(b, i)| (b * rows + i) as i64),
            retrieve_next_token: Array2::from_elem(shape, -1),
            retrieve_next_sibling: Array2::from_elem(shape, -1),
        };
        for (b, (tree, &root)) in trees.iter().zip(roots).enumerate() {
            result.candidates[[b, 0]] = root.into();
            for (node, &token) in tree.tokens().iter().enumerate() {
                result.candidates[[b, node + 1]] = token.into();
            }
            for row in 0..rows {
                let children = tree.children(row);
                result.retrieve_next_token[[b, row]] = index(children.first());
                for pair in children.windows(2) {
                    result.retrieve_next_sibling[[b, pair[0] + 1]] = index(pair.get(1));
                }
            }
        }
        Ok(result)
    }

    /// The last prompt token and the tree of each sequence. The order of siblings, which decides
    /// nothing as they differ, is not kept.
    ///
    /// # Errors
    /// [`Error::Shape`] if the arrays differ in shape or `N` is 0, [`Error::Format`] for links out
    /// of range, nodes without or with two parents, and tokens below 0; and what
    /// [`TokenTree::new`] reports.
    pub fn to_trees(&self) -> Result<Vec<(u32, TokenTree)>, Error> {
        let shape = self.candidates.shape();
        check_not_empty("candidates", shape, 1, "number of nodes")?;
        check_shape("retrieve_index", self.retrieve_index.shape(), shape)?;
        check_shape("retrieve_next_token", self.retrieve_next_token.shape(), shape)?;
        check_shape("retrieve_next_sibling", self.retrieve_next_sibling.shape(), shape)?;
        self.candidates
            .rows()
            .into_iter()
            .zip(self.retrieve_next_token.rows())
            .zip(self.retrieve_next_sibling.rows())
            .map(|((tokens, next), sibling)| to_tree(tokens, next, sibling))
            .collect()
    }

    /// What `verify_tree_greedy` writes for these results: one [`Accepted`] a sequence.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of results, if `N` is 0, and if there is no memory for so many
    /// `steps`; [`Error::Option`] if a path does not lie in the tree or is longer than `steps` allows:
    /// `1 + nodes <= steps`.
    pub fn outcome(&self, accepted: &[Accepted], steps: usize) -> Result<Outcome, Error> {
        let (batch, rows) = self.candidates.dim();
        check_not_empty("candidates", self.candidates.shape(), 1, "number of nodes")?;
        check_shape("accepted", &[accepted.len()], &[batch])?;
        let mut accept_index: Array2<i64> = try_array("accept_index", (batch, steps))?;
        accept_index.fill(-1);
        let mut outcome = Outcome {
            predicts: Array1::from_elem(batch * rows, -1),
            accept_index,
            accept_token_num: Array1::zeros(batch),
        };
        for (b, path) in accepted.iter().enumerate() {
            let fits = path.nodes.len() < steps && path.nodes.iter().all(|&node| node < rows - 1);
            if !fits || path.tokens.len() != path.nodes.len() + 1 {
                let expected = format!("paths of fewer than {steps} of {} nodes", rows - 1);
                return Err(invalid("accepted", expected, format!("{path:?}")));
            }
            outcome.accept_token_num[b] = path.nodes.len() as i64;
            let path_rows = std::iter::once(0).chain(path.nodes.iter().map(|node| node + 1));
            for (step, (row, &token)) in path_rows.zip(&path.tokens).enumerate() {
                let index = b * rows + row;
                outcome.accept_index[[b, step]] = index as i64;
                outcome.predicts[index] = token.into();
            }
        }
        Ok(outcome)
    }
}

/// What SGLang's verification writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// `[B N]`: the token after each accepted row; -1 at the others, which SGLang leaves undefined.
    pub predicts: Array1<i64>,
    /// `[B, steps]`: rows of the accepted nodes, the root first, then -1.
    pub accept_index: Array2<i64>,
    /// `[B]`: accepted nodes, without the root and the token after the path.
    pub accept_token_num: Array1<i64>,
}

/// The tree that EAGLE's drafting selects, from the input of SGLang's `build_tree_efficient`.
///
/// Level by level, `topk` candidates are offered after each of `topk` parents: candidate `c` of the
/// concatenated levels hangs below slot `c / topk`, where slot 0 is the root and slot `s` the
/// candidate `parent_list[s]`. `selected` `[N - 1]` are the candidates that were kept, ascending,
/// and `draft_tokens` their tokens.
///
/// # Errors
/// [`Error::Shape`] if the lengths differ, [`Error::Option`] if `topk` is 0, [`Error::Format`] if a
/// parent is missing; and what [`TokenTree::new`] reports.
pub fn tree_of_selection(
    parent_list: &[i64],
    selected: &[i64],
    draft_tokens: &[u32],
    topk: usize,
) -> Result<TokenTree, Error> {
    check_shape("draft_tokens", &[draft_tokens.len()], &[selected.len()])?;
    if topk == 0 {
        return Err(invalid("topk", "at least 1", topk));
    }
    let parent_row = |&candidate: &i64| {
        let slot = usize::try_from(candidate).ok()? / topk;
        if slot == 0 {
            return Some(0);
        }
        let parent = parent_list.get(slot)?;
        selected.iter().position(|other| other == parent).map(|node| node + 1)
    };
    let parents: Vec<_> = selected.iter().map(parent_row).collect();
    below_root("selected", draft_tokens, &parents)
}

/// The mask of the nodes among themselves, the root among them (`QLEN_ONLY`): `[N, N]`.
///
/// # Errors
/// [`Error::Shape`] if there is no memory for it.
pub fn tree_mask(tree: &TokenTree) -> Result<Array2<bool>, Error> {
    let mut mask = try_array("tree mask", (tree.rows(), tree.rows()))?;
    for row in 0..tree.rows() {
        mask[[row, 0]] = true;
        if let Some(node) = row.checked_sub(1) {
            for ancestor in tree.path(node) {
                mask[[row, ancestor + 1]] = true;
            }
        }
    }
    Ok(mask)
}

/// The same mask, the rows packed in bits (`QLEN_ONLY_BITPACKING`): bit `j` of a row, little endian,
/// says whether node `j` is seen.
///
/// # Errors
/// [`Error::Option`] for more than 64 nodes with the root.
pub fn tree_mask_bits(tree: &TokenTree) -> Result<Vec<u64>, Error> {
    if tree.rows() > 64 {
        return Err(invalid("tree", "at most 63 nodes", tree.len()));
    }
    let row_bits = |row: ArrayView1<'_, bool>| {
        row.iter().enumerate().fold(0, |bits, (j, &seen)| bits | u64::from(seen) << j)
    };
    Ok(tree_mask(tree)?.rows().into_iter().map(row_bits).collect())
}

/// The tree that a mask of the nodes among themselves describes (`reconstruct_indices_from_tree_mask`):
/// the parent of a node is the last node before it that it sees.
///
/// # Errors
/// [`Error::Shape`] if the mask is not square or misses the root, or `tokens` is not one shorter;
/// [`Error::Format`] if the mask is not that of a tree; and what [`TokenTree::new`] reports.
pub fn tree_of_mask(mask: ArrayView2<'_, bool>, tokens: &[u32]) -> Result<TokenTree, Error> {
    let rows = mask.nrows();
    check_not_empty("mask", mask.shape(), 0, "number of nodes")?;
    check_shape("mask", mask.shape(), &[rows, rows])?;
    check_shape("tokens", &[tokens.len()], &[rows - 1])?;
    let parents: Vec<_> = (1..rows).map(|row| (0..row).rev().find(|&j| mask[[row, j]])).collect();
    let tree = below_root("mask", tokens, &parents)?;
    if tree_mask(&tree)? != mask {
        let problem = "a node does not see exactly its ancestors and itself".to_owned();
        return Err(Error::Format { arg: "mask", problem });
    }
    Ok(tree)
}

fn to_tree(
    tokens: ArrayView1<'_, i64>,
    next: ArrayView1<'_, i64>,
    sibling: ArrayView1<'_, i64>,
) -> Result<(u32, TokenTree), Error> {
    let rows = tokens.len();
    let wrong = |arg, problem| Error::Format { arg, problem };
    let link = |arg: &'static str, array: &ArrayView1<'_, i64>, row: usize| match array[row] {
        -1 => Ok(None),
        to => match usize::try_from(to) {
            Ok(to) if to > 0 && to < rows => Ok(Some(to)),
            _ => Err(wrong(arg, format!("node {row} points to {to}, of {rows} nodes"))),
        },
    };
    let mut parents = vec![None; rows - 1];
    for row in 0..rows {
        let mut child = link("retrieve_next_token", &next, row)?;
        while let Some(at) = child {
            // A circle of siblings comes back to one that has its parent.
            if parents[at - 1].replace(row).is_some() {
                let problem = format!("node {at} is reached twice");
                return Err(wrong("retrieve_next_sibling", problem));
            }
            child = link("retrieve_next_sibling", &sibling, at)?;
        }
    }
    let token = |row: usize| {
        let problem = || format!("{} is no token", tokens[row]);
        u32::try_from(tokens[row]).map_err(|_| wrong("candidates", problem()))
    };
    let below: Vec<_> = (1..rows).map(token).collect::<Result<_, _>>()?;
    Ok((token(0)?, below_root("retrieve_next_token", &below, &parents)?))
}
