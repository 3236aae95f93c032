//! Which tokens may follow: a trait, and the trie of all sequences that may come out.

use std::fmt::Debug;

/// Decides which tokens may follow what a beam has generated.
pub trait Constraint: Debug + Sync {
    /// What may follow `generated` (without the prompt) in the search for prompt `item`.
    ///
    /// `allowed` is empty; what is pushed to it counts if [`Follow::Listed`] or [`Follow::ListedOrEnd`]
    /// is returned, in any order. If there is nothing that may follow, the beam is dropped.
    fn follow(&self, item: usize, generated: &[u32], allowed: &mut Vec<u32>) -> Follow;
}

/// What may follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Follow {
    /// Any token.
    Any,
    /// The tokens listed.
    Listed,
    /// The tokens listed, and every end token.
    ListedOrEnd,
}

/// The sequences that may be generated, for generative retrieval and the like.
///
/// A generated sequence is one of these, then an end token: without one in
/// [`Options::eos`], a complete sequence that cannot go on is dropped. Where the length ends the search, beginnings
/// come out too, not finished. A sequence that has an end token itself is complete
/// with the first, whatever follows in it.
///
/// [`Options::eos`]: crate::Options::eos
///
/// ```
/// use beam::{Constraint, Follow, Trie};
///
/// let trie = Trie::new([vec![3, 1], vec![3, 4, 1], vec![3]]);
/// let mut allowed = Vec::new();
/// assert_eq!(trie.follow(0, &[3], &mut allowed), Follow::ListedOrEnd);
/// assert_eq!(allowed, [1, 4]);
/// ```
#[derive(Debug, Clone)]
pub struct Trie {
    /// The first is the root.
    nodes: Vec<TrieNode>,
}

#[derive(Debug, Clone, Default)]
struct TrieNode {
    /// By token; with the index of the node.
    children: Vec<(u32, usize)>,
    /// Whether a sequence ends here.
    ends: bool,
}

impl Trie {
    /// A trie of `sequences`, in any order; repetitions change nothing.
    pub fn new<S: AsRef<[u32]>>(sequences: impl IntoIterator<Item = S>) -> Self {
        let mut nodes = vec![TrieNode::default()];
        for sequence in sequences {
            let mut at = 0;
            for &token in sequence.as_ref() {
                let new = nodes.len();
                let children = &mut nodes[at].children;
                at = match children.binary_search_by_key(&token, |child| child.0) {
                    Ok(found) => children[found].1,
                    Err(place) => {
                        children.insert(place, (token, new));
                        nodes.push(TrieNode::default());
                        new
                    }
                };
            }
            nodes[at].ends = true;
        }
        Self { nodes }
    }

    fn find(&self, sequence: &[u32]) -> Option<&TrieNode> {
        let mut node = &self.nodes[0];
        for token in sequence {
            let child = node.children.binary_search_by_key(token, |child| child.0).ok()?;
            node = &self.nodes[node.children[child].1];
        }
        Some(node)
    }
}

impl Constraint for Trie {
    fn follow(&self, _: usize, generated: &[u32], allowed: &mut Vec<u32>) -> Follow {
        let Some(node) = self.find(generated) else { return Follow::Listed };
        allowed.extend(node.children.iter().map(|child| child.0));
        if node.ends { Follow::ListedOrEnd } else { Follow::Listed }
    }
}
