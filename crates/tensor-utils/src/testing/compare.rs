//! Checks that two arrays agree.

use ndarray::{ArrayRef, Dimension, IntoDimension};
use thiserror::Error;

use super::{Worst, error};
use crate::{Element, ShapeError, check_shape};

/// An element passes when `|got - want| <= abs + rel * |want|`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// The absolute part.
    pub abs: f64,
    /// The part relative to the wanted value.
    pub rel: f64,
}

impl Tolerance {
    /// The defaults of `torch.testing.assert_close` for type `T`: f64 (1e-7, 1e-7), f32 (1e-5,
    /// 1.3e-6), f16 (1e-5, 1e-3), bf16 (1e-5, 1.6e-2).
    pub fn torch<T: Element>() -> Self {
        let (abs, rel) = match T::NAME {
            "f64" => (1e-7, 1e-7),
            "f32" => (1e-5, 1.3e-6),
            "f16" => (1e-5, 1e-3),
            _ => (1e-5, 1.6e-2),
        };
        Self { abs, rel }
    }
}

/// Two arrays that should agree do not.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The shapes differ.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// Elements differ by more than the tolerance.
    #[error(
        "{count} of {len} elements are too far off; the worst at {index:?}: got {got:e}, \
         want {want:e}, error {error:e}, allowed {allowed:e}",
        index = worst.index, got = worst.got, want = worst.want
    )]
    NotClose {
        /// The number of elements outside the tolerance.
        count: usize,
        /// The number of elements.
        len: usize,
        /// The element with the largest ratio of error to tolerance, the first of equals.
        worst: Worst,
        /// Its error.
        error: f64,
        /// What its tolerance allows.
        allowed: f64,
    },
    /// Elements differ in their bits.
    #[error(
        "{count} of {len} elements differ in their bits; the first at {index:?}: got {got:e}, \
         want {want:e}",
        index = first.index, got = first.got, want = first.want
    )]
    NotSameBits {
        /// The number of elements that differ.
        count: usize,
        /// The number of elements.
        len: usize,
        /// The first of them in logical order.
        first: Worst,
    },
}

/// Checks every element of `got` against `want`. NaN agrees with NaN alone and an infinity with
/// itself alone.
///
/// # Errors
/// [`CompareError::NotClose`] with the worst element, [`CompareError::Shape`] if the shapes differ.
pub fn check_close<T, W, D>(
    got: &ArrayRef<T, D>,
    want: &ArrayRef<W, D>,
    tolerance: Tolerance,
) -> Result<(), CompareError>
where
    T: Element,
    W: Element,
    D: Dimension,
{
    check_shape("got", got.shape(), want.shape())?;
    let mut count = 0;
    let mut largest = 0.0;
    let mut failure = None;
    for ((index, got), want) in got.indexed_iter().zip(want) {
        let (got, want) = (got.to_f64(), want.to_f64());
        let error = error(got, want);
        let allowed = tolerance.abs + tolerance.rel * want.abs();
        // `allowed` is NaN where `want` is, and infinite where `want` is: there only 0 passes.
        if error == 0.0 || (error <= allowed && error.is_finite()) {
            continue;
        }
        count += 1;
        let ratio = if error.is_finite() { error / allowed } else { f64::INFINITY };
        if failure.is_none() || ratio > largest {
            largest = ratio;
            let index = index.into_dimension().slice().to_vec();
            failure = Some((Worst { index, got, want }, error, allowed));
        }
    }
    match failure {
        None => Ok(()),
        Some((worst, error, allowed)) => {
            Err(CompareError::NotClose { count, len: got.len(), worst, error, allowed })
        }
    }
}

/// Checks that `got` and `want` hold the same bits: -0 is not 0, and a NaN only equals its copy.
///
/// # Errors
/// [`CompareError::NotSameBits`] with the first difference, [`CompareError::Shape`] if the shapes
/// differ.
pub fn check_same_bits<T, D>(
    got: &ArrayRef<T, D>,
    want: &ArrayRef<T, D>,
) -> Result<(), CompareError>
where
    T: Element,
    D: Dimension,
{
    check_shape("got", got.shape(), want.shape())?;
    let mut differences =
        got.indexed_iter().zip(want).filter(|((_, got), want)| got.bits() != want.bits());
    let Some(((index, first_got), first_want)) = differences.next() else {
        return Ok(());
    };
    Err(CompareError::NotSameBits {
        count: 1 + differences.count(),
        len: got.len(),
        first: Worst {
            index: index.into_dimension().slice().to_vec(),
            got: first_got.to_f64(),
            want: first_want.to_f64(),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, array};

    const TOLERANCE: Tolerance = Tolerance { abs: 0.5, rel: 0.25 };

    #[test]
    fn tolerance_adds_its_parts_and_includes_its_bound() {
        assert_eq!(check_close(&array![5.5_f32], &array![4.0_f64], TOLERANCE), Ok(()));
        assert!(check_close(&array![5.5_f32.next_up()], &array![4.0_f64], TOLERANCE).is_err());
        assert!(check_close(&array![2.5_f32.next_down()], &array![4.0_f64], TOLERANCE).is_err());
    }

    #[test]
    fn reports_the_worst_element() {
        let got = array![[1.0_f32, 7.0], [0.0, 1.0]];
        let want = array![[0.0_f64, 4.0], [0.0, -3.0]];
        let error = check_close(&got, &want, TOLERANCE).unwrap_err();
        let worst = Worst { index: vec![1, 1], got: 1.0, want: -3.0 };
        assert_eq!(
            error,
            CompareError::NotClose { count: 3, len: 4, worst, error: 4.0, allowed: 1.25 }
        );
    }

    #[test]
    fn nan_and_infinity_never_pass_for_something_else() {
        let infinite = Tolerance { abs: f64::INFINITY, rel: f64::INFINITY };
        let values = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1.0];
        for (i, got) in values.into_iter().enumerate() {
            for (j, want) in values.into_iter().enumerate() {
                for tolerance in [TOLERANCE, infinite] {
                    let result = check_close(&array![0.0, got], &array![0.0, want], tolerance);
                    assert_eq!(result.is_ok(), i == j, "{got} {want}");
                }
            }
        }
    }

    #[test]
    fn same_bits_tells_zeros_apart() {
        let nan = f32::from_bits(0x7fc0_0001);
        assert_eq!(check_same_bits(&array![0.0, nan], &array![0.0, nan]), Ok(()));
        let error = check_same_bits(&array![1.0_f32, -0.0], &array![1.0, 0.0]).unwrap_err();
        let first = Worst { index: vec![1], got: -0.0, want: 0.0 };
        assert_eq!(error, CompareError::NotSameBits { count: 1, len: 2, first });
        assert!(check_same_bits(&Array1::<f32>::zeros(2), &Array1::zeros(3)).is_err());
    }
}
