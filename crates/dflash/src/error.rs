//! What can be wrong with a call.

use std::error::Error as StdError;

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// A tree, an array or an option that cannot be worked with.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A parent that is neither -1 nor an earlier node; every cycle has such a node.
    #[error(
        "`parents[{node}]` is {parent}, expected -1 (a child of the last prompt token) or a node \
         before it"
    )]
    Parent {
        /// The node.
        node: usize,
        /// Its parent.
        parent: i64,
    },
    /// Two children of one node with the same token.
    #[error(
        "nodes {first} and {second} are both children of {} with token {token}: \
         siblings must differ, `TokenTree::merged` makes one of two",
        parent_name(*parent)
    )]
    DuplicateSiblings {
        /// Their parent, -1 for the last prompt token.
        parent: i64,
        /// The first of them.
        first: usize,
        /// The second.
        second: usize,
        /// Their token.
        token: u32,
    },
    /// More nodes than [`MAX_NODES`](crate::MAX_NODES).
    #[error("the tree has {got} nodes, expected at most {limit}")]
    TooManyNodes {
        /// The limit.
        limit: usize,
        /// The number of nodes.
        got: usize,
    },
    /// A token that the vocabulary does not have.
    #[error("`{arg}` has token {token}, expected less than the vocabulary's {vocabulary}")]
    Token {
        /// The argument.
        arg: &'static str,
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// A NaN where the largest of a row is wanted.
    #[error("`logits` has NaN in row {row}, from which a token is to be chosen")]
    Nan {
        /// The row: 0 follows the prompt, `1 + i` follows node `i`.
        row: usize,
    },
    /// Numbers that are no distribution over tokens.
    #[error("`{arg}` is not a distribution over tokens: {problem}")]
    NotALaw {
        /// The argument.
        arg: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A value outside its range.
    #[error("`{option}` is {got}, expected {expected}")]
    Option {
        /// The option or argument.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// Arrays in the format of another system that describe no tree.
    #[error("`{arg}` describes no tree: {problem}")]
    Format {
        /// The argument.
        arg: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A shape that does not fit the others.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// What the cache reported.
    #[error(transparent)]
    Cache(#[from] kvcache::Error),
    /// What the selection of the likeliest tokens reported.
    #[error(transparent)]
    TopK(#[from] softmax_topk::Error),
    /// What was wrong with one sequence of a batch; rows in it are those of its own tree.
    #[error("sequence {sequence}: {source}")]
    Sequence {
        /// The number of the sequence.
        sequence: usize,
        /// What was wrong.
        source: Box<Self>,
    },
    /// What the model or the drafter reported.
    #[error("the {who} failed: {source}")]
    Callback {
        /// `target model`, `drafter` or `drafter's model`.
        who: &'static str,
        /// Its own error.
        source: Box<dyn StdError + Send + Sync>,
    },
}

fn parent_name(parent: i64) -> String {
    if parent < 0 { "the last prompt token".to_owned() } else { format!("node {parent}") }
}

pub(crate) fn invalid(
    option: &'static str,
    expected: impl Into<String>,
    got: impl ToString,
) -> Error {
    Error::Option { option, expected: expected.into(), got: got.to_string() }
}
