//! The cache: its parts, its sequences, and what it can be asked.

use std::sync::atomic::{AtomicU32, Ordering};

use ndarray::Array3;
use tensor_utils::{Isa, try_array};

use crate::error::invalid;
use crate::form::{Form, Side};
use crate::options::NO_PAGE;
use crate::pages::Pool;
use crate::prefix::PrefixIndex;
use crate::raw::RawPool;
use crate::sequence::{Sequence, Slot};
use crate::store::{RowBuffer, Slab};
use crate::{Config, Error, Layout, SeqId};

/// Entries of a page table that a new sequence has room for without allocating.
const TABLE_ROOM: usize = 1024;

/// Keys and values of many sequences, all layers of a model; one page table for all layers.
///
/// Rows are appended layer by layer as a model computes them; [`len`](Self::len) counts the rows that
/// all layers have. Every method either does all it says or returns an error and changes nothing.
///
/// Memory: the pages of [`Config::layout`], reserved at once and touched when first written
/// ([`memory::page_bytes`](crate::memory::page_bytes) each); with quantised storage also one page in
/// full precision for each page of a sequence that is not full or ends within
/// [`Config::residual`] rows of where its last append began: a prompt that was appended whole has all its
/// pages twice until the next append, for its queries to read what they would have read one by one.
/// Pages in full precision that are no longer needed are given back, but for as many as are in use
/// ([`Stats::residual`]) and 8 more.
#[derive(Debug)]
pub struct Cache {
    pub(crate) id: u32,
    pub(crate) config: Config,
    pub(crate) keys: Form,
    pub(crate) values: Form,
    pub(crate) layers: Vec<LayerStore>,
    pub(crate) pool: Pool,
    pub(crate) raw: RawPool,
    pub(crate) index: PrefixIndex,
    pub(crate) slots: Vec<Slot>,
    pub(crate) free_slots: Vec<u32>,
    /// Free regions of the contiguous layout.
    pub(crate) regions: Vec<u32>,
    /// A row on its way into the cache.
    pub(crate) row_buffer: RowBuffer,
    /// What pages are quantised with; all give the same bits.
    pub(crate) isa: Isa,
}

/// The records of a layer.
#[derive(Debug)]
pub(crate) struct LayerStore {
    pub(crate) keys: Slab,
    pub(crate) values: Slab,
}

/// How the pages of a cache are used. `free + live + reclaimable` is `pages`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages of the cache.
    pub pages: usize,
    /// Pages that hold nothing.
    pub free: usize,
    /// Pages that sequences map.
    pub live: usize,
    /// Live pages that more than one sequence maps.
    pub shared: usize,
    /// Pages that no sequence maps, kept for [`Cache::match_prefix`] until they are needed.
    pub reclaimable: usize,
    /// Pages in full precision that quantised storage keeps besides.
    pub residual: usize,
    /// Sequences.
    pub sequences: usize,
    /// Rows of all sequences that are still held, each counted for every sequence that has it.
    pub rows: usize,
    /// Room for rows in the last pages of sequences that no row fills: under a page for each.
    pub wasted_rows: usize,
    /// Bytes of all pages, and of those in full precision.
    pub bytes: usize,
}

impl Cache {
    /// An empty cache.
    ///
    /// # Errors
    /// [`Error::Option`] for a size of 0 or one that overflows, [`Error::Shape`] if there is no memory
    /// of that size, [`Error::Isa`] if the variable `KERNELS_ISA` names what this machine does not have.
    pub fn new(config: &Config) -> Result<Self, Error> {
        static CACHES: AtomicU32 = AtomicU32::new(0);
        config.check()?;
        let pages = config.pages();
        let form = |side, storage, columns| {
            Form::new(side, storage, config.key_heads, columns, config.page_size, pages)
        };
        let keys = form(Side::Keys, config.keys, config.head_size);
        let values = form(Side::Values, config.values, config.value_size);
        let isa = Isa::active()?;
        let layer = |_| Ok(LayerStore { keys: Slab::new(keys)?, values: Slab::new(values)? });
        let layers = (0..config.layers).map(layer).collect::<Result<_, Error>>()?;
        let mut pool = Pool::new(pages)?;
        let mut regions = Vec::new();
        if let Layout::Contiguous { sequences, .. } = config.layout {
            pool.free.clear();
            regions.extend((0..sequences as u32).rev());
        }
        Ok(Self {
            id: CACHES.fetch_add(1, Ordering::Relaxed),
            config: config.clone(),
            keys,
            values,
            layers,
            pool,
            raw: RawPool::default(),
            index: PrefixIndex::default(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            regions,
            row_buffer: RowBuffer::new(config.head_size.max(config.value_size)),
            isa,
        })
    }

    /// What it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A new, empty sequence. It takes pages as rows are appended; of a contiguous cache, a region at
    /// once.
    ///
    /// # Errors
    /// [`Error::OutOfRegions`] if a contiguous cache has no region left.
    pub fn create(&mut self) -> Result<SeqId, Error> {
        let region = match self.config.layout {
            Layout::Paged { .. } => 0,
            Layout::Contiguous { sequences, .. } => {
                let region = self.regions.pop().ok_or(Error::OutOfRegions { total: sequences })?;
                region * self.region_pages() as u32
            }
        };
        let slot = match self.free_slots.pop() {
            Some(slot) => slot,
            None => {
                let room = self.pool.refs.len().min(TABLE_ROOM);
                let table = || Vec::with_capacity(room);
                let raw = if self.config.is_quantised() { table() } else { Vec::new() };
                let lens = vec![0; self.config.layers];
                let sequence = Sequence { pages: table(), raw, lens, ..Sequence::default() };
                self.slots.push(Slot { generation: 0, live: false, sequence });
                self.slots.len() as u32 - 1
            }
        };
        let Slot { generation, live, sequence } = &mut self.slots[slot as usize];
        *live = true;
        sequence.region = region;
        Ok(SeqId { cache: self.id, slot, generation: *generation })
    }

    /// Frees a sequence; its pages are free unless others share them, or the prefix index keeps them.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`] if it was freed before.
    pub fn free(&mut self, seq: SeqId) -> Result<(), Error> {
        self.sequence(seq)?;
        self.drop_pages(seq, 0);
        let slot = &mut self.slots[seq.slot as usize];
        slot.live = false;
        // A slot whose generations are used up is never taken again.
        let reusable = slot.generation < u32::MAX;
        slot.generation = slot.generation.wrapping_add(u32::from(reusable));
        let region = slot.sequence.region;
        slot.sequence.clear();
        if reusable {
            self.free_slots.push(seq.slot);
        }
        if let Layout::Contiguous { .. } = self.config.layout {
            self.regions.push(region / (self.region_pages() as u32).max(1));
        }
        Ok(())
    }

    /// Rows of the sequence that all layers have; those that the window has passed count.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn len(&self, seq: SeqId) -> Result<usize, Error> {
        Ok(self.sequence(seq)?.shortest())
    }

    /// Rows of the sequence in one layer.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::Option`] for a layer that does not exist.
    pub fn layer_len(&self, layer: usize, seq: SeqId) -> Result<usize, Error> {
        self.check_layer(layer)?;
        Ok(self.sequence(seq)?.lens[layer])
    }

    /// Whether the sequence has no row in any layer. In the middle of its first step, where [`len`](Self::len) is 0,
    /// it is not empty.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn is_empty(&self, seq: SeqId) -> Result<bool, Error> {
        Ok(self.sequence(seq)?.longest() == 0)
    }

    /// Whether the handle stands for a sequence of this cache.
    pub fn contains(&self, seq: SeqId) -> bool {
        self.sequence(seq).is_ok()
    }

    /// All sequences.
    pub fn sequences(&self) -> impl Iterator<Item = SeqId> {
        self.slots.iter().enumerate().filter(|(_, slot)| slot.live).map(|(index, slot)| SeqId {
            cache: self.id,
            slot: index as u32,
            generation: slot.generation,
        })
    }

    /// How the pages are used.
    pub fn stats(&self) -> Stats {
        let page_size = self.config.page_size;
        let live = || self.slots.iter().filter(|slot| slot.live).map(|slot| &slot.sequence);
        let held = |sequence: &Sequence| {
            let gone = sequence.pages.iter().filter(|&&page| page == NO_PAGE).count();
            sequence.longest() - (gone * page_size).min(sequence.longest())
        };
        let room = |sequence: &Sequence| sequence.pages.len() * page_size - sequence.longest();
        let mapped = self.pool.refs.iter().filter(|&&refs| refs > 0).count();
        Stats {
            pages: self.pool.refs.len(),
            free: self.pool.refs.len() - mapped - self.pool.reclaimable.len,
            live: mapped,
            shared: self.pool.refs.iter().filter(|&&refs| refs > 1).count(),
            reclaimable: self.pool.reclaimable.len,
            residual: self.raw.used(),
            sequences: live().count(),
            rows: live().map(held).sum(),
            wasted_rows: live().map(room).sum(),
            bytes: self.raw.bytes()
                + self
                    .layers
                    .iter()
                    .map(|layer| layer.keys.bytes() + layer.values.bytes())
                    .sum::<usize>(),
        }
    }

    /// The keys `[n, G, D]` and values `[n, G, E]` of rows `from..from + n` of a layer as attention at
    /// the end of the sequence takes them: rounded, or dequantised. For inspection; attention never
    /// makes such a copy.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Option`] for a layer or rows that do not exist, or rows that the
    /// window has released; [`Error::Shape`] if the copies do not fit in memory.
    pub fn read(
        &self,
        layer: usize,
        seq: SeqId,
        from: usize,
        n: usize,
    ) -> Result<(Array3<f32>, Array3<f32>), Error> {
        self.check_layer(layer)?;
        let sequence = self.sequence(seq)?;
        let len = sequence.lens[layer];
        let page_size = self.config.page_size;
        let end = from.checked_add(n).filter(|&end| end <= len);
        let Some(end) = end else {
            let (expected, got) =
                (format!("rows within 0..{len}"), format_args!("{n} from {from} on"));
            return Err(invalid("from, n", expected, got));
        };
        let heads = self.config.key_heads;
        let mut keys = try_array("keys", (n, heads, self.config.head_size))?;
        let mut values = try_array("values", (n, heads, self.config.value_size))?;
        for row in from..end {
            let index = row / page_size;
            let page = sequence.pages[index];
            if page == NO_PAGE {
                return Err(invalid("rows", "rows that the window has not released", row));
            }
            // The query at the last position decides which copy counts.
            let coded =
                self.is_coded(index, len.saturating_sub(1)) || sequence.raw_page(index).is_none();
            let layer_store = &self.layers[layer];
            let sides = [
                (&layer_store.keys, self.keys, &mut keys),
                (&layer_store.values, self.values, &mut values),
            ];
            for (slab, form, to) in sides {
                for head in 0..heads {
                    let mut to = to.index_axis_mut(ndarray::Axis(0), row - from);
                    let mut to = to.row_mut(head);
                    let Some(to) = to.as_slice_mut() else { continue };
                    match sequence.raw_page(index) {
                        Some(raw) if form.storage.is_quantised() && !coded => {
                            self.raw.read(form, raw, (layer, head), row % page_size, to);
                        }
                        _ => slab.read(form, page, head, row % page_size, to),
                    }
                }
            }
        }
        Ok((keys, values))
    }

    /// Whether the query at `position` reads page `index` quantised, where storage is.
    #[inline(always)]
    pub(crate) fn is_coded(&self, index: usize, position: usize) -> bool {
        index < self.coded_pages(position)
    }

    /// Pages that the query at `position`, and every later one, reads quantised, where storage is.
    #[inline(always)]
    pub(crate) fn coded_pages(&self, position: usize) -> usize {
        (position + 1).saturating_sub(self.config.residual) / self.config.page_size
    }

    /// Where the record of a page and head begins, in full precision if `raw` is the page that has it,
    /// and its layout.
    pub(crate) fn record_address(
        &self,
        layer: usize,
        form: Form,
        page: u32,
        raw: Option<u32>,
        head: usize,
    ) -> (Form, usize) {
        match raw {
            Some(raw) if form.storage.is_quantised() => {
                let record = self.raw.record(form, raw, layer, head);
                (form.raw(), record.as_ptr().addr())
            }
            _ => {
                let LayerStore { keys, values } = &self.layers[layer];
                let slab = if form.side == Side::Keys { keys } else { values };
                let start = Slab::start(form, page, head) * form.element_bytes();
                (form, slab.as_bytes().as_ptr().addr() + start)
            }
        }
    }

    /// Pages of a region of the contiguous layout.
    pub(crate) fn region_pages(&self) -> usize {
        match self.config.layout {
            Layout::Contiguous { capacity, .. } => capacity.div_ceil(self.config.page_size),
            Layout::Paged { .. } => 0,
        }
    }

    pub(crate) fn is_paged(&self) -> bool {
        matches!(self.config.layout, Layout::Paged { .. })
    }

    pub(crate) fn sequence(&self, seq: SeqId) -> Result<&Sequence, Error> {
        match self.slots.get(seq.slot as usize) {
            Some(slot)
                if slot.live && seq.cache == self.id && slot.generation == seq.generation =>
            {
                Ok(&slot.sequence)
            }
            _ => Err(Error::UnknownSequence(seq)),
        }
    }

    /// The sequence, if all its layers have as many rows.
    pub(crate) fn even(&self, seq: SeqId) -> Result<&Sequence, Error> {
        let sequence = self.sequence(seq)?;
        let (shortest, longest) = (sequence.shortest(), sequence.longest());
        if shortest == longest {
            Ok(sequence)
        } else {
            Err(Error::UnevenLayers { sequence: seq, shortest, longest })
        }
    }

    pub(crate) fn check_layer(&self, layer: usize) -> Result<(), Error> {
        let layers = self.config.layers;
        if layer < layers {
            Ok(())
        } else {
            Err(invalid("layer", format!("less than {layers}"), layer))
        }
    }

    /// Gives back all pages of a sequence from page `from` on, the last first.
    pub(crate) fn drop_pages(&mut self, seq: SeqId, from: usize) {
        let is_paged = self.is_paged();
        let sequence = &mut self.slots[seq.slot as usize].sequence;
        while sequence.pages.len() > from {
            let page = sequence.pages.pop().unwrap_or(NO_PAGE);
            if page == NO_PAGE {
                continue;
            }
            if is_paged {
                self.pool.release(page, &self.index);
            } else {
                self.pool.refs[page as usize] = 0;
            }
        }
        while sequence.raw.len() > from {
            if let Some(page) = sequence.raw.pop().filter(|&page| page != NO_PAGE) {
                self.raw.release(page);
            }
        }
        self.raw.trim();
        sequence.raw_start = sequence.raw_start.min(from);
        sequence.adopted = sequence.adopted.min(from);
        sequence.window_start = sequence.window_start.min(from);
    }
}
