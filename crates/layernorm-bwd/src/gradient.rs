//! The backward pass over a piece of a row, and the sums of the next row.

use std::ops::Range;

use tensor_utils::simd::{Simd, SimdFloat};
use tensor_utils::{Element, Float, prefetch_far};

use crate::blocks::{
    At, BLOCK, Block, Blocks, BlocksMut, RowSums, Vector, WeightSums, for_each_block_folded,
    for_each_vector, load, splat,
};

/// What is known of a row before its sums: `x_hat = ((x - high) - low) scale`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Known<A> {
    pub(crate) high: A,
    pub(crate) low: A,
    /// `rstd`, or 1 where the row holds `x_hat` itself.
    pub(crate) scale: A,
    pub(crate) rstd: A,
}

/// What is known of a row after its sums.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
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

/// A row to sum, or a piece of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unsummed<'a, E: Element> {
    pub(crate) x: &'a [E],
    pub(crate) dy: &'a [E],
    pub(crate) known: Known<E::Acc>,
}

impl<E: Element> Unsummed<'_, E> {
    /// A piece of a row.
    pub(crate) fn columns(self, columns: Range<usize>) -> Self {
        Self { x: &self.x[columns.clone()], dy: &self.dy[columns], known: self.known }
    }
}

/// A piece of a row to finish. What is not wanted is empty.
#[derive(Debug)]
pub(crate) struct Piece<'a, E: Element> {
    pub(crate) x: &'a [E],
    pub(crate) dy: &'a [E],
    pub(crate) summed: Summed<E::Acc>,
    /// Added to `dx`.
    pub(crate) dres: &'a [E],
    pub(crate) dx: &'a mut [E],
    /// The piece of x and of dy to ask for now, if memory is to be asked for early.
    pub(crate) ahead: Option<[&'a [E]; 2]>,
}

/// Sums over a row, or a piece of it (eq. 10): of `d = (x - high) - low`, `g` and `g d`.
pub(crate) type Totals = [f64; 3];

/// `dx` if `DX` (eq. 9), with `dres` added if `DRES`, and the terms of the weights' gradients added
/// to `weights` if `WEIGHTS` (eqs. 7 and 8). Returns the sums over `next`, a piece
/// of the same columns of another row.
///
/// The two share a loop so that `next` comes from memory while `piece`, which its own sums have
/// brought to the cache, is computed on: the sums alone would wait for memory, and the rest leave it
/// idle.
pub(crate) fn gradient<
    S: Simd,
    E: Element,
    const DX: bool,
    const WEIGHTS: bool,
    const DRES: bool,
>(
    simd: S,
    piece: Piece<'_, E>,
    next: Unsummed<'_, E>,
    gamma: &[Block<E::Acc>],
    weights: &mut [WeightSums<E::Acc>],
) -> Totals {
    simd.vectorize(
        #[inline(always)]
        || {
            let len = piece.x.len();
            let next = Next::new(simd, next, len);
            let Summed { known, c1, c2 } = piece.summed;
            let (high, low) = (splat(simd, known.high), splat(simd, known.low));
            let (scale, rstd) = (splat(simd, known.scale), splat(simd, known.rstd));
            let (c1, minus_c2) = (splat(simd, c1), splat(simd, -c2));
            let (x, dy) = (Blocks::new(piece.x, len), Blocks::new(piece.dy, len));
            let dres = Blocks::new(piece.dres, if DRES { len } else { 0 });
            let mut dx = BlocksMut::new(piece.dx, if DX { len } else { 0 });
            let is_far = piece.ahead.is_some();
            let [ahead_x, ahead_dy] = piece.ahead.unwrap_or_default();
            let mut sums = RowSums::<S, E::Acc, 3>::new(simd);
            for_each_block_folded(
                len,
                &mut sums,
                #[inline(always)]
                |sums, at| {
                    next.x.ask_ahead(at);
                    next.dy.ask_ahead(at);
                    if is_far {
                        prefetch_far(ahead_x, at.block * BLOCK);
                        prefetch_far(ahead_dy, at.block * BLOCK);
                    }
                    for_each_vector::<S, E::Acc>(
                        #[inline(always)]
                        |lane| {
                            let gamma = gamma[at.block].load(simd, lane);
                            next.add(gamma, sums.at(lane), at, lane);

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
                |sums| sums.fold(),
            );
            sums.totals()
        },
    )
}

/// The sums over a row alone, with the bits that [`gradient`] returns for its pieces, added up.
pub(crate) fn sum_row<S: Simd, E: Element>(
    simd: S,
    row: Unsummed<'_, E>,
    gamma: &[Block<E::Acc>],
) -> Totals {
    simd.vectorize(
        #[inline(always)]
        || {
            let len = row.x.len();
            let row = Next::new(simd, row, len);
            let mut sums = RowSums::<S, E::Acc, 3>::new(simd);
            for_each_block_folded(
                len,
                &mut sums,
                #[inline(always)]
                |sums, at| {
                    for_each_vector::<S, E::Acc>(
                        #[inline(always)]
                        |lane| {
                            let gamma = gamma[at.block].load(simd, lane);
                            row.add(gamma, sums.at(lane), at, lane);
                        },
                    );
                },
                #[inline(always)]
                |sums| sums.fold(),
            );
            sums.totals()
        },
    )
}

impl<A: Float> Known<A> {
    /// With the sums over a row of length `len` (eq. 11).
    pub(crate) fn summed(self, [d, g, gd]: Totals, len: usize, sums: Sums) -> Summed<A> {
        let len = len as f64;
        let rest = if sums.recentre { d / len } else { 0.0 };
        let c1 = g / len;
        let c2 = self.scale.to_f64() * (gd / len - rest * c1);
        let low = A::from_f64(self.low.to_f64() + rest);
        Summed {
            known: Known { low, ..self },
            c1: A::from_f64(if sums.centre_gradient { c1 } else { 0.0 }),
            c2: A::from_f64(c2),
        }
    }
}

/// A row whose sums are being taken, or a piece of it.
struct Next<'a, S: Simd, E: Element> {
    simd: S,
    x: Blocks<'a, E>,
    dy: Blocks<'a, E>,
    high: Vector<S, E::Acc>,
    low: Vector<S, E::Acc>,
}

impl<'a, S: Simd, E: Element> Next<'a, S, E> {
    #[inline(always)]
    fn new(simd: S, row: Unsummed<'a, E>, len: usize) -> Self {
        let Unsummed { x, dy, known } = row;
        let (high, low) = (splat(simd, known.high), splat(simd, known.low));
        Self { simd, x: Blocks::new(x, len), dy: Blocks::new(dy, len), high, low }
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
}
