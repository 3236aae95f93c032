//! The backward pass: rows shared out over threads by segments, each a few rows at a time.

use std::array::from_fn;
use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis, Slice};
use tensor_utils::simd::Simd;
use tensor_utils::{Element, Float, Kernel};

use crate::blocks::{blocks, blocks_mut, for_each_vector, load, store};
use crate::column_sums::{CHUNK, flush, merge};
use crate::gradient::{Group, Known, Sums, WeightSums, gradient_rows};
use crate::segments::{ROWS, join, segment_rows};
use crate::stage::{in_place, read_row, slices, slices_mut, write_row};
use crate::statistics::row_statistics;
use crate::workspace::{SUMS_OF_SEGMENT, Scratch, Slots, padded};
use crate::{Kind, Saved};

/// Elements from which on threads are worth waking.
const GRAIN: usize = 1 << 16;

/// What is the same for all rows.
pub(crate) struct Pass<'a, 's, T: Element> {
    pub(crate) kind: Kind,
    pub(crate) eps: f64,
    pub(crate) dy: ArrayView2<'a, T>,
    pub(crate) saved: &'a Saved<'s, T>,
    pub(crate) dres: Option<ArrayView2<'a, T>>,
    /// Factors and terms of the columns, padded.
    pub(crate) gamma: &'a [T::Acc],
    pub(crate) beta: &'a [T::Acc],
    /// Whether gradients of gamma or beta are wanted.
    pub(crate) weights: bool,
    pub(crate) slots: Slots<'a, T::Acc>,
}

/// A backward pass, ready to run on any instruction set.
pub(crate) struct Backward<'a, 's, 'o, T: Element, W> {
    pub(crate) pass: Pass<'a, 's, T>,
    pub(crate) dx: Option<ArrayViewMut2<'o, T>>,
    pub(crate) dgamma: Option<ArrayViewMut1<'o, W>>,
    pub(crate) dbeta: Option<ArrayViewMut1<'o, W>>,
    pub(crate) accumulate: bool,
    /// The segments' sums.
    pub(crate) partial: &'o mut [T::Acc],
}

impl<T: Element, W: Element<Acc = T::Acc>> Kernel for Backward<'_, '_, '_, T, W> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        let Self { pass, dx, dgamma, dbeta, accumulate, partial } = self;
        let (rows, row_length) = pass.dy.dim();
        pass.split(simd, 0..rows, dx, partial);

        let d = padded(row_length);
        let slot = &mut *pass.slots.take();
        let [dgamma_sums, dbeta_sums] = &mut slot.sums;
        let finish = |sums: &mut [T::Acc], part: usize, weight: Option<ArrayViewMut1<'_, W>>| {
            if let Some(weight) = weight {
                merge(simd, partial, SUMS_OF_SEGMENT * d, part * d, sums);
                write_sums(sums, accumulate, weight);
            }
        };
        join(
            partial.len() > GRAIN,
            || finish(&mut dgamma_sums[..d], 0, dgamma),
            || finish(&mut dbeta_sums[..d], 2, dbeta),
        );
    }
}

/// Rounds sums over rows to the output, or adds them to it.
fn write_sums<W: Element>(sums: &[W::Acc], accumulate: bool, weight: ArrayViewMut1<'_, W>) {
    for (weight, &sum) in weight.into_iter().zip(sums) {
        *weight = W::from_acc(if accumulate { weight.to_acc() + sum } else { sum });
    }
}

impl<T: Element> Pass<'_, '_, T> {
    /// Halves the segments until one is left.
    fn split<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        dx: Option<ArrayViewMut2<'_, T>>,
        partial: &mut [T::Acc],
    ) {
        let (all_rows, row_length) = self.dy.dim();
        let segment = segment_rows(all_rows, row_length);
        let segments = rows.len().div_ceil(segment);
        if segments == 0 {
            return;
        }
        if segments == 1 {
            return self.segment(simd, rows, dx, partial);
        }
        let left = segments / 2;
        let middle = left * segment;
        let (dx, dx_right) = dx.map(|dx| dx.split_at(Axis(0), middle)).unzip();
        let (partial, partial_right) =
            partial.split_at_mut(left * SUMS_OF_SEGMENT * padded(row_length));
        let middle = rows.start + middle;
        join(
            all_rows * row_length > GRAIN,
            || self.split(simd, rows.start..middle, dx, partial),
            || self.split(simd, middle..rows.end, dx_right, partial_right),
        );
    }

    /// The gradients of a segment's rows, and its sums.
    fn segment<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        mut dx: Option<ArrayViewMut2<'_, T>>,
        partial: &mut [T::Acc],
    ) {
        let d = padded(self.dy.dim().1);
        let scratch = &mut *self.slots.take();
        scratch.sums.iter_mut().for_each(|sums| sums[..d].fill(T::Acc::ZERO));
        partial.fill(T::Acc::ZERO);
        let mut row = rows.start;
        while row < rows.end {
            let whole = row + ROWS <= rows.end;
            let taken = if whole { ROWS } else { 1 };
            let first = row - rows.start;
            let dx =
                dx.as_mut().map(|dx| dx.slice_axis_mut(Axis(0), Slice::from(first..first + taken)));
            if whole {
                self.group::<S, ROWS>(simd, row, dx, scratch);
            } else {
                self.group::<S, 1>(simd, row, dx, scratch);
            }
            row += taken;
            let end_of_chunk = (row - rows.start).is_multiple_of(CHUNK) || row == rows.end;
            if self.weights && end_of_chunk {
                for (sums, parts) in scratch.sums.iter_mut().zip(partial.chunks_exact_mut(2 * d)) {
                    let (high, low) = parts.split_at_mut(d);
                    flush(simd, &mut sums[..d], high, low);
                }
            }
        }
    }

    /// The gradients of `N` rows from `first` on, in place if that is possible.
    fn group<S: Simd, const N: usize>(
        &self,
        simd: S,
        first: usize,
        mut dx: Option<ArrayViewMut2<'_, T>>,
        scratch: &mut Scratch<T::Acc>,
    ) {
        if let Some((group, wants_dx)) = self.slices_of_group::<N>(first, &mut dx) {
            return self.gradients(simd, first, group, wants_dx, &mut scratch.sums);
        }
        let row_length = self.dy.dim().1;
        let d = padded(row_length);
        let Scratch { staged: [x, dy, dres, staged_dx], sums } = scratch;
        for (i, row) in (first..first + N).enumerate() {
            let part = i * d..i * d + row_length;
            let (Saved::Statistics { x: from, .. }
            | Saved::Input { x: from }
            | Saved::Output { y: from, .. }) = self.saved;
            read_row(simd, from.index_axis(Axis(0), row), &mut x[part.clone()]);
            if let Saved::Output { .. } = self.saved {
                self.recover(simd, &mut x[i * d..][..d]);
            }
            read_row(simd, self.dy.index_axis(Axis(0), row), &mut dy[part.clone()]);
            if let Some(from) = &self.dres {
                read_row(simd, from.index_axis(Axis(0), row), &mut dres[part]);
            }
        }
        let mut parts = staged_dx.chunks_mut(d);
        let group: Group<'_, T::Acc, N> = Group {
            x: from_fn(|i| &x[i * d..][..row_length]),
            dy: from_fn(|i| &dy[i * d..][..row_length]),
            dres: self.dres.as_ref().map(|_| from_fn(|i| &dres[i * d..][..row_length])),
            dx: from_fn(|_| parts.next().map_or(&mut [][..], |part| &mut part[..row_length])),
        };
        self.gradients(simd, first, group, dx.is_some(), sums);
        if let Some(dx) = &mut dx {
            for (row, from) in dx.axis_iter_mut(Axis(0)).zip(staged_dx.chunks(d)) {
                write_row(simd, &from[..row_length], row);
            }
        }
    }

    /// The rows where they are, if they are contiguous and in the compute type; and whether `dx` is
    /// wanted.
    fn slices_of_group<'a, const N: usize>(
        &'a self,
        first: usize,
        dx: &'a mut Option<ArrayViewMut2<'_, T>>,
    ) -> Option<(Group<'a, T, N>, bool)> {
        let (Saved::Statistics { x, .. } | Saved::Input { x }) = self.saved else { return None };
        if !in_place::<T>() {
            return None;
        }
        let wants_dx = dx.is_some();
        let group = Group {
            x: slices(x, first)?,
            dy: slices(&self.dy, first)?,
            dres: match &self.dres {
                None => None,
                Some(dres) => Some(slices(dres, first)?),
            },
            dx: match dx {
                None => from_fn(|_| &mut [][..]),
                Some(dx) => slices_mut(dx)?,
            },
        };
        Some((group, wants_dx))
    }

    /// `x_hat = (y - beta) / gamma` in the place of a padded row of `y` (eq. 12).
    fn recover<S: Simd>(&self, simd: S, row: &mut [T::Acc]) {
        simd.vectorize(
            #[inline(always)]
            || {
                let weights = blocks(self.gamma).iter().zip(blocks(self.beta));
                for (y, (gamma, beta)) in blocks_mut(row).iter_mut().zip(weights) {
                    for_each_vector::<S, T::Acc>(
                        #[inline(always)]
                        |lane| {
                            let shifted = load(simd, y, lane) - load(simd, beta, lane);
                            store::<S, T::Acc>(shifted / load(simd, gamma, lane), y, lane);
                        },
                    );
                }
            },
        );
    }

    /// What is known of a row before its sums.
    fn known<S: Simd, E: Element<Acc = T::Acc>>(
        &self,
        simd: S,
        row: usize,
        x: &[E],
    ) -> Known<T::Acc> {
        let (zero, one) = (T::Acc::ZERO, T::Acc::ONE);
        match self.saved {
            Saved::Statistics { mean, rstd, .. } => {
                let high = match self.kind {
                    Kind::LayerNorm => mean[row],
                    Kind::RmsNorm => zero,
                };
                Known { high, low: zero, scale: rstd[row], rstd: rstd[row] }
            }
            Saved::Input { .. } => {
                let found = simd.vectorize(
                    #[inline(always)]
                    || row_statistics(simd, x, self.kind, self.eps),
                );
                let (high, low, rstd) = (found.high, found.low, found.rstd);
                Known { high, low, scale: rstd, rstd }
            }
            Saved::Output { rstd, .. } => {
                Known { high: zero, low: zero, scale: one, rstd: rstd[row] }
            }
        }
    }

    fn gradients<S: Simd, E: Element<Acc = T::Acc>, const N: usize>(
        &self,
        simd: S,
        first: usize,
        group: Group<'_, E, N>,
        wants_dx: bool,
        sums: &mut [Vec<T::Acc>; 2],
    ) {
        let known = from_fn(|i| self.known(simd, first + i, group.x[i]));
        let of_row = Sums {
            centre_gradient: self.kind == Kind::LayerNorm,
            recentre: self.kind == Kind::LayerNorm
                && matches!(self.saved, Saved::Statistics { .. }),
        };
        let [dgamma, dbeta] = sums;
        let weights = WeightSums { dgamma, dbeta };
        let run = match (wants_dx, self.weights, self.dres.is_some()) {
            (true, true, false) => gradient_rows::<S, E, N, true, true, false>,
            (true, true, true) => gradient_rows::<S, E, N, true, true, true>,
            (true, false, false) => gradient_rows::<S, E, N, true, false, false>,
            (true, false, true) => gradient_rows::<S, E, N, true, false, true>,
            (false, ..) => gradient_rows::<S, E, N, false, true, false>,
        };
        run(simd, known, of_row, self.gamma, group, weights);
    }
}
