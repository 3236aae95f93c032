//! What can be wrong with a call.

use tensor_utils::{IsaError, ShapeError};
use thiserror::Error;

use crate::SeqId;

/// Why a call was refused. The cache is as it was before the call.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape that does not fit the configuration or the other arguments.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The query heads cannot be shared out evenly over the key/value heads.
    #[error(
        "`q` has {query_heads} heads and the cache has {key_heads}: \
         the number of query heads must be a multiple of the number of key/value heads"
    )]
    HeadsNotDivisible {
        /// Heads of `q`.
        query_heads: usize,
        /// Heads of the cache.
        key_heads: usize,
    },
    /// A field of a configuration, or an argument, with a value outside its range.
    #[error("`{option}` is {got}, expected {expected}")]
    Option {
        /// The field or argument.
        option: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A handle whose sequence was freed, or that another cache gave out.
    #[error("{0:?} is not a sequence of this cache: it was freed, or belongs to another cache")]
    UnknownSequence(SeqId),
    /// The same sequence twice in one call.
    #[error("{0:?} occurs twice in the batch")]
    DuplicateSequence(SeqId),
    /// More pages are needed than are free or reclaimable.
    #[error("{needed} more pages are needed and {available} of {total} are available")]
    OutOfPages {
        /// Pages that the call needs.
        needed: usize,
        /// Pages that are free or hold only reusable prefixes.
        available: usize,
        /// Pages of the cache.
        total: usize,
    },
    /// A contiguous cache has no region left.
    #[error("all {total} regions of the contiguous layout are taken")]
    OutOfRegions {
        /// Regions of the cache.
        total: usize,
    },
    /// A contiguous sequence would outgrow its region.
    #[error("{sequence:?} would have {rows} rows, its region holds {capacity}")]
    RegionFull {
        /// The sequence.
        sequence: SeqId,
        /// Rows it would have.
        rows: usize,
        /// Rows that its region holds.
        capacity: usize,
    },
    /// Quantised storage cannot hold NaN or infinity.
    #[error(
        "`{arg}` has {value} at row {row}, head {head}, element {element}: int8 and int4 storage holds finite numbers only"
    )]
    NotFinite {
        /// `k` or `v`.
        arg: &'static str,
        /// Row of the argument.
        row: usize,
        /// Head.
        head: usize,
        /// Element of the head.
        element: usize,
        /// The value.
        value: f32,
    },
    /// Some layers of the sequence have more rows than others: a step is half done.
    #[error(
        "{sequence:?} has {shortest} rows in one layer and {longest} in another: \
         append to all layers first, or truncate to {shortest}"
    )]
    UnevenLayers {
        /// The sequence.
        sequence: SeqId,
        /// Rows of the shortest layer.
        shortest: usize,
        /// Rows of the longest layer.
        longest: usize,
    },
    /// Rows that are kept quantised only, or not at all, would have to change.
    #[error(
        "rows {from}..{to} of {sequence:?} can no longer be changed: {reason}; \
         lengths from {exact_from} on are exact, and so is 0"
    )]
    Irreversible {
        /// The sequence.
        sequence: SeqId,
        /// First row concerned.
        from: usize,
        /// End of the rows concerned.
        to: usize,
        /// What became of them.
        reason: &'static str,
        /// Truncation to this length or more is exact.
        exact_from: usize,
    },
    /// A query sees a row that the cache's window has released: its position is before the last append.
    #[error(
        "row {row} of {sequence:?}, which the query at position {position} sees, was released by the window"
    )]
    Released {
        /// The sequence.
        sequence: SeqId,
        /// The row.
        row: usize,
        /// Position of the query.
        position: usize,
    },
    /// The layout cannot do this.
    #[error("{operation} needs the paged layout, this cache is contiguous")]
    NeedsPages {
        /// What was asked for.
        operation: &'static str,
    },
    /// An instruction set that is not there.
    #[error(transparent)]
    Isa(#[from] IsaError),
}

/// An option outside its range.
pub(crate) fn invalid(
    option: &'static str,
    expected: impl ToString,
    got: impl std::fmt::Debug,
) -> Error {
    Error::Option { option, expected: expected.to_string(), got: format!("{got:?}") }
}

/// The query heads, or as many as there may be at least where there are none.
pub(crate) fn expected_heads(query_heads: usize, key_heads: usize) -> Result<usize, Error> {
    if !query_heads.is_multiple_of(key_heads) {
        return Err(Error::HeadsNotDivisible { query_heads, key_heads });
    }
    Ok(query_heads.max(key_heads))
}
