//! Scores in the compute type. The scale is in the copies of the queries.

use std::ops::Range;

use ndarray::ArrayView2;
use tensor_utils::Element;
use tensor_utils::simd::Simd;
use tensor_utils::tile::pack::{copy_rows, pack_transposed, panel_depth};
use tensor_utils::tile::row_stride;

use super::Scores;
use crate::tile::score_tile;
use crate::workspace::Scratch;

/// On any instruction set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ComputeType<S>(pub(crate) S);

impl<S: Simd, T: Element> Scores<T> for ComputeType<S> {
    type Simd = S;

    fn simd(self) -> S {
        self.0
    }

    fn pack_query(
        self,
        q: ArrayView2<'_, T>,
        row: usize,
        scale: T::Acc,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let stride = row_stride::<S, T::Acc>(q.ncols());
        let to = &mut scratch.queries[row * stride..][..stride];
        copy_rows(self.0, q, scale, to, stride);
    }

    fn pack_keys(self, k: ArrayView2<'_, T>, scratch: &mut Scratch<T::Acc>) {
        pack_transposed(self.0, k, &mut scratch.keys, &mut scratch.rows);
    }

    fn score<const ROWS: usize>(
        self,
        first: usize,
        columns: Range<usize>,
        d: usize,
        _: T::Acc,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let stride = row_stride::<S, T::Acc>(d);
        let queries = (&scratch.queries[first * stride..], stride);
        let (keys, scores) = ((&*scratch.keys, panel_depth(d)), &mut scratch.scores);
        score_tile::<S, T::Acc, ROWS>(self.0, queries, keys, columns, |sum| sum, scores);
    }
}
