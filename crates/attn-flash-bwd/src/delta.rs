//! `delta_i = sum_j P_ij dP_ij`, in two ways, and the gradient of the sinks, which needs nothing
//! else.

use attn_flash::internals::Sizes;
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1};
use rayon::prelude::*;
use tensor_utils::{Element, Float};

use crate::arithmetic::Products;
use crate::block::{Head, bands};
use crate::run::Saved;
use crate::workspace::Slots;

/// `delta = rowsum(do * o)` (eq. 5), summed in f64; 0 in rows that saw nothing, whatever `do` is.
pub(crate) fn saved_output_delta<T: Element>(
    o: ArrayView2<'_, T>,
    d_o: ArrayView2<'_, T>,
    lse: ArrayView1<'_, T::Acc>,
    sink: Option<T::Acc>,
    delta: &mut [T::Acc],
) {
    let rows = delta.iter_mut().zip(lse).zip(o.outer_iter()).zip(d_o.outer_iter());
    for (((delta, &lse), o), d_o) in rows {
        let nothing_but_sink = lse == T::Acc::NEG_INFINITY || Some(lse) == sink;
        if nothing_but_sink && o.iter().all(|o| o.to_f64() == 0.0) {
            *delta = T::Acc::ZERO;
            continue;
        }
        let products = o.iter().zip(d_o).map(|(o, d_o)| o.to_f64() * d_o.to_f64());
        *delta = T::Acc::from_f64(products.fold(0.0, |sum, product| sum + product));
    }
}

/// The sum itself, block by block of keys: `P` and `dP` are computed for it and thrown away.
pub(crate) fn two_pass_delta<P: Products<T>, T: Element>(
    head: &Head<'_, '_, P, T>,
    query_block: usize,
    slots: &Slots<T::Acc>,
    delta: &mut [T::Acc],
) {
    delta.par_chunks_mut(query_block).enumerate().for_each(|(chunk, delta)| {
        let first = chunk * query_block;
        let rows = first..first + delta.len();
        let scratch = &mut *slots.slot();
        delta.fill(T::Acc::ZERO);
        for keys in head.key_blocks() {
            if head.visible(rows.clone(), &keys).is_empty() {
                continue;
            }
            let finite = head.pack_keys(&keys, scratch);
            for rows in bands(rows.clone()) {
                // With a delta of 0, dS is P * dP.
                let Some(band) = head.band(rows, &keys, finite, None, scratch) else { continue };
                for (i, row) in band.rows.clone().enumerate() {
                    let products = &scratch.dp[i * head.key_block..][band.columns.clone()];
                    let sum: f64 = products.iter().map(|x| x.to_f64()).sum();
                    delta[row - first] += T::Acc::from_f64(sum);
                }
            }
        }
    });
}

/// `dsink_h = -sum over batch and queries of exp(sink - lse) (delta - d_lse)` (eq. 10), in
/// f64.
pub(crate) fn sink_gradients<T: Element>(
    saved: &Saved<'_, '_, T>,
    sizes: Sizes,
    sinks: &[T::Acc],
    delta: &[T::Acc],
    mut dsinks: ArrayViewMut1<'_, T::Acc>,
) {
    for (head, (dsink, &sink)) in dsinks.iter_mut().zip(sinks).enumerate() {
        let mut sum = 0.0;
        let mut start = 0;
        for entry in 0..sizes.batch {
            let views = saved.entry(entry);
            let (queries, _) = saved.lengths(entry);
            let delta = &delta[start + head * queries..][..queries];
            start += sizes.heads * queries;
            if sink == T::Acc::NEG_INFINITY {
                continue;
            }
            for (query, (&lse, &delta)) in views.lse.row(head).iter().zip(delta).enumerate() {
                let d_lse = views.d_lse.map_or(0.0, |d_lse| d_lse[[head, query]].to_f64());
                sum -= (sink.to_f64() - lse.to_f64()).exp() * (delta.to_f64() - d_lse);
            }
        }
        *dsink = T::Acc::from_f64(sum);
    }
}
