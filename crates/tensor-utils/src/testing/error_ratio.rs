//! The workspace's measure of accuracy: the error of a kernel against f64, over the error of the
//! naive algorithm in the same element type.

use ndarray::{ArrayRef, Dimension};
use thiserror::Error;

use super::ErrorStats;
use super::error_stats::quantile;
use crate::{Element, ShapeError};

/// The largest absolute error of `got` over that of `naive`, both against `exact`.
///
/// The denominator is at least the error of rounding the largest element of `exact` to `T`, which
/// no algorithm avoids: where the naive one happens to be exact, a kernel that is off by one
/// rounding still has a ratio of 1. The ratio is inf when `got` is NaN or infinite and `exact` is
/// not, also when `naive` is as well.
///
/// # Errors
/// [`ShapeError::Mismatch`] if the shapes differ.
pub fn error_ratio<T, D>(
    got: &ArrayRef<T, D>,
    naive: &ArrayRef<T, D>,
    exact: &ArrayRef<f64, D>,
) -> Result<f64, ShapeError>
where
    T: Element,
    D: Dimension,
{
    let ours = ErrorStats::new(got, exact)?;
    let theirs = ErrorStats::new(naive, exact)?;
    if ours.max_abs == 0.0 || ours.max_abs.is_infinite() {
        return Ok(ours.max_abs);
    }
    let rounding = (ours.scale * T::EPSILON).max(T::MIN_POSITIVE * T::EPSILON) / 2.0;
    Ok(ours.max_abs / theirs.max_abs.max(rounding))
}

/// The [`error_ratio`]s of a test suite, one a case.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ErrorRatios {
    cases: Vec<(String, f64)>,
}

/// A suite of cases is less accurate than promised.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ErrorRatioError {
    /// There is nothing to judge.
    #[error("no case was measured")]
    NoCases,
    /// One case is too far off.
    #[error("case `{case}`: {ratio:.3} times the error of the naive algorithm, allowed {allowed}")]
    Worst {
        /// The case with the largest ratio.
        case: String,
        /// Its ratio.
        ratio: f64,
        /// The largest ratio allowed.
        allowed: f64,
    },
    /// The typical case is too far off.
    #[error(
        "the median of {cases} cases is {median:.3} times the error of the naive algorithm, allowed {allowed}"
    )]
    Median {
        /// The number of cases.
        cases: usize,
        /// The median ratio.
        median: f64,
        /// The largest median allowed.
        allowed: f64,
    },
}

impl ErrorRatios {
    /// Adds the ratio of one case.
    pub fn push(&mut self, case: impl Into<String>, ratio: f64) {
        self.cases.push((case.into(), ratio));
    }

    /// The case with the largest ratio, NaN above all; none if there are no cases.
    pub fn worst(&self) -> Option<(&str, f64)> {
        let worst = self.cases.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
        Some((&worst.0, worst.1))
    }

    /// The ratio that at most half of the cases exceed; 0 if there are no cases.
    pub fn median(&self) -> f64 {
        let mut ratios: Vec<f64> = self.cases.iter().map(|(_, ratio)| *ratio).collect();
        ratios.sort_unstable_by(f64::total_cmp);
        quantile(&ratios, 0.5)
    }

    /// Checks the workspace's contract: (1, 2) for a forward pass, (1.5, 3) for a backward pass.
    ///
    /// # Errors
    /// [`ErrorRatioError`] if a case is above `worst`, the median above `median`, or there is no
    /// case.
    pub fn check(&self, median: f64, worst: f64) -> Result<(), ErrorRatioError> {
        let (case, ratio) = self.worst().ok_or(ErrorRatioError::NoCases)?;
        if ratio.is_nan() || ratio > worst {
            return Err(ErrorRatioError::Worst { case: case.to_owned(), ratio, allowed: worst });
        }
        if self.median() > median {
            let cases = self.cases.len();
            return Err(ErrorRatioError::Median { cases, median: self.median(), allowed: median });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn ratio_is_ours_over_theirs() {
        let exact = array![1.0, -2.0];
        let ratio = error_ratio(&array![1.0_f32, -2.5], &array![1.25, -2.0], &exact);
        assert_eq!(ratio, Ok(2.0));
        assert_eq!(error_ratio(&array![1.0_f32, -2.0], &array![1.25, -2.0], &exact), Ok(0.0));
    }

    #[test]
    fn an_exact_rival_counts_as_rounded() {
        let got = array![2.0_f32.next_up()];
        assert_eq!(error_ratio(&got, &array![2.0], &array![2.0]), Ok(2.0));
        assert!(error_ratio(&array![1e-3_f32], &array![0.0], &array![0.0]).unwrap() > 1e30);
    }

    #[test]
    fn nan_is_infinitely_bad_even_beside_nan() {
        let nan = array![f32::NAN];
        assert_eq!(error_ratio(&nan, &nan, &array![1.0]), Ok(f64::INFINITY));
        assert_eq!(error_ratio(&array![1.0_f32], &nan, &array![1.0]), Ok(0.0));
    }

    #[test]
    fn suite_is_held_to_median_and_worst() {
        let mut ratios = ErrorRatios::default();
        assert_eq!(ratios.check(1.0, 2.0), Err(ErrorRatioError::NoCases));
        for (case, ratio) in [("a", 0.5), ("b", 1.9), ("c", 0.9)] {
            ratios.push(case, ratio);
        }
        assert_eq!((ratios.median(), ratios.worst()), (0.9, Some(("b", 1.9))));
        assert_eq!(ratios.check(1.0, 2.0), Ok(()));
        let median = ErrorRatioError::Median { cases: 3, median: 0.9, allowed: 0.8 };
        assert_eq!(ratios.check(0.8, 2.0), Err(median));
        assert!(ratios.check(1.0, 1.8).is_err());
        ratios.push("d", f64::NAN);
        assert!(matches!(ratios.check(1.0, 2.0), Err(ErrorRatioError::Worst { .. })));
    }
}
