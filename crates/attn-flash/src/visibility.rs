//! Which keys a query sees, and what the options make of a score.
//!
//! Causality, window and key length leave one interval of keys to a query; it is found without
//! looking at scores, so tiles outside cost nothing. The other masks are read pair by pair.

use std::ops::Range;

use ndarray::{ArrayView1, ArrayView4, Axis};
use tensor_utils::simd::{Simd, SimdBase, SimdFrom};
use tensor_utils::tile::lanes;
use tensor_utils::{Element, Float};

use crate::call::{Call, Sequence};

impl<T: Element> Call<'_, T> {
    /// The keys that query `query` may see as far as position and length go; empty ranges are
    /// `0..0`.
    pub fn interval(&self, sequence: &Sequence, query: usize) -> Range<usize> {
        // So wide that no position and no window overflows.
        let position = i128::from(sequence.offset) + query as i128;
        let mut end = sequence.key_length as i128;
        if self.causal {
            end = end.min(position + 1);
        }
        if let Some(right) = self.window.right {
            end = end.min(position + right as i128 + 1);
        }
        if self.tree.is_some() {
            end = end.min((sequence.keys - sequence.queries + query + 1) as i128);
        }
        let start = match self.window.left {
            Some(left) => (position - left as i128).max(0),
            None => 0,
        };
        if start < end { start as usize..end as usize } else { 0..0 }
    }

    /// Whether there is more to a score than scale and interval.
    pub fn adjusts_scores(&self) -> bool {
        self.softcap.is_some()
            || self.bias.is_some()
            || self.alibi_slopes.is_some()
            || self.mask.is_some()
            || self.tree.is_some()
    }

    /// Turns scaled dot products into `c tanh(s / c)`, if there is a softcap.
    #[inline(always)]
    pub fn cap_scores<S: Simd>(&self, simd: S, scores: &mut [T::Acc]) {
        if let Some(cap) = self.softcap {
            softcap(simd, cap, scores);
        }
    }

    /// Adds bias and ALiBi to the capped scores of one query and the keys `keys`, and sets them to
    /// `-inf` where the pair is masked. `ask_user` says whether to ask the user mask.
    #[inline(always)]
    pub fn mask_scores(
        &self,
        sequence: &Sequence,
        head: usize,
        query: usize,
        keys: Range<usize>,
        scores: &mut [T::Acc],
        ask_user: bool,
    ) {
        let batch = sequence.batch;
        if let Some(bias) = &self.bias {
            add_bias(pairs(bias, batch, head, query, &keys), scores);
        }
        if let Some(slopes) = &self.alibi_slopes {
            let position = sequence.offset.saturating_add(query as i64);
            add_alibi(slopes[[batch, head]], position, keys.clone(), scores);
        }
        if let Some(mask) = &self.mask {
            hide(scores, pairs(mask, batch, head, query, &keys).iter().copied());
        }
        if let Some(tree) = self.tree {
            let context = sequence.keys - sequence.queries;
            let visible = |key| key < context || tree.contains(query, key - context);
            hide(scores, keys.clone().map(visible));
        }
        if ask_user {
            self.user_mask.hide(batch, head, query, keys, scores);
        }
    }
}

/// The entries of a `[B, H, N, M]` array for one query and some keys.
#[inline(always)]
fn pairs<'a, T>(
    array: &ArrayView4<'a, T>,
    batch: usize,
    head: usize,
    query: usize,
    keys: &Range<usize>,
) -> ArrayView1<'a, T> {
    let row = array
        .index_axis_move(Axis(0), batch)
        .index_axis_move(Axis(0), head)
        .index_axis_move(Axis(0), query);
    row.slice_axis_move(Axis(0), keys.clone().into())
}

/// `s = c tanh(s / c)`.
#[inline(always)]
fn softcap<S: Simd, A: Float>(simd: S, cap: A, scores: &mut [A]) {
    let lanes = lanes::<S, A>();
    let cap = A::Vector::<S>::simd_from(simd, cap);
    let (whole, rest) = scores.split_at_mut(scores.len() / lanes * lanes);
    for chunk in whole.chunks_exact_mut(lanes) {
        let s = A::Vector::<S>::from_slice(simd, chunk);
        (A::tanh_vector(simd, s / cap) * cap).store_slice(chunk);
    }
    // The same arithmetic for the rest, so that bits do not depend on where a range ends.
    for s in rest {
        let x = A::Vector::<S>::simd_from(simd, *s);
        *s = (A::tanh_vector(simd, x / cap) * cap)[0];
    }
}

/// Adds the bias; `-inf` masks, also where the score is NaN.
#[inline(always)]
fn add_bias<T: Element>(bias: ArrayView1<'_, T>, scores: &mut [T::Acc]) {
    let add = |s: &mut T::Acc, bias: &T| {
        let bias = bias.to_acc();
        *s = if bias == T::Acc::NEG_INFINITY { bias } else { *s + bias };
    };
    match bias.to_slice() {
        Some(bias) => scores.iter_mut().zip(bias).for_each(|(s, bias)| add(s, bias)),
        None => scores.iter_mut().zip(bias).for_each(|(s, bias)| add(s, bias)),
    }
}

/// Subtracts `slope` times the distance between query and key.
#[inline(always)]
fn add_alibi<A: Float>(slope: A, position: i64, keys: Range<usize>, scores: &mut [A]) {
    for (s, key) in scores.iter_mut().zip(keys) {
        let distance = (key as i64).abs_diff(position);
        *s += -slope * A::from_f64(distance as f64);
    }
}

/// `-inf` where not visible.
#[inline(always)]
fn hide<A: Float>(scores: &mut [A], visible: impl Iterator<Item = bool>) {
    for (s, visible) in scores.iter_mut().zip(visible) {
        *s = if visible { *s } else { A::NEG_INFINITY };
    }
}
