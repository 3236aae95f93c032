//! The proof that a matrix is ternary.

use ndarray::{ArrayRef, Axis, Ix2};

use crate::{Error, Projection};

/// What [`check_ternary`] has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TernaryCheck {
    /// Groups.
    pub groups: usize,
    /// Groups with a weight that is not -1, 0 or 1 times the scale, or a scale that f16 does not hold.
    pub violations: usize,
    /// Weights that are 0.
    pub zeros: usize,
}

/// Checks each group of `group` weights along the rows: with `s` its largest magnitude,
/// `|round(w / s) - w / s| < 1e-5` for every weight, and `s` is an f16.
///
/// # Errors
/// [`Error::Option`] for the group size.
pub fn check_ternary(w: &ArrayRef<f32, Ix2>, group: usize) -> Result<TernaryCheck, Error> {
    Projection { group, ..Projection::default() }.check()?;
    let mut found = TernaryCheck::default();
    for row in w.outer_iter() {
        for part in row.axis_chunks_iter(Axis(0), group) {
            let scale = part.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
            let is_f16 = tensor_utils::f16::from_f32(scale).to_f32() == scale;
            let is_code = |x: &f32| {
                let t = f64::from(*x) / f64::from(scale);
                (t.round() - t).abs() < 1e-5
            };
            // NaN is no code.
            let zeros = scale == 0.0 && part.iter().all(|&x| x == 0.0);
            let bad = !is_f16 || !(zeros || part.iter().all(is_code));
            found.groups += 1;
            found.violations += usize::from(bad);
            found.zeros += part.iter().filter(|&&x| x == 0.0).count();
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::Array2;

    #[test]
    fn one_wrong_weight_is_found() {
        let w: Array2<f32> =
            Array2::from_shape_fn((3, 200), |(i, j)| ((i * 7 + j * 3) % 5) as f32 - 2.0);
        let mut out = Array2::zeros(w.dim());
        Projection::default().project_into(&mut out, &w).unwrap();
        let found = check_ternary(&out, 128).unwrap();
        assert_eq!((found.groups, found.violations), (6, 0));
        for wrong in [f32::NAN, out[[1, 150]] * 0.5 + 0.1, 1e9] {
            let mut out = out.clone();
            out[[1, 150]] = wrong;
            assert_eq!(check_ternary(&out, 128).unwrap().violations, 1, "{wrong}");
        }
        assert_eq!(check_ternary(&w, 128).unwrap().violations, 6);
    }
}
