//! The formulas in plain loops and `f64`, the oracle that the tests hold everything else to.

use ndarray::{Array2, ArrayView2};
use tensor_utils::f16;

/// The absmean projection of `w` `[rows, columns]` in groups of `group` columns: codes, and scales
/// `[rows, ceil(columns / group)]`.
///
/// # Panics
/// If `group` is 0.
pub fn project_reference(w: ArrayView2<'_, f32>, group: usize) -> (Array2<i8>, Array2<f32>) {
    let (rows, columns) = w.dim();
    let mut codes = Array2::zeros((rows, columns));
    let mut scales = Array2::zeros((rows, columns.div_ceil(group)));
    for i in 0..rows {
        for first in (0..columns).step_by(group) {
            let last = columns.min(first + group);
            let mut sum = 0.0;
            for j in first..last {
                sum += f64::from(w[[i, j]]).abs();
            }
            let scale = f16::from_f32((sum / (last - first) as f64) as f32).to_f32();
            scales[[i, first / group]] = scale;
            for j in first..last {
                let code = (w[[i, j]] / scale).round_ties_even().clamp(-1.0, 1.0);
                codes[[i, j]] = if scale == 0.0 { 0 } else { code as i8 };
            }
        }
    }
    (codes, scales)
}
