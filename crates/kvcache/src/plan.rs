//! How a call is divided: into chunks of keys, and the queries of sequences that share the pages of a
//! chunk. None of it changes the result.

use std::ops::Range;

use crate::cache::Cache;
use crate::kernel::task::{CHUNK, partial_size};
use crate::{Queries, Rows, Window};

/// Rows of a task: their outputs and scores stay in the second-level cache.
const TASK_ROWS: usize = 256;
/// Floats of all results of a wave, unless one task has more.
const WAVE: usize = 4 << 20;

/// Queries of one sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) slot: usize,
    /// Rows of the sequence.
    pub(crate) len: usize,
    /// Rows before the tree; without a tree, all.
    pub(crate) base: usize,
    /// The tree among those of all entries.
    parents: (usize, usize),
    /// First query among those of all entries.
    first: usize,
    queries: usize,
}

impl Entry {
    pub(crate) fn is_tree(&self) -> bool {
        self.base < self.len
    }

    pub(crate) fn parents(&self) -> Range<usize> {
        self.parents.0..self.parents.1
    }
}

/// One query.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit {
    pub(crate) entry: usize,
    /// Which query of the entry; for a tree, the node.
    pub(crate) query: usize,
    /// Which query of the call.
    pub(crate) row: usize,
    pub(crate) position: usize,
}

/// Units that share the pages of a chunk, for one key head.
#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) head: usize,
    pub(crate) chunk: usize,
    pub(crate) units: Range<usize>,
    /// Where its result begins.
    pub(crate) partial: usize,
}

/// The tasks of a call.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) entries: Vec<Entry>,
    pub(crate) units: Vec<Unit>,
    pub(crate) parents: Vec<i64>,
    pub(crate) tasks: Vec<Task>,
    /// Floats of the results of `tasks`.
    pub(crate) floats: usize,
}

impl Plan {
    /// Lists the queries, those of sequences with common beginnings next to each other.
    pub(crate) fn list(&mut self, cache: &Cache, layer: usize, batch: &[Queries<'_>]) {
        self.entries.clear();
        self.units.clear();
        self.parents.clear();
        let mut first = 0;
        for queries in batch {
            let slot = queries.seq.slot as usize;
            let len = cache.slots[slot].sequence.lens[layer];
            let start = self.parents.len();
            let mut base = len;
            if let Rows::Tree(parents) = queries.rows {
                self.parents.extend_from_slice(parents);
                base -= parents.len();
            }
            let parents = (start, self.parents.len());
            let queries = queries.len();
            self.entries.push(Entry { slot, len, base, parents, first, queries });
            first += queries;
        }
        let table = |entry: &Entry| {
            let sequence = &cache.slots[entry.slot].sequence;
            (sequence.pages.as_slice(), sequence.raw.as_slice())
        };
        self.entries.sort_unstable_by(|a, b| {
            table(a).cmp(&table(b)).then(a.is_tree().cmp(&b.is_tree())).then(a.first.cmp(&b.first))
        });
        for (index, entry) in self.entries.iter().enumerate() {
            let parents = &self.parents[entry.parents()];
            for query in 0..entry.queries {
                let position = if entry.is_tree() {
                    // A parent comes before its children, so its position is known.
                    match usize::try_from(parents[query]) {
                        Ok(parent) => {
                            let own = self.units.len() - query;
                            self.units[own + parent].position + 1
                        }
                        Err(_) => entry.base,
                    }
                } else {
                    entry.len - entry.queries + query
                };
                self.units.push(Unit { entry: index, query, row: entry.first + query, position });
            }
        }
    }

    /// How many units from `start` on to do at once, so that their results stay small.
    pub(crate) fn wave(&self, start: usize, cache: &Cache, group: usize) -> Range<usize> {
        let longest = self.units[start..].iter().map(|unit| unit.position).max().unwrap_or(0);
        let row = partial_size(cache.config.value_size) * group * cache.config.key_heads;
        let units = WAVE / (row * (longest / CHUNK + 1));
        let units = units.max(TASK_ROWS.div_ceil(group));
        start..self.units.len().min(start + units)
    }

    /// The tasks of some units, chunk by chunk.
    pub(crate) fn divide(
        &mut self,
        cache: &Cache,
        group: usize,
        wave: Range<usize>,
        windows: [Option<Window>; 2],
    ) {
        self.tasks.clear();
        self.floats = 0;
        let limit = (TASK_ROWS / group).max(1);
        let row = partial_size(cache.config.value_size) * group;
        let longest = self.units[wave.clone()].iter().map(|unit| unit.position).max().unwrap_or(0);
        for chunk in 0..=longest / CHUNK {
            let mut start = wave.start;
            while start < wave.end {
                if !sees_chunk(&self.units[start], chunk, windows) {
                    start += 1;
                    continue;
                }
                let mut end = start + 1;
                while end < wave.end
                    && end - start < limit
                    && sees_chunk(&self.units[end], chunk, windows)
                    && self.share(cache, start, end, chunk)
                {
                    end += 1;
                }
                for head in 0..cache.config.key_heads {
                    self.tasks.push(Task { head, chunk, units: start..end, partial: self.floats });
                    // The next result begins at a line of the caches.
                    self.floats += ((end - start) * row).next_multiple_of(16);
                }
                start = end;
            }
        }
    }

    /// Whether two units have the same pages in a chunk.
    fn share(&self, cache: &Cache, a: usize, b: usize, chunk: usize) -> bool {
        let (a, b) = (self.units[a].entry, self.units[b].entry);
        if a == b {
            return true;
        }
        let page_size = cache.config.page_size;
        let (a, b) = (&self.entries[a], &self.entries[b]);
        let end = (chunk + 1) * CHUNK;
        // A tree that reaches into the chunk is looked at alone.
        if a.is_tree() && a.base < end || b.is_tree() && b.base < end {
            return false;
        }
        let pages = |entry: &Entry| {
            let sequence = &cache.slots[entry.slot].sequence;
            let range = chunk * CHUNK / page_size..end.min(entry.len).div_ceil(page_size);
            let raw = if sequence.raw.is_empty() { &[][..] } else { &sequence.raw[range.clone()] };
            (&sequence.pages[range], raw)
        };
        pages(a) == pages(b)
    }
}

/// Whether some key of the chunk can be visible.
fn sees_chunk(unit: &Unit, chunk: usize, windows: [Option<Window>; 2]) -> bool {
    let (start, end) = (chunk * CHUNK, (chunk + 1) * CHUNK);
    start <= unit.position
        && windows.iter().flatten().all(|w| w.start(unit.position) < end || start < w.sinks)
}
