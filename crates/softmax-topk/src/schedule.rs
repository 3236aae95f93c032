//! How rows and their segments are shared out over threads.
//!
//! Each thread takes whole rows, as long as there is one for each; the rows that are left over, such
//! as the only one, are taken one after the other and their segments shared out. A row is cut into
//! segments of fixed length either way, so its bits do not depend on it.

use std::ops::Range;

use rayon::join;
use tensor_utils::simd::Simd;
use tensor_utils::{Kernel, dispatch};

use crate::call::Call;
use crate::mass::Mass;
use crate::row::{How, row};
use crate::sweep::{Maxima, SEGMENT};
use crate::workspace::Slots;
use crate::{Error, Logit, Passes, TopKMut, Workspace};

/// Tokens that are worth another thread of the pool that the call comes from.
const GRAIN: usize = 1 << 15;

/// Tokens that are worth entering the pool from outside, which wakes a thread and is woken by it.
const GRAIN_OUTSIDE: usize = 1 << 17;

/// Computes a checked call.
pub(crate) fn topk<T: Logit>(
    call: Call<'_, '_, T>,
    top: TopKMut<'_, T::Acc>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    let (isa, passes) = (workspace.isa(), workspace.passes());
    let rows = Rows { call, passes, slots: workspace.slots(), top };
    dispatch(isa, rows)?
}

struct Rows<'a, 'o, 's, 't, T: Logit> {
    call: Call<'a, 'o, T>,
    passes: Passes,
    slots: Slots<'s, T::Acc>,
    top: TopKMut<'t, T::Acc>,
}

impl<T: Logit> Kernel for Rows<'_, '_, '_, '_, T> {
    type Output = Result<(), Error>;

    fn run<S: Simd>(self, simd: S) -> Result<(), Error> {
        let Self { call, passes, slots, top } = self;
        let (rows, threads) = (call.rows(), rayon::current_num_threads());
        let grain = if rayon::current_thread_index().is_some() { GRAIN } else { GRAIN_OUTSIDE };
        // Not worth it for a part of many rows.
        let long = call.vocabulary() > grain && rows < 4 * threads;
        let alone = if long { rows % threads } else { 0 };
        let together = Together { call: &call, passes, slots, grain };
        let (top, alone_top) = top.split_at(rows - alone);
        together.split(simd, 0, top)?;
        let mut slot = slots.take();
        let how = How { passes, parallel: true };
        let mut below = alone_top;
        for index in rows - alone..rows {
            let (top, rest) = below.split_at(1);
            row(simd, &call, index, how, &mut slot, top)?;
            below = rest;
        }
        Ok(())
    }
}

/// Rows that are shared out whole.
struct Together<'c, 'a, 'o, 's, T: Logit> {
    call: &'c Call<'a, 'o, T>,
    passes: Passes,
    slots: Slots<'s, T::Acc>,
    grain: usize,
}

impl<T: Logit> Together<'_, '_, '_, '_, T> {
    /// Halves the rows until they are not worth another thread.
    fn split<S: Simd>(&self, simd: S, first: usize, top: TopKMut<'_, T::Acc>) -> Result<(), Error> {
        let rows = top.lse.len();
        if rows <= 1 || rows * self.call.vocabulary() <= self.grain {
            return self.rows(simd, first, top);
        }
        let (left, right) = top.split_at(rows / 2);
        let (left, right) =
            join(|| self.split(simd, first, left), || self.split(simd, first + rows / 2, right));
        // The error of the first row that has one.
        left.and(right)
    }

    fn rows<S: Simd>(&self, simd: S, first: usize, top: TopKMut<'_, T::Acc>) -> Result<(), Error> {
        let mut slot = self.slots.take();
        let how = How { passes: self.passes, parallel: false };
        let mut below = top;
        for index in first..first + below.lse.len() {
            let (top, rest) = below.split_at(1);
            row(simd, self.call, index, how, &mut slot, top)?;
            below = rest;
        }
        Ok(())
    }
}

/// Calls `f` with the stripes, maxima and mass of each segment of a row; returns the masses.
pub(crate) fn for_each_segment<'m, A: Send>(
    parallel: bool,
    maxima: &mut [Maxima<A>],
    masses: &'m mut [Mass<A>],
    f: &(impl Fn(Range<usize>, &mut [Maxima<A>], &mut Mass<A>) + Sync),
) -> &'m [Mass<A>] {
    let masses = &mut masses[..maxima.len().div_ceil(SEGMENT)];
    halve(parallel, 0, maxima, masses, f);
    masses
}

fn halve<A: Send>(
    parallel: bool,
    first: usize,
    maxima: &mut [Maxima<A>],
    masses: &mut [Mass<A>],
    f: &(impl Fn(Range<usize>, &mut [Maxima<A>], &mut Mass<A>) + Sync),
) {
    if !parallel || masses.len() <= 1 {
        let mut start = first;
        for (maxima, mass) in maxima.chunks_mut(SEGMENT).zip(masses) {
            f(start..start + maxima.len(), maxima, mass);
            start += maxima.len();
        }
        return;
    }
    let left = masses.len() / 2;
    let (masses, masses_right) = masses.split_at_mut(left);
    let (maxima, maxima_right) = maxima.split_at_mut(left * SEGMENT);
    join(
        || halve(parallel, first, maxima, masses, f),
        || halve(parallel, first + left * SEGMENT, maxima_right, masses_right, f),
    );
}
