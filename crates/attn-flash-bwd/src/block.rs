//! One band of query rows against one block of keys: `P`, `dS`, and what they add to the gradients.

use std::ops::Range;

use attn_flash::internals::{Call, Sequence};
use attn_flash::{Coverage, Tile};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};
use tensor_utils::simd::Simd;
use tensor_utils::tile::{panel_width, row_stride, tiles};
use tensor_utils::{Element, Float};

use crate::arithmetic::Products;
use crate::products::{softcap_gradient, softmax_gradient};
use crate::workspace::{BAND, Scratch};

/// One query head, seen through the options.
pub(crate) struct Head<'a, 'c, P, T: Element> {
    pub(crate) products: P,
    pub(crate) call: &'a Call<'c, T>,
    pub(crate) sequence: Sequence,
    /// Index of the query head.
    pub(crate) head: usize,
    /// `[N, D]`.
    pub(crate) q: ArrayView2<'a, T>,
    /// `[M, D]`.
    pub(crate) k: ArrayView2<'a, T>,
    /// `[M, E]`.
    pub(crate) v: ArrayView2<'a, T>,
    /// `[N, E]`.
    pub(crate) d_o: ArrayView2<'a, T>,
    /// `[N]`.
    pub(crate) lse: ArrayView1<'a, T::Acc>,
    /// `[N]`.
    pub(crate) d_lse: Option<ArrayView1<'a, T::Acc>>,
    /// Keys of a block.
    pub(crate) key_block: usize,
    /// What `dS` is the gradient of.
    pub(crate) target: Target,
}

/// Sizes of what is in the scratch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    /// Columns of queries and keys.
    pub(crate) d: usize,
    /// Columns of values.
    pub(crate) e: usize,
    /// Stride of the rows of `P` and `dS`, and the keys that a panel has room for.
    pub(crate) key_block: usize,
}

/// What `dS` is the gradient of: a score is `softcap(dot product) + bias`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The scaled dot product (eq. 7), for dq and dk.
    DotProduct,
    /// The score (eq. 6), for dbias.
    Score,
}

/// A band whose `P` and `dS` are in the scratch.
#[derive(Debug, Clone)]
pub(crate) struct Band {
    /// Query rows.
    pub(crate) rows: Range<usize>,
    /// Columns of the block that some row sees, as whole panels.
    pub(crate) columns: Range<usize>,
    /// Whether keys, queries and `do` are finite, so that masked pairs may be multiplied by 0.
    pub(crate) finite: bool,
}

impl<P: Products<T>, T: Element> Head<'_, '_, P, T> {
    /// Stride of rows of queries and keys in the scratch.
    pub(crate) fn d(&self) -> usize {
        row_stride::<P::Simd, T::Acc>(self.call.sizes.d)
    }

    /// Stride of rows of values in the scratch.
    pub(crate) fn e(&self) -> usize {
        row_stride::<P::Simd, T::Acc>(self.call.sizes.e)
    }

    /// The key blocks, as ranges of keys.
    pub(crate) fn key_blocks(&self) -> impl Iterator<Item = Range<usize>> + use<P, T> {
        let (keys, size) = (self.sequence.keys, self.key_block);
        (0..keys).step_by(size).map(move |start| start..keys.min(start + size))
    }

    /// The smallest interval of keys that holds all that `rows` may see of `keys`.
    pub(crate) fn visible(&self, rows: Range<usize>, keys: &Range<usize>) -> Range<usize> {
        let (mut start, mut end) = (keys.end, keys.start);
        for query in rows {
            let interval = self.call.interval(&self.sequence, query);
            if !interval.is_empty() {
                start = start.min(interval.start.max(keys.start));
                end = end.max(interval.end.min(keys.end));
            }
        }
        if start < end { start..end } else { keys.start..keys.start }
    }

    /// Strides and sizes of the blocks in the scratch.
    pub(crate) fn layout(&self) -> Layout {
        let (d, e) = (self.call.sizes.d, self.call.sizes.e);
        Layout { d, e, key_block: self.key_block }
    }

    /// Packs a block of keys and values; returns whether the keys are finite.
    pub(crate) fn pack_keys(&self, keys: &Range<usize>, scratch: &mut Scratch<T::Acc>) -> bool {
        let k = self.k.slice_axis(ndarray::Axis(0), keys.clone().into());
        let v = self.v.slice_axis(ndarray::Axis(0), keys.clone().into());
        self.products.pack_keys(k, v, self.call.scale, self.layout(), scratch)
    }

    /// Computes `P` and `dS` of a band against a packed block of keys, `delta` being that of the
    /// head's queries, 0 if `None`. Returns `None` if nobody sees anything.
    pub(crate) fn band(
        &self,
        rows: Range<usize>,
        keys: &Range<usize>,
        keys_finite: bool,
        delta: Option<&[T::Acc]>,
        scratch: &mut Scratch<T::Acc>,
    ) -> Option<Band> {
        let visible = self.visible(rows.clone(), keys);
        if visible.is_empty() || self.coverage(rows.clone(), &visible) == Coverage::Skip {
            return None;
        }
        let width = panel_width::<P::Simd, T::Acc>();
        let columns = (visible.start - keys.start) / width * width
            ..(visible.end - keys.start).next_multiple_of(width);
        let axis = ndarray::Axis(0);
        let q = self.q.slice_axis(axis, rows.clone().into());
        let d_o = self.d_o.slice_axis(axis, rows.clone().into());
        let (scale, layout) = (self.call.scale, self.layout());
        let queries_finite = self.products.pack_queries(q, d_o, scale, layout, scratch);
        let band = Band { rows: rows.clone(), columns, finite: keys_finite && queries_finite };
        for (first, height) in tiles::<P::Simd, T::Acc>(rows.len()) {
            match height {
                12 => self.tile::<12>(&band, first, keys, delta, scratch),
                6 => self.tile::<6>(&band, first, keys, delta, scratch),
                4 => self.tile::<4>(&band, first, keys, delta, scratch),
                2 => self.tile::<2>(&band, first, keys, delta, scratch),
                _ => self.tile::<1>(&band, first, keys, delta, scratch),
            }
        }
        Some(band)
    }

    fn coverage(&self, queries: Range<usize>, keys: &Range<usize>) -> Coverage {
        let (batch, head) = (self.sequence.batch, self.head);
        self.call.user_mask.coverage(Tile { batch, head, queries, keys: keys.clone() })
    }

    /// [`Self::band`] for the rows of one tile.
    fn tile<const ROWS: usize>(
        &self,
        band: &Band,
        first: usize,
        keys: &Range<usize>,
        delta: Option<&[T::Acc]>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        let (simd, call, stride) = (self.products.simd(), self.call, self.key_block);
        let rows = band.rows.start + first..band.rows.start + first + ROWS;
        let visible = self.visible(rows.clone(), keys);
        let coverage =
            if visible.is_empty() { Coverage::Skip } else { self.coverage(rows.clone(), &visible) };
        if coverage == Coverage::Skip {
            for i in 0..ROWS {
                let row = (first + i) * stride;
                let columns = row + band.columns.start..row + band.columns.end;
                scratch.scores[columns.clone()].fill(T::Acc::ZERO);
                scratch.dp[columns.clone()].fill(T::Acc::ZERO);
                scratch.visible[columns].fill(false);
            }
            return self.round::<ROWS>(band, first, scratch);
        }
        // Only the panels that the tile sees are computed; the rest of the band is 0.
        let width = panel_width::<P::Simd, T::Acc>();
        let columns = (visible.start - keys.start) / width * width
            ..(visible.end - keys.start).next_multiple_of(width);
        let (scale, layout) = (call.scale, self.layout());
        self.products.dot::<ROWS>(first, columns.clone(), scale, layout, scratch);

        let seen = visible.start - keys.start..visible.end - keys.start;
        let ask_user = coverage == Coverage::Partial;
        let scores = &mut scratch.scores[first * stride..][..ROWS * stride];
        let dp = &mut scratch.dp[first * stride..][..ROWS * stride];
        for (i, query) in rows.enumerate() {
            let scores = &mut scores[i * stride..][..stride];
            let dp = &mut dp[i * stride..][..stride];
            let capped = &mut scratch.capped[columns.clone()];
            if ask_user || call.adjusts_scores() {
                simd.vectorize(
                    #[inline(always)]
                    || {
                        call.cap_scores(simd, &mut scores[columns.clone()]);
                        if call.softcap.is_some() {
                            capped.copy_from_slice(&scores[columns.clone()]);
                        }
                        let (keys, scores) = (visible.clone(), &mut scores[seen.clone()]);
                        call.mask_scores(&self.sequence, self.head, query, keys, scores, ask_user);
                    },
                );
            }
            let interval = call.interval(&self.sequence, query);
            let cut = |key: usize| key.saturating_sub(keys.start).clamp(columns.start, columns.end);
            let (start, end) = (cut(interval.start), cut(interval.end));
            scores[columns.start..start].fill(T::Acc::NEG_INFINITY);
            scores[end.max(start)..columns.end].fill(T::Acc::NEG_INFINITY);

            if !band.finite {
                let flags = &mut scratch.visible[(first + i) * stride..][..stride];
                flags[band.columns.clone()].fill(false);
                for (flag, &score) in
                    flags[columns.clone()].iter_mut().zip(&scores[columns.clone()])
                {
                    *flag = score != T::Acc::NEG_INFINITY;
                }
            }
            let lse = self.lse[query];
            let d_lse = self.d_lse.map_or(T::Acc::ZERO, |d_lse| d_lse[query]);
            let delta = delta.map_or(T::Acc::ZERO, |delta| delta[query] - d_lse);
            let dp_columns = &mut dp[columns.clone()];
            softmax_gradient(
                simd,
                #[inline(always)]
                |x| self.products.exp(x),
                lse,
                delta,
                &mut scores[columns.clone()],
                dp_columns,
            );
            if let (Some(cap), Target::DotProduct) = (call.softcap, self.target) {
                softcap_gradient(simd, cap, capped, dp_columns);
            }
            for rest in [band.columns.start..columns.start, columns.end..band.columns.end] {
                scores[rest.clone()].fill(T::Acc::ZERO);
                dp[rest].fill(T::Acc::ZERO);
            }
        }
        self.round::<ROWS>(band, first, scratch);
    }

    /// `P` and `dS` of a tile as operands of the products with them.
    fn round<const ROWS: usize>(&self, band: &Band, first: usize, scratch: &mut Scratch<T::Acc>) {
        if self.target == Target::DotProduct {
            let (scale, layout) = (self.call.scale, self.layout());
            self.products.round(first..first + ROWS, band, scale, layout, scratch);
        }
    }

    /// Adds `dS K` to the band's rows of `dq` (eq. 8), `[rows of the band, D]`.
    pub(crate) fn add_dq(
        &self,
        band: &Band,
        scratch: &mut Scratch<T::Acc>,
        mut dq: ArrayViewMut2<'_, T::Acc>,
    ) {
        let (d, layout) = (self.d(), self.layout());
        if dq.ncols() == d
            && let Some(rows) = dq.as_slice_mut()
        {
            return self.products.add_dq(band, layout, scratch, rows);
        }
        let mut rows = std::mem::take(&mut scratch.dq);
        load_rows(dq.view(), &mut rows, d);
        self.products.add_dq(band, layout, scratch, &mut rows);
        store_rows(&rows, d, dq);
        scratch.dq = rows;
    }

    /// Adds `dS^T Q` and `P^T dO` to the block's rows in the scratch (eqs. 9 and 4).
    pub(crate) fn add_dk_dv(&self, band: &Band, scratch: &mut Scratch<T::Acc>) {
        self.products.add_dk_dv(band, self.layout(), scratch);
    }
}

/// `rows` in bands.
pub(crate) fn bands(rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    rows.step_by(BAND).map(move |start| start..end.min(start + BAND))
}

/// Copies rows into the scratch, `stride` apart, padded with 0.
pub(crate) fn load_rows<A: Float>(from: ArrayView2<'_, A>, to: &mut [A], stride: usize) {
    for (from, to) in from.outer_iter().zip(to.chunks_exact_mut(stride)) {
        match from.to_slice() {
            Some(from) => to[..from.len()].copy_from_slice(from),
            None => to.iter_mut().zip(from).for_each(|(to, &x)| *to = x),
        }
        to[from.len()..].fill(A::ZERO);
    }
}

/// Copies rows back from the scratch.
pub(crate) fn store_rows<A: Float>(from: &[A], stride: usize, mut to: ArrayViewMut2<'_, A>) {
    for (from, mut to) in from.chunks_exact(stride).zip(to.outer_iter_mut()) {
        match to.as_slice_mut() {
            Some(to) => to.copy_from_slice(&from[..to.len()]),
            None => to.iter_mut().zip(from).for_each(|(to, &x)| *to = x),
        }
    }
}
