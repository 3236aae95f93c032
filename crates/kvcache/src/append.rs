//! Appending rows.

use std::collections::HashMap;

use ndarray::{ArrayView1, ArrayView3, Axis};
use tensor_utils::tile::pack::widen_row;
use tensor_utils::{Element, check_shape};

use crate::cache::Cache;
use crate::error::invalid;
use crate::form::{Form, Side};
use crate::options::NO_PAGE;
use crate::sequence::{Sequence, parts};
use crate::{Error, Layout, SeqId, Storage};

impl Cache {
    /// Appends `n` rows to one layer of a sequence.
    ///
    /// | argument | shape |
    /// | --- | --- |
    /// | `k` | `[n, G, D]` |
    /// | `v` | `[n, G, E]` |
    ///
    /// The first layer to receive a position takes the pages for all layers. One chunk or many, the
    /// cache is the same.
    ///
    /// # Errors
    /// [`Error::OutOfPages`] or [`Error::RegionFull`] if there is no room, [`Error::NotFinite`] for
    /// NaN and infinity in quantised storage, [`Error::UnknownSequence`], [`Error::Shape`] and
    /// [`Error::Option`] for arguments that do not fit.
    pub fn append<T: Element<Acc = f32>>(
        &mut self,
        layer: usize,
        seq: SeqId,
        k: ArrayView3<'_, T>,
        v: ArrayView3<'_, T>,
    ) -> Result<(), Error> {
        let rows = [k.dim().0];
        self.append_batch(layer, &[seq], &rows, k, v)
    }

    /// Appends to one layer of several sequences: `rows[i]` rows to `seqs[i]`, one after the other in
    /// `k` `[total rows, G, D]` and `v` `[total rows, G, E]`. All or none are appended.
    ///
    /// # Errors
    /// As [`append`](Self::append), and [`Error::DuplicateSequence`].
    pub fn append_batch<T: Element<Acc = f32>>(
        &mut self,
        layer: usize,
        seqs: &[SeqId],
        rows: &[usize],
        k: ArrayView3<'_, T>,
        v: ArrayView3<'_, T>,
    ) -> Result<(), Error> {
        self.check_layer(layer)?;
        check_shape("rows", &[rows.len()], &[seqs.len()])?;
        let total = rows.iter().try_fold(0_usize, |total, &rows| total.checked_add(rows));
        let total = total.ok_or_else(|| invalid("rows", "a total that fits in memory", rows))?;
        let heads = self.config.key_heads;
        check_shape("k", k.shape(), &[total, heads, self.config.head_size])?;
        check_shape("v", v.shape(), &[total, heads, self.config.value_size])?;
        self.check_distinct(seqs)?;
        check_finite("k", &k, self.config.keys)?;
        check_finite("v", &v, self.config.values)?;
        self.check_room(layer, seqs, rows)?;

        // All releases come first: `check_room` counted on them.
        for (&seq, _) in seqs.iter().zip(rows).filter(|&(_, &rows)| rows > 0) {
            self.release_passed(seq);
        }
        let mut first = 0;
        for (&seq, &rows) in seqs.iter().zip(rows) {
            if rows > 0 {
                self.make_room(layer, seq, rows);
                self.write_rows(layer, seq, rows, first, &k, &v)?;
                first += rows;
            }
        }
        self.raw.trim();
        Ok(())
    }

    pub(crate) fn check_distinct(&self, seqs: &[SeqId]) -> Result<(), Error> {
        for &seq in seqs {
            self.sequence(seq)?;
        }
        // Quadratic for the small batches of most calls, without memory of its own.
        if seqs.len() <= 64 {
            for (i, &seq) in seqs.iter().enumerate() {
                if seqs[..i].contains(&seq) {
                    return Err(Error::DuplicateSequence(seq));
                }
            }
            return Ok(());
        }
        let mut sorted = seqs.to_vec();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(Error::DuplicateSequence(pair[0])),
            None => Ok(()),
        }
    }

    /// Pages that a batch takes and gives back where its sequences share some with each other: of those
    /// that write to one page the last need not copy it, and a page that all have passed is given back.
    /// [`check_room`](Self::check_room) counts more and less than that, without memory of its own.
    fn count_together(&self, layer: usize, seqs: &[SeqId], rows: &[usize]) -> (usize, usize) {
        let page_size = self.config.page_size;
        let (mut needed, mut writers, mut leavers) = (0, HashMap::new(), HashMap::new());
        for (&seq, &rows) in seqs.iter().zip(rows).filter(|&(_, &rows)| rows > 0) {
            let sequence = &self.slots[seq.slot as usize].sequence;
            let old = sequence.lens[layer];
            needed += (old + rows).div_ceil(page_size).saturating_sub(sequence.pages.len());
            let written = sequence.pages.get(old / page_size);
            if let Some(&page) = written.filter(|&&page| page != NO_PAGE) {
                *writers.entry(page).or_insert(0) += 1;
            }
            for page in self.passed_pages(sequence) {
                *leavers.entry(page).or_insert(0) += 1;
            }
        }
        for (page, writers) in writers {
            let left = leavers.get(&page).copied().unwrap_or(0);
            let others = self.pool.refs[page as usize] - left > writers;
            needed += writers as usize - usize::from(!others);
        }
        let is_free = |&(&page, &left): &(&u32, &u32)| left == self.pool.refs[page as usize];
        (needed, leavers.iter().filter(is_free).count())
    }

    /// Checks that the pages for the rows exist, and makes the raw pages.
    fn check_room(&mut self, layer: usize, seqs: &[SeqId], rows: &[usize]) -> Result<(), Error> {
        let page_size = self.config.page_size;
        let (mut needed, mut raw_needed, mut returned) = (0, 0, 0);
        for (&seq, &rows) in seqs.iter().zip(rows) {
            if rows == 0 {
                continue;
            }
            let sequence = self.sequence(seq)?;
            let old = sequence.lens[layer];
            let new = old.checked_add(rows).filter(|&new| new < isize::MAX as usize / 2);
            let new = new.ok_or_else(|| invalid("rows", "a length that fits in memory", rows))?;
            if let Layout::Contiguous { .. } = self.config.layout {
                let capacity = self.region_pages() * page_size;
                if new > capacity {
                    return Err(Error::RegionFull { sequence: seq, rows: new, capacity });
                }
            } else {
                needed += new.div_ceil(page_size).saturating_sub(sequence.pages.len());
                let tail = sequence.pages.get(old / page_size);
                needed += usize::from(tail.is_some_and(|&page| self.is_shared(page)));
                returned +=
                    self.passed_pages(sequence).filter(|&page| !self.is_shared(page)).count();
            }
            if self.config.is_quantised() {
                // All pages that are written, shared ones for the copy.
                raw_needed += new.div_ceil(page_size) - old / page_size;
            }
        }
        let available = self.pool.available() + returned;
        if self.is_paged() && needed > available {
            let (needed, returned) = self.count_together(layer, seqs, rows);
            let available = self.pool.available() + returned;
            if needed > available {
                return Err(Error::OutOfPages { needed, available, total: self.pool.refs.len() });
            }
        }
        if self.config.is_quantised() {
            self.raw.reserve(raw_needed, [self.keys, self.values], self.config.layers)?;
        }
        Ok(())
    }

    fn is_shared(&self, page: u32) -> bool {
        page != NO_PAGE && self.pool.refs[page as usize] > 1
    }

    /// Pages that no later query of the sequence will see.
    fn passed_pages<'a>(&self, sequence: &'a Sequence) -> impl Iterator<Item = u32> + use<'a> {
        self.passed(sequence).map(|index| sequence.pages[index]).filter(|&page| page != NO_PAGE)
    }

    fn passed(&self, sequence: &Sequence) -> std::ops::Range<usize> {
        let Some(window) = self.config.window else { return 0..0 };
        let page_size = self.config.page_size;
        let first = window.sinks.div_ceil(page_size).max(sequence.window_start);
        let end = (window.start(sequence.shortest()) / page_size).min(sequence.pages.len());
        if self.is_paged() { first..end.max(first) } else { 0..0 }
    }

    /// Adds pages for `rows` more rows.
    fn make_room(&mut self, layer: usize, seq: SeqId, rows: usize) {
        let page_size = self.config.page_size;
        let is_paged = self.is_paged();
        let is_quantised = self.config.is_quantised();
        let sequence = &self.slots[seq.slot as usize].sequence;
        let old = sequence.lens[layer];
        let (first, end) = (old / page_size, (old + rows).div_ceil(page_size));
        for index in first..end {
            if index < self.slots[seq.slot as usize].sequence.pages.len() {
                self.own_page(seq, index);
                continue;
            }
            let page = if is_paged {
                // `check_room` counted the pages.
                self.pool.take(&mut self.index).unwrap_or(NO_PAGE)
            } else {
                let page = self.slots[seq.slot as usize].sequence.region + index as u32;
                self.pool.take_exact(page);
                page
            };
            let sequence = &mut self.slots[seq.slot as usize].sequence;
            sequence.pages.push(page);
            if is_quantised {
                let raw = self.raw.take().unwrap_or(NO_PAGE);
                sequence.raw.push(raw);
            }
        }
    }

    /// Makes the page of a sequence its own, so that it can be written: copies it if others map it.
    pub(crate) fn own_page(&mut self, seq: SeqId, index: usize) {
        let sequence = &mut self.slots[seq.slot as usize].sequence;
        let page = sequence.pages[index];
        if self.pool.refs[page as usize] > 1 {
            let copy = self.pool.take(&mut self.index).unwrap_or(NO_PAGE);
            for layer in &mut self.layers {
                layer.keys.copy_page(self.keys, page, copy);
                layer.values.copy_page(self.values, page, copy);
            }
            self.pool.release(page, &self.index);
            sequence.pages[index] = copy;
        } else {
            self.pool.touch(page, &mut self.index);
        }
        if let Some(raw) = sequence.raw_page(index)
            && self.raw.refs[raw as usize] > 1
        {
            let copy = self.raw.take().unwrap_or(NO_PAGE);
            self.raw.copy_page(raw, copy);
            self.raw.release(raw);
            sequence.raw[index] = copy;
        }
    }

    /// Drops the pages that the window has passed, and the full precision that no later query reads.
    fn release_passed(&mut self, seq: SeqId) {
        let sequence = &self.slots[seq.slot as usize].sequence;
        let (passed, next) = (self.passed(sequence), sequence.shortest());
        // The page that is being filled is not full, whatever the residual.
        let coded = self.coded_pages(next).min(next / self.config.page_size);
        let sequence = &mut self.slots[seq.slot as usize].sequence;
        for index in passed.clone() {
            let page = std::mem::replace(&mut sequence.pages[index], NO_PAGE);
            if page != NO_PAGE {
                self.pool.release(page, &self.index);
            }
            if let Some(raw) = sequence.raw_page(index) {
                self.raw.release(raw);
                sequence.raw[index] = NO_PAGE;
            }
        }
        if !passed.is_empty() {
            sequence.window_start = passed.end;
        }
        for index in sequence.raw_start..coded.min(sequence.raw.len()) {
            if let Some(raw) = sequence.raw_page(index) {
                self.raw.release(raw);
                sequence.raw[index] = NO_PAGE;
            }
            sequence.raw_start = index + 1;
        }
    }

    /// Writes rows `first..first + rows` of `k` and `v` to the end of a layer; the pages are there.
    fn write_rows<T: Element<Acc = f32>>(
        &mut self,
        layer: usize,
        seq: SeqId,
        rows: usize,
        first: usize,
        k: &ArrayView3<'_, T>,
        v: &ArrayView3<'_, T>,
    ) -> Result<(), Error> {
        let page_size = self.config.page_size;
        let old = self.slots[seq.slot as usize].sequence.lens[layer];
        // Head by head: the lines of a record's rows are written while they are in the caches.
        for (index, row, from, len) in parts(old..old + rows, page_size) {
            for head in 0..self.config.key_heads {
                for (form, rows) in [(self.keys, k), (self.values, v)] {
                    let rows = rows.index_axis(Axis(1), head);
                    for i in 0..len {
                        let place = (layer, index, row + i, head);
                        self.write_row(seq, form, place, rows.row(first + from - old + i));
                    }
                }
            }
            if row + len == page_size {
                self.quantise_page(layer, seq, index)?;
            }
        }
        self.slots[seq.slot as usize].sequence.lens[layer] = old + rows;
        Ok(())
    }

    /// Writes row `row` of a page of the sequence.
    fn write_row<T: Element<Acc = f32>>(
        &mut self,
        seq: SeqId,
        form: Form,
        (layer, index, row, head): (usize, usize, usize, usize),
        from: ArrayView1<'_, T>,
    ) {
        let sequence = &self.slots[seq.slot as usize].sequence;
        widen_row(from, &mut self.row_buffer.floats);
        if form.storage.is_quantised() {
            let page = sequence.raw[index];
            self.raw.write(form, page, (layer, head), row, &self.row_buffer.floats);
        } else {
            let store = &mut self.layers[layer];
            let slab = if form.side == Side::Keys { &mut store.keys } else { &mut store.values };
            slab.write(form, (sequence.pages[index], row), head, &mut self.row_buffer);
        }
    }

    /// Quantises a page of one layer that has become full.
    pub(crate) fn quantise_page(
        &mut self,
        layer: usize,
        seq: SeqId,
        index: usize,
    ) -> Result<(), Error> {
        let sequence = &self.slots[seq.slot as usize].sequence;
        let Some(raw) = sequence.raw_page(index) else { return Ok(()) };
        let page = sequence.pages[index];
        let store = &mut self.layers[layer];
        for (slab, form) in [(&mut store.keys, self.keys), (&mut store.values, self.values)] {
            if form.storage.is_quantised() {
                for head in 0..form.heads {
                    let from = self.raw.record(form, raw, layer, head);
                    slab.quantise(self.isa, form, (page, head), from)?;
                }
            }
        }
        Ok(())
    }
}

fn check_finite<T: Element<Acc = f32>>(
    arg: &'static str,
    rows: &ArrayView3<'_, T>,
    storage: Storage,
) -> Result<(), Error> {
    if !storage.is_quantised() {
        return Ok(());
    }
    let is_finite = |x: &T| x.to_acc().is_finite();
    // By rows first, which are slices: an index for each number costs more than quantising it.
    if rows.rows().into_iter().all(|row| row.iter().all(is_finite)) {
        return Ok(());
    }
    match rows.indexed_iter().find(|(_, x)| !is_finite(x)) {
        None => Ok(()),
        Some(((row, head, element), x)) => {
            Err(Error::NotFinite { arg, row, head, element, value: x.to_acc() })
        }
    }
}
