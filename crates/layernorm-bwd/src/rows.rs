//! Arrays of any number of axes as matrices of rows: those of `tensor_utils`, with this crate's error.

use ndarray::{ArrayView, ArrayView2, ArrayViewMut, ArrayViewMut2, Dimension};
use tensor_utils::ShapeError;

use crate::Error;

/// The rows of an array `[..., D]` as a matrix `[rows, D]`, without a copy. A vector is one row.
///
/// # Errors
/// [`Error::NotRows`] names `arg` if the axes before the last do not merge into one, as those of a
/// transposed array do not, or if there is no axis at all.
///
/// # Examples
/// ```
/// use ndarray::Array3;
///
/// let x = Array3::<f32>::zeros((4, 16, 64));
/// assert_eq!(layernorm_bwd::rows("x", x.view())?.dim(), (64, 64));
/// # Ok::<(), layernorm_bwd::Error>(())
/// ```
pub fn rows<'a, T, D: Dimension>(
    arg: &'static str,
    view: ArrayView<'a, T, D>,
) -> Result<ArrayView2<'a, T>, Error> {
    tensor_utils::rows(arg, view).map_err(not_rows)
}

/// [`rows`] of an array to write to.
///
/// # Errors
/// As [`rows`].
pub fn rows_mut<'a, T, D: Dimension>(
    arg: &'static str,
    view: ArrayViewMut<'a, T, D>,
) -> Result<ArrayViewMut2<'a, T>, Error> {
    tensor_utils::rows_mut(arg, view).map_err(not_rows)
}

fn not_rows(error: ShapeError) -> Error {
    match error {
        ShapeError::NotRows { arg, shape, strides } => Error::NotRows { arg, shape, strides },
        error => error.into(),
    }
}
