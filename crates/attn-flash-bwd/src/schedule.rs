//! The order in which blocks of queries meet blocks of keys.
//!
//! `dq` of a query block adds up over key blocks, `dk` and `dv` of a key block over query blocks.
//! With `n` the larger number of blocks, step `t` pairs key block `j` with query block
//! `(j + t) mod n`: within a step no block occurs twice, so its pairs may run at the same time, and
//! every sum grows in the order of the steps, whoever computes what. That gives the same bits for
//! any number of threads, without partial sums to store, and splits a single head over threads.

use ndarray::{ArrayViewMut2, Axis};
use tensor_utils::tile::panel_width;
use tensor_utils::{Element, Float};

use crate::arithmetic::Products;
use crate::block::{Head, bands, load_rows, store_rows};
use crate::workspace::Slots;

/// A head and where its gradients add up.
pub(crate) struct Schedule<'a, 'h, 'c, P, T: Element> {
    pub(crate) head: &'a Head<'h, 'c, P, T>,
    /// `[N]`.
    pub(crate) delta: &'a [T::Acc],
    pub(crate) query_block: usize,
    pub(crate) slots: &'a Slots<T::Acc>,
}

/// Gradients of some consecutive blocks: rows of `dq`, and rows of `dk` and `dv`.
struct Blocks<'a, A> {
    dq: ArrayViewMut2<'a, A>,
    dk: ArrayViewMut2<'a, A>,
    dv: ArrayViewMut2<'a, A>,
}

impl<'a, A> Blocks<'a, A> {
    /// Cuts after `queries` rows of `dq` and `keys` rows of `dk`, `dv`.
    fn split(self, queries: usize, keys: usize) -> (Self, Self) {
        let (dq, dq_rest) = split_rows(self.dq, queries);
        let (dk, dk_rest) = split_rows(self.dk, keys);
        let (dv, dv_rest) = split_rows(self.dv, keys);
        (Self { dq, dk, dv }, Self { dq: dq_rest, dk: dk_rest, dv: dv_rest })
    }
}

/// Cuts after `rows` rows, or at the end.
fn split_rows<A>(
    array: ArrayViewMut2<'_, A>,
    rows: usize,
) -> (ArrayViewMut2<'_, A>, ArrayViewMut2<'_, A>) {
    let rows = rows.min(array.nrows());
    array.split_at(Axis(0), rows)
}

impl<P: Products<T>, T: Element> Schedule<'_, '_, '_, P, T> {
    /// Adds the head's gradients to `dq` `[N, D]`, `dk` `[M, D]` and `dv` `[M, E]`.
    pub(crate) fn run(
        &self,
        mut dq: ArrayViewMut2<'_, T::Acc>,
        mut dk: ArrayViewMut2<'_, T::Acc>,
        mut dv: ArrayViewMut2<'_, T::Acc>,
    ) {
        let key_block = self.head.key_block;
        let query_blocks = dq.nrows().div_ceil(self.query_block);
        let key_blocks = dk.nrows().div_ceil(key_block);
        let n = query_blocks.max(key_blocks);
        for t in 0..n {
            // Key blocks 0..n - t meet query blocks t..n, the others query blocks 0..t.
            let (dq_wrapped, dq) = split_rows(dq.view_mut(), t * self.query_block);
            let (dk, dk_wrapped) = split_rows(dk.view_mut(), (n - t) * key_block);
            let (dv, dv_wrapped) = split_rows(dv.view_mut(), (n - t) * key_block);
            let wrapped = Blocks { dq: dq_wrapped, dk: dk_wrapped, dv: dv_wrapped };
            rayon::join(
                || self.pairs(t, 0, n - t, Blocks { dq, dk, dv }),
                || self.pairs(0, n - t, t, wrapped),
            );
        }
    }

    /// Query blocks from `query` on with key blocks from `key` on, `count` pairs.
    fn pairs(&self, query: usize, key: usize, count: usize, blocks: Blocks<'_, T::Acc>) {
        if blocks.dq.is_empty() || blocks.dk.is_empty() {
            return;
        }
        if count == 1 {
            return self.pair(query * self.query_block, key * self.head.key_block, blocks);
        }
        let half = count / 2;
        let (left, right) = blocks.split(half * self.query_block, half * self.head.key_block);
        rayon::join(
            || self.pairs(query, key, half, left),
            || self.pairs(query + half, key + half, count - half, right),
        );
    }

    /// The query block that starts at `query` with the key block that starts at `key`.
    fn pair(&self, query: usize, key: usize, mut blocks: Blocks<'_, T::Acc>) {
        let head = self.head;
        let rows = query..query + blocks.dq.nrows();
        let keys = key..key + blocks.dk.nrows();
        if head.visible(rows.clone(), &keys).is_empty() {
            return;
        }
        let scratch = &mut *self.slots.slot();
        let (d, e) = (head.d(), head.e());
        let padded = keys.len().next_multiple_of(panel_width::<P::Simd, T::Acc>());
        let finite = head.pack_keys(&keys, scratch);
        load_rows(blocks.dk.view(), &mut scratch.dk, d);
        load_rows(blocks.dv.view(), &mut scratch.dv, e);
        scratch.dk[keys.len() * d..padded * d].fill(T::Acc::ZERO);
        scratch.dv[keys.len() * e..padded * e].fill(T::Acc::ZERO);
        for rows in bands(rows) {
            let first = rows.start - query;
            let dq = first..first + rows.len();
            if let Some(band) = head.band(rows, &keys, finite, Some(self.delta), scratch) {
                head.add_dk_dv(&band, scratch);
                head.add_dq(&band, scratch, blocks.dq.slice_axis_mut(Axis(0), dq.into()));
            }
        }
        store_rows(&scratch.dk, d, blocks.dk);
        store_rows(&scratch.dv, e, blocks.dv);
    }
}
