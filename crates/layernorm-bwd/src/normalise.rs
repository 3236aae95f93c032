//! The forward pass over one row.

use tensor_utils::Element;
use tensor_utils::simd::{Simd, SimdFloat};

use crate::blocks::{Block, Blocks, BlocksMut, for_each_block, for_each_vector, load, splat};
use crate::statistics::Statistics;

/// `y = x_hat gamma + beta` (eq. 5).
#[inline(always)]
pub(crate) fn normalise_row<S: Simd, E: Element>(
    simd: S,
    x: &[E],
    statistics: Statistics<E::Acc>,
    gamma: &[Block<E::Acc>],
    beta: &[Block<E::Acc>],
    y: &mut [E],
) {
    let Statistics { high, low, rstd } = statistics;
    let (high, low, rstd) = (splat(simd, high), splat(simd, low), splat(simd, rstd));
    let len = x.len();
    let (x, mut y) = (Blocks::new(x, len), BlocksMut::new(y, len));
    for_each_block(
        len,
        #[inline(always)]
        |at| {
            for_each_vector::<S, E::Acc>(
                #[inline(always)]
                |lane| {
                    let x_hat = ((load(simd, x.get(at), lane) - high) - low) * rstd;
                    let gamma = gamma[at.block].load(simd, lane);
                    let beta = beta[at.block].load(simd, lane);
                    y.store::<S>(x_hat.mul_add(gamma, beta), at, lane);
                },
            );
        },
    );
}
