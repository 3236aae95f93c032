//! The token tree: what a drafter proposes and one pass of the target model verifies.

use std::collections::HashMap;

use attn_flash::AncestorMask;
use ndarray::Array2;
use tensor_utils::{ShapeError, check_shape};

use crate::Error;

/// The most nodes a tree may have; its ancestor mask then takes 512 MiB.
pub const MAX_NODES: usize = 1 << 16;

/// Tokens that may follow a prompt, arranged by common beginnings.
///
/// Node `i` holds a token and stands for the text from the last prompt token down to it. Arrays of
/// one row a context, such as the target's logits, have `1 + len()` *rows*: row 0 follows the last
/// prompt token, row `1 + i` follows node `i` ([`row_of`](Self::row_of)).
///
/// ```
/// use dflash::TokenTree;
///
/// // 7 ─┬─ 4
/// //    └─ 5
/// // 9
/// let tree = TokenTree::new(&[7, 9, 4, 5], &[-1, -1, 0, 0])?;
/// assert_eq!(tree.depths(), [1, 1, 2, 2]);
/// assert_eq!(tree.children(0), [0, 1]); // of the last prompt token
/// assert_eq!(tree.children(TokenTree::row_of(0)), [2, 3]);
/// # Ok::<(), dflash::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenTree {
    tokens: Vec<u32>,
    parents: Vec<i64>,
    depths: Vec<usize>,
    /// The children of row `r` are `children[first_child[r]..first_child[r + 1]]`.
    first_child: Vec<usize>,
    children: Vec<usize>,
}

impl TokenTree {
    /// From the token and the parent of each node; -1 is a child of the last prompt token.
    ///
    /// # Errors
    /// [`Error::Shape`] if the lengths differ, [`Error::TooManyNodes`], [`Error::Parent`] if a
    /// parent does not come before its child (so for every cycle, forward or unknown parent), and
    /// [`Error::DuplicateSiblings`]; [`merged`](Self::merged) accepts the last.
    pub fn new(tokens: &[u32], parents: &[i64]) -> Result<Self, Error> {
        check_shape("parents", &[parents.len()], &[tokens.len()])?;
        if tokens.len() > MAX_NODES {
            return Err(Error::TooManyNodes { limit: MAX_NODES, got: tokens.len() });
        }
        let mut depths = Vec::with_capacity(tokens.len());
        let mut first_child = vec![0; tokens.len() + 2];
        for (node, &parent) in parents.iter().enumerate() {
            let row = parent_row(node, parent)?;
            depths.push(if row == 0 { 1 } else { depths[row - 1] + 1 });
            first_child[row + 1] += 1;
        }
        for row in 0..=tokens.len() {
            first_child[row + 1] += first_child[row];
        }
        // Nodes in order fill each row's range in order.
        let mut next = first_child.clone();
        let mut children = vec![0; tokens.len()];
        for (node, &parent) in parents.iter().enumerate() {
            let row = parent_row(node, parent)?;
            children[next[row]] = node;
            next[row] += 1;
        }
        let tree = Self {
            tokens: tokens.to_vec(),
            parents: parents.to_vec(),
            depths,
            first_child,
            children,
        };
        tree.check_siblings()?;
        Ok(tree)
    }

    /// Like [`new`](Self::new), but siblings with the same token become one node, which takes over
    /// the children of both (as in a trie); and for each given node, the node it became.
    ///
    /// # Errors
    /// Those of [`new`](Self::new) without [`Error::DuplicateSiblings`].
    pub fn merged(tokens: &[u32], parents: &[i64]) -> Result<(Self, Vec<usize>), Error> {
        check_shape("parents", &[parents.len()], &[tokens.len()])?;
        let mut became = Vec::with_capacity(tokens.len());
        let mut seen = HashMap::new();
        let (mut kept_tokens, mut kept_parents) = (Vec::new(), Vec::new());
        for (node, (&token, &parent)) in tokens.iter().zip(parents).enumerate() {
            let parent = match parent_row(node, parent)? {
                0 => -1,
                row => became[row - 1] as i64,
            };
            let kept = *seen.entry((parent, token)).or_insert_with(|| {
                kept_tokens.push(token);
                kept_parents.push(parent);
                kept_tokens.len() - 1
            });
            became.push(kept);
        }
        Ok((Self::new(&kept_tokens, &kept_parents)?, became))
    }

    /// The tree without branches: each token follows the one before it.
    ///
    /// # Errors
    /// [`Error::TooManyNodes`].
    pub fn chain(tokens: &[u32]) -> Result<Self, Error> {
        let parents: Vec<i64> = (-1..).take(tokens.len()).collect();
        Self::new(tokens, &parents)
    }

    /// The tree without nodes; verifying it is a plain decoding step.
    pub fn empty() -> Self {
        Self {
            tokens: Vec::new(),
            parents: Vec::new(),
            depths: Vec::new(),
            first_child: vec![0; 2],
            children: Vec::new(),
        }
    }

    /// The nodes of at most this depth, and which ones they were.
    pub(crate) fn up_to(&self, depth: usize) -> Result<(Self, Vec<usize>), Error> {
        let kept: Vec<_> = (0..self.len()).filter(|&node| self.depths[node] <= depth).collect();
        // Parents are less deep than their children, so they are kept with them.
        let place = |parent: i64| match usize::try_from(parent) {
            Ok(parent) => kept.partition_point(|&node| node < parent) as i64,
            Err(_) => -1,
        };
        let tokens: Vec<_> = kept.iter().map(|&node| self.tokens[node]).collect();
        let parents: Vec<_> = kept.iter().map(|&node| place(self.parents[node])).collect();
        Ok((Self::new(&tokens, &parents)?, kept))
    }

    fn check_siblings(&self) -> Result<(), Error> {
        let mut siblings = Vec::new();
        for row in 0..=self.len() {
            siblings.clear();
            siblings.extend(self.children(row).iter().map(|&node| (self.tokens[node], node)));
            siblings.sort_unstable();
            for pair in siblings.windows(2) {
                let ((token, first), (other, second)) = (pair[0], pair[1]);
                if token == other {
                    let parent = row as i64 - 1;
                    return Err(Error::DuplicateSiblings { parent, first, second, token });
                }
            }
        }
        Ok(())
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Rows of the arrays that go with this tree: `1 + len()`.
    pub fn rows(&self) -> usize {
        1 + self.len()
    }

    /// The row that follows `node`; for `usize::MAX` itself, as no tree has so many.
    pub fn row_of(node: usize) -> usize {
        node.saturating_add(1)
    }

    /// The tokens of the nodes.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The parents of the nodes, -1 for a child of the last prompt token.
    pub fn parents(&self) -> &[i64] {
        &self.parents
    }

    /// Tokens from the last prompt token (not counted) to the node (counted): at least 1.
    pub fn depths(&self) -> &[usize] {
        &self.depths
    }

    /// Depth of the deepest node; 0 for the empty tree.
    pub fn max_depth(&self) -> usize {
        self.depths.iter().copied().max().unwrap_or(0)
    }

    /// The nodes that follow directly in the context of `row`, in order; none for a row that does
    /// not exist.
    pub fn children(&self, row: usize) -> &[usize] {
        match self.first_child.get(row..) {
            Some(&[from, to, ..]) => &self.children[from..to],
            _ => &[],
        }
    }

    /// The child of `row` with this token.
    pub fn child(&self, row: usize, token: u32) -> Option<usize> {
        self.children(row).iter().copied().find(|&node| self.tokens[node] == token)
    }

    /// The nodes from the first below the prompt to `node`; empty for a node that does not exist.
    pub fn path(&self, node: usize) -> Vec<usize> {
        let mut path = Vec::new();
        let mut at = node;
        while let Some(&parent) = self.parents.get(at) {
            path.push(at);
            at = usize::try_from(parent).unwrap_or(usize::MAX);
        }
        path.reverse();
        path
    }

    /// Position of each node in the sequence, when the last prompt token stands at `last`: its
    /// depth further on. `None` if one does not fit `usize`.
    pub fn positions(&self, last: usize) -> Option<Vec<usize>> {
        self.depths.iter().map(|depth| last.checked_add(*depth)).collect()
    }

    /// Which nodes see which, as bits: itself and its ancestors.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no memory for the square of the number of nodes in bits.
    pub fn ancestors(&self) -> Result<AncestorMask, Error> {
        Self::mask_of(&self.parents)
    }

    /// The parents of a pass over the last prompt token and the nodes, `1 + len()` rows: the prompt
    /// token is row 0 and their root.
    pub fn pass_parents(&self) -> Vec<i64> {
        std::iter::once(-1).chain(self.parents.iter().map(|parent| parent + 1)).collect()
    }

    fn mask_of(parents: &[i64]) -> Result<AncestorMask, Error> {
        AncestorMask::from_parents(parents).map_err(|error| match error {
            attn_flash::Error::Shape(error) => Error::Shape(error),
            other => Error::Format { arg: "parents", problem: other.to_string() },
        })
    }
}

/// The dense mask of a prompt and a tree, `[prompt + nodes, prompt + nodes]`, for display and for
/// tests: kernels use [`TokenTree::ancestors`], whose size does not depend on the prompt.
///
/// Row `i` may see column `j` where it is `true`: prompt tokens see the prompt up to themselves; a
/// node sees the whole prompt, its ancestors and itself.
///
/// # Errors
/// [`Error::Shape`] if there is no memory for it.
pub fn build_tree_mask(tree: &TokenTree, prompt: usize) -> Result<Array2<bool>, Error> {
    let got = vec![prompt, tree.len()];
    let size =
        prompt.checked_add(tree.len()).ok_or(ShapeError::TooLarge { arg: "tree mask", got })?;
    let mut mask = tensor_utils::try_array("tree mask", (size, size))?;
    for i in 0..prompt {
        for j in 0..=i {
            mask[[i, j]] = true;
        }
    }
    for node in 0..tree.len() {
        for j in 0..prompt {
            mask[[prompt + node, j]] = true;
        }
        for ancestor in tree.path(node) {
            mask[[prompt + node, prompt + ancestor]] = true;
        }
    }
    Ok(mask)
}

/// The row that the parent of `node` stands for: 0 for -1.
fn parent_row(node: usize, parent: i64) -> Result<usize, Error> {
    match usize::try_from(parent) {
        Ok(before) if before < node => Ok(before + 1),
        Err(_) if parent == -1 => Ok(0),
        _ => Err(Error::Parent { node, parent }),
    }
}
