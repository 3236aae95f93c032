//! Page tables in the format of FlashInfer.

use std::collections::HashMap;

use ndarray::{ArrayView4, Axis};
use tensor_utils::{Element, check_shape};

use crate::cache::Cache;
use crate::error::invalid;
use crate::options::NO_PAGE;
use crate::{Error, Layout, SeqId};

/// The page tables of a batch in FlashInfer's format (<https://docs.flashinfer.ai/tutorials/kv_layout.html>):
/// sequence `i` has pages `kv_indices[kv_indptr[i]..kv_indptr[i + 1]]`, all full but the last, which
/// has `last_page_len[i]` rows, 1 to the page size; an empty sequence has no page and 0 here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageTables {
    /// Where the pages of each sequence begin in `kv_indices`, and their total: one more than there
    /// are sequences.
    pub kv_indptr: Vec<i32>,
    /// Pages, sequence after sequence.
    pub kv_indices: Vec<i32>,
    /// Rows of the last page of each sequence.
    pub last_page_len: Vec<i32>,
}

impl Default for PageTables {
    /// Of no sequence.
    fn default() -> Self {
        Self { kv_indptr: vec![0], kv_indices: Vec::new(), last_page_len: Vec::new() }
    }
}

impl PageTables {
    /// Rows of each sequence.
    ///
    /// # Errors
    /// [`Error::Option`] naming the table that does not fit the others or the page size.
    pub fn lens(&self, page_size: usize) -> Result<Vec<usize>, Error> {
        let Self { kv_indptr, kv_indices, last_page_len } = self;
        let ascends = kv_indptr.windows(2).all(|pair| pair[0] <= pair[1]);
        let ends = kv_indptr.last().map(|&end| end as usize) == Some(kv_indices.len());
        if kv_indptr.first() != Some(&0) || !ascends || !ends {
            let expected = format!("ascending from 0 to {}", kv_indices.len());
            return Err(invalid("kv_indptr", expected, kv_indptr));
        }
        check_shape("last_page_len", &[last_page_len.len()], &[kv_indptr.len() - 1])?;
        let mut lens = Vec::with_capacity(last_page_len.len());
        for (pair, &last) in kv_indptr.windows(2).zip(last_page_len) {
            let pages = (pair[1] - pair[0]) as usize;
            let valid = if pages == 0 { 0..=0 } else { 1..=page_size };
            match usize::try_from(last) {
                Ok(last) if valid.contains(&last) => {
                    let full = pages.saturating_sub(1).checked_mul(page_size);
                    let len = full.and_then(|full| full.checked_add(last));
                    let too_long =
                        || invalid("page_size", "a length that fits in memory", page_size);
                    lens.push(len.ok_or_else(too_long)?);
                }
                _ => {
                    let expected = format!("{} to {}", valid.start(), valid.end());
                    return Err(invalid("last_page_len", expected, last));
                }
            }
        }
        Ok(lens)
    }
}

impl Cache {
    /// The page tables of a batch.
    ///
    /// # Errors
    /// [`Error::UnevenLayers`] in the middle of a step, [`Error::UnknownSequence`], [`Error::Option`]
    /// for sequences whose first pages a window has released (the format has no sign for that), and for
    /// pages or numbers of them that an `i32` does not count.
    pub fn page_tables(&self, seqs: &[SeqId]) -> Result<PageTables, Error> {
        let page_size = self.config.page_size;
        let mut tables = PageTables::default();
        for &seq in seqs {
            let sequence = self.even(seq)?;
            if sequence.pages.contains(&NO_PAGE) {
                return Err(invalid("seqs", "sequences that hold all their pages", seq));
            }
            let too_many = |_| invalid("seqs", "pages that an i32 counts", seqs.len());
            for &page in &sequence.pages {
                tables.kv_indices.push(i32::try_from(page).map_err(too_many)?);
            }
            tables.kv_indptr.push(i32::try_from(tables.kv_indices.len()).map_err(too_many)?);
            let len = sequence.shortest();
            let last = if len == 0 { 0 } else { (len - 1) % page_size + 1 };
            tables.last_page_len.push(last as i32);
        }
        Ok(tables)
    }

    /// New sequences with the rows of another paged cache: its page tables, and for each layer its
    /// pages of keys `[pages, page_size, G, D]` and values `[pages, page_size, G, E]` (FlashInfer's
    /// NHD; a view with axes 1 and 2 swapped of HND). Full pages that several sequences have in the
    /// same place are shared here too, as far as that gives the same bits: the window or quantised storage
    /// may have released what one of them still needs.
    ///
    /// # Errors
    /// [`Error::Option`] and [`Error::Shape`] for tables or pages that do not fit,
    /// [`Error::NeedsPages`] for the contiguous layout, and those of [`append`](Self::append). On an
    /// error no sequence is left behind; prefixes that nobody used may have made room.
    pub fn import<T: Element<Acc = f32>>(
        &mut self,
        tables: &PageTables,
        layers: &[(ArrayView4<'_, T>, ArrayView4<'_, T>)],
    ) -> Result<Vec<SeqId>, Error> {
        let Layout::Paged { .. } = self.config.layout else {
            return Err(Error::NeedsPages { operation: "import" });
        };
        let page_size = self.config.page_size;
        let lens = tables.lens(page_size)?;
        check_shape("layers", &[layers.len()], &[self.config.layers])?;
        for (k, v) in layers {
            let (pages, heads) = (k.dim().0, self.config.key_heads);
            check_shape("k", k.shape(), &[pages, page_size, heads, self.config.head_size])?;
            check_shape("v", v.shape(), &[pages, page_size, heads, self.config.value_size])?;
            if let Some(bad) =
                tables.kv_indices.iter().find(|&&page| page < 0 || page as usize >= pages)
            {
                return Err(invalid("kv_indices", format!("0 to {pages}, exclusive"), bad));
            }
        }
        let mut seqs = Vec::with_capacity(lens.len());
        let mut known = Imported::default();
        for (pair, &len) in tables.kv_indptr.windows(2).zip(&lens) {
            let pages = &tables.kv_indices[pair[0] as usize..pair[1] as usize];
            match self.import_sequence(pages, len, layers, &mut known) {
                Ok(seq) => seqs.push(seq),
                Err(error) => {
                    for seq in seqs {
                        self.free(seq)?;
                    }
                    return Err(error);
                }
            }
        }
        Ok(seqs)
    }

    /// Whether a sequence of `len` rows could begin with the first `n` pages of `seq`, to the bit: they are
    /// held, and in full precision where its queries will read them so, from the first row of its last page on,
    /// which would be its last append.
    fn shares_beginning(&self, seq: SeqId, n: usize, len: usize) -> bool {
        let sequence = &self.slots[seq.slot as usize].sequence;
        let page_size = self.config.page_size;
        let coded = self.coded_pages(len.saturating_sub(1) / page_size * page_size);
        let is_exact = |index: usize| {
            let is_coded = !self.config.is_quantised() || index < coded;
            sequence.pages[index] != NO_PAGE && (is_coded || sequence.raw_page(index).is_some())
        };
        (0..n).all(is_exact)
    }

    fn import_sequence<T: Element<Acc = f32>>(
        &mut self,
        pages: &[i32],
        len: usize,
        layers: &[(ArrayView4<'_, T>, ArrayView4<'_, T>)],
        known: &mut Imported,
    ) -> Result<SeqId, Error> {
        let page_size = self.config.page_size;
        let full = &pages[..len / page_size];
        let shared = known
            .beginnings(full)
            .into_iter()
            .rev()
            .find(|&(n, seq)| self.shares_beginning(seq, n, len));
        let (seq, start) = match shared {
            Some((n, seq)) => {
                let fork = self.fork(seq)?;
                self.shorten(fork, n * page_size);
                (fork, n)
            }
            None => (self.create()?, 0),
        };
        let append = |cache: &mut Self| {
            for (index, &page) in pages.iter().enumerate().skip(start) {
                let rows = page_size.min(len - index * page_size);
                for (layer, (k, v)) in layers.iter().enumerate() {
                    let k = k.index_axis(Axis(0), page as usize);
                    let v = v.index_axis(Axis(0), page as usize);
                    let (k, v) = (
                        k.slice_axis(Axis(0), (..rows).into()),
                        v.slice_axis(Axis(0), (..rows).into()),
                    );
                    cache.append(layer, seq, k, v)?;
                }
            }
            Ok(())
        };
        if let Err(error) = append(self) {
            self.free(seq)?;
            return Err(error);
        }
        known.add(full, seq);
        Ok(seq)
    }
}

/// Runs of foreign pages that have been imported, as a tree: a run is one page more than another.
#[derive(Default)]
struct Imported {
    /// The run of a run and a page; 0 is that of no page.
    runs: HashMap<(usize, i32), usize>,
    /// The sequence that was the first to begin with each run but that.
    seqs: Vec<SeqId>,
}

impl Imported {
    /// How `pages` may begin: numbers of pages, ascending, and who has them.
    fn beginnings(&self, pages: &[i32]) -> Vec<(usize, SeqId)> {
        let mut run = 0;
        let longer = |&page: &i32| {
            run = *self.runs.get(&(run, page))?;
            Some(self.seqs[run - 1])
        };
        (1..).zip(pages.iter().map_while(longer)).collect()
    }

    fn add(&mut self, pages: &[i32], seq: SeqId) {
        let mut run = 0;
        for &page in pages {
            run = *self.runs.entry((run, page)).or_insert_with(|| {
                self.seqs.push(seq);
                self.seqs.len()
            });
        }
    }
}
