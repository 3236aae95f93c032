//! What a cache holds ([`Config`]), what attention over it computes ([`Options`]), and whose queries
//! they are ([`Queries`]).

use tensor_utils::Isa;

use crate::SeqId;
use crate::error::{Error, invalid};

/// What a cache holds. Everything but the sizes has a neutral default. Layers, heads, head sizes and the page
/// size are 1 to 2^24 each, and a page must fit in memory.
///
/// ```
/// use kvcache::{Config, Layout, Storage};
///
/// let config = Config { keys: Storage::Int8, values: Storage::Int8, ..Config::new(32, 8, 128) };
/// assert_eq!(config.layout, Layout::Paged { pages: 1024 });
/// assert_eq!(config.page_size, 64);
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Layers of the model; all share one page table.
    pub layers: usize,
    /// Key/value heads `G`.
    pub key_heads: usize,
    /// Head size `D` of keys and queries.
    pub head_size: usize,
    /// Head size `E` of values and outputs. Default: `head_size`.
    pub value_size: usize,
    /// How keys are stored. Default [`Storage::F32`].
    pub keys: Storage,
    /// How values are stored. Default [`Storage::F32`].
    pub values: Storage,
    /// Where pages are. Default: paged, 1024 pages.
    pub layout: Layout,
    /// Rows of a page. Default 64. Multiples of 16 are fastest. Quantised keys have a
    /// scale and a minimum per channel and page, so a small page costs more (see
    /// [`memory::page_bytes`](crate::memory::page_bytes)).
    pub page_size: usize,
    /// The number of most recent rows that quantised storage keeps in full precision as well (`f32`):
    /// a query at position `p` reads a page quantised if it ends at or before `p + 1 - residual`,
    /// else in full precision. The page that is being filled is always kept in full precision.
    /// Default 32; [`usize::MAX`] keeps all.
    ///
    /// Full precision that no query after the last append reads is released: a query at an older position
    /// then reads such pages quantised too.
    ///
    /// Pages that hold rows of a tree are read in full precision by its nodes; for the same bits as decoding
    /// token by token, `residual` must be above the depth of the tree.
    pub residual: usize,
    /// Rows beyond this window are never read again; a paged cache releases their pages, a contiguous one
    /// keeps them. Default: none.
    pub window: Option<Window>,
}

impl Config {
    /// `layers` layers of `key_heads` heads of size `head_size`, and defaults.
    pub fn new(layers: usize, key_heads: usize, head_size: usize) -> Self {
        Self {
            layers,
            key_heads,
            head_size,
            value_size: head_size,
            keys: Storage::F32,
            values: Storage::F32,
            layout: Layout::default(),
            page_size: 64,
            residual: 32,
            window: None,
        }
    }

    /// Keys and values stored in the same way.
    pub fn stored_as(self, storage: Storage) -> Self {
        Self { keys: storage, values: storage, ..self }
    }

    /// The same with another layout.
    pub fn with_layout(self, layout: Layout) -> Self {
        Self { layout, ..self }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let sizes = [
            ("layers", self.layers),
            ("key_heads", self.key_heads),
            ("head_size", self.head_size),
            ("value_size", self.value_size),
            ("page_size", self.page_size),
        ];
        for (option, size) in sizes {
            if size == 0 || size > 1 << 24 {
                return Err(invalid(option, "1 to 2^24", size));
            }
        }
        let columns = 4 * (self.head_size + self.value_size) + 16;
        let sizes = [self.key_heads, self.page_size, self.layers];
        let bytes = sizes.iter().try_fold(columns, |bytes, &size| bytes.checked_mul(size));
        if bytes.is_none_or(|bytes| bytes > isize::MAX as usize / 4) {
            let expected = "a page that fits in memory with these heads and layers";
            return Err(invalid("page_size", expected, self.page_size));
        }
        if let Some(window) = self.window {
            window.check("window")?;
        }
        match self.layout {
            Layout::Paged { pages } if pages >= NO_PAGE as usize => {
                Err(invalid("layout.pages", "less than 2^32 - 1", pages))
            }
            Layout::Contiguous { sequences, capacity } => {
                let pages = capacity.div_ceil(self.page_size).checked_mul(sequences);
                if sequences >= NO_PAGE as usize {
                    return Err(invalid("layout.sequences", "less than 2^32 - 1", sequences));
                }
                match pages {
                    Some(pages) if pages < NO_PAGE as usize => Ok(()),
                    _ => {
                        Err(invalid("layout.capacity", "less than 2^32 - 1 pages in all", capacity))
                    }
                }
            }
            Layout::Paged { .. } => Ok(()),
        }
    }

    /// Pages of the cache.
    pub(crate) fn pages(&self) -> usize {
        match self.layout {
            Layout::Paged { pages } => pages,
            Layout::Contiguous { sequences, capacity } => {
                sequences * capacity.div_ceil(self.page_size)
            }
        }
    }

    pub(crate) fn is_quantised(&self) -> bool {
        self.keys.is_quantised() || self.values.is_quantised()
    }
}

/// The entry of a page table whose page was released.
pub(crate) const NO_PAGE: u32 = u32::MAX;

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Storage {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16.
    Bf16,
    /// Rounded to half precision; beyond 65504 infinity.
    F16,
    /// 8 bits: `minimum + scale * code`, keys with a scale and minimum for each channel of a page,
    /// values for each row (Liu et al., 2024, "KIVI", [arXiv:2402.02750](https://arxiv.org/abs/2402.02750)).
    Int8,
    /// The same with 4 bits.
    Int4,
}

impl Storage {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::F32, Self::Bf16, Self::F16, Self::Int8, Self::Int4];

    /// Bits of a number, scales apart.
    pub fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::Bf16 | Self::F16 => 16,
            Self::Int8 => 8,
            Self::Int4 => 4,
        }
    }

    /// Whether it is [`Int8`](Self::Int8) or [`Int4`](Self::Int4).
    pub fn is_quantised(self) -> bool {
        matches!(self, Self::Int8 | Self::Int4)
    }

    /// The name in case files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        }
    }
}

/// Where the rows of a sequence are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Anywhere: a pool of pages with a free list, and a page table for each sequence. Forks and
    /// equal prefixes share pages.
    Paged {
        /// Pages of the pool.
        pages: usize,
    },
    /// One region for each sequence, reserved when it is created. A fork copies.
    Contiguous {
        /// Regions.
        sequences: usize,
        /// Rows of a region, rounded up to whole pages.
        capacity: usize,
    },
}

impl Default for Layout {
    fn default() -> Self {
        Self::Paged { pages: 1024 }
    }
}

/// A sliding window with attention sinks (Xiao et al., 2023,
/// [arXiv:2309.17453](https://arxiv.org/abs/2309.17453)): the query at position `p` sees position `j`
/// if `p - j < size` or `j < sinks`. Positions are never renumbered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Positions that are visible, the query's own included; at least 1.
    pub size: usize,
    /// First positions of the sequence that stay visible.
    pub sinks: usize,
}

impl Window {
    pub(crate) fn check(self, option: &'static str) -> Result<(), Error> {
        if self.size == 0 { Err(invalid(option, "a size of at least 1", self)) } else { Ok(()) }
    }

    /// First position after the sinks that the query at `position` sees.
    pub(crate) fn start(self, position: usize) -> usize {
        (position + 1).saturating_sub(self.size)
    }
}

/// What attention over the cache computes; the default is plain softmax attention.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// Factor of the dot products. `None`: `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Bound `c > 0` of the scores, `c tanh(s / c)`. Default: none.
    pub softcap: Option<f64>,
    /// A window of this call, besides that of the cache (for models whose layers differ). Default:
    /// none.
    pub window: Option<Window>,
    /// Instruction set. `None`: [`Isa::active`].
    pub isa: Option<Isa>,
}

impl Options {
    /// Checks all but the instruction set; returns the scale.
    pub(crate) fn check(&self, head_size: usize) -> Result<f64, Error> {
        if let Some(window) = self.window {
            window.check("window")?;
        }
        // They and what they are divided by are f32.
        let is_cap = |cap: f32| cap > 0.0 && cap.is_finite() && (1.0 / cap).is_finite();
        if let Some(cap) = self.softcap.filter(|&cap| !is_cap(cap as f32)) {
            return Err(invalid("softcap", "positive and finite in f32, its reciprocal too", cap));
        }
        let scale = self.scale.unwrap_or(1.0 / (head_size as f64).sqrt());
        if !(scale as f32).is_finite() {
            return Err(invalid("scale", "finite in f32", scale));
        }
        Ok(scale)
    }
}

/// The queries of one sequence: how many, and what they see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queries<'a> {
    /// The sequence.
    pub seq: SeqId,
    /// Which of its rows they belong to.
    pub rows: Rows<'a>,
}

/// Which rows of a sequence the queries belong to, and so what they see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows<'a> {
    /// The last so many positions; each sees its own and those before.
    Last(usize),
    /// The last rows are the nodes of a token tree, given by the parent of each (`-1`: none, a child of
    /// the row before the tree). A node sees the rows before the tree, its ancestors and itself; its
    /// position is the number of rows before the tree plus its depth. Pages that hold rows of the tree are
    /// read in full precision, whatever [`Config::residual`] says.
    Tree(&'a [i64]),
}

impl Rows<'_> {
    /// How many.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Last(rows) => rows,
            Self::Tree(parents) => parents.len(),
        }
    }

    /// Checks that the parents are those of a tree.
    pub(crate) fn check(self) -> Result<(), Error> {
        let Self::Tree(parents) = self else { return Ok(()) };
        for (node, &parent) in parents.iter().enumerate() {
            if parent < -1 || parent >= node as i64 {
                let expected = format!("an earlier node or -1 as the parent of node {node}");
                return Err(invalid("parents", expected, parent));
            }
        }
        Ok(())
    }
}

impl<'a> Queries<'a> {
    /// The last `rows` positions.
    pub fn last(seq: SeqId, rows: usize) -> Self {
        Self { seq, rows: Rows::Last(rows) }
    }

    /// The nodes of a tree.
    pub fn tree(seq: SeqId, parents: &'a [i64]) -> Self {
        Self { seq, rows: Rows::Tree(parents) }
    }

    /// How many queries.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
