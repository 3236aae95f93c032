//! The public entry points of the backward pass, and how its rows are shared out.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2};
use tensor_utils::{Element, check_shape, try_array};

use crate::call::{check_invertible, check_options, widen_weights};
use crate::column_sums::write;
use crate::segments::segments;
use crate::sweep::{Backward, Pass};
use crate::{Error, Options, Tiling, Workspace};

/// What the backward pass knows of the forward pass.
#[derive(Debug, Clone)]
pub enum Saved<'a, T: Element> {
    /// The input and its statistics, as [`layer_norm`](crate::layer_norm) returns them.
    ///
    /// What rounding took from the mean is found again from `x`, so it does no harm that the mean
    /// is saved in the compute type. RMS norm does not read the mean.
    Statistics {
        /// `[rows, D]`.
        x: ArrayView2<'a, T>,
        /// `[rows]`.
        mean: ArrayView1<'a, T::Acc>,
        /// `[rows]`.
        rstd: ArrayView1<'a, T::Acc>,
    },
    /// The input alone: its statistics are computed again, which costs two more sweeps over a row
    /// that is in the cache.
    Input {
        /// `[rows, D]`.
        x: ArrayView2<'a, T>,
    },
    /// The output, which may have taken the place of the input, and `rstd`:
    /// `x_hat = (y - beta) / gamma`, so no factor may be 0.
    ///
    /// A factor that is small against beta costs precision: `x_hat` is off by the rounding of `y`
    /// over gamma. So does a 16-bit `y`.
    Output {
        /// `[rows, D]`.
        y: ArrayView2<'a, T>,
        /// `[rows]`.
        rstd: ArrayView1<'a, T::Acc>,
    },
}

/// The result of [`layer_norm_backward`].
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<T, W> {
    /// `[rows, D]`: with respect to `x`.
    pub dx: Array2<T>,
    /// `[D]`: with respect to gamma, also if there is none and it stands for ones.
    pub dgamma: Array1<W>,
    /// `[D]`: with respect to beta, also if there is none and it stands for zeros.
    pub dbeta: Array1<W>,
}

/// Where the gradients go. What is `None` is not computed; the default is nothing.
#[derive(Debug)]
pub struct GradientsMut<'a, T, W> {
    /// `[rows, D]`, overwritten.
    pub dx: Option<ArrayViewMut2<'a, T>>,
    /// `[D]`.
    pub dgamma: Option<ArrayViewMut1<'a, W>>,
    /// `[D]`.
    pub dbeta: Option<ArrayViewMut1<'a, W>>,
    /// Whether the gradients are added to what `dgamma` and `dbeta` hold, instead of overwriting
    /// it. Default `false`.
    pub accumulate: bool,
    /// The gradient that comes past the norm on a residual connection, `[rows, D]`: it is added to
    /// `dx` before that is rounded, and does nothing without `dx`. Default: none.
    pub dres: Option<ArrayView2<'a, T>>,
}

impl<T, W> Default for GradientsMut<'_, T, W> {
    fn default() -> Self {
        Self { dx: None, dgamma: None, dbeta: None, accumulate: false, dres: None }
    }
}

/// The gradients of a norm with respect to `x`, gamma and beta, from `dy` `[rows, D]`, the gradient
/// with respect to its output.
///
/// With `g = gamma dy` and the means taken over a row,
///
/// ```text
/// dx     = rstd (g - mean(g) - x_hat mean(g x_hat))      RMS norm: without mean(g)
/// dgamma = sum over rows of dy x_hat
/// dbeta  = sum over rows of dy
/// ```
///
/// The options are those of the forward pass. Views of any strides; fast when the last axis is
/// contiguous. `x` and `dy` are read from memory once.
///
/// At the edges, if `eps` is above 0 and `1 / sqrt(eps)` finite in the compute type:
/// - [`Kind::LayerNorm`](crate::Kind::LayerNorm): rows of equal numbers add exactly 0 to `dgamma`, and `D = 1`
///   gives `dx = 0`, `dgamma = 0`. From [`Saved::Output`] only if the type of `y` holds beta exactly.
/// - [`Kind::RmsNorm`](crate::Kind::RmsNorm): rows of zeros add exactly 0 to `dgamma` and have `dx = rstd g`.
///   From [`Saved::Output`] as above.
///
/// With any `eps`:
/// - NaN or infinity in a row of `x` or `dy` spoils this row of `dx` and no other, and `dgamma` and
///   `dbeta`, where it must show.
/// - Squares overflow and underflow as in [`layer_norm`](crate::layer_norm).
/// - Without rows `dgamma` and `dbeta` are 0; `D = 0` is an error.
///
/// The same bits come out for any number of threads, and the same `dx` for a row alone or in a
/// batch. The sums over rows are as precise as if they were taken in twice the precision.
///
/// Memory: the outputs and a [`Workspace`]. Use [`layer_norm_backward_into`] to keep both, or to
/// have some of the gradients only.
///
/// Source: Ba, Kiros and Hinton, Layer normalization (2016); the gradients are derived in
/// `docs/derivation.md`.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
///
/// # Examples
/// ```
/// use layernorm_bwd::{Options, Saved, layer_norm, layer_norm_backward};
/// use ndarray::{array, aview1};
///
/// let x = array![[1.0_f32, 2.0, 4.0], [0.0, -1.0, 0.5]];
/// let gamma = [0.5_f32, 1.0, 2.0];
/// let options = Options { gamma: Some(aview1(&gamma)), ..Options::default() };
/// let forward = layer_norm(x.view(), &options)?;
///
/// let dy = array![[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]];
/// let saved = Saved::Statistics {
///     x: x.view(),
///     mean: forward.mean.view(),
///     rstd: forward.rstd.view(),
/// };
/// let gradients = layer_norm_backward(dy.view(), saved, &options)?;
/// assert_eq!(gradients.dbeta, array![1.0, 1.0, 1.0]);
/// // Shifting a row changes nothing, so the gradient has no component along (1, 1, 1).
/// assert!(gradients.dx.rows().into_iter().all(|row| row.sum().abs() < 1e-6));
/// # Ok::<(), layernorm_bwd::Error>(())
/// ```
pub fn layer_norm_backward<T: Element, W: Element<Acc = T::Acc>>(
    dy: ArrayView2<'_, T>,
    saved: Saved<'_, T>,
    options: &Options<'_, W>,
) -> Result<Gradients<T, W>, Error> {
    let (rows, row_length) = dy.dim();
    let mut dx = try_array("dx", (rows, row_length))?;
    let mut dgamma = try_array("dgamma", row_length)?;
    let mut dbeta = try_array("dbeta", row_length)?;
    let mut workspace = Workspace::new(rows, row_length, &Tiling::default())?;
    let gradients = GradientsMut {
        dx: Some(dx.view_mut()),
        dgamma: Some(dgamma.view_mut()),
        dbeta: Some(dbeta.view_mut()),
        ..GradientsMut::default()
    };
    layer_norm_backward_into(gradients, dy, saved, options, &mut workspace)?;
    Ok(Gradients { dx, dgamma, dbeta })
}

/// [`layer_norm_backward`] into the caller's arrays, of those that are there.
///
/// Allocates nothing. (Rayon's queues may, the first time a pool is entered.)
///
/// # Errors
/// As [`layer_norm_backward`]; [`Error::WorkspaceTooSmall`] if the workspace was made for fewer or
/// shorter rows. The outputs are untouched then.
pub fn layer_norm_backward_into<T: Element, W: Element<Acc = T::Acc>>(
    gradients: GradientsMut<'_, T, W>,
    dy: ArrayView2<'_, T>,
    saved: Saved<'_, T>,
    options: &Options<'_, W>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    let (rows, row_length) = dy.dim();
    let GradientsMut { dx, dgamma, dbeta, accumulate, dres } = gradients;
    check_options(options, "dy", dy.shape())?;
    check_saved(&saved, dy.shape())?;
    if let Saved::Output { .. } = saved {
        check_invertible(options)?;
    }
    if let Some(dx) = &dx {
        check_shape("dx", dx.shape(), dy.shape())?;
    }
    if let Some(dres) = &dres {
        check_shape("dres", dres.shape(), dy.shape())?;
    }
    for (arg, weight) in [("dgamma", &dgamma), ("dbeta", &dbeta)] {
        if let Some(weight) = weight {
            check_shape(arg, weight.shape(), &[row_length])?;
        }
    }
    workspace.check(rows, row_length)?;

    let mut parts = workspace.parts(row_length, segments(rows, row_length));
    widen_weights(options, row_length, &mut parts);
    let pass = Pass {
        kind: options.kind,
        eps: options.eps,
        dy,
        saved: &saved,
        dres,
        gamma: parts.gamma,
        beta: parts.beta,
        weights: dgamma.is_some() || dbeta.is_some(),
        slots: parts.slots,
    };
    if dx.is_none() && !pass.weights {
        return Ok(());
    }
    let segments = parts.segments;
    let weights = pass.weights;
    Backward { isa: parts.isa, pass, dx, segments: &mut *segments }.compute()?;
    if weights {
        for (which, weight) in [dgamma, dbeta].into_iter().enumerate() {
            if let Some(weight) = weight {
                write(segments, which, accumulate, weight);
            }
        }
    }
    Ok(())
}

fn check_saved<T: Element>(saved: &Saved<'_, T>, shape: &[usize]) -> Result<(), Error> {
    match saved {
        Saved::Statistics { x, mean, rstd } => {
            check_shape("x", x.shape(), shape)?;
            check_shape("mean", mean.shape(), &shape[..1])?;
            check_shape("rstd", rstd.shape(), &shape[..1])?;
        }
        Saved::Input { x } => check_shape("x", x.shape(), shape)?,
        Saved::Output { y, rstd } => {
            check_shape("y", y.shape(), shape)?;
            check_shape("rstd", rstd.shape(), &shape[..1])?;
        }
    }
    Ok(())
}
