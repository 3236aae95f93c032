//! Sums over rows, as precise as if they were taken in twice the precision.
//!
//! The terms of up to [`CHUNK`] rows are summed in the compute type. Each such sum is then added to
//! a running sum that is kept in two parts, the second of which collects the rounding errors of the
//! first (T. Ogita, S. Rump, S. Oishi, Accurate sum and dot product, 2005, algorithm 4.1).

use tensor_utils::Float;
use tensor_utils::simd::{Select, Simd, SimdFloat};

use crate::blocks::{Vector, blocks, blocks_mut, for_each_vector, load, splat, store};

/// Rows that are summed in the compute type alone.
pub(crate) const CHUNK: usize = 16;

/// Adds the sums of a chunk to `high + low`, and sets them to 0.
pub(crate) fn flush<S: Simd, A: Float>(simd: S, sums: &mut [A], high: &mut [A], low: &mut [A]) {
    simd.vectorize(
        #[inline(always)]
        || {
            let sums = blocks_mut(sums).iter_mut();
            for ((sums, high), low) in sums.zip(blocks_mut(high)).zip(blocks_mut(low)) {
                for_each_vector::<S, A>(
                    #[inline(always)]
                    |lane| {
                        let (sum, error) =
                            two_sum::<S, A>(load(simd, high, lane), load(simd, sums, lane));
                        let errors = load(simd, low, lane) + error;
                        store::<S, A>(sum, high, lane);
                        store::<S, A>(errors, low, lane);
                        store::<S, A>(splat(simd, A::ZERO), sums, lane);
                    },
                );
            }
        },
    );
}

/// Adds up the two-part sums of all segments in their order, and leaves the result in `total`.
///
/// A segment takes `stride` of `partial`; its two parts begin at `offset` and `offset +
/// total.len()`. An infinite sum stays infinite, although its error is NaN.
pub(crate) fn merge<S: Simd, A: Float>(
    simd: S,
    partial: &[A],
    stride: usize,
    offset: usize,
    total: &mut [A],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let low_part = total.len();
            for (block, total) in blocks_mut(total).iter_mut().enumerate() {
                for_each_vector::<S, A>(
                    #[inline(always)]
                    |lane| {
                        let mut high = splat(simd, A::ZERO);
                        let mut low = high;
                        for segment in partial.chunks_exact(stride) {
                            let term = &blocks(&segment[offset..])[block];
                            let errors = &blocks(&segment[offset + low_part..])[block];
                            let (sum, error) = two_sum::<S, A>(high, load(simd, term, lane));
                            high = sum;
                            low += error + load(simd, errors, lane);
                        }
                        let sum = high.is_finite().select(high + low, high);
                        store::<S, A>(sum, total, lane);
                    },
                );
            }
        },
    );
}

/// The rounded sum and its error (D. Knuth, The Art of Computer Programming 2, section 4.2.2).
#[inline(always)]
fn two_sum<S: Simd, A: Float>(a: Vector<S, A>, b: Vector<S, A>) -> (Vector<S, A>, Vector<S, A>) {
    let sum = a + b;
    let b_rounded = sum - a;
    (sum, (a - (sum - b_rounded)) + (b - b_rounded))
}
