//! Sums over rows, nearly as precise as if they were taken in twice the precision.
//!
//! The terms of up to [`CHUNK`] rows are summed in the compute type. Each such sum is then added to
//! a running sum that is kept in two parts, the second of which collects the rounding errors of the
//! first (T. Ogita, S. Rump, S. Oishi, Accurate sum and dot product, 2005, algorithm 4.1).

use ndarray::{ArrayViewMut1, Axis};
use tensor_utils::simd::{Select, Simd, SimdFloat};
use tensor_utils::tile::pack::narrow_row;
use tensor_utils::{Element, Float};

use crate::blocks::{BLOCK, Block, Vector, WeightSums, for_each_vector, splat};

/// Rows that are summed in the compute type alone.
pub(crate) const CHUNK: usize = 8;

/// Running sums of some rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct TwoPart<A> {
    high: WeightSums<A>,
    /// What rounding took from `high`.
    low: WeightSums<A>,
}

/// Makes sums 0. By columns: `fill` copies blocks of this size one by one.
pub(crate) fn clear<A: Float>(sums: &mut WeightSums<A>) {
    for Block(columns) in sums {
        columns.fill(A::ZERO);
    }
}

/// Adds the sums of a chunk to running sums, which begin with the first chunk; those of the chunk become 0.
pub(crate) fn flush<S: Simd, A: Float>(
    simd: S,
    is_first: bool,
    chunk: &mut [WeightSums<A>],
    running: &mut [TwoPart<A>],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            for (chunk, TwoPart { high, low }) in chunk.iter_mut().zip(running) {
                for i in 0..2 {
                    for_each_vector::<S, A>(
                        #[inline(always)]
                        |lane| {
                            let (zero, term) = (splat(simd, A::ZERO), chunk[i].load(simd, lane));
                            let (sum, errors) = if is_first {
                                (term, zero)
                            } else {
                                let (sum, error) = two_sum::<S, A>(high[i].load(simd, lane), term);
                                (sum, low[i].load(simd, lane) + error)
                            };
                            high[i].store(sum, lane);
                            low[i].store(errors, lane);
                            chunk[i].store(zero, lane);
                        },
                    );
                }
            }
        },
    );
}

/// Adds up the running sums of all segments, each of length `len`, in their order; the first segment
/// then has the totals. An infinite sum stays infinite, although its error is NaN.
pub(crate) fn merge<S: Simd, A: Float>(simd: S, segments: &mut [TwoPart<A>], len: usize) {
    simd.vectorize(
        #[inline(always)]
        || {
            for block in 0..len.min(segments.len()) {
                for i in 0..2 {
                    for_each_vector::<S, A>(
                        #[inline(always)]
                        |lane| {
                            let mut high = splat(simd, A::ZERO);
                            let mut low = high;
                            for segment in segments.chunks_exact(len) {
                                let term = segment[block].high[i].load(simd, lane);
                                let (sum, error) = two_sum::<S, A>(high, term);
                                high = sum;
                                low += error + segment[block].low[i].load(simd, lane);
                            }
                            let sum = high.is_finite().select(high + low, high);
                            segments[block].high[i].store(sum, lane);
                        },
                    );
                }
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

/// Rounds one of the two totals of each column to the output, or adds it to what is there. Without
/// segments, as there are without rows, totals are 0.
pub(crate) fn write<W: Element>(
    segments: &[TwoPart<W::Acc>],
    which: usize,
    accumulate: bool,
    mut weights: ArrayViewMut1<'_, W>,
) {
    let blocks = weights.axis_chunks_iter_mut(Axis(0), BLOCK);
    for (block, weights) in blocks.enumerate() {
        let mut totals =
            segments.get(block).map_or([W::Acc::ZERO; BLOCK], |sums| sums.high[which].0);
        if accumulate {
            for (total, weight) in totals.iter_mut().zip(&weights) {
                *total = weight.to_acc() + *total;
            }
        }
        narrow_row(&totals, weights);
    }
}
