//! Scratch memory that the caller owns.

use std::sync::{Mutex, MutexGuard};

use tensor_utils::tile::pairs::{Pair, pair_depth};
use tensor_utils::{Aligned, Element, Float, Isa, ShapeError, bf16, lock_slot, take_slot, try_vec};

use crate::{Error, Inputs, Strategy, Tiling, VarlenInputs};

/// Query rows whose `P` and `dS` are held at once: a multiple of every tile height.
pub(crate) const BAND: usize = 96;
/// Pairs between rows of `P` and `dS` in pairs of queries beyond the keys of a block: a column of them
/// is read at once, and must not fall on a few sets of the cache.
pub(crate) const PAIR_PAD: usize = 16;
/// Lanes of the widest vector of `f32`; buffers are sized for it on every instruction set.
const MAX_LANES: usize = 16;

/// Scratch memory for the `_into` functions, which allocate nothing themselves.
///
/// One slot for each thread of the rayon pool it is made in; a call from a larger pool is correct
/// but waits for slots. With `d` and `e` the sizes rounded up to 16, `c` the key block rounded up to
/// 32 and `w` the bytes of the compute type, a slot takes
///
/// ```text
/// w (3 c d + 2 c e + 96 (2 d + e) + 289 c + 16 max(d, e)) + 96 c  bytes
/// ```
///
/// (0.73 MB for `f32`, head size 64 and the default tiling), whatever the lengths. bf16 on
/// [`Isa::Avx512Bf16`], whose products are of pairs, takes, with `p` and `r` half of `d` and `e`
/// rounded up to 16,
///
/// ```text
/// 4 (c (3 d / 2 + p + e + r + max(p, r)) + 96 (d + p + r) + 48 (d + e) + 433 c + 1536) + 96 c  bytes
/// ```
///
/// (0.81 MB for head size 64), and each buffer up to 60 bytes more, to begin at a line of the caches.
/// Beside the slots there is one number a query row and head for delta, and for 16-bit types, whose gradients add up
/// in `f32`, one number an element of dq, dk and dv.
#[derive(Debug)]
pub struct Workspace<T: Element> {
    tiling: Tiling,
    isa: Isa,
    room: Room,
    pub(crate) slots: Slots<T::Acc>,
    pub(crate) delta: Vec<T::Acc>,
    /// Sums of the gradients of 16-bit types: dq, dk, dv.
    pub(crate) sums: [Vec<T::Acc>; 3],
}

/// What a call needs room for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) head_size: usize,
    pub(crate) value_size: usize,
    /// Query rows of all heads.
    pub(crate) rows: usize,
    /// Elements of dq, dk and dv.
    pub(crate) gradients: [usize; 3],
}

impl<T: Element> Workspace<T> {
    /// Scratch for calls of the sizes of `inputs` or smaller ones, cut as `tiling` says, for the
    /// current rayon pool.
    ///
    /// # Errors
    /// [`Error::EmptyBlock`] if a block of the tiling is 0, [`Error::Isa`] if this machine does not
    /// have the instruction set, [`Error::Shape`] if there is no memory of that size.
    pub fn new(inputs: &Inputs<'_, T>, tiling: &Tiling) -> Result<Self, Error> {
        Self::with_room(inputs.room(), tiling)
    }

    /// The same for a packed batch.
    ///
    /// # Errors
    /// As [`Workspace::new`].
    pub fn new_varlen(inputs: &VarlenInputs<'_, T>, tiling: &Tiling) -> Result<Self, Error> {
        Self::with_room(inputs.room(), tiling)
    }

    fn with_room(room: Room, tiling: &Tiling) -> Result<Self, Error> {
        for (block, size) in [("query_block", tiling.query_block), ("key_block", tiling.key_block)]
        {
            if size == 0 {
                return Err(Error::EmptyBlock { block });
            }
        }
        let isa = Isa::resolve(tiling.isa)?;
        let tiling = Tiling {
            key_block: round_up(tiling.key_block, 2 * MAX_LANES),
            isa: Some(isa),
            ..tiling.clone()
        };
        let in_pairs = isa == Isa::Avx512Bf16 && T::NAME == bf16::NAME;
        let slots = (0..rayon::current_num_threads())
            .map(|_| Scratch::new(room.head_size, room.value_size, tiling.key_block, in_pairs))
            .map(|scratch| scratch.map(Mutex::new))
            .collect::<Result<_, _>>()?;
        let zeros = |len: usize| try_vec("workspace", &[len]);
        let [dq, dk, dv] = if T::IS_COMPUTE_TYPE { [0; 3] } else { room.gradients };
        Ok(Self {
            room,
            slots: Slots(slots),
            delta: zeros(room.rows)?,
            sums: [zeros(dq)?, zeros(dk)?, zeros(dv)?],
            tiling,
            isa,
        })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        let slots: usize = self.slots.0.iter().map(|slot| lock_slot(slot).bytes()).sum();
        let numbers = self.delta.len() + self.sums.iter().map(Vec::len).sum::<usize>();
        slots + numbers * size_of::<T::Acc>()
    }

    /// The tiling it was made with, its key block rounded up and its instruction set resolved.
    pub fn tiling(&self) -> &Tiling {
        &self.tiling
    }

    /// The instruction set it was made for.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// Whether delta is computed in a pass of its own.
    pub(crate) fn two_pass(&self) -> bool {
        self.tiling.strategy == Strategy::TwoPass
    }

    /// Checks that it is large enough.
    pub(crate) fn check(&self, needed: Room) -> Result<(), Error> {
        let room = self.room;
        let [dq, dk, dv] = needed.gradients;
        for (what, needed, room) in [
            ("columns of q and k", needed.head_size, room.head_size),
            ("columns of v", needed.value_size, room.value_size),
            ("query rows of all heads", needed.rows, room.rows),
            ("elements of q", dq, room.gradients[0]),
            ("elements of k", dk, room.gradients[1]),
            ("elements of v", dv, room.gradients[2]),
        ] {
            if needed > room {
                return Err(Error::WorkspaceTooSmall { what, needed, room });
            }
        }
        Ok(())
    }
}

/// `n` rounded up, or too much to be allocated.
fn round_up(n: usize, multiple: usize) -> usize {
    n.checked_next_multiple_of(multiple).unwrap_or(usize::MAX)
}

/// The scratch of each thread.
#[derive(Debug)]
pub(crate) struct Slots<A>(Vec<Mutex<Scratch<A>>>);

impl<A> Slots<A> {
    /// A slot for the current thread: its own if it is free, else any free one, else it waits.
    pub(crate) fn slot(&self) -> MutexGuard<'_, Scratch<A>> {
        take_slot(&self.0)
    }
}

/// The scratch of one thread. Rows are head or value sizes rounded up to lanes.
#[derive(Debug)]
pub(crate) struct Scratch<A> {
    /// Keys of a block, transposed.
    pub(crate) keys_transposed: Aligned<A>,
    /// Values of a block, transposed.
    pub(crate) values_transposed: Aligned<A>,
    /// Keys of a block times the scale, packed by columns.
    pub(crate) keys: Aligned<A>,
    /// Sums for the keys of a block.
    pub(crate) dk: Aligned<A>,
    /// Sums for the values of a block.
    pub(crate) dv: Aligned<A>,
    /// Queries of a band times the scale.
    pub(crate) queries: Aligned<A>,
    /// `do` of a band.
    pub(crate) d_o: Aligned<A>,
    /// Sums for the queries of a band.
    pub(crate) dq: Aligned<A>,
    /// Scores of a band, then `P`.
    pub(crate) scores: Aligned<A>,
    /// `dP` of a band, then `dS`.
    pub(crate) dp: Aligned<A>,
    /// Whether the pairs of a band are visible; only where something is not finite.
    pub(crate) visible: Vec<bool>,
    /// Capped scores of a row.
    pub(crate) capped: Aligned<A>,
    /// Sums for a part of the bias.
    pub(crate) sums: Aligned<A>,
    /// Rows on their way into a panel.
    pub(crate) rows: Aligned<A>,
    /// Operands of products of bf16 pairs.
    pub(crate) pairs: Pairs,
}

/// What takes the place of the operands in [`Scratch`] where pairs of bf16 are multiplied; empty
/// elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    /// Keys of a block, transposed: pairs of columns.
    pub(crate) keys_transposed: Aligned<Pair>,
    /// Values of a block, transposed: pairs of columns.
    pub(crate) values_transposed: Aligned<Pair>,
    /// Keys of a block, packed by columns: pairs of keys.
    pub(crate) keys: Aligned<Pair>,
    /// Queries of a band: pairs of columns.
    pub(crate) queries: Aligned<Pair>,
    /// `do` of a band: pairs of columns.
    pub(crate) d_o: Aligned<Pair>,
    /// Queries of a band: pairs of queries.
    pub(crate) query_pairs: Aligned<Pair>,
    /// `do` of a band: pairs of queries.
    pub(crate) d_o_pairs: Aligned<Pair>,
    /// `P` of a band: pairs of queries.
    pub(crate) p: Aligned<Pair>,
    /// `dS` of a band times the scale: pairs of queries.
    pub(crate) ds: Aligned<Pair>,
    /// The same: pairs of keys.
    pub(crate) ds_rows: Aligned<Pair>,
    /// Rows on their way into a panel.
    pub(crate) rows: Aligned<Pair>,
}

impl Pairs {
    /// For `d`, `e` and `keys` as rounded up for [`Scratch`].
    fn new(d: usize, e: usize, keys: usize) -> Result<Self, ShapeError> {
        let zeros = |height, width| Aligned::try_new("workspace", &[height, width]);
        let pairs = |columns: usize| pair_depth(columns).next_multiple_of(MAX_LANES);
        Ok(Self {
            keys_transposed: zeros(keys, pairs(d))?,
            values_transposed: zeros(keys, pairs(e))?,
            keys: zeros(keys / 2, d)?,
            queries: zeros(BAND, pairs(d))?,
            d_o: zeros(BAND, pairs(e))?,
            query_pairs: zeros(BAND / 2, d)?,
            d_o_pairs: zeros(BAND / 2, e)?,
            p: zeros(BAND / 2, keys + PAIR_PAD)?,
            ds: zeros(BAND / 2, keys + PAIR_PAD)?,
            ds_rows: zeros(BAND, keys / 2)?,
            rows: zeros(keys, pairs(d.max(e)))?,
        })
    }

    fn bytes(&self) -> usize {
        let pairs = [
            &self.keys_transposed,
            &self.values_transposed,
            &self.keys,
            &self.queries,
            &self.d_o,
            &self.query_pairs,
            &self.d_o_pairs,
            &self.p,
            &self.ds,
            &self.ds_rows,
            &self.rows,
        ];
        pairs.iter().map(|buffer| buffer.len() * size_of::<Pair>()).sum()
    }
}

impl<A: Float> Scratch<A> {
    /// With operands in the compute type, or as pairs of bf16.
    fn new(
        head_size: usize,
        value_size: usize,
        keys: usize,
        in_pairs: bool,
    ) -> Result<Self, ShapeError> {
        let d = round_up(head_size, MAX_LANES);
        let e = round_up(value_size, MAX_LANES);
        let zeros = |height, width| Aligned::try_new("workspace", &[height, width]);
        let operand =
            |height, width| if in_pairs { Ok(Aligned::default()) } else { zeros(height, width) };
        Ok(Self {
            keys_transposed: operand(keys, d)?,
            values_transposed: operand(keys, e)?,
            keys: operand(keys, d)?,
            dk: zeros(keys, d)?,
            dv: zeros(keys, e)?,
            queries: operand(BAND, d)?,
            d_o: operand(BAND, e)?,
            dq: zeros(BAND, d)?,
            scores: zeros(BAND, keys)?,
            dp: zeros(BAND, keys)?,
            visible: try_vec("workspace", &[BAND, keys])?,
            capped: zeros(keys, 1)?,
            sums: zeros(BAND, keys)?,
            rows: operand(MAX_LANES, d.max(e))?,
            pairs: if in_pairs { Pairs::new(d, e, keys)? } else { Pairs::default() },
        })
    }

    fn bytes(&self) -> usize {
        let numbers = [
            &self.keys_transposed,
            &self.values_transposed,
            &self.keys,
            &self.dk,
            &self.dv,
            &self.queries,
            &self.d_o,
            &self.dq,
            &self.scores,
            &self.dp,
            &self.capped,
            &self.sums,
            &self.rows,
        ];
        let numbers: usize = numbers.iter().map(|buffer| buffer.len()).sum();
        numbers * size_of::<A>() + self.visible.len() + self.pairs.bytes()
    }
}
