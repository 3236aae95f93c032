//! What can be wrong with a call.

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// An argument or option that attention cannot be computed with.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that does not fit the others.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The query heads cannot be shared out evenly over the key/value heads.
    #[error(
        "`q` has {query_heads} heads and `k` has {key_heads}: \
         the number of query heads must be a multiple of the number of key/value heads"
    )]
    HeadsNotDivisible {
        /// Heads of `q`.
        query_heads: usize,
        /// Heads of `k` and `v`.
        key_heads: usize,
    },
    /// An option with a value outside its range.
    #[error("option `{option}` is {got}, expected {expected}")]
    Option {
        /// The field of [`Options`](crate::Options) or [`Tiling`](crate::Tiling), or the argument.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A workspace made for smaller heads.
    #[error(
        "the workspace was made for head size {workspace_head_size} and value size \
         {workspace_value_size}, the call needs {head_size} and {value_size}: \
         make it with `Workspace::new({head_size}, {value_size}, ..)`"
    )]
    WorkspaceTooSmall {
        /// Head size of the call.
        head_size: usize,
        /// Value size of the call.
        value_size: usize,
        /// Largest head size of the workspace.
        workspace_head_size: usize,
        /// Largest value size of the workspace.
        workspace_value_size: usize,
    },
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
}
