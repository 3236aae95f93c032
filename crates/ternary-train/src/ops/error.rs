//! What an operation can refuse.

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// An argument of an operation does not fit.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum OpError {
    /// A shape does not fit the others.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The rows of a matrix are not contiguous.
    #[error("`{arg}` has strides {strides:?}: its rows must be contiguous and lie in order")]
    Strides {
        /// The argument.
        arg: &'static str,
        /// Its strides.
        strides: Vec<isize>,
    },
    /// A token that the vocabulary does not have.
    #[error("token {token} at position {position} is outside the vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// The instruction set that was asked for is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// From the forward pass of attention.
    #[error(transparent)]
    Attention(#[from] attn_flash::Error),
    /// From the backward pass of attention.
    #[error(transparent)]
    AttentionBackward(#[from] attn_flash_bwd::Error),
    /// From a norm.
    #[error(transparent)]
    Norm(#[from] layernorm_bwd::Error),
}

/// Elements of an array of these sizes.
pub(crate) fn elements(arg: &'static str, sizes: [usize; 2]) -> Result<usize, OpError> {
    let elements = sizes[0].checked_mul(sizes[1]);
    elements.ok_or_else(|| ShapeError::TooLarge { arg, got: sizes.to_vec() }.into())
}
