//! Arrays of any number of axes as matrices of rows.

use ndarray::{
    ArrayBase, ArrayView, ArrayView2, ArrayViewMut, ArrayViewMut2, Axis, Dimension, Ix2, IxDyn,
    RawData,
};

use crate::ShapeError;

/// The rows of an array `[..., D]` as a matrix `[rows, D]`, without a copy. A vector is one row.
///
/// # Errors
/// [`ShapeError::NotRows`] names `arg` if the axes before the last do not merge into one, as those of a
/// transposed array do not, or if there is no axis at all.
///
/// # Examples
/// ```
/// use ndarray::Array3;
///
/// let x = Array3::<f32>::zeros((4, 16, 64));
/// assert_eq!(tensor_utils::rows("x", x.view())?.dim(), (64, 64));
/// # Ok::<(), tensor_utils::ShapeError>(())
/// ```
pub fn rows<'a, T, D: Dimension>(
    arg: &'static str,
    view: ArrayView<'a, T, D>,
) -> Result<ArrayView2<'a, T>, ShapeError> {
    match of_empty(view.shape()).map(|dim| ArrayView2::from_shape(dim, &[])) {
        Some(Ok(empty)) => Ok(empty),
        _ => merge(arg, view.into_dyn()),
    }
}

/// [`rows`] of an array to write to.
///
/// # Errors
/// As [`rows`].
pub fn rows_mut<'a, T, D: Dimension>(
    arg: &'static str,
    view: ArrayViewMut<'a, T, D>,
) -> Result<ArrayViewMut2<'a, T>, ShapeError> {
    match of_empty(view.shape()).map(|dim| ArrayViewMut2::from_shape(dim, &mut [])) {
        Some(Ok(empty)) => Ok(empty),
        _ => merge(arg, view.into_dyn()),
    }
}

/// The matrix's shape for an array without elements, whose strides mean nothing.
fn of_empty(shape: &[usize]) -> Option<(usize, usize)> {
    let (&row_length, leading) = shape.split_last()?;
    shape.contains(&0).then(|| (leading.iter().product(), row_length))
}

fn merge<S: RawData>(
    arg: &'static str,
    mut array: ArrayBase<S, IxDyn>,
) -> Result<ArrayBase<S, Ix2>, ShapeError> {
    let (shape, strides) = (array.shape().to_vec(), array.strides().to_vec());
    let not_rows = move || ShapeError::NotRows { arg, shape, strides };
    if array.ndim() == 0 {
        return Err(not_rows());
    }
    if array.ndim() == 1 {
        array = array.insert_axis(Axis(0));
    }
    while array.ndim() > 2 {
        if !array.merge_axes(Axis(0), Axis(1)) {
            return Err(not_rows());
        }
        array = array.index_axis_move(Axis(0), 0);
    }
    array.into_dimensionality().map_err(|_| not_rows())
}
