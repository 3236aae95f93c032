//! What can be wrong with a call.

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

/// An argument or option that the norm cannot be computed with.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that does not fit the others.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// An option with a value outside its range.
    #[error("option `{option}` is {got}, expected {expected}")]
    Option {
        /// The field of [`Options`](crate::Options).
        option: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        got: String,
    },
    /// Axes that cannot be taken as one without a copy.
    #[error(
        "`{arg}` with shape {shape:?} and strides {strides:?} is not a matrix of rows: \
         all axes but the last must merge into one without a copy"
    )]
    NotRows {
        /// The argument.
        arg: &'static str,
        /// Its shape.
        shape: Vec<usize>,
        /// Its strides, in elements.
        strides: Vec<isize>,
    },
    /// A workspace made for fewer or shorter rows.
    #[error(
        "the workspace was made for {workspace_rows} rows of length {workspace_row_length}, the \
         call has {rows} of {row_length}: make it with `Workspace::new({rows}, {row_length}, ..)`"
    )]
    WorkspaceTooSmall {
        /// Rows of the call.
        rows: usize,
        /// Their length.
        row_length: usize,
        /// Rows that the workspace was made for.
        workspace_rows: usize,
        /// Their length.
        workspace_row_length: usize,
    },
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
}
