//! Parallelism over fixed chunks: how work is divided depends on its size alone, so the bits of
//! the result depend neither on the number of threads nor on which of them was faster.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

/// Maps `0..len` in chunks of `chunk` (the last may be shorter) and merges the results, in parallel
/// and in a fixed order.
///
/// Neighbours merge first, then neighbours of those, as in a tournament: the tree is the same for
/// the same `len` and `chunk`. The left argument of `merge` always stands for lower indices. A sum
/// so merged has an error that grows with the logarithm of the number of chunks (pairwise
/// summation: N. Higham, "The accuracy of floating point summation", 1993), and at most that many
/// results are alive at once in each thread, not one a chunk.
///
/// `None` if `len` is 0. A `chunk` of 0 counts as 1.
///
/// ```
/// let squares = |range: std::ops::Range<usize>| range.map(|i| (i * i) as f64).sum::<f64>();
/// let sum = tensor_utils::map_chunks_ordered(1000, 64, squares, |left, right| left + right);
/// assert_eq!(sum, Some(332_833_500.0));
/// ```
pub fn map_chunks_ordered<R: Send>(
    len: usize,
    chunk: usize,
    map: impl Fn(Range<usize>) -> R + Sync,
    merge: impl Fn(R, R) -> R + Sync,
) -> Option<R> {
    let chunk = chunk.max(1);
    let chunks = len.div_ceil(chunk);
    let map = |index: usize| {
        let start = index * chunk;
        map(start..start + chunk.min(len - start))
    };
    (chunks > 0).then(|| reduce(0..chunks, &map, &merge))
}

fn reduce<R: Send>(
    chunks: Range<usize>,
    map: &(impl Fn(usize) -> R + Sync),
    merge: &(impl Fn(R, R) -> R + Sync),
) -> R {
    if chunks.len() == 1 {
        return map(chunks.start);
    }
    // The left half is the largest power of two that leaves something to the right.
    let middle = chunks.start + chunks.len().next_power_of_two() / 2;
    let (left, right) = rayon::join(
        || reduce(chunks.start..middle, map, merge),
        || reduce(middle..chunks.end, map, merge),
    );
    merge(left, right)
}

/// Calls `f(index, part)` for consecutive parts of `data` of length `chunk` (the last may be
/// shorter), in parallel. A `chunk` of 0 counts as 1.
///
/// A single part is done on the calling thread, without waking another.
pub fn for_each_chunk<T: Send>(data: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if data.len() <= chunk {
        if !data.is_empty() {
            f(0, data);
        }
        return;
    }
    data.par_chunks_mut(chunk.max(1)).enumerate().for_each(|(index, part)| f(index, part));
}

/// Scratch memory for the current thread: its own of `slots` if that is free, else any free one, else
/// it waits.
///
/// What a slot holds must be overwritten before it is read: another thread may have left it there, or
/// panicked while it wrote.
///
/// # Panics
/// If there are no slots.
pub fn take_slot<T>(slots: &[Mutex<T>]) -> MutexGuard<'_, T> {
    let own = rayon::current_thread_index().unwrap_or(0) % slots.len();
    let (before, from_own) = slots.split_at(own);
    for slot in from_own.iter().chain(before) {
        if let Ok(slot) = slot.try_lock() {
            return slot;
        }
    }
    lock_slot(&slots[own])
}

/// Waits for a slot of [`take_slot`]. A poisoned one is as good as any.
pub fn lock_slot<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}
