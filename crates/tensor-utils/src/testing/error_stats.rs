//! How far an array is from the exact answer.

use ndarray::{ArrayRef, Dimension, IntoDimension};

use crate::{Element, ShapeError, check_shape};

/// `|got - want|`, never NaN: 0 if both are NaN or the same infinity, inf if only one of them is.
///
/// An infinite error fails every tolerance, where a NaN would pass `!(error > tolerance)` and
/// vanish in a maximum.
pub fn error(got: f64, want: f64) -> f64 {
    if got == want || (got.is_nan() && want.is_nan()) {
        0.0
    } else if got.is_finite() && want.is_finite() {
        (got - want).abs()
    } else {
        f64::INFINITY
    }
}

/// The largest `|a - b|` of pairs, 0 without any; NaN if one has a NaN, or twice the same infinity.
///
/// A maximum by `f64::max` would drop the NaN, and a wrong result would differ from nothing.
pub fn largest_difference(pairs: impl IntoIterator<Item = (f64, f64)>) -> f64 {
    pairs.into_iter().map(|(a, b)| (a - b).abs()).fold(0.0, |largest, difference| {
        if difference.is_nan() || difference > largest { difference } else { largest }
    })
}

/// The errors of an array against the exact answer, as [`error`] measures one; all 0 for an empty
/// array.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ErrorStats {
    /// The number of elements.
    pub len: usize,
    /// The largest absolute error.
    pub max_abs: f64,
    /// The largest error relative to `|want|`; inf for an error where `want` is 0.
    pub max_rel: f64,
    /// The absolute error that at most half of the elements exceed.
    pub median: f64,
    /// The absolute error that at most one element in a hundred exceeds.
    pub p99: f64,
    /// The largest finite `|want|`: the scale of the answer.
    pub scale: f64,
    /// The element with the largest absolute error, the first of equals; none in an empty array.
    pub worst: Option<Worst>,
}

/// One element of a comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Worst {
    /// Where it is.
    pub index: Vec<usize>,
    /// The value to judge.
    pub got: f64,
    /// The exact value.
    pub want: f64,
}

impl ErrorStats {
    /// Compares `got` with `want`, element by element.
    ///
    /// # Errors
    /// [`ShapeError::Mismatch`] if the shapes differ.
    pub fn new<T, W, D>(got: &ArrayRef<T, D>, want: &ArrayRef<W, D>) -> Result<Self, ShapeError>
    where
        T: Element,
        W: Element,
        D: Dimension,
    {
        check_shape("got", got.shape(), want.shape())?;
        let mut errors = Vec::with_capacity(got.len());
        let (mut max_abs, mut max_rel, mut scale) = (0.0_f64, 0.0_f64, 0.0_f64);
        let mut worst = 0;
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            let want = want.to_f64();
            let error = error(got.to_f64(), want);
            if error > max_abs {
                (max_abs, worst) = (error, i);
            }
            // Infinity over infinity is the same answer as over a number.
            let relative = if error.is_finite() { error / want.abs() } else { error };
            if error > 0.0 {
                max_rel = max_rel.max(relative);
            }
            if want.is_finite() {
                scale = scale.max(want.abs());
            }
            errors.push(error);
        }
        let worst = got.indexed_iter().zip(want).nth(worst).map(|((index, got), want)| Worst {
            index: index.into_dimension().slice().to_vec(),
            got: got.to_f64(),
            want: want.to_f64(),
        });
        errors.sort_unstable_by(f64::total_cmp);
        Ok(Self {
            len: errors.len(),
            max_abs,
            max_rel,
            median: quantile(&errors, 0.5),
            p99: quantile(&errors, 0.99),
            scale,
            worst,
        })
    }
}

/// The smallest element that at least `fraction` of the `sorted` do not exceed (nearest rank).
pub(super) fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let rank = (fraction * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array1, Array2, array};

    #[test]
    fn finds_the_worst_element() {
        let got = array![[1.0_f32, 2.5], [-3.0, 0.0]];
        let want = array![[1.0_f64, 2.0], [-3.25, 0.0]];
        let stats = ErrorStats::new(&got, &want).unwrap();
        assert_eq!((stats.max_abs, stats.max_rel, stats.scale), (0.5, 0.25, 3.25));
        let worst = Worst { index: vec![0, 1], got: 2.5, want: 2.0 };
        assert_eq!(stats.worst, Some(worst));
    }

    #[test]
    fn quantiles_are_of_the_absolute_error() {
        let got = Array1::from_iter((0..200).map(f64::from));
        let stats = ErrorStats::new(&got, &Array1::<f64>::zeros(200)).unwrap();
        assert_eq!((stats.median, stats.p99), (99.0, 197.0));
        assert_eq!(stats.max_rel, f64::INFINITY);
    }

    #[test]
    fn a_nan_on_one_side_is_an_infinite_error() {
        for (got, want) in [(f32::NAN, 1.0), (1.0, f64::NAN), (f32::INFINITY, f64::NEG_INFINITY)] {
            let stats = ErrorStats::new(&array![0.0, got], &array![0.0, want]).unwrap();
            assert_eq!((stats.max_abs, stats.max_rel), (f64::INFINITY, f64::INFINITY));
            assert_eq!(stats.worst.unwrap().index, [1]);
        }
        let same = array![f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        assert_eq!(ErrorStats::new(&same, &same).unwrap().max_abs, 0.0);
    }

    #[test]
    fn a_nan_is_the_largest_difference_wherever_it_stands() {
        assert_eq!(largest_difference([]), 0.0);
        let pairs = [(1.0, 1.0), (1.0, 3.5), (-2.0, -1.0)];
        assert_eq!(largest_difference(pairs), 2.5);
        assert_eq!(largest_difference(pairs.map(|(a, b)| (b, a))), 2.5);
        let infinity = f64::INFINITY;
        assert_eq!(largest_difference([(infinity, -infinity), (0.0, 1.0)]), infinity);
        for wrong in [(f64::NAN, 1.0), (1.0, f64::NAN), (infinity, infinity)] {
            for place in 0..pairs.len() {
                let mut pairs = pairs;
                pairs[place] = wrong;
                assert!(largest_difference(pairs).is_nan(), "{wrong:?} at {place}");
            }
        }
    }

    #[test]
    fn shapes_must_agree_and_may_be_empty() {
        let empty = Array2::<f32>::zeros((0, 3));
        let stats = ErrorStats::new(&empty, &empty).unwrap();
        assert_eq!((stats.len, stats.max_abs, stats.worst), (0, 0.0, None));
        assert!(ErrorStats::new(&empty, &Array2::<f64>::zeros((1, 3))).is_err());
    }
}
