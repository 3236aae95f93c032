//! Scores of bf16 queries and keys, from pairs of them: their products are exact and their sums in `f32`,
//! at twice the rate of `f32`. The scale is multiplied in last, since a query times it is no bf16.

use std::ops::Range;

use bytemuck::cast_slice_mut;
use ndarray::{ArrayView2, Axis};
use tensor_utils::bf16;
use tensor_utils::tile::pairs::{
    Bf16Dot, Pair, copy_pairs, pack_pairs_transposed, pair_depth, pair_stride,
};
use tensor_utils::tile::{Multiply, panel_width};

use super::Scores;
use crate::tile::score_tile;
use crate::workspace::Scratch;

type Simd = <Bf16Dot as Multiply<Pair>>::Simd;

/// On the instruction set that has them. Pairs take half of the scratch of the numbers in `f32`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Pairs(pub(crate) Bf16Dot);

impl Scores<bf16> for Bf16Pairs {
    type Simd = Simd;

    fn simd(self) -> Simd {
        self.0.simd()
    }

    fn pack_query(self, q: ArrayView2<'_, bf16>, row: usize, _: f32, scratch: &mut Scratch<f32>) {
        let stride = pair_stride::<Simd>(q.ncols());
        let queries: &mut [Pair] = cast_slice_mut(&mut scratch.queries);
        copy_pairs(self.0.simd(), q, &mut queries[row * stride..][..stride]);
    }

    fn pack_keys(self, k: ArrayView2<'_, bf16>, scratch: &mut Scratch<f32>) {
        let (simd, width) = (self.0.simd(), panel_width::<Simd, f32>());
        let (depth, stride) = (pair_depth(k.ncols()), pair_stride::<Simd>(k.ncols()));
        let rows: &mut [Pair] = &mut cast_slice_mut(&mut scratch.rows)[..width * stride];
        let keys: &mut [Pair] = cast_slice_mut(&mut scratch.keys);
        let panels = keys.chunks_exact_mut(depth * width);
        for (k, panel) in k.axis_chunks_iter(Axis(0), width).zip(panels) {
            copy_pairs(simd, k, rows);
            pack_pairs_transposed(simd, k.dim(), rows, panel);
        }
    }

    fn score<const ROWS: usize>(
        self,
        first: usize,
        columns: Range<usize>,
        d: usize,
        scale: f32,
        scratch: &mut Scratch<f32>,
    ) {
        let stride = pair_stride::<Simd>(d);
        let queries: &[Pair] = bytemuck::cast_slice(&scratch.queries);
        let keys: &[Pair] = bytemuck::cast_slice(&scratch.keys);
        let (queries, keys) = ((&queries[first * stride..], stride), (keys, pair_depth(d)));
        let scores = &mut scratch.scores;
        score_tile::<_, _, ROWS>(self.0, queries, keys, columns, |sum| sum * scale, scores);
    }
}
