//! Mean and standard deviation of a row.

use tensor_utils::simd::{Simd, SimdFloat};
use tensor_utils::{Element, Float};

use crate::Kind;
use crate::blocks::{
    At, Blocks, RowSums, Vector, for_each_block_folded, for_each_vector, load, splat,
};

/// What is subtracted from a row, as an unevaluated sum of two numbers of the compute type, and the
/// reciprocal of the standard deviation.
///
/// Of a mean of 1e6 in `f32` the first part alone is off by up to 0.03, which is a shift of `x_hat`;
/// `x - high` is exact where that matters, so the second part can still be taken off (eq. 4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Statistics<A> {
    pub(crate) high: A,
    pub(crate) low: A,
    pub(crate) rstd: A,
}

impl<A: Float> Statistics<A> {
    /// The mean as one number.
    pub(crate) fn mean(&self) -> A {
        A::from_f64(self.high.to_f64() + self.low.to_f64())
    }
}

/// The statistics of a row that is not empty (eqs. 1 to 4).
#[inline(always)]
pub(crate) fn row_statistics<S: Simd, E: Element>(
    simd: S,
    x: &[E],
    kind: Kind,
    eps: f64,
) -> Statistics<E::Acc> {
    match kind {
        Kind::LayerNorm => layer_norm_statistics(simd, x, eps),
        Kind::RmsNorm => {
            let blocks = Blocks::new(x, x.len());
            let [squares] = sum_row::<S, E, 1>(
                simd,
                x.len(),
                #[inline(always)]
                |[squares], at, lane| {
                    let x = load(simd, blocks.get(at), lane);
                    *squares = x.mul_add(x, *squares);
                },
            );
            let rstd = reciprocal_root(squares / x.len() as f64 + eps);
            Statistics { high: E::Acc::ZERO, low: E::Acc::ZERO, rstd }
        }
    }
}

#[inline(always)]
fn layer_norm_statistics<S: Simd, E: Element>(simd: S, x: &[E], eps: f64) -> Statistics<E::Acc> {
    let len = x.len() as f64;
    // Against the first element, so that the mean of a constant row is exact whatever its length.
    let first = splat(simd, x[0].to_acc());
    let blocks = Blocks::new(x, x.len());
    let [shifted] = sum_row::<S, E, 1>(
        simd,
        x.len(),
        #[inline(always)]
        |[sum], at, lane| {
            let shifted = load(simd, blocks.get(at), lane) - first;
            *sum += blocks.keep(simd, shifted, at, lane);
        },
    );
    let (mean, error) = two_sum(x[0].to_f64(), shifted / len);
    let high = E::Acc::from_f64(mean);
    let low = E::Acc::from_f64((mean - high.to_f64()) + error);

    let (high_lanes, low_lanes) = (splat(simd, high), splat(simd, low));
    let [sum, squares] = sum_row::<S, E, 2>(
        simd,
        x.len(),
        #[inline(always)]
        |[sum, squares], at, lane| {
            let d = (load(simd, blocks.get(at), lane) - high_lanes) - low_lanes;
            let d = blocks.keep(simd, d, at, lane);
            *sum += d;
            *squares = d.mul_add(d, *squares);
        },
    );
    // What rounding has left of the mean in the first pass (eq. 3); it is small against the
    // deviation, so this difference does not cancel.
    let rest = sum / len;
    let variance = at_least_0(squares / len - rest * rest);
    let low = E::Acc::from_f64(low.to_f64() + rest);
    Statistics { high, low, rstd: reciprocal_root(variance + eps) }
}

/// Sums over a row of length `len`; `add` adds the terms of a vector.
#[inline(always)]
fn sum_row<S: Simd, E: Element, const N: usize>(
    simd: S,
    len: usize,
    add: impl Fn(&mut [Vector<S, E::Acc>; N], At, usize),
) -> [f64; N] {
    let mut sums = RowSums::<S, E::Acc, N>::new(simd);
    for_each_block_folded(
        len,
        &mut sums,
        #[inline(always)]
        |sums, at| {
            for_each_vector::<S, E::Acc>(
                #[inline(always)]
                |lane| add(sums.at(lane), at, lane),
            );
        },
        #[inline(always)]
        |sums| sums.fold(),
    );
    sums.totals()
}

/// `max(x, 0)`, NaN for NaN.
fn at_least_0(x: f64) -> f64 {
    if x < 0.0 { 0.0 } else { x }
}

fn reciprocal_root<A: Float>(x: f64) -> A {
    A::from_f64(1.0 / x.sqrt())
}

/// The rounded sum and its error (D. Knuth, The Art of Computer Programming 2, section 4.2.2).
fn two_sum(a: f64, b: f64) -> (f64, f64) {
    let sum = a + b;
    let b_rounded = sum - a;
    (sum, (a - (sum - b_rounded)) + (b - b_rounded))
}
