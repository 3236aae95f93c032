//! Forking, shortening and compacting sequences.

use crate::cache::Cache;
use crate::error::invalid;
use crate::options::NO_PAGE;
use crate::sequence::Sequence;
use crate::store::Move;
use crate::{Error, SeqId};

impl Cache {
    /// A second sequence with the same rows. Paged: all pages are shared, and only the last, if it is
    /// not full, is copied when either sequence appends to it. Contiguous: the rows are copied to a
    /// region of their own.
    ///
    /// # Errors
    /// [`Error::UnevenLayers`] in the middle of a step, [`Error::OutOfRegions`],
    /// [`Error::UnknownSequence`].
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId, Error> {
        self.even(seq)?;
        let fork = self.create()?;
        let is_paged = self.is_paged();
        let (from, to) = (seq.slot as usize, fork.slot as usize);
        // The table is taken out while both slots are used; it keeps its buffer.
        let mut target = std::mem::take(&mut self.slots[to].sequence);
        let source = &self.slots[from].sequence;
        target.pages.extend_from_slice(&source.pages);
        target.raw.extend_from_slice(&source.raw);
        target.lens.copy_from_slice(&source.lens);
        target.raw_start = source.raw_start;
        target.adopted = source.adopted;
        target.window_start = source.window_start;
        for (index, page) in target.pages.iter_mut().enumerate() {
            if *page == NO_PAGE {
                continue;
            }
            if is_paged {
                self.pool.share(*page);
            } else {
                let copy = target.region + index as u32;
                self.pool.take_exact(copy);
                for layer in &mut self.layers {
                    layer.keys.copy_page(self.keys, *page, copy);
                    layer.values.copy_page(self.values, *page, copy);
                }
                *page = copy;
            }
        }
        for &raw in target.raw.iter().filter(|&&raw| raw != NO_PAGE) {
            self.raw.share(raw);
        }
        self.slots[to].sequence = target;
        Ok(fork)
    }

    /// Shortens all layers to `len` rows: the exact inverse of the appends since, for all that is appended and
    /// asked from there on. With quantised storage a query for a row that was there before them may see
    /// quantised what it saw in full precision then ([`attend`](Self::attend)). In the middle of a step, where
    /// some layers have more rows than [`len`](Self::len), it undoes the step.
    ///
    /// # Errors
    /// [`Error::Option`] if `len` is more than [`len`](Self::len); [`Error::Irreversible`] if rows
    /// before `len` are needed that the window has released, or that are kept quantised only, where the
    /// row to be appended at `len` needs them in full precision ([`Config::residual`], and the page that `len`
    /// lies in). Neither happens within the rows of the last append. What can always be had is the
    /// empty sequence, and the full pages of a registered prefix ([`match_prefix`](Self::match_prefix)).
    ///
    /// [`Config::residual`]: crate::Config::residual
    pub fn truncate(&mut self, seq: SeqId, len: usize) -> Result<(), Error> {
        let shortest = self.sequence(seq)?.shortest();
        if len > shortest {
            return Err(invalid("len", format!("at most {shortest}"), len));
        }
        self.check_reversible(seq, len, false)?;
        self.shorten(seq, len);
        Ok(())
    }

    pub(crate) fn shorten(&mut self, seq: SeqId, len: usize) {
        self.drop_pages(seq, len.div_ceil(self.config.page_size));
        self.slots[seq.slot as usize].sequence.lens.fill(len);
    }

    /// Checks that the sequence can go on from `len` as if nothing had come after, and if `moves`, that
    /// later rows can be moved to `len`.
    fn check_reversible(&self, seq: SeqId, len: usize, moves: bool) -> Result<(), Error> {
        let sequence = self.sequence(seq)?;
        let page_size = self.config.page_size;
        let refuse = |reason| {
            let (from, to) = (len, sequence.longest());
            let exact_from = self.exact_from(sequence);
            Err(Error::Irreversible { sequence: seq, from, to, reason, exact_from })
        };
        if self.config.is_quantised() {
            let full = len / page_size;
            let end = len.div_ceil(page_size);
            // In full precision: pages that the query at `len` reads so, and the one that is written.
            let read = self.coded_pages(len).max(sequence.adopted)..end;
            let written = full..if moves { full + 1 } else { end };
            let lacks = |index: usize| {
                sequence.pages[index] != NO_PAGE && sequence.raw_page(index).is_none()
            };
            if read.chain(written).any(lacks) {
                return refuse("what goes before is kept quantised only");
            }
        }
        if let Some(window) = self.config.window {
            let first = window.start(len) / page_size;
            let end = if moves { sequence.pages.len() } else { len.div_ceil(page_size) };
            let sinks = window.sinks.div_ceil(page_size);
            if (first.max(sinks)..end).any(|index| sequence.pages[index] == NO_PAGE) {
                return refuse("the window has released what they see");
            }
        }
        Ok(())
    }

    /// The length that neither precision nor pages are missing from, for the row that is appended there, and for
    /// none that is longer.
    fn exact_from(&self, sequence: &Sequence) -> usize {
        let page_size = self.config.page_size;
        let lost = sequence.raw_start > sequence.adopted;
        let residual = if lost { self.config.residual.saturating_sub(1) } else { 0 };
        let precise = sequence.raw_start * page_size + residual;
        let held = match self.config.window {
            Some(window) if sequence.pages.contains(&NO_PAGE) => {
                sequence.window_start * page_size + window.size - 1
            }
            _ => 0,
        };
        precise.max(held)
    }

    /// Keeps, of the rows from `base` on, only `base + kept[0]`, `base + kept[1]`, .., in all layers:
    /// the accepted path of a token tree. `kept` ascends; the sequence ends with `base + kept.len()`
    /// rows, the same bits as if only those had been appended.
    ///
    /// # Errors
    /// [`Error::Option`] if `base` is beyond the end or `kept` does not ascend or leaves the sequence;
    /// [`Error::Irreversible`] as for [`truncate`](Self::truncate) to `base`;
    /// [`Error::OutOfPages`] if a shared page has to be copied and there is none;
    /// [`Error::UnevenLayers`], [`Error::UnknownSequence`].
    pub fn compact(&mut self, seq: SeqId, base: usize, kept: &[usize]) -> Result<(), Error> {
        let page_size = self.config.page_size;
        let sequence = self.even(seq)?;
        let len = sequence.shortest();
        if base > len {
            return Err(invalid("base", format!("at most {len}"), base));
        }
        let ascends = kept.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascends || kept.last().is_some_and(|&last| last >= len - base) {
            let expected = format!("ascending rows below {}", len - base);
            return Err(invalid("kept", expected, kept));
        }
        let end = base + kept.len();
        // Rows that already are where they belong.
        let fixed = kept.iter().enumerate().take_while(|&(i, &row)| row == i).count();
        let first = base + fixed;
        self.check_reversible(seq, first, first < end)?;
        let written = if first < end { first / page_size..end.div_ceil(page_size) } else { 0..0 };
        let shared = |&page: &u32| self.pool.refs[page as usize] > 1;
        let needed =
            self.sequence(seq)?.pages[written.clone()].iter().filter(|page| shared(page)).count();
        let available = self.pool.available();
        if needed > available {
            return Err(Error::OutOfPages { needed, available, total: self.pool.refs.len() });
        }
        if self.config.is_quantised() {
            // Pages after `first` are younger than its own, whose full precision is there.
            self.raw.reserve(written.len(), [self.keys, self.values], self.config.layers)?;
        }
        for index in written.clone() {
            self.own_page(seq, index);
        }
        self.copy_rows(seq, base, kept, fixed);
        for index in written {
            if (index + 1) * page_size <= end {
                for layer in 0..self.config.layers {
                    self.quantise_page(layer, seq, index)?;
                }
            }
        }
        self.shorten(seq, end);
        Ok(())
    }

    /// Copies rows `base + kept[i]` to `base + i`, from `i = fixed` on.
    fn copy_rows(&mut self, seq: SeqId, base: usize, kept: &[usize], fixed: usize) {
        let page_size = self.config.page_size;
        let Sequence { pages, raw, .. } = &self.slots[seq.slot as usize].sequence;
        let place = |table: &[u32], row: usize| (table[row / page_size], row % page_size);
        let moved = kept.iter().enumerate().skip(fixed).map(|(i, row)| (base + row, base + i));
        let moves = |table| {
            moved.clone().map(move |(a, b)| Move { from: place(table, a), to: place(table, b) })
        };
        for layer in &mut self.layers {
            for (slab, form) in [(&mut layer.keys, self.keys), (&mut layer.values, self.values)] {
                if !form.storage.is_quantised() {
                    slab.copy_rows(form, moves(pages));
                }
            }
        }
        for form in [self.keys, self.values] {
            if form.storage.is_quantised() {
                self.raw.copy_rows(form, self.config.layers, moves(raw));
            }
        }
    }
}
