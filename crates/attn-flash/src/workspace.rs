//! Scratch memory that the caller owns.

use std::sync::{Mutex, MutexGuard};

use tensor_utils::{Aligned, Float, Isa, ShapeError, lock_slot, take_slot, try_vec};

use crate::call::invalid;
use crate::{Error, Tiling};

/// Lanes of the widest vector of `f32`; buffers are sized for it on every instruction set.
const MAX_LANES: usize = 16;
/// Rows of the tallest register tile.
const MAX_TILE: usize = 12;

/// Scratch memory for the `_into` functions, which allocate nothing themselves.
///
/// One slot for each thread of the rayon pool it is made in; a call from a larger pool is correct
/// but waits for slots. With `d` and `e` the sizes rounded up to 16, `r` the query block, `c` the
/// key block rounded up to 32, `m` the larger of `d` and `e` rounded up to 32, and `w` the bytes of the
/// compute type, a slot takes
///
/// ```text
/// w (r (d + e) + c (d + e) + 24 c + 16 m + 2 r) + 16 r  bytes,
/// ```
///
/// whatever the number of queries, keys, heads and batch entries: 1.14 MB for `f32`, head size 64
/// and the default tiling. Each buffer takes up to 60 bytes more, to begin at a line of the caches.
#[derive(Debug)]
pub struct Workspace<A: Float> {
    tiling: Tiling,
    isa: Isa,
    head_size: usize,
    value_size: usize,
    slots: Vec<Mutex<Scratch<A>>>,
}

impl<A: Float> Workspace<A> {
    /// Scratch for head sizes up to `head_size` and value sizes up to `value_size`, cut as `tiling`
    /// says, for the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Option`] if a block of the tiling is 0, [`Error::Isa`] if this machine does not have
    /// the instruction set, [`Error::Shape`] if there is no memory of that size.
    pub fn new(head_size: usize, value_size: usize, tiling: &Tiling) -> Result<Self, Error> {
        for (option, block) in
            [("query_block", tiling.query_block), ("key_block", tiling.key_block)]
        {
            if block == 0 {
                return Err(invalid(option, "at least 1", block));
            }
        }
        let isa = Isa::resolve(tiling.isa)?;
        let tiling = Tiling {
            key_block: round_up(tiling.key_block, 2 * MAX_LANES),
            isa: Some(isa),
            ..tiling.clone()
        };
        let slots = (0..rayon::current_num_threads())
            .map(|_| Scratch::new(head_size, value_size, &tiling).map(Mutex::new))
            .collect::<Result<_, _>>()?;
        Ok(Self { tiling, isa, head_size, value_size, slots })
    }

    /// Size of all slots in bytes.
    pub fn bytes(&self) -> usize {
        self.slots.iter().map(|slot| lock_slot(slot).bytes()).sum()
    }

    /// The tiling it was made with, its key block rounded up and its instruction set resolved.
    pub fn tiling(&self) -> &Tiling {
        &self.tiling
    }

    /// The instruction set it was made for.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// Checks that it is large enough.
    pub(crate) fn check(&self, head_size: usize, value_size: usize) -> Result<(), Error> {
        if head_size <= self.head_size && value_size <= self.value_size {
            return Ok(());
        }
        Err(Error::WorkspaceTooSmall {
            head_size,
            value_size,
            workspace_head_size: self.head_size,
            workspace_value_size: self.value_size,
        })
    }

    /// A slot for the current thread: its own if it is free, else any free one, else it waits.
    pub(crate) fn slot(&self) -> MutexGuard<'_, Scratch<A>> {
        take_slot(&self.slots)
    }
}

/// `n` rounded up, or too much to be allocated.
fn round_up(n: usize, multiple: usize) -> usize {
    n.checked_next_multiple_of(multiple).unwrap_or(usize::MAX)
}

/// The scratch of one thread; the packed layouts are those of `tensor_utils::tile::pack`.
#[derive(Debug)]
pub(crate) struct Scratch<A> {
    /// Queries as [`Scores::pack_query`](crate::arithmetic::Scores::pack_query) leaves them.
    pub(crate) queries: Aligned<A>,
    /// Unnormalised outputs, `[row][E rounded up to lanes]`.
    pub(crate) o: Aligned<A>,
    /// Largest score of each row.
    pub(crate) m: Aligned<A>,
    /// Sum of `exp(score - m)` of each row.
    pub(crate) l: Aligned<A>,
    /// First key and end of the keys that each row may see.
    pub(crate) intervals: Vec<(usize, usize)>,
    /// Keys of a block as [`Scores::pack_keys`](crate::arithmetic::Scores::pack_keys) leaves them.
    pub(crate) keys: Aligned<A>,
    /// Packed values of a block.
    pub(crate) values: Aligned<A>,
    /// Rows on their way into a panel.
    pub(crate) rows: Aligned<A>,
    /// Scores of a tile, `[panel][row][panel width]`.
    pub(crate) scores: Aligned<A>,
    /// The same before the exponential, where they are needed.
    pub(crate) raw_scores: Aligned<A>,
}

impl<A: Float> Scratch<A> {
    fn new(head_size: usize, value_size: usize, tiling: &Tiling) -> Result<Self, ShapeError> {
        let d = round_up(head_size, MAX_LANES);
        let e = round_up(value_size, MAX_LANES);
        let (rows, keys) = (tiling.query_block, tiling.key_block);
        let zeros = |height, width| Aligned::try_new("workspace", &[height, width]);
        Ok(Self {
            queries: zeros(rows, d)?,
            o: zeros(rows, e)?,
            m: zeros(rows, 1)?,
            l: zeros(rows, 1)?,
            intervals: try_vec("workspace", &[rows])?,
            keys: zeros(keys, d)?,
            values: zeros(keys, e)?,
            rows: zeros(MAX_LANES, round_up(d.max(e), 2 * MAX_LANES))?,
            scores: zeros(MAX_TILE, keys)?,
            raw_scores: zeros(MAX_TILE, keys)?,
        })
    }

    fn bytes(&self) -> usize {
        let numbers = self.queries.len()
            + self.o.len()
            + self.m.len()
            + self.l.len()
            + self.keys.len()
            + self.values.len()
            + self.rows.len()
            + self.scores.len()
            + self.raw_scores.len();
        numbers * size_of::<A>() + size_of_val(self.intervals.as_slice())
    }
}
