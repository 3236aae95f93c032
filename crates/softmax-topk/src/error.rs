//! What can be wrong with a call.

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// An argument or option that the result cannot be computed with.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that does not fit the others.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// More results are asked for than there are tokens, or none.
    #[error("`k` is {k}, expected 1 to {vocabulary}, the length of the rows of `logits`")]
    K {
        /// What was asked for.
        k: usize,
        /// The tokens of a row.
        vocabulary: usize,
    },
    /// No tokens, or more than a `u32` can count.
    #[error("`logits` has rows of {vocabulary} tokens, expected 1 to {}", u32::MAX)]
    Vocabulary {
        /// The tokens of a row.
        vocabulary: usize,
    },
    /// Room for given tokens is missing.
    #[error(
        "the result has no `tokens`, expected room for the {wanted} of each row that option `tokens` names"
    )]
    TokensMissing {
        /// Tokens of a row of [`Options::tokens`](crate::Options::tokens).
        wanted: usize,
    },
    /// Room for given tokens, of which there are none.
    #[error("the result has `tokens`, expected none: option `tokens` names none")]
    TokensUnasked,
    /// An option with a value outside its range.
    #[error("option `{option}` is {got:?} for row {row}, expected {expected}")]
    Option {
        /// The field of [`Options`](crate::Options).
        option: &'static str,
        /// The row it is for.
        row: usize,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: f64,
    },
    /// A token that is not in the vocabulary.
    #[error("`{arg}` has token {token} in row {row}, expected less than {vocabulary}")]
    Token {
        /// The argument.
        arg: &'static str,
        /// Its row.
        row: usize,
        /// The token.
        token: u32,
        /// The tokens of a row.
        vocabulary: usize,
    },
    /// A score is NaN, and the policy is [`NanPolicy::Error`](crate::NanPolicy::Error).
    #[error(
        "`logits`, plus `bias` if given, is NaN for token {token} in row {row}, expected a number"
    )]
    Nan {
        /// The first row with one.
        row: usize,
        /// Its first NaN.
        token: usize,
    },
    /// No token of a row has a probability to be drawn with; with
    /// [`NanPolicy::Greatest`](crate::NanPolicy::Greatest) one NaN is enough.
    #[error("no token of row {row} can be drawn: all are masked or -inf, or one is NaN")]
    NothingToDraw {
        /// The first such row.
        row: usize,
    },
    /// A workspace made for fewer or longer results.
    #[error(
        "the workspace was made for {made_rows} rows of {made_vocabulary} tokens and k {made_k}, \
         the call has {rows} rows of {vocabulary} and k {k}: make it with \
         `Workspace::new({rows}, {vocabulary}, {k}, ..)`"
    )]
    WorkspaceTooSmall {
        /// Rows of the call.
        rows: usize,
        /// Tokens of a row.
        vocabulary: usize,
        /// Results of a row.
        k: usize,
        /// Rows that the workspace was made for.
        made_rows: usize,
        /// Tokens of a row.
        made_vocabulary: usize,
        /// Results of a row.
        made_k: usize,
    },
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
}
