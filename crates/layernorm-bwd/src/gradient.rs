//! The backward pass over one row, and the sums of the next.

use tensor_utils::Element;
use tensor_utils::simd::{Simd, SimdFloat};

use crate::blocks::{
    At, Block, Blocks, BlocksMut, RowSums, Vector, WeightSums, for_each_block_folded,
    for_each_vector, load, splat,
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

/// What is known of a row after its sums.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summed<A> {
    /// With a `low` that no rounding has spoilt.
    known: Known<A>,
    /// `mean(g)`, or 0 for RMS norm.
    c1: A,
    /// `mean(g x_hat)`.
    c2: A,
}

/// What the sums of a row are used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sums {
    /// Whether `mean(g)` is taken off: for layer norm, not for RMS norm.
    pub(crate) centre_gradient: bool,
    /// Whether `high + low` may be off by a rounding, which the sums then correct (eq. 11).
    pub(crate) recentre: bool,
}

/// A row to sum.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unsummed<'a, E: Element> {
    pub(crate) x: &'a [E],
    pub(crate) dy: &'a [E],
    pub(crate) known: Known<E::Acc>,
}

/// A row to finish. What is not wanted is empty.
#[derive(Debug)]
pub(crate) struct Row<'a, E: Element> {
    pub(crate) x: &'a [E],
    pub(crate) dy: &'a [E],
    pub(crate) summed: Summed<E::Acc>,
    /// Added to `dx`.
    pub(crate) dres: &'a [E],
    pub(crate) dx: &'a mut [E],
    /// Whether the rows below are asked for early: they are in memory, and nothing else uses it.
    pub(crate) is_far: bool,
}

/// `dx` if `DX` (eq. 9), with `dres` added if `DRES`, and the terms of the weights' gradients added
/// to `weights` if `WEIGHTS` (eqs. 7 and 8). Returns the sums of `next`, another
/// row of the same length.
///
/// The two rows share a loop so that `next` comes from memory while `row`, which its own sums have
/// brought to the cache, is computed on: the sums alone would wait for memory, and the rest leave it
/// idle.
pub(crate) fn gradient_row<
    S: Simd,
    E: Element,
    const DX: bool,
    const WEIGHTS: bool,
    const DRES: bool,
>(
    simd: S,
    row: Row<'_, E>,
    next: Unsummed<'_, E>,
    sums: Sums,
    gamma: &[Block<E::Acc>],
    weights: &mut [WeightSums<E::Acc>],
) -> Summed<E::Acc> {
    simd.vectorize(
        #[inline(always)]
        || {
            let len = row.x.len();
            let next = Next::new(simd, next, len);
            let Summed { known, c1, c2 } = row.summed;
            let (high, low) = (splat(simd, known.high), splat(simd, known.low));
            let (scale, rstd) = (splat(simd, known.scale), splat(simd, known.rstd));
            let (c1, minus_c2) = (splat(simd, c1), splat(simd, -c2));
            let (x, dy) = (Blocks::new(row.x, len), Blocks::new(row.dy, len));
            let dres = Blocks::new(row.dres, if DRES { len } else { 0 });
            let mut dx = BlocksMut::new(row.dx, if DX { len } else { 0 });
            let mut row_sums = RowSums::<S, E::Acc, 3>::new(simd);
            for_each_block_folded(
                len,
                &mut row_sums,
                #[inline(always)]
                |row_sums, at| {
                    next.x.ask_ahead(at, row.is_far);
                    next.dy.ask_ahead(at, row.is_far);
                    for_each_vector::<S, E::Acc>(
                        #[inline(always)]
                        |lane| {
                            let gamma = gamma[at.block].load(simd, lane);
                            next.add(gamma, row_sums.at(lane), at, lane);

                            let x_hat = ((load(simd, x.get(at), lane) - high) - low) * scale;
                            let dy = load(simd, dy.get(at), lane);
                            if DX {
                                let in_brackets = x_hat.mul_add(minus_c2, gamma * dy - c1);
                                let gradient = if DRES {
                                    in_brackets.mul_add(rstd, load(simd, dres.get(at), lane))
                                } else {
                                    in_brackets * rstd
                                };
                                dx.store::<S>(gradient, at, lane);
                            }
                            if WEIGHTS {
                                let [dgamma, dbeta] = &mut weights[at.block];
                                let of_gamma = dy.mul_add(x_hat, dgamma.load(simd, lane));
                                let of_beta = dbeta.load(simd, lane) + dy;
                                dgamma.store(of_gamma, lane);
                                dbeta.store(of_beta, lane);
                            }
                        },
                    );
                },
                #[inline(always)]
                |row_sums| row_sums.fold(),
            );
            next.finish(row_sums.totals(), len, sums)
        },
    )
}

/// The sums of one row alone, with the bits that [`gradient_row`] returns.
pub(crate) fn sum_row<S: Simd, E: Element>(
    simd: S,
    row: Unsummed<'_, E>,
    sums: Sums,
    gamma: &[Block<E::Acc>],
) -> Summed<E::Acc> {
    simd.vectorize(
        #[inline(always)]
        || {
            let len = row.x.len();
            let row = Next::new(simd, row, len);
            let mut row_sums = RowSums::<S, E::Acc, 3>::new(simd);
            for_each_block_folded(
                len,
                &mut row_sums,
                #[inline(always)]
                |row_sums, at| {
                    for_each_vector::<S, E::Acc>(
                        #[inline(always)]
                        |lane| {
                            let gamma = gamma[at.block].load(simd, lane);
                            row.add(gamma, row_sums.at(lane), at, lane);
                        },
                    );
                },
                #[inline(always)]
                |row_sums| row_sums.fold(),
            );
            row.finish(row_sums.totals(), len, sums)
        },
    )
}

/// A row whose sums are being taken (eq. 10): of `d = (x - high) - low`, `g` and `g d`.
struct Next<'a, S: Simd, E: Element> {
    simd: S,
    x: Blocks<'a, E>,
    dy: Blocks<'a, E>,
    high: Vector<S, E::Acc>,
    low: Vector<S, E::Acc>,
    known: Known<E::Acc>,
}

impl<'a, S: Simd, E: Element> Next<'a, S, E> {
    #[inline(always)]
    fn new(simd: S, row: Unsummed<'a, E>, len: usize) -> Self {
        let Unsummed { x, dy, known } = row;
        let (high, low) = (splat(simd, known.high), splat(simd, known.low));
        Self { simd, x: Blocks::new(x, len), dy: Blocks::new(dy, len), high, low, known }
    }

    #[inline(always)]
    fn add(
        &self,
        gamma: Vector<S, E::Acc>,
        [d_sum, g_sum, gd_sum]: &mut [Vector<S, E::Acc>; 3],
        at: At,
        lane: usize,
    ) {
        let d = (load(self.simd, self.x.get(at), lane) - self.high) - self.low;
        let d = self.x.keep(self.simd, d, at, lane);
        let g = gamma * load(self.simd, self.dy.get(at), lane);
        *d_sum += d;
        *g_sum += g;
        *gd_sum = g.mul_add(d, *gd_sum);
    }

    /// Eq. 11.
    #[inline(always)]
    fn finish(&self, [d, g, gd]: [f64; 3], len: usize, sums: Sums) -> Summed<E::Acc> {
        let len = len as f64;
        let rest = if sums.recentre { d / len } else { 0.0 };
        let c1 = g / len;
        let c2 = self.known.scale.to_f64() * (gd / len - rest * c1);
        let low = E::Acc::from_f64(self.known.low.to_f64() + rest);
        Summed {
            known: Known { low, ..self.known },
            c1: E::Acc::from_f64(if sums.centre_gradient { c1 } else { 0.0 }),
            c2: E::Acc::from_f64(c2),
        }
    }
}
