//! How scores are computed and their operands packed: in the compute type on every instruction set, and
//! from pairs of bf16 on the one that multiplies them.
//!
//! The other product, of weights and values, is in the compute type always: a weight rounded to bf16 would
//! cost as much accuracy as rounding the output, and one split in two bf16 as much time as `f32`.

use std::ops::Range;

use ndarray::ArrayView2;
use tensor_utils::Element;
use tensor_utils::simd::Simd;

use crate::workspace::Scratch;

#[cfg(target_arch = "x86_64")]
mod bf16_pairs;
mod compute_type;

#[cfg(target_arch = "x86_64")]
pub(crate) use bf16_pairs::Bf16Pairs;
pub(crate) use compute_type::ComputeType;

/// How scores are computed. Operands and results are in the scratch; `d` is the head size.
pub(crate) trait Scores<T: Element>: Copy + Send + Sync {
    /// For everything else.
    type Simd: Simd;

    fn simd(self) -> Self::Simd;

    /// Packs the query of row `row`, `[1, d]`.
    fn pack_query(
        self,
        q: ArrayView2<'_, T>,
        row: usize,
        scale: T::Acc,
        scratch: &mut Scratch<T::Acc>,
    );

    /// Packs a block of keys.
    fn pack_keys(self, k: ArrayView2<'_, T>, scratch: &mut Scratch<T::Acc>);

    /// `scores = scale q k^T` (eq. 1) of rows `first..first + ROWS` and whole panels of columns.
    fn score<const ROWS: usize>(
        self,
        first: usize,
        columns: Range<usize>,
        d: usize,
        scale: T::Acc,
        scratch: &mut Scratch<T::Acc>,
    );
}
