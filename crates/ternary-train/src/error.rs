//! What can be wrong with a call, a file or a run.

use std::path::{Path, PathBuf};

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// An argument, option or file that cannot be worked with.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that does not fit the others.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
    /// An operation of the model.
    #[error(transparent)]
    Op(#[from] crate::ops::OpError),
    /// A text that does not fill a window.
    #[error("the text has {tokens} tokens, a window takes {length} and the one after")]
    TooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens of a window.
        length: usize,
    },
    /// A training that leads nowhere.
    #[error(
        "training diverged at step {step}: loss {loss}, norm of the gradients {gradient_norm}; \
         a lower learning rate or a longer warmup may help"
    )]
    Diverged {
        /// The step, from 1.
        step: usize,
        /// Its loss.
        loss: f64,
        /// The norm of all gradients.
        gradient_norm: f64,
    },
    /// The cache of keys and values refused a step.
    #[error("cache: {0}")]
    Cache(#[from] kvcache::Error),
    /// A norm refused its rows.
    #[error("norm: {0}")]
    Norm(#[from] layernorm_bwd::Error),
    /// Sampling refused the logits or an option.
    #[error("sampling: {0}")]
    Sampling(#[from] softmax_topk::Error),
    /// The beam search refused an option, or the model failed in it.
    #[error("beam search: {0}")]
    Beam(#[from] beam::Error),
    /// Decoding, plain or speculative, refused an option or the logits, or the model failed in it.
    #[error("decoding: {0}")]
    Decoding(#[from] dflash::Error),
    /// The tokenizer refused a text or a file.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// An option with a value outside its range.
    #[error("option `{option}` is {got}, expected {expected}")]
    Option {
        /// The field or argument.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A configuration that makes no model, or one that this crate does not compute.
    #[error("config: {0}")]
    Config(String),
    /// A weight that has no ternary form.
    #[error("`{arg}`, row {row}, columns {first} to {last}: {what}")]
    Group {
        /// The matrix: the argument, or its name in the model or the file.
        arg: String,
        /// The row.
        row: usize,
        /// The first column of the group.
        first: usize,
        /// The last column of the group.
        last: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A file that cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file whose contents are not what they should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

impl Error {
    /// Names the matrix that a [`Self::Group`] is about.
    pub(crate) fn in_matrix(self, name: &str) -> Self {
        match self {
            Self::Group { row, first, last, what, .. } => {
                Self::Group { arg: name.to_owned(), row, first, last, what }
            }
            other => other,
        }
    }

    /// Makes a [`Self::Io`] of the error of the operating system.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    /// A [`Self::File`].
    pub(crate) fn file(path: &Path, what: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), what: what.into() }
    }

    /// A [`Self::Option`].
    pub(crate) fn option(
        option: &'static str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Option { option, expected: expected.into(), got: got.to_string() }
    }
}
