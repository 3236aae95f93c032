//! Scratch memory that the caller owns.

use std::sync::{Mutex, MutexGuard};

use tensor_utils::{Isa, take_slot, try_vec};

use crate::mass::Mass;
use crate::score::Score;
use crate::select::{capacity, group_rows};
use crate::source::STRIPE;
use crate::sweep::{COLUMNS, Maxima, SEGMENT};
use crate::{Error, Passes, Tiling};

/// Scratch memory for the `_into` functions, which allocate nothing themselves.
///
/// With `V` the length of the rows, `V'` the next multiple of 128, `w` the bytes of the compute type (4 or 8)
/// and `t` the threads of the rayon pool it is made in, but at most the number of rows, it takes
///
/// ```text
/// t (16 w V' / 128 + 16 ceil(V / 16384)               maxima and sums
///    + 16 w min(floor(k / 4) + 1, V' / 128)           groups of maxima
///    + 2 w (min(V', max(4 k, 256)) + 128)             candidates
///    + 8 min(k, V))  bytes:                           shares
/// ```
///
/// an eighth of a row for each thread and the candidates, 30 KB a thread for 50257 tokens and k = 50 in
/// `f32` (keys of `f64` are of 16 bytes). A call from a larger pool is correct but waits for scratch memory.
#[derive(Debug)]
pub struct Workspace<A: Score> {
    isa: Isa,
    passes: Passes,
    rows: usize,
    vocabulary: usize,
    k: usize,
    slots: Vec<Mutex<Scratch<A>>>,
}

/// Scratch memory of the threads.
#[derive(Debug)]
pub(crate) struct Slots<'a, A: Score>(&'a [Mutex<Scratch<A>>]);

impl<A: Score> Clone for Slots<'_, A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: Score> Copy for Slots<'_, A> {}

/// Scratch memory of one thread.
#[derive(Debug)]
pub(crate) struct Scratch<A: Score> {
    /// Of the stripes of a row.
    pub(crate) maxima: Vec<Maxima<A>>,
    /// Of its segments.
    pub(crate) masses: Vec<Mass<A>>,
    /// Of groups of columns.
    pub(crate) groups: Vec<Maxima<A>>,
    /// Candidates for the best.
    pub(crate) keys: Vec<A::Key>,
    /// Shares of the best.
    pub(crate) shares: Vec<f64>,
}

impl<A: Score> Workspace<A> {
    /// Scratch for up to `rows` rows of up to `vocabulary` tokens and up to `k` results a row, for the
    /// current rayon pool.
    ///
    /// # Errors
    /// [`Error::Isa`] if this machine does not have the instruction set, [`Error::Shape`] if there is
    /// no memory of that size.
    pub fn new(rows: usize, vocabulary: usize, k: usize, tiling: &Tiling) -> Result<Self, Error> {
        let isa = Isa::resolve(tiling.isa)?;
        let stripes = vocabulary.div_ceil(STRIPE);
        let scratch = || -> Result<_, Error> {
            Ok(Mutex::new(Scratch {
                maxima: try_vec("workspace", &[stripes])?,
                masses: try_vec("workspace", &[stripes.div_ceil(SEGMENT)])?,
                groups: try_vec("workspace", &[group_rows(vocabulary, k)])?,
                keys: try_vec("workspace", &[capacity(vocabulary, k)])?,
                shares: try_vec("workspace", &[k.min(vocabulary)])?,
            }))
        };
        let slots = rayon::current_num_threads().min(rows).max(1);
        Ok(Self {
            isa,
            passes: tiling.passes,
            rows,
            vocabulary,
            k,
            slots: (0..slots).map(|_| scratch()).collect::<Result<_, _>>()?,
        })
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        let stripes = self.vocabulary.div_ceil(STRIPE);
        let maxima = stripes * COLUMNS * size_of::<A>();
        let masses = stripes.div_ceil(SEGMENT) * size_of::<Mass<A>>();
        let groups = group_rows(self.vocabulary, self.k) * size_of::<Maxima<A>>();
        let keys = capacity(self.vocabulary, self.k) * size_of::<A::Key>();
        let shares = self.k.min(self.vocabulary) * size_of::<f64>();
        self.slots.len() * (maxima + masses + groups + keys + shares)
    }

    /// The instruction set it was made for.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// How often the logits are read.
    pub fn passes(&self) -> Passes {
        self.passes
    }

    /// Checks that it is large enough.
    pub(crate) fn check(&self, rows: usize, vocabulary: usize, k: usize) -> Result<(), Error> {
        if rows <= self.rows && vocabulary <= self.vocabulary && k <= self.k {
            return Ok(());
        }
        Err(Error::WorkspaceTooSmall {
            rows,
            vocabulary,
            k,
            made_rows: self.rows,
            made_vocabulary: self.vocabulary,
            made_k: self.k,
        })
    }

    pub(crate) fn slots(&mut self) -> Slots<'_, A> {
        Slots(&self.slots)
    }
}

impl<'a, A: Score> Slots<'a, A> {
    /// A slot for the current thread: its own if it is free, else any free one, else it waits.
    pub(crate) fn take(self) -> MutexGuard<'a, Scratch<A>> {
        take_slot(self.0)
    }
}
