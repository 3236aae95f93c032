//! The backward pass over a few rows at once.

use tensor_utils::simd::{Simd, SimdFloat};
use tensor_utils::{Element, Float};

use crate::blocks::{
    Blocks, BlocksMut, Vector, blocks, blocks_mut, for_each_block, for_each_vector, load, splat,
    store, sum_row,
};

/// What is known of a row before its sums: `x_hat = ((x - high) - low) scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Known<A> {
    pub(crate) high: A,
    pub(crate) low: A,
    /// `rstd`, or 1 where the row holds `x_hat` itself.
    pub(crate) scale: A,
    pub(crate) rstd: A,
}

/// What the sums of a row depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sums {
    /// Whether `mean(g)` is taken off: for layer norm, not for RMS norm.
    pub(crate) centre_gradient: bool,
    /// Whether `high + low` may be off by a rounding, which the sums then correct (eq. 11).
    pub(crate) recentre: bool,
}

/// Rows of the same length. What is not wanted has empty rows.
#[derive(Debug)]
pub(crate) struct Group<'a, E, const ROWS: usize> {
    pub(crate) x: [&'a [E]; ROWS],
    pub(crate) dy: [&'a [E]; ROWS],
    /// Added to `dx`.
    pub(crate) dres: Option<[&'a [E]; ROWS]>,
    pub(crate) dx: [&'a mut [E]; ROWS],
}

/// Sums over rows of the gradients of gamma and beta, padded.
#[derive(Debug)]
pub(crate) struct WeightSums<'a, A> {
    pub(crate) dgamma: &'a mut [A],
    pub(crate) dbeta: &'a mut [A],
}

/// A row with its sums: what the second sweep needs.
#[derive(Debug, Clone, Copy)]
struct Row<V> {
    high: V,
    low: V,
    scale: V,
    rstd: V,
    /// `mean(g)`.
    c1: V,
    /// `-mean(g x_hat)`.
    minus_c2: V,
}

/// `dx` if `DX` (eq. 9), and the terms of the weights' gradients added to `weights` if `WEIGHTS`
/// (eqs. 7 and 8). `gamma` is padded.
///
/// Two sweeps: the sums, row by row, then everything else, for all rows at once so that gamma and
/// the weights' sums are loaded once for all of them. The second sweep finds the rows in the cache.
pub(crate) fn gradient_rows<
    S: Simd,
    E: Element,
    const ROWS: usize,
    const DX: bool,
    const WEIGHTS: bool,
    const DRES: bool,
>(
    simd: S,
    known: [Known<E::Acc>; ROWS],
    sums: Sums,
    gamma: &[E::Acc],
    group: Group<'_, E, ROWS>,
    weights: WeightSums<'_, E::Acc>,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let Group { x, dy, dres, dx } = group;
            let len = x[0].len();
            // Loops: closures of `array::map` and the like would be compiled for the baseline.
            let mut rows = [row(simd, known[0], 0.0, 0.0); ROWS];
            let (mut x_blocks, mut dy_blocks) =
                ([Blocks::new(x[0], len); ROWS], [Blocks::new(dy[0], len); ROWS]);
            let mut dres_blocks = dy_blocks;
            for i in 0..ROWS {
                (x_blocks[i], dy_blocks[i]) = (Blocks::new(x[i], len), Blocks::new(dy[i], len));
                if let Some(dres) = &dres {
                    dres_blocks[i] = Blocks::new(dres[i], len);
                }
                rows[i] = if DX || sums.recentre {
                    row_sums(simd, &x_blocks[i], &dy_blocks[i], len, gamma, known[i], sums)
                } else {
                    row(simd, known[i], 0.0, 0.0)
                };
            }
            let mut dx = dx.map(|dx| BlocksMut::new(dx, if DX { len } else { 0 }));
            let gamma = blocks(gamma);
            let (dgamma, dbeta) = (blocks_mut(weights.dgamma), blocks_mut(weights.dbeta));
            for_each_block(
                len,
                #[inline(always)]
                |at| {
                    for_each_vector::<S, E::Acc>(
                        #[inline(always)]
                        |lane| {
                            let gamma = load(simd, &gamma[at.block], lane);
                            let zero = splat(simd, E::Acc::ZERO);
                            let (mut dgamma_sum, mut dbeta_sum) = (zero, zero);
                            for i in 0..ROWS {
                                let Row { high, low, scale, rstd, c1, minus_c2 } = rows[i];
                                let x = load(simd, x_blocks[i].get(at), lane);
                                let x_hat = ((x - high) - low) * scale;
                                let dy = load(simd, dy_blocks[i].get(at), lane);
                                if DX {
                                    let in_brackets = x_hat.mul_add(minus_c2, gamma * dy - c1);
                                    let gradient = if DRES {
                                        let dres = load(simd, dres_blocks[i].get(at), lane);
                                        in_brackets.mul_add(rstd, dres)
                                    } else {
                                        in_brackets * rstd
                                    };
                                    dx[i].store::<S>(gradient, at, lane);
                                }
                                if WEIGHTS {
                                    dgamma_sum = dy.mul_add(x_hat, dgamma_sum);
                                    dbeta_sum += dy;
                                }
                            }
                            if WEIGHTS {
                                let (dgamma, dbeta) = (&mut dgamma[at.block], &mut dbeta[at.block]);
                                let sum = load(simd, dgamma, lane) + dgamma_sum;
                                store::<S, E::Acc>(sum, dgamma, lane);
                                let sum = load(simd, dbeta, lane) + dbeta_sum;
                                store::<S, E::Acc>(sum, dbeta, lane);
                            }
                        },
                    );
                },
            );
        },
    );
}

/// The first sweep over a row: the means of `g` and `g x_hat`, and what is left of the mean of `x`
/// (eqs. 10 and 11).
#[inline(always)]
fn row_sums<S: Simd, E: Element>(
    simd: S,
    x: &Blocks<'_, E>,
    dy: &Blocks<'_, E>,
    len: usize,
    gamma: &[E::Acc],
    known: Known<E::Acc>,
    sums: Sums,
) -> Row<Vector<S, E::Acc>> {
    let (high, low) = (splat(simd, known.high), splat(simd, known.low));
    let gamma = blocks(gamma);
    let [d, g, gd] = sum_row::<S, E::Acc, 3>(
        simd,
        len,
        #[inline(always)]
        |[d_sum, g_sum, gd_sum], at, lane| {
            let d = (load(simd, x.get(at), lane) - high) - low;
            let d = x.keep(simd, d, at, lane);
            let g = load(simd, &gamma[at.block], lane) * load(simd, dy.get(at), lane);
            *d_sum += d;
            *g_sum += g;
            *gd_sum = g.mul_add(d, *gd_sum);
        },
    );
    let len = len as f64;
    let rest = if sums.recentre { d / len } else { 0.0 };
    let c1 = g / len;
    let c2 = known.scale.to_f64() * (gd / len - rest * c1);
    let low = E::Acc::from_f64(known.low.to_f64() + rest);
    row(simd, Known { low, ..known }, if sums.centre_gradient { c1 } else { 0.0 }, c2)
}

#[inline(always)]
fn row<S: Simd, A: Float>(simd: S, known: Known<A>, c1: f64, c2: f64) -> Row<Vector<S, A>> {
    Row {
        high: splat(simd, known.high),
        low: splat(simd, known.low),
        scale: splat(simd, known.scale),
        rstd: splat(simd, known.rstd),
        c1: splat(simd, A::from_f64(c1)),
        minus_c2: splat(simd, A::from_f64(-c2)),
    }
}
