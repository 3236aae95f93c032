//! Scratch memory that the caller owns.

use std::sync::{Mutex, MutexGuard};

use tensor_utils::{Aligned, Float, Isa, take_slot, try_vec};

use crate::blocks::{BLOCK, Block, WeightSums};
use crate::column_sums::TwoPart;
use crate::segments::most_segments;
use crate::{Error, Tiling};

/// Scratch memory for the `_into` functions, which allocate nothing themselves.
///
/// With `d` the row length, `e` the same rounded up to 16, `w` the bytes of the compute type, `t` the threads of
/// the rayon pool it is made in and `s` the segments that the rows are summed in (at most 32, and
/// one for every 32 rows or 16384 elements), it takes
///
/// ```text
/// w (6 t d + (2 + 2 t + 4 s) e)  bytes:
/// ```
///
/// 2.4 MB for many rows of 4096 `f32` and two threads, and up to 60 bytes more a row of scratch, to begin at
/// a line of the caches. A call from a larger pool is correct but
/// waits for scratch memory.
#[derive(Debug)]
pub struct Workspace<A: Float> {
    isa: Isa,
    rows: usize,
    row_length: usize,
    gamma: Vec<Block<A>>,
    beta: Vec<Block<A>>,
    /// Sums of each segment.
    segments: Vec<TwoPart<A>>,
    slots: Vec<Mutex<Scratch<A>>>,
}

/// The parts of a workspace that a call uses, cut to its row length.
#[derive(Debug)]
pub(crate) struct Parts<'a, A> {
    pub(crate) isa: Isa,
    /// Factors and terms of the columns.
    pub(crate) gamma: &'a mut [Block<A>],
    pub(crate) beta: &'a mut [Block<A>],
    pub(crate) segments: &'a mut [TwoPart<A>],
    pub(crate) slots: Slots<'a, A>,
}

/// Scratch memory of the threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots<'a, A>(&'a [Mutex<Scratch<A>>]);

/// Scratch memory of one thread.
#[derive(Debug)]
pub(crate) struct Scratch<A> {
    /// Rows in the compute type: one to compute on and the next.
    pub(crate) x: [Aligned<A>; 2],
    pub(crate) dy: [Aligned<A>; 2],
    pub(crate) dres: Aligned<A>,
    pub(crate) dx: Aligned<A>,
    /// Sums of a chunk of rows.
    pub(crate) sums: Vec<WeightSums<A>>,
}

impl<A: Float> Workspace<A> {
    /// Scratch for up to `rows` rows of up to `row_length`, for the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Isa`] if this machine does not have the instruction set, [`Error::Shape`] if there is
    /// no memory of that size.
    pub fn new(rows: usize, row_length: usize, tiling: &Tiling) -> Result<Self, Error> {
        let isa = Isa::resolve(tiling.isa)?;
        let blocks = row_length.div_ceil(BLOCK);
        let columns = || try_vec("workspace", &[blocks]);
        let row = || Aligned::try_new("workspace", &[row_length]);
        let scratch = || -> Result<_, Error> {
            let (x, dy) = ([row()?, row()?], [row()?, row()?]);
            let sums = try_vec("workspace", &[blocks])?;
            Ok(Mutex::new(Scratch { x, dy, dres: row()?, dx: row()?, sums }))
        };
        Ok(Self {
            isa,
            rows,
            row_length,
            gamma: columns()?,
            beta: columns()?,
            segments: try_vec("workspace", &[most_segments(rows, row_length), blocks])?,
            slots: (0..rayon::current_num_threads())
                .map(|_| scratch())
                .collect::<Result<_, _>>()?,
        })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        let rows = 6 * size_of::<A>() * self.row_length;
        let sums = size_of::<WeightSums<A>>() * self.gamma.len();
        size_of_val(&*self.gamma)
            + size_of_val(&*self.beta)
            + size_of_val(&*self.segments)
            + self.slots.len() * (rows + sums)
    }

    /// The instruction set it was made for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Checks that it is large enough.
    pub(crate) fn check(&self, rows: usize, row_length: usize) -> Result<(), Error> {
        if rows <= self.rows && row_length <= self.row_length {
            return Ok(());
        }
        Err(Error::WorkspaceTooSmall {
            rows,
            row_length,
            workspace_rows: self.rows,
            workspace_row_length: self.row_length,
        })
    }

    /// The parts for rows of `row_length` in `segments` segments.
    pub(crate) fn parts(&mut self, row_length: usize, segments: usize) -> Parts<'_, A> {
        let blocks = row_length.div_ceil(BLOCK);
        Parts {
            isa: self.isa,
            gamma: &mut self.gamma[..blocks],
            beta: &mut self.beta[..blocks],
            segments: &mut self.segments[..segments * blocks],
            slots: Slots(&self.slots),
        }
    }
}

impl<'a, A> Slots<'a, A> {
    /// A slot for the current thread: its own if it is free, else any free one, else it waits.
    pub(crate) fn take(self) -> MutexGuard<'a, Scratch<A>> {
        take_slot(self.0)
    }
}
