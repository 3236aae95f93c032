//! Fetching what the next products will read, evenly over the present ones.
//!
//! The processor's own prefetching follows runs of neighbouring lines within 4 KiB. A record is not
//! much longer, and the next one is elsewhere, so without help every record begins with a wait.

use std::ops::Range;

use tensor_utils::prefetch;

use crate::store::{Form, Slab};

/// Bytes of a line of the caches.
const LINE: usize = 64;

/// What one phase of a block (the scores, or the sums of values) fetches for the next.
#[derive(Debug, Default)]
pub(crate) struct Ahead {
    /// Runs of neighbouring lines: the first byte of each, and how many.
    runs: Vec<(usize, usize)>,
    lines: usize,
    /// Lines handed out.
    given: usize,
    /// What the products of the phase have left to do.
    work: usize,
}

impl Ahead {
    /// A new phase, whose products do `work` in any unit.
    pub(crate) fn restart(&mut self, work: usize) {
        self.runs.clear();
        (self.lines, self.given, self.work) = (0, 0, work);
    }

    /// Adds what attention reads of rows `row..row + len` of a record.
    pub(crate) fn add(&mut self, form: Form, record: usize, row: usize, len: usize) {
        form.runs(row, len, |run| {
            let lines = (run.len() * form.element_bytes()).div_ceil(LINE);
            self.runs.push(((record + run.start) * form.element_bytes(), lines));
            self.lines += lines;
        });
    }

    /// The lines to fetch during a product that does `work`.
    pub(crate) fn share(&mut self, work: usize) -> Range<usize> {
        let left = self.lines - self.given;
        let share = if work < self.work { left * work / self.work } else { left };
        self.work = self.work.saturating_sub(work);
        let from = self.given;
        self.given += share;
        from..self.given
    }

    /// Some of the lines, of the slab that they are in.
    pub(crate) fn lines<'a>(&'a self, slab: &'a Slab, range: Range<usize>) -> Lines<'a> {
        Lines { slab: slab.as_bytes(), runs: &self.runs, from: range.start, to: range.end }
    }

    pub(crate) fn bytes(&self) -> usize {
        size_of::<(usize, usize)>() * self.runs.capacity()
    }
}

/// Lines to be fetched during a product.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lines<'a> {
    slab: &'a [u8],
    runs: &'a [(usize, usize)],
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
        let mut steps =
            Steps { slab: self.slab, runs: self.runs, left: self.len(), at: 0, end: 0, share };
        let mut skip = self.from;
        while let [(_, lines), rest @ ..] = steps.runs
            && skip >= *lines
        {
            (steps.runs, skip) = (rest, skip - lines);
        }
        steps.next_run(skip);
        steps
    }
}

/// The lines of each step.
#[derive(Debug)]
pub(crate) struct Steps<'a> {
    slab: &'a [u8],
    /// Runs after the present one.
    runs: &'a [(usize, usize)],
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
                prefetch(self.slab, self.at);
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
        let [(start, lines), rest @ ..] = self.runs else { return false };
        if self.left == 0 {
            return false;
        }
        let lines = self.left.min(lines - skip);
        self.at = start + skip * LINE;
        self.end = self.at + lines * LINE;
        self.left -= lines;
        self.runs = rest;
        true
    }
}
