//! One task: the queries of sequences that share their pages, over one chunk of keys and one head.

mod scores;
mod tree;
mod values;

use std::ops::Range;

use tensor_utils::Aligned;
use tensor_utils::simd::{Simd, SimdBase};

use super::ahead::{AHEAD, Ahead};
use super::factors::Factors;
use super::queries::{Arithmetic, depth};
use super::softmax::{cap_scores, rescale, weigh};
use super::tile::lanes;
use crate::cache::Cache;
use crate::form::Form;
use crate::options::NO_PAGE;
use crate::plan::{Entry, Task, Unit};
use crate::sequence::{Sequence, parts};
use crate::{Storage, Window};

/// Keys between two corrections of the running maximum; blocks begin at its multiples.
pub(crate) const BLOCK: usize = 128;
/// Keys whose sums are merged with those of the keys before; chunks begin at its multiples.
pub(crate) const CHUNK: usize = 1024;
/// Stride of rows of scores: the last vector of a page may reach beyond the block.
pub(crate) const SCORES: usize = BLOCK + 16;

/// A call, as its tasks see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) cache: &'a Cache,
    pub(crate) layer: usize,
    /// Query heads that share a key head.
    pub(crate) group: usize,
    pub(crate) softcap: Option<f32>,
    pub(crate) windows: [Option<Window>; 2],
    pub(crate) entries: &'a [Entry],
    pub(crate) units: &'a [Unit],
    /// Parents of the trees, one tree after the other.
    pub(crate) parents: &'a [i64],
    pub(crate) arithmetic: Arithmetic,
    /// As [`Arithmetic::pack`] has copied them.
    pub(crate) queries: &'a [f32],
}

/// Keys of a block that lie in one page.
#[derive(Debug, Clone, Copy, Default)]
struct Fragment {
    /// Which page of the sequence.
    index: usize,
    page: u32,
    /// [`NO_PAGE`] if the page is kept quantised only, or not quantised at all.
    raw: u32,
    /// First row within the page.
    row: usize,
    /// First key, from the beginning of the block.
    key: usize,
    len: usize,
}

/// Keys of a block that a unit sees: three ranges in order, from the beginning of the block; those that
/// are empty are `(0, 0)`.
type Seen = [(usize, usize); 3];

/// Scratch of one thread, grown as needed.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    scores: Aligned<f32>,
    /// Scores of all rows of a tree, before they are put in the order of each path.
    tree: Aligned<f32>,
    l: Aligned<f32>,
    correction: Aligned<f32>,
    seen: Vec<Seen>,
    fragments: Vec<Fragment>,
    ahead: Ahead,
    factors: Factors,
    /// Weights from the beginning of a block of codes on.
    aligned: Aligned<f32>,
    path: Vec<usize>,
}

impl Scratch {
    pub(crate) fn bytes(&self) -> usize {
        self.scores.bytes()
            + self.tree.bytes()
            + self.l.bytes()
            + self.correction.bytes()
            + self.aligned.bytes()
            + self.factors.bytes()
            + 8 * self.path.capacity()
            + self.ahead.bytes()
            + size_of::<Seen>() * self.seen.capacity()
            + size_of::<Fragment>() * self.fragments.capacity()
    }
}

/// Floats of a task's result for a row: `o`, `m` and `l`.
pub(crate) fn partial_size(value_size: usize) -> usize {
    value_size.next_multiple_of(16) + 2
}

/// Computes a task; `out` is `o` `[rows][E rounded up to 16]`, then `m` and `l` of all rows. `next` is
/// the task that will likely follow on this thread.
pub(crate) fn run<S: Simd>(
    simd: S,
    cx: &Context<'_>,
    task: &Task,
    next: Option<&Task>,
    scratch: &mut Scratch,
    out: &mut [f32],
) {
    let rows = task.units.len() * cx.group;
    let e = cx.cache.config.value_size.next_multiple_of(16);
    let (o, rest) = out.split_at_mut(rows * e);
    let (m, l) = rest.split_at_mut(rows);
    o.fill(0.0);
    m.fill(f32::NEG_INFINITY);
    scratch.scores.grow(rows * SCORES);
    scratch.l.grow(rows * 16);
    scratch.correction.grow(rows);
    let units = task.units.len().max(scratch.seen.len());
    scratch.seen.resize(units, Seen::default());
    scratch.l[..rows * 16].fill(0.0);

    let depth = depth(cx.cache.config.head_size);
    let first = (task.head * cx.units.len() + task.units.start) * cx.group;
    let queries = &cx.queries[first * depth..][..rows * depth];
    let mut state = State { simd, cx, task, next, queries, depth, e, rows, scratch, o, m };
    state.add_chunk();

    let lanes = lanes::<S>();
    for (l, vector) in l.iter_mut().zip(scratch.l.chunks_exact(16)) {
        *l = S::f32s::from_slice(simd, &vector[..lanes]).reduce_sum();
    }
}

/// A task in the middle.
struct State<'a, 'c, S> {
    simd: S,
    cx: &'a Context<'c>,
    task: &'a Task,
    next: Option<&'a Task>,
    queries: &'a [f32],
    /// Stride of queries.
    depth: usize,
    /// Stride of outputs.
    e: usize,
    rows: usize,
    scratch: &'a mut Scratch,
    o: &'a mut [f32],
    m: &'a mut [f32],
}

impl<'c, S: Simd> State<'_, 'c, S> {
    fn units(&self) -> &[Unit] {
        &self.cx.units[self.task.units.clone()]
    }

    /// All units of a task have the pages of the first.
    fn entry(&self) -> &Entry {
        &self.cx.entries[self.units()[0].entry]
    }

    fn add_chunk(&mut self) {
        let start = self.task.chunk * CHUNK;
        let last = self.units().iter().map(|unit| unit.position).max().unwrap_or(0);
        let plain = self.entry().base;
        let mut tree_from = None;
        let end = (start + CHUNK).min(last + 1);
        for block in (start..end).step_by(BLOCK) {
            if block + BLOCK <= plain || !self.entry().is_tree() {
                let next = block + BLOCK;
                self.add_block(block, (next < end).then_some(next));
            } else {
                let from = *tree_from.get_or_insert(block);
                self.add_tree_block(block, from);
            }
        }
    }

    /// The keys of a block that each unit sees; the range that covers them all.
    fn look(&mut self, block: usize) -> Range<usize> {
        let (mut first, mut end) = (BLOCK, 0);
        let cx = self.cx;
        for (unit, seen) in cx.units[self.task.units.clone()].iter().zip(&mut self.scratch.seen) {
            *seen = seen_keys(cx.windows, unit.position, block);
            for &(a, b) in seen.iter().filter(|(a, b)| a < b) {
                first = first.min(a);
                end = end.max(b);
            }
        }
        first..end
    }

    /// The fragments of keys `keys` (positions in the cache), counted from `origin`.
    fn cut(&mut self, keys: Range<usize>, origin: usize) {
        let sequence = &self.cx.cache.slots[self.entry().slot].sequence;
        let Scratch { fragments, .. } = &mut *self.scratch;
        fragments.clear();
        for (index, row, key, len) in parts(keys, self.cx.cache.config.page_size) {
            let raw = sequence.raw_page(index).unwrap_or(NO_PAGE);
            let fragment =
                Fragment { index, page: sequence.pages[index], raw, row, key: key - origin, len };
            // Pages that the window has released hold no key that anybody sees.
            if fragment.page != NO_PAGE {
                fragments.push(fragment);
            }
        }
    }

    /// Whether a unit reads the fragment quantised, where storage is.
    fn is_coded(&self, fragment: &Fragment, unit: &Unit) -> bool {
        let entry = &self.cx.entries[unit.entry];
        let before_tree = (fragment.index + 1) * self.cx.cache.config.page_size <= entry.base;
        fragment.raw == NO_PAGE
            || (before_tree || !entry.is_tree())
                && self.cx.cache.is_coded(fragment.index, unit.position)
    }

    /// The units from `first` on that read the fragment as unit `first` does, and see the same.
    fn alike(
        &self,
        fragment: &Fragment,
        first: usize,
        storage: Storage,
        by_sight: bool,
    ) -> (usize, bool) {
        let units = self.units();
        let coded = storage.is_quantised() && self.is_coded(fragment, &units[first]);
        let same = |u: usize| {
            (!storage.is_quantised() || self.is_coded(fragment, &units[u]) == coded)
                && (!by_sight || self.scratch.seen[u] == self.scratch.seen[first])
        };
        let end = (first + 1..units.len()).find(|&u| !same(u)).unwrap_or(units.len());
        (end, coded)
    }

    /// Keys `block..block + BLOCK` for all rows. Block `next` follows, or the next task.
    fn add_block(&mut self, block: usize, next: Option<usize>) {
        let seen = self.look(block);
        if seen.is_empty() {
            return;
        }
        self.cut(block + seen.start..block + seen.end, block);
        self.expect(next);
        let mut scores = std::mem::take(&mut self.scratch.scores);
        self.score(&mut scores, SCORES);
        self.finish_scores(&mut scores);
        self.scratch.scores = scores;
        for f in 0..self.scratch.fragments.len() {
            let fragment = self.scratch.fragments[f];
            let mut unit = 0;
            while unit < self.task.units.len() {
                let (end, coded) = self.alike(&fragment, unit, self.cx.cache.values.storage, true);
                for (a, b) in self.scratch.seen[unit] {
                    let (a, b) = (a.max(fragment.key), b.min(fragment.key + fragment.len));
                    if a < b {
                        let row = fragment.row + a - fragment.key;
                        let part = Fragment { row, key: a, len: b - a, ..fragment };
                        self.add_values(&part, unit..end, coded);
                    }
                }
                unit = end;
            }
        }
    }

    /// Caps and masks the scores of a block, turns them into weights and rescales the output.
    fn finish_scores(&mut self, scores: &mut [f32]) {
        let Self { simd, cx, rows, .. } = *self;
        let scores = &mut scores[..rows * SCORES];
        if let Some(cap) = cx.softcap {
            cap_scores(simd, scores, cap);
        }
        for (unit, scores) in scores.chunks_exact_mut(cx.group * SCORES).enumerate() {
            let seen = self.scratch.seen[unit];
            if seen.contains(&(0, BLOCK)) {
                continue;
            }
            for row in scores.chunks_exact_mut(SCORES) {
                let mut at = 0;
                for (a, b) in seen.into_iter().filter(|(a, b)| a < b) {
                    row[at..a].fill(f32::NEG_INFINITY);
                    at = b;
                }
                row[at..BLOCK].fill(f32::NEG_INFINITY);
            }
        }
        let correction = &mut self.scratch.correction[..rows];
        weigh(simd, scores, self.m, &mut self.scratch.l, correction);
        rescale(simd, self.o, self.e, correction);
    }

    /// Lists what the products of a block fetch: the rest of its keys, its values, and the first keys of
    /// block `next`, or else of the next task.
    fn expect(&mut self, next: Option<usize>) {
        let Context { cache, units, entries, .. } = *self.cx;
        let Scratch { ahead, fragments, .. } = &mut *self.scratch;
        let head = self.task.head;
        let keys: usize = fragments.iter().map(|fragment| fragment.len).sum();
        let work = self.cx.arithmetic.work(cache.keys.columns) + cache.values.columns;
        ahead.restart(self.rows * keys * work);
        let unit = &units[self.task.units.start];
        let sequence = &cache.slots[entries[unit.entry].slot].sequence;
        let record = |form: Form, index, head, sequence: &Sequence, position| {
            let raw = sequence.raw_page(index).filter(|_| !cache.is_coded(index, position));
            cache.record_address(self.cx.layer, form, sequence.pages[index], raw, head)
        };
        for &Fragment { index, row, len, .. } in fragments.iter().filter(|part| part.key >= AHEAD) {
            let record = record(cache.keys, index, head, sequence, unit.position);
            ahead.add(record, row, len);
        }
        for &Fragment { index, row, len, .. } in fragments.iter() {
            let record = record(cache.values, index, head, sequence, unit.position);
            ahead.add(record, row, len);
        }
        let (task, first) = match (next, self.next) {
            (Some(block), _) => (self.task, block),
            (None, Some(task)) => (task, task.chunk * CHUNK),
            (None, None) => return,
        };
        let unit = &units[task.units.start];
        let entry = &entries[unit.entry];
        let sequence = &cache.slots[entry.slot].sequence;
        let end = (first + BLOCK).min(entry.len);
        for (index, row, key, len) in parts(first..end, cache.config.page_size) {
            if key < first + AHEAD && sequence.pages[index] != NO_PAGE {
                let record = record(cache.keys, index, task.head, sequence, unit.position);
                ahead.add(record, row, len);
            }
        }
    }
}

/// The keys of a block that the query at `position` sees: those up to its own that no window hides.
fn seen_keys(windows: [Option<Window>; 2], position: usize, block: usize) -> Seen {
    // Each window hides the positions from its sinks to its start.
    let hidden = |window: Option<Window>| match window {
        Some(w) if w.sinks < w.start(position) => (w.sinks, w.start(position)),
        _ => (0, 0),
    };
    let mut holes = windows.map(hidden);
    holes.sort_unstable();
    let [(a, b), (c, d)] = holes;
    [(0, a), (b, c), (b.max(d), position + 1)].map(|(start, end)| {
        let (start, end) = (start.max(block), end.min(block + BLOCK));
        if start < end { (start - block, end - block) } else { (0, 0) }
    })
}
