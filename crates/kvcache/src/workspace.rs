//! Scratch memory that the caller owns.

use std::sync::{Mutex, MutexGuard};

use tensor_utils::{Aligned, lock_slot, take_slot};

use crate::kernel::task::Scratch;
use crate::plan::Plan;

/// Scratch memory for [`Cache::attend_into`](crate::Cache::attend_into). It grows to what the largest
/// call needs; calls that need no more allocate nothing. Each thread of the pool has a part of its own, which
/// grows when the thread first gets a task so large: with several threads that may be a few calls later.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(crate) plan: Plan,
    /// Queries times the scale.
    pub(crate) queries: Aligned<f32>,
    /// Results of tasks.
    pub(crate) partials: Aligned<f32>,
    /// Results of rows.
    pub(crate) merged: Aligned<f32>,
    slots: Vec<Mutex<Scratch>>,
}

impl Workspace {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> usize {
        let Plan { entries, units, parents, tasks, floats: _ } = &self.plan;
        let plan = bytes(entries) + bytes(units) + bytes(parents) + bytes(tasks);
        let results = self.queries.bytes() + self.partials.bytes() + self.merged.bytes();
        plan + results + self.slots.iter().map(|slot| lock_slot(slot).bytes()).sum::<usize>()
    }

    /// Scratch for each thread of the pool.
    pub(crate) fn prepare(&mut self) {
        let threads = rayon::current_num_threads();
        if self.slots.len() < threads {
            self.slots.resize_with(threads, Mutex::default);
        }
    }

    pub(crate) fn slots(&self) -> Slots<'_> {
        Slots(&self.slots)
    }
}

fn bytes<T>(of: &Vec<T>) -> usize {
    of.capacity() * size_of::<T>()
}

/// The scratch of the threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slots<'a>(&'a [Mutex<Scratch>]);

impl<'a> Slots<'a> {
    /// That of the current thread if it is free, else any free one, else it waits.
    pub(crate) fn take(self) -> MutexGuard<'a, Scratch> {
        take_slot(self.0)
    }
}
