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

/// `x` `[tokens, columns]` in int8, a scale for each token: the integers and the scales. By the formula alone: what
/// [`Activations`](crate::Activations) documents of tiny numbers and NaN is not here.
pub fn activations_reference(x: ArrayView2<'_, f32>) -> (Array2<i8>, Vec<f32>) {
    let mut q = Array2::zeros(x.dim());
    let mut scales = Vec::new();
    for (i, row) in x.outer_iter().enumerate() {
        let most = row.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        scales.push(most / 127.0);
        for (j, &x) in row.iter().enumerate() {
            q[[i, j]] = if most == 0.0 { 0 } else { (x * (127.0 / most)).round_ties_even() as i8 };
        }
    }
    (q, scales)
}

/// `y = x W^T` `[tokens, rows]` in f64, for a ternary matrix `codes` `[rows, columns]` with `scales`
/// `[rows, ceil(columns / group)]`.
///
/// # Panics
/// If the shapes do not fit.
pub fn matmul_reference(
    codes: ArrayView2<'_, i8>,
    scales: ArrayView2<'_, f32>,
    group: usize,
    x: ArrayView2<'_, f64>,
) -> Array2<f64> {
    Array2::from_shape_fn((x.nrows(), codes.nrows()), |(t, i)| {
        let weight = |j| f64::from(codes[[i, j]]) * f64::from(scales[[i, j / group]]);
        (0..x.ncols()).map(|j| x[[t, j]] * weight(j)).sum()
    })
}
