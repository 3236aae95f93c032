//! The public entry points of the forward pass.

use std::marker::PhantomData;

use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use tensor_utils::simd::Simd;
use tensor_utils::{
    Element, Float, Instances, Isa, IsaError, Kernel, PerElement, check_shape, dispatch, try_array,
};

use crate::blocks::Block;
use crate::call::{check_options, widen_weights};
use crate::normalise::normalise_row;
use crate::stage::{read_row, write_row};
use crate::statistics::{Statistics, row_statistics};
use crate::workspace::Slots;
use crate::{Error, Kind, Options, Tiling, Workspace};

/// Elements that are worth another thread.
const GRAIN: usize = 1 << 14;

/// The result of [`layer_norm`].
#[derive(Debug, Clone, PartialEq)]
pub struct Normalised<T: Element> {
    /// `[rows, D]`.
    pub y: Array2<T>,
    /// `[rows]`: the mean of each row of `x`; 0 for RMS norm.
    pub mean: Array1<T::Acc>,
    /// `[rows]`: `1 / sqrt(var + eps)` of each row of `x`; for RMS norm `1 / sqrt(mean(x^2) + eps)`.
    pub rstd: Array1<T::Acc>,
}

/// Where the statistics of the rows go, which [`Saved::Statistics`](crate::Saved::Statistics)
/// hands to the backward pass.
#[derive(Debug)]
pub struct StatisticsMut<'a, A> {
    /// `[rows]`: see [`Normalised::mean`].
    pub mean: ArrayViewMut1<'a, A>,
    /// `[rows]`: see [`Normalised::rstd`].
    pub rstd: ArrayViewMut1<'a, A>,
}

/// `y = x_hat gamma + beta` for every row of `x` `[rows, D]`, where `x_hat` is the normalised row
/// ([`Kind`]) and gamma and beta are in the [`Options`].
///
/// Views of any strides; fast when the last axis is contiguous. [`rows`](crate::rows) makes a matrix
/// of an array with more axes.
///
/// The mean is kept in two parts and the variance taken of the differences from it, so the result
/// is as precise for a mean of 1e6 deviations as for 0.
///
/// At the edges, if `eps` is above 0 and `1 / sqrt(eps)` finite in the compute type:
/// - [`Kind::LayerNorm`]: a row of equal numbers, and so every row with `D = 1`, has `x_hat = 0` exactly,
///   `y = beta`; NaN or infinity makes its own row NaN and no other; `x_hat` is 0 or NaN where squares overflow.
/// - [`Kind::RmsNorm`]: a row of zeros has `x_hat = 0` exactly, `y = beta`; NaN makes its own row NaN and no
///   other; infinity becomes NaN, and the other elements of its row have `x_hat = 0`, as where squares overflow.
///
/// With any `eps`:
/// - Squares of `x`, less the mean for layer norm, are added up in the compute type, up to 1024 of them. In `f32`
///   they overflow from 5e17 on in long rows, and from 2e19 on in any.
/// - They underflow, too, which shows if `eps` is below 1e-38 in `f32`: with 0, `x_hat` is off by 2 % in a row of
///   size 1e-22, and infinite or NaN from 1e-23 down.
/// - No rows are fine, `D = 0` is an error.
///
/// The same bits come out for any number of threads and for a row alone or in a batch.
///
/// Source: Ba, Kiros and Hinton, Layer normalization (2016), section 3; Zhang and Sennrich, Root
/// mean square layer normalization (2019), section 3; equations in `docs/derivation.md`.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
///
/// # Examples
/// ```
/// use layernorm_bwd::{Options, layer_norm};
/// use ndarray::{array, aview1};
///
/// let x = array![[1.0_f32, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]];
/// let options = Options { beta: Some(aview1(&[0.5_f32; 4])), ..Options::default() };
/// let result = layer_norm(x.view(), &options)?;
/// assert_eq!(result.mean, array![3.0, 5.0]);
/// assert_eq!(result.y.row(1), array![0.5, 0.5, 0.5, 0.5]);
/// # Ok::<(), layernorm_bwd::Error>(())
/// ```
pub fn layer_norm<T: Element, W: Element<Acc = T::Acc>>(
    x: ArrayView2<'_, T>,
    options: &Options<'_, W>,
) -> Result<Normalised<T>, Error> {
    let (rows, row_length) = x.dim();
    let mut y = try_array("y", (rows, row_length))?;
    let mut mean = try_array("mean", rows)?;
    let mut rstd = try_array("rstd", rows)?;
    let mut workspace = Workspace::new(rows, row_length, &Tiling::default())?;
    let statistics = StatisticsMut { mean: mean.view_mut(), rstd: rstd.view_mut() };
    layer_norm_into(y.view_mut(), Some(statistics), x, options, &mut workspace)?;
    Ok(Normalised { y, mean, rstd })
}

/// [`layer_norm`] into the caller's `y` `[rows, D]` and, if they are wanted, statistics.
///
/// Allocates nothing. (Rayon's queues may, the first time a pool is entered.)
///
/// # Errors
/// As [`layer_norm`]; [`Error::WorkspaceTooSmall`] if the workspace was made for fewer or shorter
/// rows. The outputs are untouched then.
pub fn layer_norm_into<T: Element, W: Element<Acc = T::Acc>>(
    y: ArrayViewMut2<'_, T>,
    statistics: Option<StatisticsMut<'_, T::Acc>>,
    x: ArrayView2<'_, T>,
    options: &Options<'_, W>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    check_options(options, "x", x.shape())?;
    check_shape("y", y.shape(), x.shape())?;
    forward(Matrices { x: Some(x), y }, statistics, options, workspace)
}

/// [`layer_norm_into`] with `y` in the place of `x`.
///
/// The backward pass then recovers `x_hat` from `y`, see [`Saved::Output`](crate::Saved::Output).
/// The result has the bits of [`layer_norm_into`].
///
/// # Errors
/// As [`layer_norm_into`].
pub fn layer_norm_in_place<T: Element, W: Element<Acc = T::Acc>>(
    x: ArrayViewMut2<'_, T>,
    statistics: Option<StatisticsMut<'_, T::Acc>>,
    options: &Options<'_, W>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    check_options(options, "x", x.shape())?;
    forward(Matrices { x: None, y: x }, statistics, options, workspace)
}

/// Input and output of some rows.
struct Matrices<'x, 'y, T> {
    /// `None`: the input is in `y`.
    x: Option<ArrayView2<'x, T>>,
    y: ArrayViewMut2<'y, T>,
}

/// Runs a call whose shapes have been checked, but for the statistics and the workspace.
fn forward<T: Element, W: Element<Acc = T::Acc>>(
    matrices: Matrices<'_, '_, T>,
    statistics: Option<StatisticsMut<'_, T::Acc>>,
    options: &Options<'_, W>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    let (rows, row_length) = matrices.y.dim();
    if let Some(StatisticsMut { mean, rstd }) = &statistics {
        check_shape("mean", mean.shape(), &[rows])?;
        check_shape("rstd", rstd.shape(), &[rows])?;
    }
    workspace.check(rows, row_length)?;
    let mut parts = workspace.parts(row_length, 0);
    widen_weights(options, row_length, &mut parts);
    let (gamma, beta) = (&*parts.gamma, &*parts.beta);
    let pass = Pass { kind: options.kind, eps: options.eps, gamma, beta, slots: parts.slots };
    Forward { isa: parts.isa, pass, matrices, statistics }.compute()?;
    Ok(())
}

/// What is the same for all rows.
#[derive(Clone, Copy)]
struct Pass<'a, A> {
    kind: Kind,
    eps: f64,
    gamma: &'a [Block<A>],
    beta: &'a [Block<A>],
    slots: Slots<'a, A>,
}

struct Forward<'a, 'x, 'y, 's, T: Element> {
    isa: Isa,
    pass: Pass<'a, T::Acc>,
    matrices: Matrices<'x, 'y, T>,
    statistics: Option<StatisticsMut<'s, T::Acc>>,
}

/// [`Forward`] for each element type.
struct AnyForward<'a, 'x, 'y, 's>(PhantomData<(&'a (), &'x (), &'y (), &'s ())>);

impl<'a, 'x, 'y, 's> PerElement for AnyForward<'a, 'x, 'y, 's> {
    type Arguments<T: Element> = Forward<'a, 'x, 'y, 's, T>;
    type Output = Result<(), IsaError>;
}

#[inline(never)]
fn instances<'a, 'x, 'y, 's>() -> Instances<AnyForward<'a, 'x, 'y, 's>> {
    Instances {
        f32: Forward::dispatch,
        f64: Forward::dispatch,
        bf16: Forward::dispatch,
        f16: Forward::dispatch,
    }
}

impl<T: Element> Forward<'_, '_, '_, '_, T> {
    fn compute(self) -> Result<(), IsaError> {
        T::instance(&instances())(self)
    }

    fn dispatch(self) -> Result<(), IsaError> {
        dispatch(self.isa, self)
    }
}

impl<T: Element> Kernel for Forward<'_, '_, '_, '_, T> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        self.pass.split(simd, self.matrices, self.statistics);
    }
}

impl<A: Float> Pass<'_, A> {
    /// Halves the rows until they are not worth another thread.
    fn split<S: Simd, T: Element<Acc = A>>(
        self,
        simd: S,
        matrices: Matrices<'_, '_, T>,
        statistics: Option<StatisticsMut<'_, A>>,
    ) {
        let (rows, row_length) = matrices.y.dim();
        if rows <= 1 || rows * row_length <= GRAIN {
            return self.rows(simd, matrices, statistics);
        }
        let middle = rows / 2;
        let Matrices { x, y } = matrices;
        let (x, x_right) = x.map(|x| x.split_at(Axis(0), middle)).unzip();
        let (y, y_right) = y.split_at(Axis(0), middle);
        let (statistics, statistics_right) = statistics
            .map(|StatisticsMut { mean, rstd }| {
                let (mean, mean_right) = mean.split_at(Axis(0), middle);
                let (rstd, rstd_right) = rstd.split_at(Axis(0), middle);
                let right = StatisticsMut { mean: mean_right, rstd: rstd_right };
                (StatisticsMut { mean, rstd }, right)
            })
            .unzip();
        rayon::join(
            || self.split(simd, Matrices { x, y }, statistics),
            || self.split(simd, Matrices { x: x_right, y: y_right }, statistics_right),
        );
    }

    fn rows<S: Simd, T: Element<Acc = A>>(
        self,
        simd: S,
        Matrices { x, mut y }: Matrices<'_, '_, T>,
        mut statistics: Option<StatisticsMut<'_, A>>,
    ) {
        let row_length = y.dim().1;
        let mut slot = self.slots.take();
        let [staged_x, staged_y] = &mut slot.x;
        let (staged_x, staged_y) = (&mut staged_x[..row_length], &mut staged_y[..row_length]);
        for (row, mut y) in y.axis_iter_mut(Axis(0)).enumerate() {
            let x = x.as_ref().map(|x| x.index_axis(Axis(0), row));
            let direct = match (&x, y.as_slice_mut()) {
                (Some(x), Some(y)) => x.as_slice().map(|x| (x, y)),
                _ => None,
            };
            let found = match direct {
                Some((x, y)) => self.row(simd, x, y),
                None => {
                    read_row(simd, x.unwrap_or(y.view()), staged_x);
                    let found = self.row(simd, staged_x, staged_y);
                    write_row(simd, staged_y, y);
                    found
                }
            };
            if let Some(StatisticsMut { mean, rstd }) = &mut statistics {
                mean[row] = found.mean();
                rstd[row] = found.rstd;
            }
        }
    }

    fn row<S: Simd, E: Element<Acc = A>>(self, simd: S, x: &[E], y: &mut [E]) -> Statistics<A> {
        simd.vectorize(
            #[inline(always)]
            || {
                let statistics = row_statistics(simd, x, self.kind, self.eps);
                normalise_row(simd, x, statistics, self.gamma, self.beta, y);
                statistics
            },
        )
    }
}
