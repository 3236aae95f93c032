//! Rows on their way between the caller's arrays and the compute type.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use tensor_utils::simd::Simd;
use tensor_utils::{Element, narrow, widen};

/// Whether rows of `T` are read where they are, if they are contiguous: the 16-bit types are
/// converted once instead of once for each sweep.
pub(crate) fn in_place<T: Element>() -> bool {
    size_of::<T>() == size_of::<T::Acc>()
}

/// The rows from `first` on as slices, if all of them are contiguous.
pub(crate) fn slices<'a, T, const ROWS: usize>(
    matrix: &'a ArrayView2<'_, T>,
    first: usize,
) -> Option<[&'a [T]; ROWS]> {
    let rows: [_; ROWS] = std::array::from_fn(|i| matrix.index_axis(Axis(0), first + i).to_slice());
    let all = rows.iter().all(Option::is_some);
    all.then(|| rows.map(Option::unwrap_or_default))
}

/// The rows of a matrix of `ROWS` rows as slices, if all of them are contiguous.
pub(crate) fn slices_mut<'a, T, const ROWS: usize>(
    matrix: &'a mut ArrayViewMut2<'_, T>,
) -> Option<[&'a mut [T]; ROWS]> {
    let mut rows = matrix.axis_iter_mut(Axis(0));
    let rows: [_; ROWS] = std::array::from_fn(|_| rows.next().and_then(ArrayViewMut1::into_slice));
    let all = rows.iter().all(Option::is_some);
    all.then(|| rows.map(Option::unwrap_or_default))
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
