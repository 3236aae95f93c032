//! Shape checks that build the errors common to all crates.

use ndarray::{ArrayView4, ArrayViewD};
use thiserror::Error;

/// An argument whose shape does not fit the others.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// An axis has another length than the other arguments ask for.
    #[error("`{arg}` has shape {got:?}, expected {expected:?}")]
    Mismatch {
        /// The argument.
        arg: &'static str,
        /// The shape that the other arguments imply.
        expected: Vec<usize>,
        /// The shape that was passed.
        got: Vec<usize>,
    },
    /// A shape that does not broadcast to the one it is used at.
    #[error(
        "`{arg}` has shape {got:?}, which does not broadcast to {expected:?} \
         (axes are aligned at the right and must be equal or 1)"
    )]
    NotBroadcastable {
        /// The argument.
        arg: &'static str,
        /// The shape to broadcast to.
        expected: Vec<usize>,
        /// The shape that was passed.
        got: Vec<usize>,
    },
    /// An array that no memory can hold.
    #[error("there is no memory for `{arg}` of shape {got:?}")]
    TooLarge {
        /// The array.
        arg: &'static str,
        /// Its shape.
        got: Vec<usize>,
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
    /// An axis that must not be empty is.
    #[error("`{arg}` has shape {got:?}: its {axis} must be at least 1")]
    EmptyAxis {
        /// The argument.
        arg: &'static str,
        /// What the axis is called.
        axis: &'static str,
        /// The shape that was passed.
        got: Vec<usize>,
    },
}

/// Checks that `arg` has exactly the shape `expected`.
///
/// # Errors
/// [`ShapeError::Mismatch`] otherwise.
pub fn check_shape(arg: &'static str, got: &[usize], expected: &[usize]) -> Result<(), ShapeError> {
    if got == expected {
        return Ok(());
    }
    Err(ShapeError::Mismatch { arg, expected: expected.to_vec(), got: got.to_vec() })
}

/// Checks that axis `index` of `arg`, called `axis`, is not empty.
///
/// # Errors
/// [`ShapeError::EmptyAxis`] otherwise, also when there is no such axis.
pub fn check_not_empty(
    arg: &'static str,
    got: &[usize],
    index: usize,
    axis: &'static str,
) -> Result<(), ShapeError> {
    match got.get(index) {
        Some(&length) if length > 0 => Ok(()),
        _ => Err(ShapeError::EmptyAxis { arg, axis, got: got.to_vec() }),
    }
}

/// Broadcasts `view` to four axes by NumPy's rule (aligned at the right, length 1 repeats), without
/// a copy: the broadcast axes get stride 0.
///
/// # Errors
/// [`ShapeError::NotBroadcastable`] if an axis is neither equal nor 1, or there are more than four.
pub fn broadcast_4d<'a, T>(
    arg: &'static str,
    view: &'a ArrayViewD<'_, T>,
    expected: [usize; 4],
) -> Result<ArrayView4<'a, T>, ShapeError> {
    view.broadcast(expected).ok_or_else(|| ShapeError::NotBroadcastable {
        arg,
        expected: expected.to_vec(),
        got: view.shape().to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{ArrayD, IxDyn};

    #[test]
    fn shapes_are_equal_or_named() {
        assert_eq!(check_shape("k", &[2, 3], &[2, 3]), Ok(()));
        let error = check_shape("k", &[2, 3], &[2, 3, 1]).unwrap_err();
        assert_eq!(error.to_string(), "`k` has shape [2, 3], expected [2, 3, 1]");
    }

    #[test]
    fn empty_or_missing_axis_is_named() {
        assert_eq!(check_not_empty("q", &[0, 3], 1, "head size"), Ok(()));
        let error = check_not_empty("q", &[3, 0], 1, "head size").unwrap_err();
        assert_eq!(error.to_string(), "`q` has shape [3, 0]: its head size must be at least 1");
        assert!(check_not_empty("q", &[3], 1, "head size").is_err());
    }

    #[test]
    fn broadcast_aligns_at_the_right_and_copies_nothing() {
        for (shape, strides) in [
            (&[3, 1][..], [0, 0, 1, 0]),
            (&[2, 1, 1, 4], [4, 0, 0, 1]),
            (&[], [0, 0, 0, 0]),
            (&[4], [0, 0, 0, 1]),
        ] {
            let array = ArrayD::<f32>::zeros(IxDyn(shape));
            let view = array.view();
            let wide = broadcast_4d("bias", &view, [2, 5, 3, 4]).unwrap();
            assert_eq!(wide.shape(), [2, 5, 3, 4]);
            assert_eq!(wide.strides(), strides, "{shape:?}");
        }
        for shape in [&[3][..], &[2, 4], &[1, 1, 1, 1, 1], &[0]] {
            let array = ArrayD::<f32>::zeros(IxDyn(shape));
            assert!(broadcast_4d("bias", &array.view(), [2, 5, 3, 4]).is_err(), "{shape:?}");
        }
    }
}
