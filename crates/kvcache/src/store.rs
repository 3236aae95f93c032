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
//!
//! Vectors may be loaded past the end of a row, and of the last record, so a slab has a little slack.

use std::ops::Range;

use tensor_utils::{Element, ShapeError, bf16, f16, try_vec};

use crate::Storage;
use crate::huge::Huge;
use crate::quantise::Affine;

/// Elements after the last record that a vector may read.
pub(crate) const SLACK: usize = 64;

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
    lanes: usize,
    /// Pages of a slab.
    pages: usize,
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
    fn top(self) -> f32 {
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

    /// Where the numbers from `r` on of a lane are that lie next to one another, the first of them `r`.
    #[inline(always)]
    fn place(self, r: usize, lane: usize) -> usize {
        let (together, width) = self.step();
        let first = lane / PANEL * PANEL;
        let stride = PANEL.min(self.lanes - first);
        let step = r / together * stride + lane - first;
        first * (self.words / self.lanes) + step * width
    }

    /// `r` and the lane of element `column` of row `row`.
    #[inline(always)]
    fn turned(self, row: usize, column: usize) -> (usize, usize) {
        match self.side {
            Side::Keys => (column, row),
            Side::Values => (row, column),
        }
    }

    /// Where element `column` of row `row` of an `f32` record is.
    #[inline(always)]
    fn at(self, row: usize, column: usize) -> usize {
        let (r, lane) = self.turned(row, column);
        self.place(r, lane)
    }

    /// Word and shift of element `column` of row `row`.
    #[inline(always)]
    fn word_at(self, row: usize, column: usize) -> (usize, usize) {
        let (r, lane) = self.turned(row, column);
        let within = r % (2 * self.fields);
        (self.place(r, lane) + within % 2, within / 2 * (16 / self.fields))
    }

    fn field_mask(self) -> u16 {
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

/// The records of one side of one layer.
#[derive(Debug)]
pub(crate) enum Slab {
    F32(Huge<f32>),
    /// bf16 and f16 bits, or codes and bf16 scales.
    Words(Huge<u16>),
}

impl Slab {
    /// Zeros, which the system hands out when they are first touched.
    pub(crate) fn new(form: Form) -> Result<Self, ShapeError> {
        let arg = "layout";
        let Form { heads, pages, record, .. } = form;
        let elements = pages
            .checked_mul(heads)
            .and_then(|records| records.checked_mul(record))
            .and_then(|elements| elements.checked_add(SLACK))
            .ok_or_else(|| ShapeError::TooLarge { arg, got: vec![heads, pages, record] })?;
        Ok(if form.storage == Storage::F32 {
            Self::F32(Huge::zeros(arg, &[elements])?)
        } else {
            Self::Words(Huge::zeros(arg, &[elements])?)
        })
    }

    /// Where the record of a page and head begins.
    #[inline(always)]
    pub(crate) fn start(form: Form, page: u32, head: usize) -> usize {
        (head * form.pages + page as usize) * form.record
    }

    /// Stores a row; quantised storage takes whole pages only ([`Self::quantise`]).
    pub(crate) fn write(&mut self, form: Form, page: u32, head: usize, row: usize, from: &[f32]) {
        let start = Self::start(form, page, head);
        match (self, form.storage) {
            (Self::F32(to), _) => write_row(form, &mut to[start..], row, from),
            (Self::Words(to), Storage::Bf16) => {
                for (column, &x) in from.iter().enumerate() {
                    to[start + form.word_at(row, column).0] = bf16::from_acc(x).to_bits();
                }
            }
            (Self::Words(to), Storage::F16) => {
                for (column, &x) in from.iter().enumerate() {
                    to[start + form.word_at(row, column).0] = f16::from_f32(x).to_bits();
                }
            }
            (Self::Words(_), _) => {}
        }
    }

    /// The numbers of a row as attention takes them; those of codes at most the largest of `f32`.
    pub(crate) fn read(&self, form: Form, page: u32, head: usize, row: usize, to: &mut [f32]) {
        let start = Self::start(form, page, head);
        for (column, to) in to.iter_mut().enumerate() {
            *to = match (self, form.storage) {
                (Self::F32(from), _) => from[start + form.at(row, column)],
                (Self::Words(from), Storage::Bf16) => {
                    bf16::from_bits(from[start + form.word_at(row, column).0]).to_acc()
                }
                (Self::Words(from), Storage::F16) => {
                    f16::from_bits(from[start + form.word_at(row, column).0]).to_f32()
                }
                (Self::Words(from), _) => {
                    let (word, shift) = form.word_at(row, column);
                    let group = if form.side == Side::Keys { column } else { row };
                    Affine {
                        scale: bf16::from_bits(from[start + group]),
                        minimum: bf16::from_bits(from[start + form.groups + group]),
                    }
                    .value(from[start + form.head() + word] >> shift & form.field_mask())
                }
            };
        }
    }

    /// Quantises a full record from the same record in full precision.
    pub(crate) fn quantise(&mut self, form: Form, page: u32, head: usize, from: &[f32]) {
        let Self::Words(words) = self else { return };
        let start = Self::start(form, page, head);
        let record = &mut words[start..][..form.record];
        let (affine, codes) = record.split_at_mut(form.head());
        codes.fill(0);
        let (scales, minima) = affine.split_at_mut(form.groups);
        let (raw, top, fields) = (form.raw(), form.top(), form.fields);
        for group in 0..form.groups {
            let numbers = || {
                raw.panels(0..raw.lanes)
                    .map(|panel| &from[panel.start + group * panel.stride..][..panel.lanes.len()])
            };
            let (min, max) = numbers()
                .flatten()
                .fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
            let affine = Affine::covering(min, max, top);
            scales[group] = affine.scale.to_bits();
            minima[group] = affine.minimum.to_bits();
            let (block, r) = (group / (2 * fields), group % (2 * fields));
            let shift = r / 2 * (16 / fields);
            for (panel, numbers) in form.panels(0..form.lanes).zip(numbers()) {
                let words = &mut codes[panel.start + block * panel.stride * 2 + r % 2..];
                for (word, &x) in words.iter_mut().step_by(2).zip(numbers) {
                    *word |= (affine.code(x, top) as u16) << shift;
                }
            }
        }
    }

    /// Copies all heads of a page.
    pub(crate) fn copy_page(&mut self, form: Form, from: u32, to: u32) {
        for head in 0..form.heads {
            let (from, to) = (Self::start(form, from, head), Self::start(form, to, head));
            let range = from..from + form.record;
            match self {
                Self::F32(slab) => slab.copy_within(range, to),
                Self::Words(slab) => slab.copy_within(range, to),
            }
        }
    }

    /// Copies one row of all heads; floats only.
    pub(crate) fn copy_row(&mut self, form: Form, from: (u32, usize), to: (u32, usize)) {
        for head in 0..form.heads {
            let (a, b) = (Self::start(form, from.0, head), Self::start(form, to.0, head));
            for column in 0..form.columns {
                match self {
                    Self::F32(slab) => {
                        slab[b + form.at(to.1, column)] = slab[a + form.at(from.1, column)];
                    }
                    Self::Words(slab) => {
                        slab[b + form.word_at(to.1, column).0] =
                            slab[a + form.word_at(from.1, column).0];
                    }
                }
            }
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(slab) => bytemuck::cast_slice(slab),
            Self::Words(slab) => bytemuck::cast_slice(slab),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.as_bytes().len()
    }
}

fn write_row(form: Form, to: &mut [f32], row: usize, from: &[f32]) {
    for (column, &x) in from.iter().enumerate() {
        to[form.at(row, column)] = x;
    }
}

/// Free pages in full precision that are kept beside as many as there are in use.
const SPARE: usize = 8;

/// Pages in full precision, for the rows that quantised storage still has to keep so. Each holds all
/// layers; the pool grows when it must, and gives back the memory of most pages that are free.
#[derive(Debug, Default)]
pub(crate) struct RawPool {
    pages: Vec<RawPage>,
    pub(crate) refs: Vec<u32>,
    pub(crate) free: Vec<u32>,
    /// Places of pages whose memory was given back.
    pub(crate) places: Vec<u32>,
}

#[derive(Debug, Default)]
struct RawPage {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl RawPage {
    fn side(&self, side: Side) -> &[f32] {
        match side {
            Side::Keys => &self.keys,
            Side::Values => &self.values,
        }
    }

    fn side_mut(&mut self, side: Side) -> &mut [f32] {
        match side {
            Side::Keys => &mut self.keys,
            Side::Values => &mut self.values,
        }
    }
}

/// The record of a layer and head in a raw page.
fn raw_record(form: Form, layer: usize, head: usize) -> Range<usize> {
    let record = form.raw().record;
    let start = (layer * form.heads + head) * record;
    start..start + record
}

impl RawPool {
    /// Makes sure that `count` pages are free. `forms`: of keys and of values.
    pub(crate) fn reserve(
        &mut self,
        count: usize,
        forms: [Form; 2],
        layers: usize,
    ) -> Result<(), ShapeError> {
        while self.free.len() < count {
            let new = |form: Form| {
                let record = form.raw().record;
                let size = if form.storage.is_quantised() { layers * form.heads } else { 0 };
                let slack = if size > 0 { SLACK } else { 0 };
                let mut vec = try_vec("residual", &[size, record])?;
                vec.resize(vec.len() + slack, 0.0);
                Ok(vec)
            };
            let page = RawPage { keys: new(forms[0])?, values: new(forms[1])? };
            match self.places.pop() {
                Some(place) => {
                    self.pages[place as usize] = page;
                    self.free.push(place);
                }
                None => {
                    self.free.push(self.pages.len() as u32);
                    self.pages.push(page);
                    self.refs.push(0);
                }
            }
        }
        Ok(())
    }

    /// A page of one's own; [`reserve`](Self::reserve) came before.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.refs[page as usize] = 1;
        Some(page)
    }

    pub(crate) fn share(&mut self, page: u32) {
        self.refs[page as usize] += 1;
    }

    pub(crate) fn release(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        if *refs == 0 {
            self.free.push(page);
        }
    }

    /// Gives back the memory of free pages, but for as many as are in use and [`SPARE`].
    pub(crate) fn trim(&mut self) {
        let kept = self.used() + SPARE;
        for page in self.free.drain(kept.min(self.free.len())..) {
            self.pages[page as usize] = RawPage::default();
            self.places.push(page);
        }
    }

    /// Pages in use.
    pub(crate) fn used(&self) -> usize {
        self.pages.len() - self.free.len() - self.places.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        let bytes = |page: &RawPage| 4 * (page.keys.len() + page.values.len());
        self.pages.iter().map(bytes).sum()
    }

    /// From the record of a layer and head to the end of the page.
    #[inline(always)]
    pub(crate) fn record(&self, form: Form, page: u32, layer: usize, head: usize) -> &[f32] {
        let range = raw_record(form, layer, head);
        &self.pages[page as usize].side(form.side)[range.start..]
    }

    pub(crate) fn write(
        &mut self,
        form: Form,
        page: u32,
        (layer, head): (usize, usize),
        row: usize,
        from: &[f32],
    ) {
        let range = raw_record(form, layer, head);
        let to = &mut self.pages[page as usize].side_mut(form.side)[range];
        write_row(form.raw(), to, row, from);
    }

    pub(crate) fn read(
        &self,
        form: Form,
        page: u32,
        (layer, head): (usize, usize),
        row: usize,
        to: &mut [f32],
    ) {
        let record = self.record(form, page, layer, head);
        let form = form.raw();
        for (column, to) in to.iter_mut().enumerate() {
            *to = record[form.at(row, column)];
        }
    }

    pub(crate) fn copy_page(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize, to as usize);
        let [a, b] = match self.pages.get_disjoint_mut([from, to]) {
            Ok(pages) => pages,
            Err(_) => return,
        };
        b.keys.copy_from_slice(&a.keys);
        b.values.copy_from_slice(&a.values);
    }

    /// Copies one row of all layers and heads.
    pub(crate) fn copy_row(
        &mut self,
        form: Form,
        layers: usize,
        from: (u32, usize),
        to: (u32, usize),
    ) {
        if !form.storage.is_quantised() {
            return;
        }
        let form = form.raw();
        for layer in 0..layers {
            for head in 0..form.heads {
                let range = raw_record(form, layer, head);
                for column in 0..form.columns {
                    let x = self.pages[from.0 as usize].side(form.side)
                        [range.start + form.at(from.1, column)];
                    self.pages[to.0 as usize].side_mut(form.side)
                        [range.start + form.at(to.1, column)] = x;
                }
            }
        }
    }
}
