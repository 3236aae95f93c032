//! What can be wrong with a call.

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// What a [`Model`](crate::Model) may fail with.
pub type ModelError = Box<dyn std::error::Error + Send + Sync>;

/// An argument or option that cannot be searched with, or a model that does not keep its contract.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// An option with a value outside its range.
    #[error("option `{option}` is {got}, expected {expected}")]
    Option {
        /// The field of [`Options`](crate::Options), or the argument.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A prompt without tokens: nothing that the first token could follow.
    #[error("prompt {item} is empty; a prompt has at least one token")]
    EmptyPrompt {
        /// The prompt.
        item: usize,
    },
    /// A token that the vocabulary does not have.
    #[error("`{argument}` has the token {token}, and the vocabulary only {vocabulary} tokens")]
    Token {
        /// The argument or option that has it.
        argument: &'static str,
        /// The token.
        token: u32,
        /// How many tokens there are.
        vocabulary: usize,
    },
    /// Logits of a shape other than `[beams, vocabulary]`.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A row of logits that is no distribution.
    #[error("the model's logits of row {row} (prompt {item}) {problem}")]
    Logits {
        /// The row of the call.
        row: usize,
        /// The prompt it belongs to.
        item: usize,
        /// What is wrong with them.
        problem: &'static str,
    },
    /// The model failed.
    #[error("the model failed: {0}")]
    Model(#[source] ModelError),
    /// A space too large to be searched through.
    #[error(
        "there are more than {limit} sequences of {vocabulary} tokens and length {max_new_tokens}; \
         brute force is for small cases"
    )]
    TooManySequences {
        /// How many would be looked at.
        limit: usize,
        /// How many tokens there are.
        vocabulary: usize,
        /// The longest length.
        max_new_tokens: usize,
    },
    /// The best tokens cannot be found, as in a vocabulary of more than `u32::MAX` tokens.
    #[error(transparent)]
    Expansion(softmax_topk::Error),
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
}

/// An [`Error::Option`].
pub(crate) fn invalid(
    option: &'static str,
    expected: impl Into<String>,
    got: impl ToString,
) -> Error {
    Error::Option { option, expected: expected.into(), got: got.to_string() }
}
