//! EAGLE's buffers (also Medusa's): the tree as the paths to its leaves.

use std::collections::HashMap;

use ndarray::{Array2, ArrayView2};
use tensor_utils::{check_not_empty, try_array};

use super::below_root;
use super::sglang::tree_mask;
use crate::error::invalid;
use crate::{Accepted, Error, TokenTree};

/// In which order the paths stand. No result depends on it but which of two equally long paths is
/// called the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PathOrder {
    /// By the number of the leaf (EAGLE-2 and 3 at temperature 0).
    #[default]
    Leaf,
    /// By the nodes on the path, where the end of a path comes after every node (EAGLE-1, and
    /// EAGLE-2 and 3 when sampling).
    Path,
}

/// A tree of `N` nodes with the root, the last prompt token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffers {
    /// `[N]`: the tokens, the root's first.
    pub draft_tokens: Vec<u32>,
    /// `[leaves, 1 + depth]`: the nodes from the root to each leaf, padded with -1.
    pub retrieve_indices: Array2<i64>,
    /// `[N, N]`: which node sees which.
    pub tree_mask: Array2<bool>,
    /// `[N]`: depth, 0 for the root.
    pub tree_position_ids: Vec<usize>,
}

impl Buffers {
    /// From the last prompt token and a tree.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no memory for it.
    pub fn from_tree(root: u32, tree: &TokenTree, order: PathOrder) -> Result<Self, Error> {
        let mut paths: Vec<Vec<i64>> = (0..tree.rows())
            .filter(|&row| tree.children(row).is_empty())
            .map(|leaf| {
                let nodes = leaf.checked_sub(1).map_or_else(Vec::new, |node| tree.path(node));
                std::iter::once(0).chain(nodes.into_iter().map(|node| node as i64 + 1)).collect()
            })
            .collect();
        let length = 1 + tree.max_depth();
        if order == PathOrder::Path {
            // The end of a path comes after every node, as if it were the largest.
            paths.sort_by_key(|path| path.iter().copied().chain([i64::MAX]).collect::<Vec<_>>());
        }
        let mut retrieve_indices = try_array("retrieve_indices", (paths.len(), length))?;
        for (path, mut row) in paths.iter().zip(retrieve_indices.rows_mut()) {
            row.fill(-1);
            row.iter_mut().zip(path).for_each(|(to, &node)| *to = node);
        }
        Ok(Self {
            draft_tokens: std::iter::once(root).chain(tree.tokens().iter().copied()).collect(),
            retrieve_indices,
            tree_mask: tree_mask(tree)?,
            tree_position_ids: std::iter::once(0).chain(tree.depths().iter().copied()).collect(),
        })
    }

    /// The last prompt token and the tree, from the tokens and the paths (the rest follows from
    /// them).
    ///
    /// # Errors
    /// What [`tree_of_paths`] reports; [`Error::Shape`] without a root.
    pub fn to_tree(&self) -> Result<(u32, TokenTree), Error> {
        let tree = tree_of_paths(&self.draft_tokens, self.retrieve_indices.view())?;
        Ok((self.draft_tokens[0], tree))
    }

    /// What `evaluate_posterior` returns for a result: the first path with the longest accepted
    /// beginning, and its length without the root.
    ///
    /// # Errors
    /// [`Error::Option`] if the accepted nodes are on no path.
    pub fn outcome(&self, accepted: &Accepted) -> Result<(usize, usize), Error> {
        let holds = |row: ndarray::ArrayView1<'_, i64>| {
            let nodes = accepted.nodes.iter().map(|&node| node as i64 + 1);
            row.len() > accepted.nodes.len()
                && row.iter().skip(1).copied().zip(nodes).all(|(a, b)| a == b)
        };
        match self.retrieve_indices.rows().into_iter().position(holds) {
            Some(best) => Ok((best, accepted.nodes.len())),
            None => Err(invalid("accepted", "nodes of one path", format!("{accepted:?}"))),
        }
    }
}

/// The tree with these tokens, the root's first, and these paths from the root, padded with numbers
/// below 0.
///
/// # Errors
/// [`Error::Shape`] if there is no token; [`Error::Format`] if a path does not begin at the root,
/// names a node that is not there or one after the end, or if a node is on no path or has two
/// parents; and what [`TokenTree::new`] reports.
pub fn tree_of_paths(tokens: &[u32], paths: ArrayView2<'_, i64>) -> Result<TokenTree, Error> {
    const ARG: &str = "retrieve_indices";
    check_not_empty("draft_tokens", &[tokens.len()], 0, "number of nodes")?;
    let wrong = |problem: String| Error::Format { arg: ARG, problem };
    let mut parents = vec![None; tokens.len() - 1];
    for path in paths.rows() {
        let length = path.iter().position(|&node| node < 0).unwrap_or(path.len());
        if path.iter().skip(length).any(|&node| node >= 0) || path.first() != Some(&0) {
            return Err(wrong(format!("the path {path} is not one from the root and then padded")));
        }
        for pair in path.iter().take(length).collect::<Vec<_>>().windows(2) {
            let (parent, node) = (*pair[0] as usize, *pair[1] as usize);
            let slot = node
                .checked_sub(1)
                .and_then(|node| parents.get_mut(node))
                .ok_or_else(|| wrong(format!("{node} is no node below the root")))?;
            if slot.replace(parent).is_some_and(|other| other != parent) {
                return Err(wrong(format!("node {node} has two parents")));
            }
        }
    }
    below_root(ARG, &tokens[1..], &parents)
}

/// The tree of EAGLE-1's and Medusa's choices: each choice is the ranks along a path (`[0, 2]`: the
/// third best token after the best one), and `token` gives the token of a choice. Nodes are ordered
/// by depth, then by ranks.
///
/// # Errors
/// [`Error::Format`] if a choice is empty or its parent is missing; and what [`TokenTree::new`]
/// reports.
pub fn tree_of_choices(
    choices: &[&[usize]],
    mut token: impl FnMut(&[usize]) -> u32,
) -> Result<TokenTree, Error> {
    let mut sorted = choices.to_vec();
    sorted.sort_by(|a, b| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
    let mut nodes: HashMap<&[usize], i64> = HashMap::from([(&[][..], -1)]);
    let (mut tokens, mut parents) = (Vec::new(), Vec::new());
    for (node, choice) in (0..).zip(sorted) {
        let parent = choice.split_last().and_then(|(_, parent)| nodes.get(parent).copied());
        let missing = || format!("the choice {choice:?} has no parent among the choices");
        parents.push(parent.ok_or_else(|| Error::Format { arg: "choices", problem: missing() })?);
        tokens.push(token(choice));
        nodes.insert(choice, node);
    }
    TokenTree::new(&tokens, &parents)
}
