//! The two layouts of a batch, and a batch entry in either.

use ndarray::{ArrayView3, ArrayView4, Axis};

/// Where queries, keys and values of the batch entries are.
#[derive(Debug)]
pub enum Batch<'a, T> {
    /// All entries of the same lengths.
    Dense {
        /// `[B, H, N, D]`.
        q: ArrayView4<'a, T>,
        /// `[B, G, M, D]`.
        k: ArrayView4<'a, T>,
        /// `[B, G, M, E]`.
        v: ArrayView4<'a, T>,
    },
    /// Sequences one after the other.
    Packed {
        /// `[total queries, H, D]`.
        q: ArrayView3<'a, T>,
        /// `[total keys, G, D]`.
        k: ArrayView3<'a, T>,
        /// `[total keys, G, E]`.
        v: ArrayView3<'a, T>,
        /// Where the queries of each sequence begin, and the total.
        query_offsets: &'a [usize],
        /// Where the keys of each sequence begin, and the total.
        key_offsets: &'a [usize],
    },
}

impl<T> Batch<'_, T> {
    /// Queries and keys of an entry.
    pub fn lengths(&self, entry: usize) -> (usize, usize) {
        match self {
            Self::Dense { q, k, .. } => (q.dim().2, k.dim().2),
            Self::Packed { query_offsets, key_offsets, .. } => (
                query_offsets[entry + 1] - query_offsets[entry],
                key_offsets[entry + 1] - key_offsets[entry],
            ),
        }
    }

    /// Queries `[H, N, D]`, keys `[G, M, D]` and values `[G, M, E]` of an entry.
    pub fn entry(&self, entry: usize) -> [ArrayView3<'_, T>; 3] {
        match self {
            Self::Dense { q, k, v } => [q, k, v].map(|array| array.index_axis(Axis(0), entry)),
            Self::Packed { q, k, v, query_offsets, key_offsets } => [
                sequence(q, query_offsets, entry),
                sequence(k, key_offsets, entry),
                sequence(v, key_offsets, entry),
            ],
        }
    }
}

/// One sequence of a packed array, heads first, as in a dense batch.
pub fn sequence<'a, T>(
    array: &'a ArrayView3<'_, T>,
    offsets: &[usize],
    entry: usize,
) -> ArrayView3<'a, T> {
    let range = offsets[entry]..offsets[entry + 1];
    array.slice_axis(Axis(0), range.into()).permuted_axes([1, 0, 2])
}
