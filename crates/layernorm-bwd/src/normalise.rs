//! The forward pass over one row.

use tensor_utils::Element;
use tensor_utils::simd::{Simd, SimdFloat};

use crate::blocks::{Blocks, BlocksMut, blocks, for_each_block, for_each_vector, load, splat};
use crate::statistics::Statistics;

/// `y = x_hat gamma + beta` (eq. 5). `gamma` and `beta` are padded.
#[inline(always)]
pub(crate) fn normalise_row<S: Simd, E: Element>(
    simd: S,
    x: &[E],
    statistics: Statistics<E::Acc>,
    gamma: &[E::Acc],
    beta: &[E::Acc],
    y: &mut [E],
) {
    let Statistics { high, low, rstd } = statistics;
    let (high, low, rstd) = (splat(simd, high), splat(simd, low), splat(simd, rstd));
    let (gamma, beta) = (blocks(gamma), blocks(beta));
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
                    let gamma = load(simd, &gamma[at.block], lane);
                    let beta = load(simd, &beta[at.block], lane);
                    y.store::<S>(x_hat.mul_add(gamma, beta), at, lane);
                },
            );
        },
    );
}
