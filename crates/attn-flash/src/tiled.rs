//! The tiled forward pass over one range of query rows of one key/value head.

use std::ops::Range;

use ndarray::{ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use tensor_utils::simd::Simd;
use tensor_utils::tile::pack::{narrow_row, pack_columns};
use tensor_utils::tile::{lanes, panel_width, tiles};
use tensor_utils::{Element, Float, Isa};

use crate::arithmetic::Scores;
use crate::call::{Call, Sequence};
use crate::observe::{Observer, Step};
use crate::tile::{Values, normalise, score_index, softmax_tile, value_tile, visible_value_tile};
use crate::workspace::Scratch;
use crate::{Coverage, Tile};

/// Query rows of one key/value head: queries `queries` of the query heads
/// `first_head..first_head + group`.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) sequence: Sequence,
    pub(crate) key_head: usize,
    pub(crate) first_head: usize,
    pub(crate) queries: Range<usize>,
}

/// Everything a part is computed from.
#[derive(Debug)]
pub(crate) struct Inputs<'a, 'c, T: Element> {
    pub(crate) call: &'a Call<'c, T>,
    pub(crate) isa: Isa,
    pub(crate) key_block: usize,
    /// `[H, N, D]` of one batch entry.
    pub(crate) q: ArrayView3<'a, T>,
    /// `[G, M, D]` of one batch entry.
    pub(crate) k: ArrayView3<'a, T>,
    /// `[G, M, E]` of one batch entry.
    pub(crate) v: ArrayView3<'a, T>,
}

/// Rows that are computed together. Row `r` is query `queries.start + r % queries.len()` of head
/// `first_head + r / queries.len()`.
#[derive(Debug, Clone, Copy)]
struct Row {
    head: usize,
    query: usize,
}

impl Part {
    fn row(&self, r: usize) -> Row {
        Row {
            head: self.first_head + r / self.queries.len(),
            query: self.queries.start + r % self.queries.len(),
        }
    }
}

/// Computes `o` `[group, queries, E]` and `lse` `[group, queries]` of a part.
pub(crate) fn compute_part<P: Scores<T>, T: Element>(
    arithmetic: P,
    inputs: &Inputs<'_, '_, T>,
    part: &Part,
    mut o: ArrayViewMut3<'_, T>,
    mut lse: ArrayViewMut2<'_, T::Acc>,
    scratch: &mut Scratch<T::Acc>,
    observer: Option<&dyn Observer<T::Acc>>,
) {
    let rows = o.dim().0 * part.queries.len();
    let capacity = scratch.m.len();
    for start in (0..rows).step_by(capacity) {
        let mut band =
            Band { arithmetic, inputs, part, rows: start..rows.min(start + capacity), scratch };
        band.start();
        band.add_keys(observer);
        band.finish(&mut o, &mut lse);
    }
}

/// The rows of a part that fit into the scratch, on their way over the keys.
struct Band<'a, 'i, 'c, P: Scores<T>, T: Element> {
    arithmetic: P,
    inputs: &'a Inputs<'i, 'c, T>,
    part: &'a Part,
    rows: Range<usize>,
    scratch: &'a mut Scratch<T::Acc>,
}

impl<P: Scores<T>, T: Element> Band<'_, '_, '_, P, T> {
    /// Value size rounded up to lanes.
    fn e(&self) -> usize {
        self.inputs.call.sizes.e.next_multiple_of(lanes::<P::Simd, T::Acc>())
    }

    /// Packs the queries and sets each row to the state in which it has seen its sink alone.
    fn start(&mut self) {
        let (call, e, rows) = (self.inputs.call, self.e(), self.rows.len());
        for i in 0..rows {
            let Row { head, query } = self.part.row(self.rows.start + i);
            let q = self.inputs.q.index_axis(Axis(0), head);
            let q = q.slice_axis(Axis(0), (query..query + 1).into());
            self.arithmetic.pack_query(q, i, call.scale, self.scratch);
            let interval = call.interval(&self.part.sequence, query);
            self.scratch.intervals[i] = (interval.start, interval.end);
            let sink = call.sinks.map_or(T::Acc::NEG_INFINITY, |sinks| sinks[head]);
            self.scratch.m[i] = sink;
            self.scratch.l[i] =
                if sink == T::Acc::NEG_INFINITY { T::Acc::ZERO } else { T::Acc::ONE };
        }
        self.scratch.o[..rows * e].fill(T::Acc::ZERO);
    }

    /// The smallest interval of keys that holds those of `rows`.
    fn interval(&self, rows: Range<usize>) -> Range<usize> {
        let intervals = self.scratch.intervals[rows].iter().filter(|(start, end)| start < end);
        let (start, end) =
            intervals.fold((usize::MAX, 0), |all, row| (all.0.min(row.0), all.1.max(row.1)));
        if start < end { start..end } else { 0..0 }
    }

    /// Walks over the key blocks. Blocks start at multiples of the block size, wherever the rows'
    /// intervals start, so that a row is cut the same way in any company.
    fn add_keys(&mut self, observer: Option<&dyn Observer<T::Acc>>) {
        let size = self.inputs.key_block;
        let all = self.interval(0..self.rows.len());
        let first_block = all.start / size * size;
        for block_start in (first_block..all.end).step_by(size) {
            // What comes after the last key that somebody sees may be memory that nobody has written: NaN in
            // it is not worth the way for values that are not finite.
            let keys = block_start..all.end.min(block_start + size);
            // Packed when the first tile needs it: a block that the user mask skips costs nothing.
            let mut packed = None;
            for (first, height) in tiles::<P::Simd, T::Acc>(self.rows.len()) {
                let interval = self.interval(first..first + height);
                let visible = interval.start.max(keys.start)..interval.end.min(keys.end);
                if visible.is_empty() {
                    continue;
                }
                let coverage = self.coverage(first..first + height, &visible);
                if coverage == Coverage::Skip {
                    continue;
                }
                let finite = *packed.get_or_insert_with(|| self.pack(&keys));
                let step = TileStep { first, keys: keys.clone(), visible, coverage, finite };
                // One instance a height: rows are compile-time, so that sums stay in registers.
                match height {
                    12 => self.add_tile::<12>(&step, observer),
                    6 => self.add_tile::<6>(&step, observer),
                    4 => self.add_tile::<4>(&step, observer),
                    2 => self.add_tile::<2>(&step, observer),
                    _ => self.add_tile::<1>(&step, observer),
                }
            }
        }
    }

    /// What the user mask says about the rows `rows` of the band and the keys `keys`.
    fn coverage(&self, rows: Range<usize>, keys: &Range<usize>) -> Coverage {
        let mut coverage = None;
        let mut r = rows.start;
        while r < rows.end {
            let Row { head, query } = self.part.row(self.rows.start + r);
            // Rows up to the end of the head are consecutive queries.
            let length = (self.part.queries.end - query).min(rows.end - r);
            let tile = Tile {
                batch: self.part.sequence.batch,
                head,
                queries: query..query + length,
                keys: keys.clone(),
            };
            let part = self.inputs.call.user_mask.coverage(tile);
            if coverage.is_some_and(|coverage| coverage != part) {
                return Coverage::Partial;
            }
            coverage = Some(part);
            r += length;
        }
        coverage.unwrap_or(Coverage::Full)
    }

    /// Packs a block of keys and values; returns whether the values are finite.
    fn pack(&mut self, keys: &Range<usize>) -> bool {
        let Self { arithmetic, inputs, part, ref mut scratch, .. } = *self;
        let k = inputs.k.index_axis(Axis(0), part.key_head);
        let k = k.slice_axis(Axis(0), keys.clone().into());
        let v = inputs.v.index_axis(Axis(0), part.key_head);
        let v = v.slice_axis(Axis(0), keys.clone().into());
        arithmetic.pack_keys(k, scratch);
        let (simd, one) = (arithmetic.simd(), T::Acc::ONE);
        pack_columns(simd, v, one, &mut scratch.values, inputs.key_block, &mut scratch.rows)
    }

    /// Adds one block of keys to the rows of one tile.
    fn add_tile<const ROWS: usize>(
        &mut self,
        step: &TileStep,
        observer: Option<&dyn Observer<T::Acc>>,
    ) {
        let e = self.e();
        let Self { arithmetic, inputs, part, ref rows, ref mut scratch } = *self;
        let (call, simd) = (inputs.call, arithmetic.simd());
        let capacity = inputs.key_block;
        let width = panel_width::<P::Simd, T::Acc>();
        let (first, block_start) = (step.first, step.keys.start);
        // Columns of the block: those that somebody in the tile may see, and whole panels of them.
        let visible = step.visible.start - block_start..step.visible.end - block_start;
        let columns = visible.start / width * width..visible.end.next_multiple_of(width);

        arithmetic.score::<ROWS>(first, columns.clone(), call.sizes.d, call.scale, scratch);

        let values = Values { panels: &scratch.values, capacity, e };
        let scores = &mut scratch.scores[..ROWS * capacity];
        let m = &mut scratch.m[first..][..ROWS];
        let l = &mut scratch.l[first..][..ROWS];
        let o = &mut scratch.o[first * e..][..ROWS * e];
        let intervals = &scratch.intervals[first..][..ROWS];

        let ask_user = step.coverage == Coverage::Partial;
        if ask_user || call.adjusts_scores() {
            simd.vectorize(
                #[inline(always)]
                || {
                    for i in 0..ROWS {
                        let Row { head, query } = part.row(rows.start + first + i);
                        for column in columns.clone().step_by(width) {
                            let piece = column.max(visible.start)..visible.end.min(column + width);
                            let at = score_index::<ROWS>(i, piece.start, width);
                            let scores = &mut scores[at..][..piece.len()];
                            let keys = block_start + piece.start..block_start + piece.end;
                            call.cap_scores(simd, scores);
                            call.mask_scores(&part.sequence, head, query, keys, scores, ask_user);
                        }
                    }
                },
            );
        }
        for (i, &(start, end)) in intervals.iter().enumerate() {
            if start <= block_start + columns.start && end >= block_start + columns.end {
                continue;
            }
            for column in columns.clone().step_by(width) {
                let at = score_index::<ROWS>(i, column, width);
                let scores = &mut scores[at..][..width];
                let start = start.saturating_sub(block_start + column).min(width);
                let end = end.saturating_sub(block_start + column).clamp(start, width);
                scores[..start].fill(T::Acc::NEG_INFINITY);
                scores[end..].fill(T::Acc::NEG_INFINITY);
            }
        }
        // The weights of values that are not finite need to know which scores were masked.
        let raw_scores = &mut scratch.raw_scores[..ROWS * capacity];
        if !step.finite {
            raw_scores.copy_from_slice(scores);
        }

        let corrections: [T::Acc; ROWS] = softmax_tile(simd, columns.clone(), scores, m, l);
        if step.finite {
            value_tile(simd, values, columns, scores, &corrections, o);
        } else {
            visible_value_tile(simd, values, columns, raw_scores, scores, &corrections, o);
        }

        let Some(observer) = observer else { return };
        for i in 0..ROWS {
            let Row { head, query } = part.row(rows.start + first + i);
            observer.step(&Step {
                isa: inputs.isa,
                batch: part.sequence.batch,
                head,
                query,
                keys_end: step.visible.end,
                correction: corrections[i],
                m: m[i],
                l: l[i],
                o: &o[i * e..][..call.sizes.e],
            });
        }
    }

    /// Divides by `l`, rounds and writes out.
    fn finish(self, o: &mut ArrayViewMut3<'_, T>, lse: &mut ArrayViewMut2<'_, T::Acc>) {
        let e = self.e();
        let Self { arithmetic, part, scratch, .. } = self;
        for (i, r) in self.rows.enumerate() {
            let row = &mut scratch.o[i * e..][..e];
            let (m, l) = (scratch.m[i], scratch.l[i]);
            normalise(arithmetic.simd(), row, l);
            let (head, query) = (r / part.queries.len(), r % part.queries.len());
            let mut out = o.index_axis_mut(Axis(0), head);
            narrow_row(row, out.row_mut(query));
            lse[[head, query]] = if l == T::Acc::ZERO { T::Acc::NEG_INFINITY } else { m + l.ln() };
        }
    }
}

/// A tile and a block of keys that meet.
#[derive(Debug)]
struct TileStep {
    /// First row of the tile within the band.
    first: usize,
    /// Keys of the block.
    keys: Range<usize>,
    /// Those that some row of the tile may see.
    visible: Range<usize>,
    /// What the user mask says.
    coverage: Coverage,
    /// Whether the block's values are finite.
    finite: bool,
}
