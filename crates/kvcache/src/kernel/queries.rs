//! Queries as the kernel takes them: copies in the order of the plan, padded with zeros.

use ndarray::{ArrayView1, ArrayView3, Axis};
use tensor_utils::tile::pack::widen_row;
use tensor_utils::{Aligned, Element, Isa};
#[cfg(target_arch = "x86_64")]
use tensor_utils::{
    bf16,
    tile::pairs::{Bf16Dot, Pair},
};

use super::factors::PADDING;
use crate::Storage;
use crate::plan::Plan;

/// In what queries are multiplied by keys.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arithmetic {
    /// In `f32`, or in whole numbers that are made of it. The scale is in the copies of the queries.
    F32 { scale: f32 },
    /// In pairs of bf16 (see [`super::pairs`]), whose sums are multiplied by the scale.
    #[cfg(target_arch = "x86_64")]
    Bf16Pairs { dot: Bf16Dot, scale: f32 },
}

impl Arithmetic {
    /// That of queries `T` and keys kept as `keys` says.
    pub(crate) fn of<T: Element>(isa: Isa, keys: Storage, scale: f32) -> Self {
        #[cfg(target_arch = "x86_64")]
        if T::NAME == bf16::NAME
            && keys == Storage::Bf16
            && let Some(dot) = isa.bf16_dot()
        {
            return Self::Bf16Pairs { dot, scale };
        }
        let _ = (isa, keys);
        Self::F32 { scale }
    }

    /// What the score of a key with so many channels takes, in multiply-adds of `f32`.
    pub(crate) fn work(self, columns: usize) -> usize {
        match self {
            Self::F32 { .. } => columns,
            #[cfg(target_arch = "x86_64")]
            Self::Bf16Pairs { .. } => columns.div_ceil(2),
        }
    }

    /// Copies queries, of which `group` share a key head: `[key head][unit][head of the group]`, each
    /// [`depth`] numbers, or half as many pairs in the bits of the first ones.
    pub(crate) fn pack<T: Element<Acc = f32>>(
        self,
        q: &ArrayView3<'_, T>,
        plan: &Plan,
        group: usize,
        to: &mut Aligned<f32>,
    ) {
        let (_, heads, head_size) = q.dim();
        let (depth, units) = (depth(head_size), plan.units.len());
        to.grow(heads * units * depth);
        for head in 0..heads {
            for (index, unit) in plan.units.iter().enumerate() {
                let row = (head / group * units + index) * group + head % group;
                let to = &mut to[row * depth..][..depth];
                let q = q.index_axis(Axis(0), unit.row);
                match self {
                    Self::F32 { scale } => pack(q.row(head), scale, to),
                    #[cfg(target_arch = "x86_64")]
                    Self::Bf16Pairs { .. } => pack_pairs(q.row(head), bytemuck::cast_slice_mut(to)),
                }
            }
        }
    }
}

/// From one query to the next.
pub(crate) fn depth(head_size: usize) -> usize {
    head_size.next_multiple_of(PADDING)
}

/// A query times the scale, then zeros.
fn pack<T: Element<Acc = f32>>(q: ArrayView1<'_, T>, scale: f32, to: &mut [f32]) {
    let (to, padding) = to.split_at_mut(q.len());
    widen_row(q, to);
    to.iter_mut().for_each(|x| *x *= scale);
    padding.fill(0.0);
}

/// A query in pairs of neighbours, then zeros up to a whole number of chunks. A bf16 is the upper half of an
/// `f32`.
#[cfg(target_arch = "x86_64")]
fn pack_pairs<T: Element<Acc = f32>>(q: ArrayView1<'_, T>, to: &mut [Pair]) {
    let chunks = q.axis_chunks_iter(Axis(0), PADDING);
    for (q, to) in chunks.zip(to.chunks_exact_mut(PADDING / 2)) {
        let mut wide = [0.0; PADDING];
        widen_row(q, &mut wide);
        for (to, [low, high]) in to.iter_mut().zip(wide.as_chunks().0) {
            *to = low.to_bits() >> 16 | high.to_bits() & 0xffff_0000;
        }
    }
}
