//! Scratch memory that the caller owns.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tensor_utils::{Float, Isa, IsaError, try_vec};

use crate::blocks::BLOCK;
use crate::segments::{ROWS, most_segments};
use crate::{Error, Tiling};

/// Sums that a segment keeps: for dgamma and dbeta, each in two parts.
pub(crate) const SUMS_OF_SEGMENT: usize = 4;

/// Scratch memory for the `_into` functions, which allocate nothing themselves.
///
/// With `d` the row length rounded up to 16, `w` the bytes of the compute type, `t` the threads of
/// the rayon pool it is made in and `s` the segments that the rows are summed in (at most 32, and
/// one for every 32 rows or 16384 elements), it takes
///
/// ```text
/// w d (2 + 10 t + 4 s)  bytes:
/// ```
///
/// 2.5 MB for many rows of 4096 `f32` and two threads. A call from a larger pool is correct but
/// waits for scratch memory.
#[derive(Debug)]
pub struct Workspace<A: Float> {
    isa: Isa,
    rows: usize,
    row_length: usize,
    /// Factors and terms of the columns.
    columns: Vec<A>,
    /// [`SUMS_OF_SEGMENT`] rows for each segment.
    partial: Vec<A>,
    slots: Vec<Mutex<Scratch<A>>>,
}

/// The parts of a workspace that a call uses, cut to its row length.
#[derive(Debug)]
pub(crate) struct Parts<'a, A> {
    pub(crate) isa: Isa,
    /// Each of the padded length.
    pub(crate) gamma: &'a mut [A],
    pub(crate) beta: &'a mut [A],
    pub(crate) partial: &'a mut [A],
    pub(crate) slots: Slots<'a, A>,
}

/// Scratch memory of the threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots<'a, A>(&'a [Mutex<Scratch<A>>]);

/// Scratch memory of one thread.
#[derive(Debug)]
pub(crate) struct Scratch<A> {
    /// Rows of x, dy, dres and dx in the compute type, [`ROWS`] of each.
    pub(crate) staged: [Vec<A>; 4],
    /// Sums of a chunk of rows, for dgamma and dbeta.
    pub(crate) sums: [Vec<A>; 2],
}

/// The length of rows of scratch memory.
pub(crate) fn padded(row_length: usize) -> usize {
    row_length.next_multiple_of(BLOCK)
}

impl<A: Float> Workspace<A> {
    /// Scratch for up to `rows` rows of up to `row_length`, for the current rayon pool.
    ///
    /// # Errors
    /// [`Error::Isa`] if this machine does not have the instruction set, [`Error::Shape`] if there is
    /// no memory of that size.
    pub fn new(rows: usize, row_length: usize, tiling: &Tiling) -> Result<Self, Error> {
        let isa = match tiling.isa {
            None => Isa::active()?,
            Some(isa) if isa.is_available() => isa,
            Some(isa) => return Err(IsaError::Unavailable(isa).into()),
        };
        // What cannot be padded cannot be allocated either.
        let d = row_length.checked_next_multiple_of(BLOCK).unwrap_or(usize::MAX);
        let zeros = |rows: usize| try_vec("workspace", &[rows, d]);
        let scratch = || -> Result<_, Error> {
            let staged = [zeros(ROWS)?, zeros(ROWS)?, zeros(ROWS)?, zeros(ROWS)?];
            Ok(Mutex::new(Scratch { staged, sums: [zeros(1)?, zeros(1)?] }))
        };
        Ok(Self {
            isa,
            rows,
            row_length,
            columns: zeros(2)?,
            partial: zeros(SUMS_OF_SEGMENT * most_segments(rows, row_length))?,
            slots: (0..rayon::current_num_threads())
                .map(|_| scratch())
                .collect::<Result<_, _>>()?,
        })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        let slots = self.slots.len() * (4 * ROWS + 2) * padded(self.row_length);
        (self.columns.len() + self.partial.len() + slots) * size_of::<A>()
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
        let d = padded(row_length);
        let (gamma, rest) = self.columns.split_at_mut(d);
        Parts {
            isa: self.isa,
            gamma,
            beta: &mut rest[..d],
            partial: &mut self.partial[..SUMS_OF_SEGMENT * segments * d],
            slots: Slots(&self.slots),
        }
    }
}

impl<'a, A> Slots<'a, A> {
    /// A slot for the current thread: its own if it is free, else any free one, else it waits.
    pub(crate) fn take(self) -> MutexGuard<'a, Scratch<A>> {
        let own = rayon::current_thread_index().unwrap_or(0) % self.0.len();
        let (before, from_own) = self.0.split_at(own);
        for slot in from_own.iter().chain(before) {
            if let Ok(slot) = slot.try_lock() {
                return slot;
            }
        }
        // A poisoned slot is as good as any: its contents are overwritten before they are read.
        self.0[own].lock().unwrap_or_else(PoisonError::into_inner)
    }
}
