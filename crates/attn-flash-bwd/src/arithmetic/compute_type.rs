//! Products in the compute type. The scale is in the copies of queries and keys, so that `P` and `dS` are
//! operands as they are.

use std::ops::Range;

use ndarray::ArrayView2;
use tensor_utils::simd::Simd;
use tensor_utils::tile::pack::{
    copy_rows, pack_columns, pack_transposed, panel_depth, panel_index,
};
use tensor_utils::tile::{lanes, panel_width, row_stride, tiles};
use tensor_utils::{Element, Float};

use super::Products;
use crate::block::{Band, Layout};
use crate::products::{Panels, add_columns, add_rows, add_visible, dot_rows};
use crate::workspace::Scratch;

/// On any instruction set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ComputeType<S>(pub(crate) S);

impl<S: Simd, T: Element> Products<T> for ComputeType<S> {
    type Simd = S;

    fn simd(self) -> S {
        self.0
    }

    fn pack_keys(
        self,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        scale: T::Acc,
        layout: Layout,
        scratch: &mut Scratch<T::Acc>,
    ) -> bool {
        pack_transposed(self.0, k, &mut scratch.keys_transposed, &mut scratch.rows);
        pack_transposed(self.0, v, &mut scratch.values_transposed, &mut scratch.rows);
        pack_columns(self.0, k, scale, &mut scratch.keys, layout.key_block, &mut scratch.rows)
    }

    fn pack_queries(
        self,
        q: ArrayView2<'_, T>,
        d_o: ArrayView2<'_, T>,
        scale: T::Acc,
        layout: Layout,
        scratch: &mut Scratch<T::Acc>,
    ) -> bool {
        let (d, e) = (row_stride::<S, T::Acc>(layout.d), row_stride::<S, T::Acc>(layout.e));
        copy_rows(self.0, q, scale, &mut scratch.queries, d)
            & copy_rows(self.0, d_o, T::Acc::ONE, &mut scratch.d_o, e)
    }

    fn dot<const ROWS: usize>(
        self,
        first: usize,
        columns: Range<usize>,
        _: T::Acc,
        layout: Layout,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let stride = layout.key_block;
        let (depth, d) = (panel_depth(layout.d), row_stride::<S, T::Acc>(layout.d));
        let (a, b) = (&scratch.queries[first * d..], &scratch.keys_transposed);
        let out = &mut scratch.scores[first * stride..];
        dot_rows::<ROWS, _, _>(self.0, depth, a, d, b, columns.clone(), |sum| sum, out, stride);
        let (depth, e) = (panel_depth(layout.e), row_stride::<S, T::Acc>(layout.e));
        let (a, b) = (&scratch.d_o[first * e..], &scratch.values_transposed);
        let out = &mut scratch.dp[first * stride..];
        dot_rows::<ROWS, _, _>(self.0, depth, a, e, b, columns, |sum| sum, out, stride);
    }

    #[inline(always)]
    fn exp(self, x: <T::Acc as Float>::Vector<S>) -> <T::Acc as Float>::Vector<S> {
        T::Acc::exp_nonpositive_vector(self.0, x)
    }

    fn add_dq(self, band: &Band, layout: Layout, scratch: &Scratch<T::Acc>, dq: &mut [T::Acc]) {
        let (d, stride) = (row_stride::<S, T::Acc>(layout.d), layout.key_block);
        let columns = band.columns.clone();
        let keys = Panels {
            panels: &scratch.keys,
            columns: layout.d.next_multiple_of(lanes::<S, T::Acc>()),
            capacity: stride,
        };
        for (first, height) in tiles::<S, T::Acc>(band.rows.len()) {
            let out = &mut dq[first * d..];
            if band.finite {
                let rows = columns.clone();
                let ds = &scratch.dp[first * stride..];
                match height {
                    12 => add_rows::<S, T::Acc, 12>(self.0, rows, ds, stride, keys, out, d),
                    6 => add_rows::<S, T::Acc, 6>(self.0, rows, ds, stride, keys, out, d),
                    4 => add_rows::<S, T::Acc, 4>(self.0, rows, ds, stride, keys, out, d),
                    2 => add_rows::<S, T::Acc, 2>(self.0, rows, ds, stride, keys, out, d),
                    _ => add_rows::<S, T::Acc, 1>(self.0, rows, ds, stride, keys, out, d),
                }
                continue;
            }
            let width = panel_width::<S, T::Acc>();
            let index = |j, column| panel_index(column, j, keys.columns, keys.capacity, width);
            for i in first..first + height {
                let pair = |j: usize| i * stride + j;
                let terms =
                    columns.clone().map(|j| (scratch.visible[pair(j)], scratch.dp[pair(j)], j));
                let out = &mut dq[i * d..][..keys.columns];
                add_visible(self.0, terms, keys.panels, index, out);
            }
        }
    }

    fn add_dk_dv(self, band: &Band, layout: Layout, scratch: &mut Scratch<T::Acc>) {
        let (d, e) = (row_stride::<S, T::Acc>(layout.d), row_stride::<S, T::Acc>(layout.e));
        let (rows, stride) = (band.rows.len(), layout.key_block);
        if band.finite {
            let columns = band.columns.clone();
            let Scratch { scores, dp, queries, d_o, dk, dv, .. } = scratch;
            add_columns(self.0, rows, scores, stride, columns.clone(), d_o, dv, e);
            add_columns(self.0, rows, dp, stride, columns, queries, dk, d);
            return;
        }
        for j in band.columns.clone() {
            let Scratch { scores, dp, queries, d_o, dk, dv, visible, .. } = scratch;
            let pair = |i: usize| i * stride + j;
            let terms = (0..rows).map(|i| (visible[pair(i)], scores[pair(i)], i));
            add_visible(self.0, terms, d_o, |i, column| i * e + column, &mut dv[j * e..][..e]);
            let terms = (0..rows).map(|i| (visible[pair(i)], dp[pair(i)], i));
            add_visible(self.0, terms, queries, |i, column| i * d + column, &mut dk[j * d..][..d]);
        }
    }
}
