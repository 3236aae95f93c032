//! What can be wrong with a call.

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// An argument or option that the gradients cannot be computed with.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that does not fit the others.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// What the forward pass would refuse, too.
    #[error(transparent)]
    Forward(#[from] attn_flash::Error),
    /// A gradient of an option that is not set.
    #[error("`{gradient}` was asked for, but option `{option}` is not set")]
    NoInput {
        /// The gradient.
        gradient: &'static str,
        /// The field of [`Options`](attn_flash::Options) that it is the gradient of.
        option: &'static str,
    },
    /// A block of the tiling that is 0.
    #[error("`{block}` of the tiling is 0, expected at least 1")]
    EmptyBlock {
        /// The field of [`Tiling`](crate::Tiling).
        block: &'static str,
    },
    /// A workspace made for a smaller call.
    #[error(
        "the workspace has room for {room} {what}, the call needs {needed}: make it with the inputs of \
         the largest call"
    )]
    WorkspaceTooSmall {
        /// What there is not enough of.
        what: &'static str,
        /// What the call needs.
        needed: usize,
        /// What the workspace has.
        room: usize,
    },
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
}
