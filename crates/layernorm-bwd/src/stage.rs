//! Rows on their way between the caller's arrays and the compute type.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, Axis};
use tensor_utils::simd::Simd;
use tensor_utils::{Element, narrow, widen};

/// Whether each row is a slice.
pub(crate) fn has_contiguous_rows<T>(matrix: &ArrayView2<'_, T>) -> bool {
    matrix.ncols() <= 1 || matrix.strides()[1] == 1
}

/// A row of a matrix that [has contiguous rows](has_contiguous_rows).
pub(crate) fn slice<'a, T>(matrix: &'a ArrayView2<'_, T>, row: usize) -> &'a [T] {
    matrix.index_axis(Axis(0), row).to_slice().unwrap_or_default()
}

/// Widens a row of any stride.
pub(crate) fn read_row<S: Simd, T: Element>(simd: S, row: ArrayView1<'_, T>, to: &mut [T::Acc]) {
    match row.to_slice() {
        Some(slice) => simd.vectorize(
            #[inline(always)]
            || widen(slice, to),
        ),
        None => {
            for (to, from) in to.iter_mut().zip(row) {
                *to = from.to_acc();
            }
        }
    }
}

/// Rounds to a row of any stride.
pub(crate) fn write_row<S: Simd, T: Element>(
    simd: S,
    from: &[T::Acc],
    mut row: ArrayViewMut1<'_, T>,
) {
    match row.as_slice_mut() {
        Some(slice) => simd.vectorize(
            #[inline(always)]
            || narrow(from, slice),
        ),
        None => {
            for (to, from) in row.iter_mut().zip(from) {
                *to = T::from_acc(*from);
            }
        }
    }
}
