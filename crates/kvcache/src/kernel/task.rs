//! One task: the queries of sequences that share their pages, over one chunk of keys and one head.

use std::ops::Range;

use tensor_utils::simd::{Bytes, Simd, SimdBase, SimdFloat, SimdFrom, SimdNarrow};

use super::ahead::{Ahead, Lines};
use super::product::{
    Bf16, F16, F32, Into, Numbers, Panel, Rows, Scaled, code_product, lanes, product,
};
use super::softmax::{cap_scores, rescale, weigh};
use crate::cache::Cache;
use crate::options::NO_PAGE;
use crate::plan::{Entry, Task, Unit};
use crate::store::{Form, Slab};
use crate::{Storage, Window};

/// Keys between two corrections of the running maximum; blocks begin at its multiples.
pub(crate) const BLOCK: usize = 64;
/// Keys whose sums are merged with those of the keys before; chunks begin at its multiples.
pub(crate) const CHUNK: usize = 1024;
/// Stride of rows of scores: the last vector of a page may reach beyond the block.
pub(crate) const SCORES: usize = BLOCK + 16;
/// Factors of codes are padded to this.
pub(crate) const PAIRS: usize = 32;

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
    /// Queries times the scale, `[key head][unit][head of the group][D rounded up to PAIRS]`.
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
    scores: Vec<f32>,
    /// Scores of all rows of a tree, before they are put in the order of each path.
    tree: Vec<f32>,
    l: Vec<f32>,
    correction: Vec<f32>,
    seen: Vec<Seen>,
    fragments: Vec<Fragment>,
    ahead: Ahead,
    /// Scales and minima of a page.
    scales: Vec<f32>,
    minima: Vec<f32>,
    products: Vec<f32>,
    factors: Vec<i32>,
    meaning: Vec<Scaled>,
    path: Vec<usize>,
}

impl Scratch {
    pub(crate) fn bytes(&self) -> usize {
        4 * (self.scores.capacity()
            + self.tree.capacity()
            + self.l.capacity()
            + self.correction.capacity()
            + self.scales.capacity()
            + self.minima.capacity()
            + self.products.capacity()
            + self.factors.capacity())
            + 8 * self.path.capacity()
            + self.ahead.bytes()
            + size_of::<Seen>() * self.seen.capacity()
            + size_of::<Fragment>() * self.fragments.capacity()
            + size_of::<Scaled>() * self.meaning.capacity()
    }
}

/// Makes a buffer at least so long; what is in it does not matter.
pub(crate) fn grow<T: Clone + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
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
    grow(&mut scratch.scores, rows * SCORES);
    grow(&mut scratch.l, rows * 16);
    grow(&mut scratch.correction, rows);
    grow(&mut scratch.seen, task.units.len());
    scratch.l[..rows * 16].fill(0.0);

    let depth = cx.cache.config.head_size.next_multiple_of(PAIRS);
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
        let page_size = self.cx.cache.config.page_size;
        let sequence = &self.cx.cache.slots[self.entry().slot].sequence;
        self.scratch.fragments.clear();
        let mut key = keys.start;
        while key < keys.end {
            let (index, row) = (key / page_size, key % page_size);
            let len = (page_size - row).min(keys.end - key);
            let raw = sequence.raw_page(index).unwrap_or(NO_PAGE);
            let fragment =
                Fragment { index, page: sequence.pages[index], raw, row, key: key - origin, len };
            // Pages that the window has released hold no key that anybody sees.
            if fragment.page != NO_PAGE {
                self.scratch.fragments.push(fragment);
            }
            key += len;
        }
    }

    /// Whether a unit reads the fragment quantised, where storage is.
    fn is_coded(&self, fragment: &Fragment, unit: &Unit) -> bool {
        let entry = self.entry();
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
        self.expect_values();
        let mut scores = std::mem::take(&mut self.scratch.scores);
        self.score(&mut scores, SCORES);
        self.finish_scores(&mut scores);
        self.scratch.scores = scores;
        self.expect_keys(next);
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

    /// Scores of all rows and the fragments' keys, `stride` apart.
    fn score(&mut self, scores: &mut [f32], stride: usize) {
        let cache = self.cx.cache;
        let form = cache.keys;
        match (&cache.layers[self.cx.layer].keys, form.storage) {
            (Slab::F32(words), _) => self.score_floats::<F32>(words, scores, stride),
            (Slab::Words(words), Storage::Bf16) => self.score_floats::<Bf16>(words, scores, stride),
            (Slab::Words(words), Storage::F16) => self.score_floats::<F16>(words, scores, stride),
            (Slab::Words(words), storage) => {
                for f in 0..self.scratch.fragments.len() {
                    let fragment = self.scratch.fragments[f];
                    let mut unit = 0;
                    while unit < self.task.units.len() {
                        let (end, coded) = self.alike(&fragment, unit, storage, false);
                        let units = unit..end;
                        match (coded, storage) {
                            (false, _) => self.score_raw(&fragment, units, scores, stride),
                            (true, Storage::Int4) => {
                                self.score_codes::<4>(words, &fragment, units, scores, stride);
                            }
                            (true, _) => {
                                self.score_codes::<2>(words, &fragment, units, scores, stride);
                            }
                        }
                        unit = end;
                    }
                }
            }
        }
    }

    fn score_floats<N: Numbers>(&mut self, words: &[N::Word], scores: &mut [f32], stride: usize) {
        for f in 0..self.scratch.fragments.len() {
            let fragment = self.scratch.fragments[f];
            let record = Slab::start(self.cx.cache.keys, fragment.page, self.task.head);
            let units = 0..self.task.units.len();
            self.multiply_keys::<N>(&words[record..], &fragment, units, scores, stride);
        }
    }

    fn score_raw(
        &mut self,
        fragment: &Fragment,
        units: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let cache = self.cx.cache;
        let record = cache.raw.record(cache.keys, fragment.raw, self.cx.layer, self.task.head);
        self.multiply_keys::<F32>(record, fragment, units, scores, stride);
    }

    /// Scores of some units and the keys of a fragment in `record`.
    fn multiply_keys<N: Numbers>(
        &mut self,
        record: &[N::Word],
        fragment: &Fragment,
        units: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let form = self.cx.cache.keys;
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let lines = self.scratch.ahead.share(rows.len() * fragment.len);
        let x = Panel {
            words: &record[fragment.row * N::WIDTH..],
            stride: form.rows,
            vectors: fragment.len.div_ceil(lanes::<S>()),
            ahead: self.values_ahead(lines),
        };
        let queries = &self.queries[rows.start * self.depth..];
        let numbers = &mut scores[rows.start * stride + fragment.key..];
        let (range, mode) = ((0, form.columns), Into::Replace);
        let mut to = Rows { numbers, stride };
        product::<S, N>(self.simd, x, range, queries, self.depth, rows.len(), mode, &mut to);
    }

    fn score_codes<const FIELDS: usize>(
        &mut self,
        words: &[u16],
        fragment: &Fragment,
        units: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let form = self.cx.cache.keys;
        let record = Slab::start(form, fragment.page, self.task.head);
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let queries = &self.queries[rows.start * self.depth..rows.end * self.depth];
        let scratch = &mut *self.scratch;
        let numbers = &words[record..];
        load_affine(self.simd, form, numbers, 0..form.groups(), 0, self.depth, scratch);
        let top = if form.storage == Storage::Int4 { 15.0 } else { 255.0 };
        let amplitude = (i32::MAX as f32 / (top * form.columns as f32) * 0.99).min(32767.0).floor();
        grow(&mut scratch.factors, rows.len() * self.depth / 2);
        grow(&mut scratch.products, self.depth);
        scratch.meaning.clear();
        for (row, query) in queries.chunks_exact(self.depth).enumerate() {
            let factors = &mut scratch.factors[row * self.depth / 2..][..self.depth / 2];
            let (scales, minima) = (&scratch.scales[..self.depth], &scratch.minima[..self.depth]);
            let products = &mut scratch.products[..self.depth];
            let meaning = whole(self.simd, query, scales, minima, amplitude, products, factors);
            scratch.meaning.push(meaning);
        }
        let lines = scratch.ahead.share(rows.len() * fragment.len);
        let ahead = self.values_ahead(lines);
        let scratch = &*self.scratch;
        let x = Panel {
            words: &words[record + 2 * fragment.row..],
            stride: form.rows,
            vectors: fragment.len.div_ceil(lanes::<S>()),
            ahead,
        };
        let numbers = &mut scores[rows.start * stride + fragment.key..];
        let mut to = Rows { numbers, stride };
        let blocks = (0, form.columns.div_ceil(2 * FIELDS));
        let factors = &scratch.factors;
        let half = self.depth / 2;
        code_product::<S, FIELDS>(
            self.simd,
            x,
            blocks,
            factors,
            half,
            &scratch.meaning,
            Into::Replace,
            &mut to,
        );
    }

    /// Adds the weighted values of a fragment to the output of some units. The weights are in
    /// `scratch.scores`, from the fragment's key on.
    fn add_values(&mut self, fragment: &Fragment, units: Range<usize>, coded: bool) {
        let cache = self.cx.cache;
        let (form, head) = (cache.values, self.task.head);
        let record = Slab::start(form, fragment.page, head);
        match (&cache.layers[self.cx.layer].values, form.storage) {
            (Slab::F32(words), _) => self.add_floats::<F32>(words, record, fragment, units),
            (Slab::Words(words), Storage::Bf16) => {
                self.add_floats::<Bf16>(words, record, fragment, units);
            }
            (Slab::Words(words), Storage::F16) => {
                self.add_floats::<F16>(words, record, fragment, units);
            }
            (Slab::Words(_), _) if !coded => {
                let words = cache.raw.record(form, fragment.raw, self.cx.layer, head);
                self.add_floats::<F32>(words, 0, fragment, units);
            }
            (Slab::Words(words), Storage::Int4) => {
                self.add_codes::<4>(words, record, fragment, units);
            }
            (Slab::Words(words), _) => self.add_codes::<2>(words, record, fragment, units),
        }
    }

    /// The values of the fragments are to be fetched while their scores are computed.
    fn expect_values(&mut self) {
        let form = self.cx.cache.values;
        let Scratch { ahead, fragments, .. } = &mut *self.scratch;
        let keys: usize = fragments.iter().map(|fragment| fragment.len).sum();
        ahead.restart(self.rows * keys);
        for fragment in fragments.iter() {
            let record = Slab::start(form, fragment.page, self.task.head);
            ahead.add(form, record, fragment.row, fragment.len);
        }
    }

    /// The keys of block `next`, or else of the first block of the next task, are to be fetched while
    /// the values of this block are summed.
    fn expect_keys(&mut self, next: Option<usize>) {
        let Context { cache, units, entries, .. } = *self.cx;
        let Scratch { ahead, fragments, .. } = &mut *self.scratch;
        let keys: usize = fragments.iter().map(|fragment| fragment.len).sum();
        ahead.restart(self.rows * keys);
        let (task, first) = match (next, self.next) {
            (Some(block), _) => (self.task, block),
            (None, Some(task)) => (task, task.chunk * CHUNK),
            (None, None) => return,
        };
        let entry = &entries[units[task.units.start].entry];
        let pages = &cache.slots[entry.slot].sequence.pages;
        let page_size = cache.config.page_size;
        let (mut key, end) = (first, (first + BLOCK).min(entry.len));
        while key < end {
            let (index, row) = (key / page_size, key % page_size);
            let len = (page_size - row).min(end - key);
            if pages[index] != NO_PAGE {
                let record = Slab::start(cache.keys, pages[index], task.head);
                ahead.add(cache.keys, record, row, len);
            }
            key += len;
        }
    }

    /// Lines of values.
    fn values_ahead(&self, lines: Range<usize>) -> Lines<'_> {
        self.scratch.ahead.lines(&self.cx.cache.layers[self.cx.layer].values, lines)
    }

    fn add_floats<N: Numbers>(
        &mut self,
        words: &[N::Word],
        record: usize,
        fragment: &Fragment,
        units: Range<usize>,
    ) {
        let form = self.cx.cache.values;
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let lines = self.scratch.ahead.share(rows.len() * fragment.len);
        let layer = &self.cx.cache.layers[self.cx.layer];
        let ahead = self.scratch.ahead.lines(&layer.keys, lines);
        let vectors = form.columns.div_ceil(lanes::<S>());
        let x = Panel { words: &words[record..], stride: form.columns, vectors, ahead };
        let weights = &self.scratch.scores[rows.start * SCORES + fragment.key..];
        let numbers = &mut self.o[rows.start * self.e..];
        let mut to = Rows { numbers, stride: self.e };
        let range = (fragment.row, fragment.len);
        product::<S, N>(self.simd, x, range, weights, SCORES, rows.len(), Into::Add, &mut to);
    }

    fn add_codes<const FIELDS: usize>(
        &mut self,
        words: &[u16],
        record: usize,
        fragment: &Fragment,
        units: Range<usize>,
    ) {
        let form = self.cx.cache.values;
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let first = fragment.row / (2 * FIELDS);
        let blocks = (fragment.row + fragment.len).div_ceil(2 * FIELDS) - first;
        // The weights begin in the middle of a block where the fragment does.
        let lead = fragment.row - first * 2 * FIELDS;
        let padded = (blocks * 2 * FIELDS).next_multiple_of(PAIRS);
        let scratch = &mut *self.scratch;
        let groups = fragment.row..fragment.row + fragment.len;
        load_affine(self.simd, form, &words[record..], groups, lead, padded, scratch);
        grow(&mut scratch.factors, rows.len() * padded / 2);
        grow(&mut scratch.products, 2 * padded);
        scratch.meaning.clear();
        for (row, weights) in
            scratch.scores[rows.start * SCORES..].chunks_exact(SCORES).take(rows.len()).enumerate()
        {
            let factors = &mut scratch.factors[row * padded / 2..][..padded / 2];
            let (products, aligned) = scratch.products.split_at_mut(padded);
            let mut weights = &weights[fragment.key..fragment.key + fragment.len];
            if weights.len() < padded {
                let aligned = &mut aligned[..padded];
                aligned[..lead].fill(0.0);
                aligned[lead..lead + weights.len()].copy_from_slice(weights);
                aligned[lead + weights.len()..].fill(0.0);
                weights = aligned;
            }
            let (scales, minima) = (&scratch.scales[..padded], &scratch.minima[..padded]);
            let meaning = whole(self.simd, weights, scales, minima, 32767.0, products, factors);
            scratch.meaning.push(meaning);
        }
        let lines = scratch.ahead.share(rows.len() * fragment.len);
        let layer = &self.cx.cache.layers[self.cx.layer];
        let scratch = &*self.scratch;
        let ahead = scratch.ahead.lines(&layer.keys, lines);
        let vectors = form.columns.div_ceil(lanes::<S>());
        let x = Panel { words: &words[record..], stride: form.columns, vectors, ahead };
        let numbers = &mut self.o[rows.start * self.e..];
        let mut to = Rows { numbers, stride: self.e };
        let (blocks, half) = ((first, blocks), padded / 2);
        code_product::<S, FIELDS>(
            self.simd,
            x,
            blocks,
            &scratch.factors,
            half,
            &scratch.meaning,
            Into::Add,
            &mut to,
        );
    }

    /// Positions `block..block + BLOCK` for the nodes of a tree: rows before the tree, then each node's
    /// own path. In the order of positions, and so with the bits of a sequence that is nothing but
    /// the path.
    fn add_tree_block(&mut self, block: usize, from: usize) {
        let seen = self.look(block);
        let entry = *self.entry();
        let width = (entry.len - from).next_multiple_of(16) + 16;
        if block == from {
            // All rows against all nodes, once for the chunk.
            let mut tree = std::mem::take(&mut self.scratch.tree);
            grow(&mut tree, self.rows * width);
            self.cut(from..entry.len, from);
            self.scratch.ahead.restart(0);
            self.score(&mut tree, width);
            self.scratch.tree = tree;
        }
        if seen.is_empty() {
            return;
        }
        let group = self.cx.group;
        self.scratch.ahead.restart(0);
        let mut scores = std::mem::take(&mut self.scratch.scores);
        for unit in 0..self.task.units.len() {
            self.find_path(unit);
            for row in unit * group..(unit + 1) * group {
                let tree = &self.scratch.tree[row * width..][..width];
                for (key, score) in scores[row * SCORES..][..BLOCK].iter_mut().enumerate() {
                    *score = match self.scratch.path.get((block + key).wrapping_sub(entry.base)) {
                        Some(node) => tree[entry.base + node - from],
                        None if block + key < entry.base => tree[block + key - from],
                        None => f32::NEG_INFINITY,
                    };
                }
            }
        }
        self.finish_scores(&mut scores);
        self.scratch.scores = scores;
        for unit in 0..self.task.units.len() {
            self.find_path(unit);
            for (a, b) in self.scratch.seen[unit] {
                let before = entry.base.clamp(block + a, block + b.max(a));
                self.cut(block + a..before, block);
                self.add_unit_values(unit);
                for position in before..(block + b).max(before) {
                    let row = entry.base + self.scratch.path[position - entry.base];
                    // The row's place among the keys of the block is that of its position.
                    self.cut(row..row + 1, row - (position - block));
                    self.add_unit_values(unit);
                }
            }
        }
    }

    fn add_unit_values(&mut self, unit: usize) {
        for f in 0..self.scratch.fragments.len() {
            let fragment = self.scratch.fragments[f];
            let quantised = self.cx.cache.values.storage.is_quantised();
            let coded = quantised && self.is_coded(&fragment, &self.units()[unit]);
            self.add_values(&fragment, unit..unit + 1, coded);
        }
    }

    /// The nodes from the root to a unit's own.
    fn find_path(&mut self, unit: usize) {
        let cx = self.cx;
        let unit = &cx.units[self.task.units.start + unit];
        let parents = &cx.parents[cx.entries[unit.entry].parents()];
        self.scratch.path.clear();
        let mut node = unit.query as i64;
        while node >= 0 {
            self.scratch.path.push(node as usize);
            node = parents[node as usize];
        }
        self.scratch.path.reverse();
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

/// Scales and minima of some groups of a record, `lead` zeros before and zeros up to `padded` after.
fn load_affine<S: Simd>(
    simd: S,
    form: Form,
    record: &[u16],
    groups: Range<usize>,
    lead: usize,
    padded: usize,
    scratch: &mut Scratch,
) {
    grow(&mut scratch.scales, padded);
    grow(&mut scratch.minima, padded);
    let (scales, minima) = record[form.words()..].split_at(form.groups());
    let (to_scales, to_minima) = (&mut scratch.scales[..padded], &mut scratch.minima[..padded]);
    simd.vectorize(
        #[inline(always)]
        || {
            for (from, to) in [(scales, to_scales), (minima, to_minima)] {
                to[..lead].fill(0.0);
                to[lead + groups.len()..].fill(0.0);
                let from = &from[groups.clone()];
                for (to, &from) in to[lead..][..from.len()].iter_mut().zip(from) {
                    *to = f32::from_bits(u32::from(from) << 16);
                }
            }
        },
    )
}

/// `x * scales` as whole numbers up to `amplitude`, in pairs, and what they mean: their products with
/// codes, times the scale, plus `sum x * minima`.
fn whole<S: Simd>(
    simd: S,
    x: &[f32],
    scales: &[f32],
    minima: &[f32],
    amplitude: f32,
    products: &mut [f32],
    factors: &mut [i32],
) -> Scaled {
    simd.vectorize(
        #[inline(always)]
        || {
            let n = lanes::<S>();
            let zero = S::f32s::simd_from(simd, 0.0);
            let (mut largest, mut offset) = (zero, zero);
            for at in (0..x.len()).step_by(n) {
                let value = load(simd, x, at);
                let scaled = value * load(simd, scales, at);
                scaled.store_slice(&mut products[at..at + n]);
                largest = largest.max(scaled.max(zero - scaled));
                offset = value.mul_add(load(simd, minima, at), offset);
            }
            let largest = largest.reduce_max();
            let factor = if largest > 0.0 { amplitude / largest } else { 0.0 };
            // Beyond the range of f32 the products are as good as 0.
            let factor = if factor.is_finite() { factor } else { 0.0 };
            let multiplier = S::f32s::simd_from(simd, factor);
            for (pair, at) in factors.chunks_exact_mut(n).zip((0..x.len()).step_by(2 * n)) {
                let low = nearest(simd, load(simd, products, at), multiplier);
                let high = nearest(simd, load(simd, products, at + n), multiplier);
                let both: S::i16s = low.narrow(high);
                let both: S::i32s = both.bitcast();
                both.store_slice(pair);
            }
            let scale = if factor > 0.0 { 1.0 / factor } else { 0.0 };
            Scaled { scale, offset: offset.reduce_sum() }
        },
    )
}

#[inline(always)]
fn load<S: Simd>(simd: S, from: &[f32], at: usize) -> S::f32s {
    S::f32s::from_slice(simd, &from[at..at + lanes::<S>()])
}

/// `x * multiplier` to the nearest whole number of 16 bits, ties to even, in the lower halves.
#[inline(always)]
fn nearest<S: Simd>(simd: S, x: S::f32s, multiplier: S::f32s) -> S::i32s {
    // 1.5 * 2^23: a sum with it has no room for a fraction, and the number in its lowest bits.
    let magic = S::f32s::simd_from(simd, 12_582_912.0);
    x.mul_add(multiplier, magic).bitcast()
}
