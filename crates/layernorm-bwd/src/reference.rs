//! The oracle: the norm and its gradients as their formulas read, in plain loops.
//!
//! Shares no code with the fast path. The functions that end in `_reference` say what the result is;
//! those that end in `_naive` say how precise a plain program is in the same type, the yardstick that
//! the error of the fast path is measured with.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};
use tensor_utils::{Element, Float, check_not_empty, check_shape};

use crate::{Error, Gradients, Kind, Normalised, Options};

/// The norm of the rows of `x` `[rows, D]`, computed in `f64` throughout and not rounded.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn layer_norm_reference<T: Element, W: Element>(
    x: ArrayView2<'_, T>,
    options: &Options<'_, W>,
) -> Result<Normalised<f64>, Error> {
    let norm = Norm::<f64>::new("x", x.shape(), options)?;
    let (y, mean, rstd) = norm.forward(&widen(x));
    Ok(Normalised { y, mean, rstd })
}

/// The same with all arithmetic in the compute type of `T`, and `y` rounded to `T`.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn layer_norm_naive<T: Element, W: Element>(
    x: ArrayView2<'_, T>,
    options: &Options<'_, W>,
) -> Result<Normalised<T>, Error> {
    let norm = Norm::<T::Acc>::new("x", x.shape(), options)?;
    let (y, mean, rstd) = norm.forward(&widen(x));
    Ok(Normalised { y: y.mapv(T::from_acc), mean, rstd })
}

/// The gradients of the norm of `x` `[rows, D]` for the gradient `dy` of its output, computed in
/// `f64` throughout and not rounded.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn layer_norm_backward_reference<T: Element, W: Element>(
    dy: ArrayView2<'_, T>,
    x: ArrayView2<'_, T>,
    options: &Options<'_, W>,
) -> Result<Gradients<f64, f64>, Error> {
    let norm = Norm::<f64>::new("dy", dy.shape(), options)?;
    check_shape("x", x.shape(), dy.shape())?;
    let (dx, dgamma, dbeta) = norm.backward(&widen(dy), &widen(x));
    Ok(Gradients { dx, dgamma, dbeta })
}

/// The same with all arithmetic in the compute type of `T`, and the results rounded to the types of
/// `x` and gamma.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn layer_norm_backward_naive<T: Element, W: Element>(
    dy: ArrayView2<'_, T>,
    x: ArrayView2<'_, T>,
    options: &Options<'_, W>,
) -> Result<Gradients<T, W>, Error> {
    let norm = Norm::<T::Acc>::new("dy", dy.shape(), options)?;
    check_shape("x", x.shape(), dy.shape())?;
    let (dx, dgamma, dbeta) = norm.backward(&widen(dy), &widen(x));
    let weight = |x: T::Acc| W::from_f64(x.to_f64());
    Ok(Gradients {
        dx: dx.mapv(T::from_acc),
        dgamma: dgamma.mapv(weight),
        dbeta: dbeta.mapv(weight),
    })
}

fn widen<T: Element, A: Float>(x: ArrayView2<'_, T>) -> Array2<A> {
    x.mapv(|x| A::from_f64(x.to_f64()))
}

/// A norm with all arithmetic in `A`.
struct Norm<A> {
    kind: Kind,
    eps: A,
    /// Factor of each column, the 1 of `1 + gamma` included.
    gamma: Vec<A>,
    beta: Vec<A>,
}

impl<A: Float> Norm<A> {
    fn new<W: Element>(
        arg: &'static str,
        shape: &[usize],
        options: &Options<'_, W>,
    ) -> Result<Self, Error> {
        check_not_empty(arg, shape, 1, "row length")?;
        if !options.eps.is_finite() || options.eps < 0.0 {
            let expected = "a finite number that is at least 0";
            return Err(Error::Option { option: "eps", expected, got: options.eps.to_string() });
        }
        let number = |x: f64| A::from_f64(x);
        let mut gamma = column("gamma", &options.gamma, shape[1], A::ONE)?;
        if options.one_plus_gamma && options.gamma.is_some() {
            for gamma in &mut gamma {
                *gamma = A::ONE + *gamma;
            }
        }
        let beta = column("beta", &options.beta, shape[1], A::ZERO)?;
        Ok(Self { kind: options.kind, eps: number(options.eps), gamma, beta })
    }

    /// The mean (0 for RMS norm) and the reciprocal of the standard deviation of a row.
    fn statistics(&self, x: ArrayView1<'_, A>) -> (A, A) {
        let len = A::from_f64(x.len() as f64);
        let mut mean = A::ZERO;
        if self.kind == Kind::LayerNorm {
            for &x in x {
                mean += x;
            }
            mean /= len;
        }
        let mut variance = A::ZERO;
        for &x in x {
            variance += (x - mean) * (x - mean);
        }
        let deviation = A::from_f64((variance / len + self.eps).to_f64().sqrt());
        (mean, A::ONE / deviation)
    }

    fn forward(&self, x: &Array2<A>) -> (Array2<A>, Array1<A>, Array1<A>) {
        let (rows, d) = x.dim();
        let (mut means, mut rstds) = (Array1::default(rows), Array1::default(rows));
        let mut y = Array2::default((rows, d));
        for row in 0..rows {
            let (mean, rstd) = self.statistics(x.row(row));
            for j in 0..d {
                let x_hat = (x[[row, j]] - mean) * rstd;
                y[[row, j]] = x_hat * self.gamma[j] + self.beta[j];
            }
            (means[row], rstds[row]) = (mean, rstd);
        }
        (y, means, rstds)
    }

    fn backward(&self, dy: &Array2<A>, x: &Array2<A>) -> (Array2<A>, Array1<A>, Array1<A>) {
        let (rows, d) = x.dim();
        let len = A::from_f64(d as f64);
        let mut dx = Array2::default((rows, d));
        let (mut dgamma, mut dbeta) = (Array1::default(d), Array1::default(d));
        for row in 0..rows {
            let (mean, rstd) = self.statistics(x.row(row));
            let x_hat = |j| (x[[row, j]] - mean) * rstd;
            let g = |j| self.gamma[j] * dy[[row, j]];
            let (mut c1, mut c2) = (A::ZERO, A::ZERO);
            for j in 0..d {
                if self.kind == Kind::LayerNorm {
                    c1 += g(j);
                }
                c2 += g(j) * x_hat(j);
            }
            (c1, c2) = (c1 / len, c2 / len);
            for j in 0..d {
                dx[[row, j]] = rstd * (g(j) - c1 - x_hat(j) * c2);
                dgamma[j] += dy[[row, j]] * x_hat(j);
                dbeta[j] += dy[[row, j]];
            }
        }
        (dx, dgamma, dbeta)
    }
}

/// Gamma or beta, or what stands for it.
fn column<W: Element, A: Float>(
    arg: &'static str,
    weights: &Option<ArrayView1<'_, W>>,
    d: usize,
    default: A,
) -> Result<Vec<A>, Error> {
    let Some(weights) = weights else { return Ok(vec![default; d]) };
    check_shape(arg, weights.shape(), &[d])?;
    Ok(weights.iter().map(|x| A::from_f64(x.to_f64())).collect())
}
