//! Where the numbers are: the records of pages.
//!
//! One record holds one head of one page; `[head][page]` records follow one another in the slab of a
//! layer. With `r` the index that attention sums over (channel of a key, row of a value), `l` the
//! other one, `R` and `L` their numbers, a record is
//!
//! | storage | layout |
//! | --- | --- |
//! | `f32` | `[L / 64][R][64]` |
//! | others | `[L / 64][R / 2F][64][2]` words of 16 bits, each of `F` fields: 1 of 16 bits, 2 of 8, or 4 of 4 |
//! | codes | `R` scales and `R` minima before them |
//!
//! where number `(r, l)` is field `r % 2F / 2` of word `[l / 64][r / 2F][l % 64][r % 2]`. So 16 keys, or 16
//! channels of values, fill a vector, and shifting and masking a vector of words leaves the neighbours `r`
//! and `r + 1` of each `l`: two `f32`, or the operands of a dot product of pairs.
//!
//! A panel of 64 lanes is what a tile of the product reads from its first byte to its last. (Where it read
//! half of each row and then the other halves, memory was half as fast: docs/decisions/0006.) The last
//! panel is as wide as what is left of `L`.

use std::ops::Range;

use crate::Storage;

/// Lanes of a panel.
const PANEL: usize = 64;

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Keys,
    Values,
}

/// The layout of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    pub(crate) side: Side,
    pub(crate) storage: Storage,
    pub(crate) heads: usize,
    /// Head size.
    pub(crate) columns: usize,
    /// Rows of a page.
    pub(crate) rows: usize,
    /// Fields of a word.
    pub(crate) fields: usize,
    /// Groups that have a scale: channels of keys, rows of values. The numbers of a lane.
    pub(crate) groups: usize,
    pub(crate) lanes: usize,
    /// Pages of a slab.
    pub(crate) pages: usize,
    /// Elements of the numbers of a record ..
    words: usize,
    /// .. and of all of it, each of the bytes of [`Self::element_bytes`].
    pub(crate) record: usize,
}

impl Form {
    pub(crate) fn new(
        side: Side,
        storage: Storage,
        heads: usize,
        columns: usize,
        rows: usize,
        pages: usize,
    ) -> Self {
        let (groups, lanes) = match side {
            Side::Keys => (columns, rows),
            Side::Values => (rows, columns),
        };
        let fields = 16 / storage.bits().min(16);
        let words = match storage {
            Storage::F32 => groups * lanes,
            _ => groups.div_ceil(2 * fields) * lanes * 2,
        };
        let record = if storage.is_quantised() { words + 2 * groups } else { words };
        Self { side, storage, heads, columns, rows, fields, groups, lanes, pages, words, record }
    }

    /// The same in full precision.
    pub(crate) fn raw(self) -> Self {
        Self::new(self.side, Storage::F32, self.heads, self.columns, self.rows, self.pages)
    }

    /// The largest code.
    pub(crate) fn top(self) -> f32 {
        if self.storage == Storage::Int4 { 15.0 } else { 255.0 }
    }

    /// The scales and the minima of some groups of a record of codes.
    #[inline(always)]
    pub(crate) fn affine(self, record: &[u16], groups: Range<usize>) -> [&[u16]; 2] {
        let (scales, minima) = record[..2 * self.groups].split_at(self.groups);
        [&scales[groups.clone()], &minima[groups]]
    }

    /// Elements of a record before its numbers.
    #[inline(always)]
    pub(crate) fn head(self) -> usize {
        self.record - self.words
    }

    pub(crate) fn element_bytes(self) -> usize {
        if self.storage == Storage::F32 { 4 } else { 2 }
    }

    /// Numbers of a lane that are next to one another, and the elements that they take.
    fn step(self) -> (usize, usize) {
        match self.storage {
            Storage::F32 => (1, 1),
            _ => (2 * self.fields, 2),
        }
    }

    /// The panels that some lanes lie in.
    #[inline(always)]
    pub(crate) fn panels(self, lanes: Range<usize>) -> impl Iterator<Item = Part> {
        let width = self.step().1;
        (lanes.start / PANEL..lanes.end.div_ceil(PANEL)).map(move |panel| {
            let first = panel * PANEL;
            let end = self.lanes.min(first + PANEL);
            let lanes = lanes.start.max(first)..lanes.end.min(end);
            let start = first * (self.words / self.lanes) + (lanes.start - first) * width;
            Part { lanes, start, stride: end - first }
        })
    }

    /// Calls `run` with each run of neighbouring elements of a record that attention reads for rows
    /// `row..row + len`.
    pub(crate) fn runs(self, row: usize, len: usize, mut run: impl FnMut(Range<usize>)) {
        if len == self.rows {
            return run(0..self.record);
        }
        let (together, width) = self.step();
        if self.storage.is_quantised() {
            let groups = if self.side == Side::Keys { 0..self.groups } else { row..row + len };
            for first in [0, self.groups] {
                run(first + groups.start..first + groups.end);
            }
        }
        match self.side {
            Side::Values => {
                let (from, to) = (row / together, (row + len).div_ceil(together));
                for panel in self.panels(0..self.lanes) {
                    let (start, row) = (self.head() + panel.start, panel.stride * width);
                    run(start + from * row..start + to * row);
                }
            }
            Side::Keys => {
                for panel in self.panels(row..row + len) {
                    for step in 0..self.groups.div_ceil(together) {
                        let start = self.head() + panel.start + step * panel.stride * width;
                        run(start..start + panel.lanes.len() * width);
                    }
                }
            }
        }
    }

    /// Bytes of all heads of a page.
    pub(crate) fn page_bytes(self) -> usize {
        self.heads * self.record * self.element_bytes()
    }

    /// Where the elements of a row of floats are: at equal distances in each of a few lines.
    #[inline(always)]
    pub(crate) fn lines(self, row: usize) -> impl Iterator<Item = Line> {
        let (together, width) = self.step();
        let panels = self.panels(match self.side {
            Side::Keys => row..row + 1,
            Side::Values => 0..self.lanes,
        });
        let lines = if self.side == Side::Keys { together } else { 1 };
        panels.flat_map(move |panel| {
            (0..lines).map(move |line| match self.side {
                Side::Keys => Line {
                    column: line,
                    every: together,
                    start: panel.start + line,
                    step: panel.stride * width,
                    len: self.columns.saturating_sub(line).div_ceil(together),
                },
                Side::Values => Line {
                    column: panel.lanes.start,
                    every: 1,
                    start: panel.start + row / together * panel.stride * width + row % together,
                    step: width,
                    len: panel.lanes.len(),
                },
            })
        })
    }

    /// Word and shift of the code of element `column` of row `row`.
    #[inline(always)]
    pub(crate) fn word_at(self, row: usize, column: usize) -> (usize, usize) {
        let (r, lane) = match self.side {
            Side::Keys => (column, row),
            Side::Values => (row, column),
        };
        let (together, width) = self.step();
        let first = lane / PANEL * PANEL;
        let stride = PANEL.min(self.lanes - first);
        let block =
            first * (self.words / self.lanes) + (r / together * stride + lane - first) * width;
        let within = r % together;
        (block + within % 2, within / 2 * (16 / self.fields))
    }

    pub(crate) fn field_mask(self) -> u16 {
        u16::MAX >> (16 - self.storage.bits().min(16))
    }
}

/// Lanes of one panel.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) lanes: Range<usize>,
    /// Where number 0 of the first of them is among the numbers of a record.
    pub(crate) start: usize,
    /// Lanes of the panel.
    pub(crate) stride: usize,
}

/// Elements of a row: `column`, `column + every`, .. are at `start`, `start + step`, .. of a record.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    column: usize,
    every: usize,
    start: usize,
    step: usize,
    len: usize,
}

impl Line {
    /// The columns and the places, if both are neighbours.
    #[inline(always)]
    pub(crate) fn runs(self) -> Option<(Range<usize>, Range<usize>)> {
        let Self { column, start, len, .. } = self;
        (self.every == 1 && self.step == 1).then(|| (column..column + len, start..start + len))
    }

    /// Which elements of the row.
    #[inline(always)]
    pub(crate) fn columns(self) -> impl Iterator<Item = usize> {
        (0..self.len).map(move |i| self.column + i * self.every)
    }

    /// Where they are in the record.
    #[inline(always)]
    pub(crate) fn places(self) -> impl Iterator<Item = usize> {
        (0..self.len).map(move |i| self.start + i * self.step)
    }
}
