//! Handles of sequences, and what a cache knows of each.

use std::fmt;
use std::ops::Range;

use crate::options::NO_PAGE;

/// A sequence of one cache. Freeing it makes the handle, and all copies of it, invalid for ever: a
/// call with one is [`Error::UnknownSequence`](crate::Error::UnknownSequence).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId {
    pub(crate) cache: u32,
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

impl fmt::Debug for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sequence {}.{}.{}", self.cache, self.slot, self.generation)
    }
}

/// A place for a sequence.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Counts the sequences that lived here.
    pub(crate) generation: u32,
    pub(crate) live: bool,
    pub(crate) sequence: Sequence,
}

/// Where the rows of a sequence are.
#[derive(Debug, Default)]
pub(crate) struct Sequence {
    /// The page of each `page_size` rows; [`NO_PAGE`] once the window has passed it.
    pub(crate) pages: Vec<u32>,
    /// The same rows in full precision; [`NO_PAGE`] where they are not kept.
    pub(crate) raw: Vec<u32>,
    /// Rows in each layer.
    pub(crate) lens: Vec<usize>,
    /// Pages before this one have no raw page.
    pub(crate) raw_start: usize,
    /// Pages before this one came from the prefix index, and never had one here.
    pub(crate) adopted: usize,
    /// Pages before this one and after the sinks are released.
    pub(crate) window_start: usize,
    /// First page of the region (contiguous layout).
    pub(crate) region: u32,
}

impl Sequence {
    /// Rows that all layers have.
    pub(crate) fn shortest(&self) -> usize {
        self.lens.iter().copied().min().unwrap_or(0)
    }

    pub(crate) fn longest(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    /// Keeps the buffers for the next sequence in this slot.
    pub(crate) fn clear(&mut self) {
        self.pages.clear();
        self.raw.clear();
        self.lens.fill(0);
        self.raw_start = 0;
        self.adopted = 0;
        self.window_start = 0;
    }

    pub(crate) fn raw_page(&self, index: usize) -> Option<u32> {
        self.raw.get(index).copied().filter(|&page| page != NO_PAGE)
    }
}

/// Cuts rows of a sequence at the ends of its pages: (page, row in the page, row, how many).
pub(crate) fn parts(
    rows: Range<usize>,
    page_size: usize,
) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    let (mut index, mut row) = (rows.start / page_size, rows.start % page_size);
    let mut from = rows.start;
    std::iter::from_fn(move || {
        let len = (page_size - row).min(rows.end.saturating_sub(from));
        let part = (index, row, from, len);
        (index, row, from) = (index + 1, 0, from + len);
        (len > 0).then_some(part)
    })
}
