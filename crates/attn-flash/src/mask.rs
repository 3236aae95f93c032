//! Masks: the trait for masks in code, and the ancestor mask of a token tree.

use std::fmt::Debug;
use std::ops::Range;

use tensor_utils::{Float, try_vec};

use crate::Error;

/// A mask in code, compiled into the kernel.
///
/// ```
/// use attn_flash::{Coverage, Mask, Pair, Tile};
///
/// /// Documents packed one after the other: nobody looks into another document.
/// #[derive(Debug)]
/// struct Documents(Vec<usize>);
///
/// impl Mask for Documents {
///     fn visible(&self, at: Pair) -> bool {
///         self.0[at.query] == self.0[at.key]
///     }
///
///     // Documents are in order, so the first and the last of a tile tell about all of it.
///     fn coverage(&self, tile: Tile) -> Coverage {
///         let (queries, keys) = (&self.0[tile.queries], &self.0[tile.keys]);
///         match (queries, keys) {
///             ([q0, .., q1], [k0, .., k1]) if q1 < k0 || k1 < q0 => Coverage::Skip,
///             ([q0, .., q1], [k0, .., k1]) if q0 == q1 && k0 == k1 && q0 == k0 => Coverage::Full,
///             _ => Coverage::Partial,
///         }
///     }
/// }
/// ```
pub trait Mask: Debug + Sync {
    /// Whether the query sees the key. Must be the same at every call.
    fn visible(&self, at: Pair) -> bool;

    /// What is visible in a whole tile: [`Coverage::Skip`] tiles cost nothing, in
    /// [`Coverage::Full`] tiles nobody asks [`Mask::visible`]. Must agree with it. `Partial` is
    /// always right and the default.
    fn coverage(&self, tile: Tile) -> Coverage {
        let _ = tile;
        Coverage::Partial
    }
}

/// A query and a key, by index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// Batch entry, or sequence of a packed batch.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query, `0..N`.
    pub query: usize,
    /// Key, `0..M`.
    pub key: usize,
}

/// A rectangle of queries and keys; neither range is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tile {
    /// Batch entry, or sequence of a packed batch.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Queries, within `0..N`.
    pub queries: Range<usize>,
    /// Keys, within `0..M`.
    pub keys: Range<usize>,
}

/// How much of a tile is visible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// Nothing.
    Skip,
    /// Everything.
    Full,
    /// Something, or not known.
    Partial,
}

/// The mask that masks nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NoMask;

impl Mask for NoMask {
    #[inline(always)]
    fn visible(&self, _: Pair) -> bool {
        true
    }

    #[inline(always)]
    fn coverage(&self, _: Tile) -> Coverage {
        Coverage::Full
    }
}

/// A [`Mask`] as the kernel calls it: once a tile, and once a row of a tile. The kernel is compiled
/// without knowing the mask, the loop over the pairs of a row with it.
pub trait RowMask<A>: Debug + Sync {
    /// See [`Mask::coverage`].
    fn coverage(&self, tile: Tile) -> Coverage;

    /// Sets the scores of the keys `keys` that the query does not see to `-inf`.
    fn hide(&self, batch: usize, head: usize, query: usize, keys: Range<usize>, scores: &mut [A]);
}

impl<A: Float, M: Mask> RowMask<A> for M {
    fn coverage(&self, tile: Tile) -> Coverage {
        Mask::coverage(self, tile)
    }

    fn hide(&self, batch: usize, head: usize, query: usize, keys: Range<usize>, scores: &mut [A]) {
        for (score, key) in scores.iter_mut().zip(keys) {
            if !self.visible(Pair { batch, head, query, key }) {
                *score = A::NEG_INFINITY;
            }
        }
    }
}

impl<M: Mask + ?Sized> Mask for &M {
    #[inline(always)]
    fn visible(&self, at: Pair) -> bool {
        (**self).visible(at)
    }

    #[inline(always)]
    fn coverage(&self, tile: Tile) -> Coverage {
        (**self).coverage(tile)
    }
}

/// Which nodes of a token tree are ancestors of which, as bits.
///
/// The tree that speculative decoding verifies in one call (Miao et al., 2023, SpecInfer, section
/// 4.2): each node attends to the path from the root to itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AncestorMask {
    nodes: usize,
    words_per_row: usize,
    bits: Vec<u64>,
}

impl AncestorMask {
    /// From the parent of each node, `-1` for a root. A parent comes before its children.
    ///
    /// # Errors
    /// [`Error::Option`] if a parent is not an earlier node or `-1`, [`Error::Shape`] if there is no
    /// memory for the square of the number of nodes in bits.
    pub fn from_parents(parents: &[i64]) -> Result<Self, Error> {
        let nodes = parents.len();
        let words_per_row = nodes.div_ceil(64);
        let mut bits: Vec<u64> = try_vec("tree", &[nodes, words_per_row])?;
        for (node, &parent) in parents.iter().enumerate() {
            let (before, row) = bits.split_at_mut(node * words_per_row);
            match usize::try_from(parent) {
                Ok(parent) if parent < node => {
                    row[..words_per_row]
                        .copy_from_slice(&before[parent * words_per_row..][..words_per_row]);
                }
                Err(_) if parent == -1 => {}
                _ => {
                    return Err(Error::Option {
                        option: "tree",
                        expected: format!("an earlier node or -1 as the parent of node {node}"),
                        got: parent.to_string(),
                    });
                }
            }
            row[node / 64] |= 1 << (node % 64);
        }
        Ok(Self { nodes, words_per_row, bits })
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.nodes
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes == 0
    }

    /// Whether `ancestor` lies on the path from the root to `node`, both ends included; `false`
    /// for nodes that do not exist.
    #[inline]
    pub fn contains(&self, node: usize, ancestor: usize) -> bool {
        node < self.nodes
            && ancestor < self.nodes
            && self.bits[node * self.words_per_row + ancestor / 64] >> (ancestor % 64) & 1 == 1
    }
}
