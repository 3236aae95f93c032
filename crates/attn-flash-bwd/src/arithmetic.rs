//! The five products of a band with a block, and how their operands are packed: in the compute type on
//! every instruction set, and as pairs of bf16 on the one that multiplies them.

use std::ops::Range;

use ndarray::ArrayView2;
use tensor_utils::simd::Simd;
use tensor_utils::{Element, Float};

use crate::block::{Band, Layout};
use crate::workspace::Scratch;

#[cfg(target_arch = "x86_64")]
mod bf16_pairs;
mod compute_type;

#[cfg(target_arch = "x86_64")]
pub(crate) use bf16_pairs::Bf16Pairs;
pub(crate) use compute_type::ComputeType;

/// How products are computed. All operands and results are in the scratch.
pub(crate) trait Products<T: Element>: Copy + Send + Sync {
    /// For everything that is not a product.
    type Simd: Simd;

    fn simd(self) -> Self::Simd;

    /// Packs a block of keys and values; returns whether the keys are finite.
    fn pack_keys(
        self,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        scale: T::Acc,
        layout: Layout,
        scratch: &mut Scratch<T::Acc>,
    ) -> bool;

    /// Packs a band of queries and `do`; returns whether they are finite.
    fn pack_queries(
        self,
        q: ArrayView2<'_, T>,
        d_o: ArrayView2<'_, T>,
        scale: T::Acc,
        layout: Layout,
        scratch: &mut Scratch<T::Acc>,
    ) -> bool;

    /// `scores = scale Q K^T` and `dp = dO V^T` (eqs. 1 and 3) for `ROWS` rows of the band from `first`
    /// on, and whole panels of columns.
    fn dot<const ROWS: usize>(
        self,
        first: usize,
        columns: Range<usize>,
        scale: T::Acc,
        layout: Layout,
        scratch: &mut Scratch<T::Acc>,
    );

    /// `e^x` of numbers that are at most 0, as exact as what is made of it. To be inlined.
    fn exp(self, x: <T::Acc as Float>::Vector<Self::Simd>)
    -> <T::Acc as Float>::Vector<Self::Simd>;

    /// Makes operands of the rows `rows` of `P` and `dS`, those before being done. By default they are
    /// operands as they are.
    fn round(
        self,
        _rows: Range<usize>,
        _band: &Band,
        _scale: T::Acc,
        _layout: Layout,
        _scratch: &mut Scratch<T::Acc>,
    ) {
    }

    /// `dq += scale dS K` (eq. 8), the rows of `dq` being as long as their stride in the scratch.
    fn add_dq(self, band: &Band, layout: Layout, scratch: &Scratch<T::Acc>, dq: &mut [T::Acc]);

    /// `dk += scale dS^T Q` and `dv += P^T dO` (eqs. 9 and 4).
    fn add_dk_dv(self, band: &Band, layout: Layout, scratch: &mut Scratch<T::Acc>);
}
