//! Allocations that fail with an error instead of a panic or an abort.

use ndarray::{Array, Dimension, IntoDimension};

use crate::ShapeError;

/// An array of `T::default()` (0 for the element types).
///
/// # Errors
/// [`ShapeError::TooLarge`] if there is no memory of that size.
pub fn try_array<T: Clone + Default, I: IntoDimension>(
    arg: &'static str,
    shape: I,
) -> Result<Array<T, I::Dim>, ShapeError> {
    let shape = shape.into_dimension();
    let elements = try_vec(arg, shape.slice())?;
    let got = shape.slice().to_vec();
    Array::from_shape_vec(shape, elements).map_err(|_| ShapeError::TooLarge { arg, got })
}

/// A buffer of `T::default()` with room for an array of shape `shape`.
///
/// # Errors
/// [`ShapeError::TooLarge`] if there is no memory of that size.
pub fn try_vec<T: Clone + Default>(
    arg: &'static str,
    shape: &[usize],
) -> Result<Vec<T>, ShapeError> {
    let error = || ShapeError::TooLarge { arg, got: shape.to_vec() };
    let len = elements(shape).ok_or_else(error)?;
    // The probe is given back at once: `vec!` gets zeroed pages, which resizing would touch.
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| error())?;
    Ok(vec![T::default(); len])
}

/// How many elements an array of shape `shape` has, if so many can be counted.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1_usize, |len, &axis| len.checked_mul(axis))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_fit_and_sizes_that_do_not() {
        assert_eq!(try_array::<f32, _>("a", (2, 3)).unwrap().dim(), (2, 3));
        assert_eq!(try_vec::<f32>("a", &[0, usize::MAX, usize::MAX]).unwrap().len(), 0);
        for shape in [[usize::MAX, 1], [1 << 40, 1 << 30], [isize::MAX as usize, 1]] {
            let got = shape.to_vec();
            assert_eq!(try_vec::<f32>("a", &shape), Err(ShapeError::TooLarge { arg: "a", got }));
        }
    }
}
