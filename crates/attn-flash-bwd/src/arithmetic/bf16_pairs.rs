//! Products of bf16 pairs. Queries, keys, values and `do` are bf16 already, so scores and `dP` come out as
//! in `f32`; `P` and `dS`, the latter times the scale, are rounded to bf16 for the products with them.

use std::ops::Range;

use ndarray::ArrayView2;
use tensor_utils::simd::SimdBase;
use tensor_utils::tile::pack::panel_index;
use tensor_utils::tile::pairs::{
    Bf16Dot, Pair, copy_pairs, pack_pairs_transposed, pack_row_pairs, pair_depth, pair_stride,
};
use tensor_utils::tile::{Multiply, lanes, load, panel_width, row_stride, tiles};
use tensor_utils::{Float, bf16, exp_nonpositive_fast};

use super::Products;
use crate::block::{Band, Layout};
use crate::products::{Panels, add_columns, add_rows, dot_rows};
use crate::workspace::{BAND, PAIR_PAD, Pairs, Scratch};

type Simd = <Bf16Dot as Multiply<Pair>>::Simd;
type Vector = <f32 as Float>::Vector<Simd>;

/// On the instruction set that has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bf16Pairs(pub(crate) Bf16Dot);

impl Products<bf16> for Bf16Pairs {
    type Simd = Simd;

    fn simd(self) -> Simd {
        self.0.simd()
    }

    fn pack_keys(
        self,
        k: ArrayView2<'_, bf16>,
        v: ArrayView2<'_, bf16>,
        _: f32,
        layout: Layout,
        scratch: &mut Scratch<f32>,
    ) -> bool {
        let (simd, width) = (self.0.simd(), panel_width::<Simd, f32>());
        let Pairs { keys_transposed, values_transposed, keys, rows, .. } = &mut scratch.pairs;
        copy_pairs(simd, v, rows);
        pack_pairs_transposed(simd, v.dim(), rows, values_transposed);
        let finite = copy_pairs(simd, k, rows);
        pack_pairs_transposed(simd, k.dim(), rows, keys_transposed);
        let dim = (k.nrows().next_multiple_of(width), layout.d);
        pack_row_pairs(simd, dim, rows, keys, layout.key_block / 2, width);
        finite
    }

    fn pack_queries(
        self,
        q: ArrayView2<'_, bf16>,
        d_o: ArrayView2<'_, bf16>,
        _: f32,
        layout: Layout,
        scratch: &mut Scratch<f32>,
    ) -> bool {
        let simd = self.0.simd();
        let Pairs { queries, d_o: d_o_rows, query_pairs, d_o_pairs, .. } = &mut scratch.pairs;
        let finite = copy_pairs(simd, q, queries) & copy_pairs(simd, d_o, d_o_rows);
        // The row after the last one makes a pair with it.
        let rows = q.nrows();
        if rows % 2 == 1 {
            for (pairs, columns) in [(&mut *queries, layout.d), (&mut *d_o_rows, layout.e)] {
                let stride = pair_stride::<Simd>(columns);
                pairs[rows * stride..][..stride].fill(0);
            }
        }
        let (d, e) = (row_stride::<Simd, f32>(layout.d), row_stride::<Simd, f32>(layout.e));
        pack_row_pairs(simd, q.dim(), queries, query_pairs, BAND / 2, d);
        pack_row_pairs(simd, d_o.dim(), d_o_rows, d_o_pairs, BAND / 2, e);
        finite
    }

    fn dot<const ROWS: usize>(
        self,
        first: usize,
        columns: Range<usize>,
        scale: f32,
        layout: Layout,
        scratch: &mut Scratch<f32>,
    ) {
        let (stride, pairs) = (layout.key_block, &scratch.pairs);
        let (depth, d) = (pair_depth(layout.d), pair_stride::<Simd>(layout.d));
        let (a, b) = (&pairs.queries[first * d..], &pairs.keys_transposed);
        let out = &mut scratch.scores[first * stride..];
        let scaled = |sum| sum * scale;
        dot_rows::<ROWS, _, _>(self.0, depth, a, d, b, columns.clone(), scaled, out, stride);
        let (depth, e) = (pair_depth(layout.e), pair_stride::<Simd>(layout.e));
        let (a, b) = (&pairs.d_o[first * e..], &pairs.values_transposed);
        let out = &mut scratch.dp[first * stride..];
        dot_rows::<ROWS, _, _>(self.0, depth, a, e, b, columns, |sum| sum, out, stride);
    }

    #[inline(always)]
    fn exp(self, x: Vector) -> Vector {
        exp_nonpositive_fast(self.0.simd(), x)
    }

    fn round(
        self,
        rows: Range<usize>,
        band: &Band,
        scale: f32,
        layout: Layout,
        scratch: &mut Scratch<f32>,
    ) {
        let stride = layout.key_block;
        let Scratch { scores, dp, pairs: Pairs { p, ds, ds_rows, .. }, .. } = scratch;
        let (simd, columns) = (self.0.simd(), band.columns.clone());
        if rows.end % 2 == 1 {
            // The row after the last one makes a pair with it.
            for x in [&mut *scores, &mut *dp] {
                x[rows.end * stride..][columns.clone()].fill(0.0);
            }
        }
        self.0.inside(
            #[inline(always)]
            || {
                const L: usize = lanes::<Simd, f32>();
                let vectors = columns.len() / L;
                // All slices are cut to one length, so that bounds are not checked in the inner loop.
                for pair in rows.start / 2..rows.end.div_ceil(2) {
                    let [p, ds] = [&mut *p, &mut *ds].map(|x| {
                        let x = &mut x[pair * (stride + PAIR_PAD)..][columns.clone()];
                        &mut x.as_chunks_mut::<L>().0[..vectors]
                    });
                    let (first, second) =
                        ds_rows[pair * stride..][..stride].split_at_mut(stride / 2);
                    let [first, second] = [first, second].map(|x| {
                        let x = &mut x[columns.start / 2..columns.end / 2];
                        &mut x.as_chunks_mut::<{ L / 2 }>().0[..vectors]
                    });
                    let [s0, s1, dp0, dp1] =
                        [(&*scores, 0), (scores, 1), (dp, 0), (dp, 1)].map(|(x, i)| {
                            let x = &x[(2 * pair + i) * stride..][columns.clone()];
                            &x.as_chunks::<L>().0[..vectors]
                        });
                    for i in 0..vectors {
                        let vector = |x: &[f32; L]| Vector::from_slice(simd, x);
                        self.0.round(vector(&s0[i]), vector(&s1[i])).zipped.store_slice(&mut p[i]);
                        let rounded =
                            self.0.round(vector(&dp0[i]) * scale, vector(&dp1[i]) * scale);
                        rounded.zipped.store_slice(&mut ds[i]);
                        rounded.first.store_slice(&mut first[i]);
                        rounded.second.store_slice(&mut second[i]);
                    }
                }
            },
        );
    }

    fn add_dq(self, band: &Band, layout: Layout, scratch: &Scratch<f32>, dq: &mut [f32]) {
        let (d, stride) = (row_stride::<Simd, f32>(layout.d), layout.key_block / 2);
        let Pairs { keys, ds_rows, .. } = &scratch.pairs;
        let keys = Panels { panels: keys, columns: d, capacity: stride };
        let pairs = band.columns.start / 2..band.columns.end / 2;
        for (first, height) in tiles::<Simd, f32>(band.rows.len()) {
            let out = &mut dq[first * d..];
            if band.finite {
                let (rows, ds) = (pairs.clone(), &ds_rows[first * stride..]);
                match height {
                    12 => add_rows::<Bf16Dot, Pair, 12>(self.0, rows, ds, stride, keys, out, d),
                    4 => add_rows::<Bf16Dot, Pair, 4>(self.0, rows, ds, stride, keys, out, d),
                    _ => add_rows::<Bf16Dot, Pair, 1>(self.0, rows, ds, stride, keys, out, d),
                }
                continue;
            }
            let width = panel_width::<Simd, f32>();
            let index = |j, column| panel_index(column, j, d, stride, width);
            for i in first..first + height {
                let visible = &scratch.visible[i * layout.key_block..];
                let terms = pairs.clone().map(|j| {
                    let seen = mask(visible[2 * j], visible[2 * j + 1]);
                    (seen, ds_rows[i * stride + j], j)
                });
                add_visible_pairs(self.0, terms, keys.panels, index, &mut dq[i * d..][..d]);
            }
        }
    }

    fn add_dk_dv(self, band: &Band, layout: Layout, scratch: &mut Scratch<f32>) {
        let (d, e) = (row_stride::<Simd, f32>(layout.d), row_stride::<Simd, f32>(layout.e));
        let (rows, stride) = (band.rows.len(), layout.key_block + PAIR_PAD);
        let Scratch { dk, dv, visible, pairs, .. } = scratch;
        let Pairs { p, ds, query_pairs, d_o_pairs, .. } = pairs;
        let depth = rows.div_ceil(2);
        if band.finite {
            let columns = band.columns.clone();
            add_columns(self.0, depth, p, stride, columns.clone(), d_o_pairs, dv, e);
            add_columns(self.0, depth, ds, stride, columns, query_pairs, dk, d);
            return;
        }
        for j in band.columns.clone() {
            let seen = |row: usize| row < rows && visible[row * layout.key_block + j];
            for (a, b, out, width) in
                [(&*p, &*d_o_pairs, &mut *dv, e), (&*ds, &*query_pairs, &mut *dk, d)]
            {
                let terms =
                    (0..depth).map(|i| (mask(seen(2 * i), seen(2 * i + 1)), a[i * stride + j], i));
                let index = |i, column| i * width + column;
                add_visible_pairs(self.0, terms, b, index, &mut out[j * width..][..width]);
            }
        }
    }
}

/// The bits of a pair whose halves are visible or not.
fn mask(low: bool, high: bool) -> Pair {
    (Pair::from(low) * 0xffff) | (Pair::from(high) * 0xffff_0000)
}

/// [`add_visible`](crate::products::add_visible) for pairs: terms are (mask, pair of weights, row). The
/// halves that nobody sees count as 0, as their weights are.
fn add_visible_pairs(
    dot: Bf16Dot,
    terms: impl Iterator<Item = (Pair, Pair, usize)> + Clone,
    b: &[Pair],
    index: impl Fn(usize, usize) -> usize,
    out: &mut [f32],
) {
    dot.inside(
        #[inline(always)]
        || {
            let lanes = lanes::<Simd, f32>();
            for (column, out) in (0..).step_by(lanes).zip(out.chunks_exact_mut(lanes)) {
                let mut sum = dot.zero();
                for (mask, weights, row) in terms.clone() {
                    let row = dot.load(&b[index(row, column)..]) & mask;
                    sum = dot.mul_add(dot.splat(weights), row, sum);
                }
                let [old] = load::<_, f32, 1>(dot.simd(), out);
                (old + sum).store_slice(out);
            }
        },
    )
}
