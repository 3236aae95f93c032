//! Fetching what the next products will read, evenly over the present ones.
//!
//! The processor's own prefetching follows runs of neighbouring lines within 4 KiB. A record is not
//! much longer, and the next one is elsewhere, so without help every record begins with a wait.
//!
//! What is fetched is read [`AHEAD`] keys later: of the keys, then of the values of a block, then of the
//! next block. It is fetched into the second-level cache: for the first, the processor keeps track of some
//! 24 lines at a time, each for as long as memory takes to answer, which is 14 GB/s a core.

use std::ops::Range;

use tensor_utils::prefetch_far_address;

use crate::form::Form;

/// Bytes of a line of the caches.
const LINE: usize = 64;
/// How many keys ahead: enough for the latency of memory.
pub(crate) const AHEAD: usize = 64;

/// What the products of a block fetch, in the order in which it will be read.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    runs: Vec<Run>,
    lines: usize,
    /// Lines handed out.
    given: usize,
    /// What the products of the block have left to do.
    work: usize,
}

/// Neighbouring lines.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// Address of the first byte.
    start: usize,
    lines: usize,
}

impl Ahead {
    /// A new block, whose products do `work` in any unit.
    pub(crate) fn restart(&mut self, work: usize) {
        self.runs.clear();
        (self.lines, self.given, self.work) = (0, 0, work);
    }

    /// Adds what attention reads of rows `row..row + len` of the record at an address.
    pub(crate) fn add(&mut self, (form, record): (Form, usize), row: usize, len: usize) {
        form.runs(row, len, |run| {
            let lines = (run.len() * form.element_bytes()).div_ceil(LINE);
            let start = record + run.start * form.element_bytes();
            self.runs.push(Run { start, lines });
            self.lines += lines;
        });
    }

    /// The lines to fetch during a product that does `work`.
    pub(crate) fn share(&mut self, work: usize) -> Lines<'_> {
        let left = self.lines - self.given;
        let share = if work < self.work { left * work / self.work } else { left };
        self.work = self.work.saturating_sub(work);
        let from = self.given;
        self.given += share;
        Lines { runs: &self.runs, from, to: self.given }
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<Run>() * self.runs.capacity()
    }
}

/// Lines to be fetched during a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lines<'a> {
    runs: &'a [Run],
    /// Which of all lines of the runs.
    from: usize,
    to: usize,
}

impl<'a> Lines<'a> {
    pub(crate) fn len(self) -> usize {
        self.to - self.from
    }

    pub(crate) fn slice(self, range: Range<usize>) -> Self {
        Self { from: self.from + range.start, to: self.from + range.end, ..self }
    }

    /// Divides them among `steps` steps.
    #[inline(always)]
    pub(crate) fn over(self, steps: usize) -> Steps<'a> {
        let share = self.len().div_ceil(steps.max(1));
        let left = self.len();
        let mut steps = Steps { runs: self.runs, left, at: 0, end: 0, share };
        let mut skip = self.from;
        while let [run, rest @ ..] = steps.runs
            && skip >= run.lines
        {
            (steps.runs, skip) = (rest, skip - run.lines);
        }
        steps.next_run(skip);
        steps
    }
}

/// The lines of each step.
#[derive(Debug)]
pub(crate) struct Steps<'a> {
    /// Runs after the present one.
    runs: &'a [Run],
    /// Lines after the present run.
    left: usize,
    /// What is left of the present run, in bytes.
    at: usize,
    end: usize,
    /// Lines of a step.
    share: usize,
}

impl Steps<'_> {
    /// Fetches those of the next step. Inlined to the end: a call would move the product's sums out of
    /// their registers.
    #[inline(always)]
    pub(crate) fn step(&mut self) {
        let mut share = self.share;
        loop {
            let until = self.end.min(self.at + share * LINE);
            share -= (until - self.at) / LINE;
            while self.at < until {
                prefetch_far_address(self.at);
                self.at += LINE;
            }
            if share == 0 || !self.next_run(0) {
                return;
            }
        }
    }

    /// Begins the next run, if there is one, with its line `skip`.
    #[inline(always)]
    fn next_run(&mut self, skip: usize) -> bool {
        let [run, rest @ ..] = self.runs else { return false };
        if self.left == 0 {
            return false;
        }
        let lines = self.left.min(run.lines - skip);
        self.at = run.start + skip * LINE;
        self.end = self.at + lines * LINE;
        self.left -= lines;
        self.runs = rest;
        true
    }
}
