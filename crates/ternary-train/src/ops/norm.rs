//! RMS norm, by `layernorm-bwd`.

use layernorm_bwd::{
    GradientsMut, Kind, Options, Saved, StatisticsMut, Tiling, Workspace, layer_norm_backward_into,
    layer_norm_into,
};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};
use tensor_utils::{Float, check_shape};

use super::OpError;

/// A norm over rows of one length, with its scratch memory.
#[derive(Debug)]
pub struct Norm<A: Float> {
    width: usize,
    eps: f64,
    workspace: Workspace<A>,
}

impl<A: Float> Norm<A> {
    /// For up to `rows` rows of `width`.
    ///
    /// # Errors
    /// [`OpError::Norm`] if there is no memory for it.
    pub fn new(rows: usize, width: usize, eps: f64) -> Result<Self, OpError> {
        Ok(Self { width, eps, workspace: Workspace::new(rows, width, &Tiling::default())? })
    }

    fn options<'a>(&self, weight: &'a [A]) -> Options<'a, A> {
        Options {
            kind: Kind::RmsNorm,
            eps: self.eps,
            gamma: Some(ArrayView1::from(weight)),
            ..Options::default()
        }
    }
}

/// `y = x / sqrt(mean(x^2) + eps) weight` for every row; `rstd` gets the factor of each row.
///
/// # Errors
/// [`OpError`] if a length does not fit.
pub fn rms_norm<A: Float>(
    y: &mut [A],
    rstd: &mut [A],
    x: &[A],
    weight: &[A],
    norm: &mut Norm<A>,
) -> Result<(), OpError> {
    let width = norm.width;
    check_shape("y", &[y.len()], &[x.len()])?;
    let rows = x.len().checked_div(width).unwrap_or(0);
    check_shape("x", &[x.len()], &[rows * width])?;
    check_shape("weight", &[weight.len()], &[width])?;
    let options = norm.options(weight);
    // RMS norm has no mean; its place is overwritten with zeros.
    let mut mean = vec![A::ZERO; rows];
    let statistics =
        StatisticsMut { mean: ArrayViewMut1::from(&mut mean), rstd: ArrayViewMut1::from(rstd) };
    let x = matrix(x, rows, width);
    layer_norm_into(
        matrix_mut(y, rows, width),
        Some(statistics),
        x,
        &options,
        &mut norm.workspace,
    )?;
    Ok(())
}

/// The gradients of [`rms_norm`]: `dx` is overwritten, plus `residual` if there is one (the gradient
/// that comes past the norm), `d_weight` is added to.
///
/// # Errors
/// [`OpError`] if a length does not fit.
pub fn rms_norm_backward<A: Float>(
    dx: &mut [A],
    d_weight: &mut [A],
    dy: &[A],
    residual: Option<&[A]>,
    x: &[A],
    rstd: &[A],
    weight: &[A],
    norm: &mut Norm<A>,
) -> Result<(), OpError> {
    let width = norm.width;
    let rows = dy.len().checked_div(width).unwrap_or(0);
    check_shape("dy", &[dy.len()], &[rows * width])?;
    check_shape("x", &[x.len()], &[dy.len()])?;
    check_shape("dx", &[dx.len()], &[dy.len()])?;
    check_shape("weight", &[weight.len()], &[width])?;
    if let Some(residual) = residual {
        check_shape("residual", &[residual.len()], &[dy.len()])?;
    }
    let options = norm.options(weight);
    let gradients = GradientsMut {
        dx: Some(matrix_mut(dx, rows, width)),
        dgamma: Some(ArrayViewMut1::from(d_weight)),
        accumulate: true,
        dres: residual.map(|residual| matrix(residual, rows, width)),
        ..GradientsMut::default()
    };
    // RMS norm does not read the mean; any array of the length will do.
    let rstd = ArrayView1::from(rstd);
    let saved = Saved::Statistics { x: matrix(x, rows, width), mean: rstd, rstd };
    layer_norm_backward_into(
        gradients,
        matrix(dy, rows, width),
        saved,
        &options,
        &mut norm.workspace,
    )?;
    Ok(())
}

/// A slice, whose length was checked, as rows.
fn matrix<A>(x: &[A], rows: usize, width: usize) -> ArrayView2<'_, A> {
    ArrayView2::from_shape((rows, width), x).expect("whole rows")
}

/// The same, to be written.
fn matrix_mut<A>(x: &mut [A], rows: usize, width: usize) -> ArrayViewMut2<'_, A> {
    ArrayViewMut2::from_shape((rows, width), x).expect("whole rows")
}
