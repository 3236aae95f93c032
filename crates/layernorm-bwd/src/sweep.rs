//! The backward pass: rows shared out over threads by segments, each one row after the other.

use std::marker::PhantomData;
use std::mem::swap;
use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use tensor_utils::simd::Simd;
use tensor_utils::{
    Element, Float, Instances, Isa, IsaError, Kernel, PerElement, copy_past_caches, dispatch,
};

use crate::blocks::{BLOCK, Block, PIECE, WeightSums};
use crate::column_sums::{CHUNK, TwoPart, clear, flush, merge};
use crate::gradient::{Known, Piece, Sums, Totals, Unsummed, gradient, sum_row};
use crate::segments::{join, segment_rows};
use crate::stage::{has_contiguous_rows, read_row, slice, write_row};
use crate::statistics::row_statistics;
use crate::workspace::{Scratch, Slots};
use crate::{Kind, Saved};

/// Bytes of `dx` from which on it is written past the caches: with `x` and `dy` so much does not stay there
/// anyway.
const LARGE: usize = 16 << 20;

/// Pieces ahead of its use that memory is then asked for, into the second cache.
const AHEAD: usize = 2;

/// Elements from which on threads are worth waking.
const GRAIN: usize = 1 << 16;

/// What is the same for all rows.
pub(crate) struct Pass<'a, 's, T: Element> {
    pub(crate) kind: Kind,
    pub(crate) eps: f64,
    pub(crate) dy: ArrayView2<'a, T>,
    pub(crate) saved: &'a Saved<'s, T>,
    pub(crate) dres: Option<ArrayView2<'a, T>>,
    /// Factors and terms of the columns.
    pub(crate) gamma: &'a [Block<T::Acc>],
    pub(crate) beta: &'a [Block<T::Acc>],
    /// Whether gradients of gamma or beta are wanted.
    pub(crate) weights: bool,
    pub(crate) slots: Slots<'a, T::Acc>,
}

/// A backward pass, ready to run on any instruction set.
pub(crate) struct Backward<'a, 's, 'o, T: Element> {
    pub(crate) isa: Isa,
    pub(crate) pass: Pass<'a, 's, T>,
    pub(crate) dx: Option<ArrayViewMut2<'o, T>>,
    /// The segments' sums; in the end the first segment has those of all.
    pub(crate) segments: &'o mut [TwoPart<T::Acc>],
}

/// [`Backward`] for each element type.
struct AnyBackward<'a, 's, 'o>(PhantomData<(&'a &'s (), &'o ())>);

impl<'a, 's, 'o> PerElement for AnyBackward<'a, 's, 'o> {
    type Arguments<T: Element> = Backward<'a, 's, 'o, T>;
    type Output = Result<(), IsaError>;
}

#[inline(never)]
fn instances<'a, 's, 'o>() -> Instances<AnyBackward<'a, 's, 'o>> {
    Instances {
        f32: Backward::dispatch,
        f64: Backward::dispatch,
        bf16: Backward::dispatch,
        f16: Backward::dispatch,
    }
}

impl<T: Element> Backward<'_, '_, '_, T> {
    pub(crate) fn compute(self) -> Result<(), IsaError> {
        T::instance(&instances())(self)
    }

    fn dispatch(self) -> Result<(), IsaError> {
        dispatch(self.isa, self)
    }
}

impl<T: Element> Kernel for Backward<'_, '_, '_, T> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        let Self { pass, dx, segments, .. } = self;
        let (rows, row_length) = pass.dy.dim();
        pass.split(simd, 0..rows, dx, segments);
        if pass.weights {
            merge(simd, segments, row_length.div_ceil(BLOCK));
        }
    }
}

impl<T: Element> Pass<'_, '_, T> {
    /// Halves the segments until one is left.
    fn split<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        dx: Option<ArrayViewMut2<'_, T>>,
        sums: &mut [TwoPart<T::Acc>],
    ) {
        let (all_rows, row_length) = self.dy.dim();
        let segment = segment_rows(all_rows, row_length);
        let segments = rows.len().div_ceil(segment);
        if segments == 0 {
            return;
        }
        if segments == 1 {
            return self.segment(simd, rows, dx, sums);
        }
        let left = segments / 2;
        let middle = left * segment;
        let (dx, dx_right) = dx.map(|dx| dx.split_at(Axis(0), middle)).unzip();
        let (sums, sums_right) = sums.split_at_mut(left * row_length.div_ceil(BLOCK));
        let middle = rows.start + middle;
        join(
            all_rows * row_length > GRAIN,
            || self.split(simd, rows.start..middle, dx, sums),
            || self.split(simd, middle..rows.end, dx_right, sums_right),
        );
    }

    /// The gradients of a segment's rows, and its sums.
    fn segment<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        dx: Option<ArrayViewMut2<'_, T>>,
        running: &mut [TwoPart<T::Acc>],
    ) {
        let scratch = &mut *self.slots.take();
        scratch.sums[..running.len()].iter_mut().for_each(clear);
        if self.is_in_place(&dx) {
            let Scratch { dx: buffer, sums, .. } = scratch;
            self.rows_in_place(simd, rows, dx, buffer, sums, running);
        } else {
            self.rows_staged(simd, rows, dx, scratch, running);
        }
    }

    /// Whether the kernel can read and write the rows where they are.
    fn is_in_place(&self, dx: &Option<ArrayViewMut2<'_, T>>) -> bool {
        !matches!(self.saved, Saved::Output { .. })
            && has_contiguous_rows(&self.source().view())
            && has_contiguous_rows(&self.dy)
            && self.dres.as_ref().is_none_or(has_contiguous_rows)
            && dx.as_ref().is_none_or(|dx| has_contiguous_rows(&dx.view()))
    }

    /// x, or y in its place.
    fn source(&self) -> &ArrayView2<'_, T> {
        match self.saved {
            Saved::Statistics { x, .. } | Saved::Input { x } | Saved::Output { y: x, .. } => x,
        }
    }

    /// Rows go piece by piece, so that what is written waits in the first cache to be copied past the
    /// others.
    fn rows_in_place<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        mut dx: Option<ArrayViewMut2<'_, T>>,
        buffer: &mut [T::Acc],
        sums: &mut [WeightSums<T::Acc>],
        running: &mut [TwoPart<T::Acc>],
    ) {
        let wants_dx = dx.is_some();
        let row_length = self.dy.dim().1;
        let pieces = row_length.div_ceil(PIECE);
        let columns = |piece| piece * PIECE..row_length.min((piece + 1) * PIECE);
        let is_large = size_of::<T>() * self.dy.len() >= LARGE;
        let buffer = T::from_acc_slice_mut(&mut buffer[..row_length.min(PIECE)]);
        let mut buffer = buffer.filter(|_| is_large && wants_dx);
        let mut dx_rows = dx.iter_mut().flat_map(|dx| dx.axis_iter_mut(Axis(0)));
        // The last row has no next; its own sums once more cost little.
        let last = rows.end - 1;
        let unsummed = |row: usize| {
            let row = row.min(last);
            let (x, dy) = (slice(self.source(), row), slice(&self.dy, row));
            Unsummed { x, dy, known: self.known(simd, row, x) }
        };
        let ahead = |row: usize, piece: usize| {
            let row = (row + 1 + (piece + AHEAD) / pieces).min(last);
            let columns = columns((piece + AHEAD) % pieces);
            [self.source(), &self.dy].map(|from| &slice(from, row)[columns.clone()])
        };

        let mut current = unsummed(rows.start);
        let totals = sum_row(simd, current, self.gamma);
        let mut summed = current.known.summed(totals, row_length, self.sums());
        for row in rows.clone() {
            let next = unsummed(row + 1);
            let dx = dx_rows.next().and_then(ArrayViewMut1::into_slice).unwrap_or_default();
            let dres = self.dres.as_ref().map_or(&[][..], |dres| slice(dres, row));
            let mut totals = Totals::default();
            for index in 0..pieces {
                let columns = columns(index);
                let blocks = columns.start / BLOCK..columns.end.div_ceil(BLOCK);
                let (gamma, sums) = (&self.gamma[blocks.clone()], &mut sums[blocks]);
                let next = next.columns(columns.clone());
                let Unsummed { x, dy, .. } = current.columns(columns.clone());
                let dres = dres.get(columns.clone()).unwrap_or_default();
                let dx = dx.get_mut(columns).unwrap_or_default();
                let of_piece = match &mut buffer {
                    Some(buffer) => {
                        let buffer = &mut buffer[..dx.len()];
                        let ahead = Some(ahead(row, index));
                        let piece = Piece { x, dy, summed, dres, dx: buffer, ahead };
                        let totals = self.gradient(simd, piece, next, wants_dx, gamma, sums);
                        simd.vectorize(
                            #[inline(always)]
                            || copy_past_caches(simd, buffer, dx),
                        );
                        totals
                    }
                    None => {
                        let piece = Piece { x, dy, summed, dres, dx, ahead: None };
                        self.gradient(simd, piece, next, wants_dx, gamma, sums)
                    }
                };
                for (total, of_piece) in totals.iter_mut().zip(of_piece) {
                    *total += of_piece;
                }
            }
            summed = next.known.summed(totals, row_length, self.sums());
            current = next;
            self.flush(simd, row + 1 - rows.start, row == last, sums, running);
        }
    }

    /// By way of scratch memory in the compute type, where rows take turns: while one is computed
    /// on, the other is the next.
    fn rows_staged<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        mut dx: Option<ArrayViewMut2<'_, T>>,
        scratch: &mut Scratch<T::Acc>,
        running: &mut [TwoPart<T::Acc>],
    ) {
        let len = self.dy.dim().1;
        let wants_dx = dx.is_some();
        let mut dx_rows = dx.iter_mut().flat_map(|dx| dx.axis_iter_mut(Axis(0)));
        let Scratch { x: [x, next_x], dy: [dy, next_dy], dres, dx: staged_dx, sums } = scratch;
        let (mut x, mut next_x) = (&mut x[..len], &mut next_x[..len]);
        let (mut dy, mut next_dy) = (&mut dy[..len], &mut next_dy[..len]);
        let (dres, staged_dx) = (&mut dres[..len], &mut staged_dx[..len]);

        self.stage(simd, rows.start, x, dy);
        let mut known = self.known(simd, rows.start, x);
        let first = Unsummed { x, dy, known };
        let mut summed = known.summed(sum_row(simd, first, self.gamma), len, self.sums());
        for row in rows.clone() {
            if row + 1 < rows.end {
                self.stage(simd, row + 1, next_x, next_dy);
                known = self.known(simd, row + 1, next_x);
            }
            if let Some(from) = &self.dres {
                read_row(simd, from.index_axis(Axis(0), row), dres);
            }
            let next = Unsummed { x: next_x, dy: next_dy, known };
            let piece = Piece { x, dy, summed, dres, dx: staged_dx, ahead: None };
            let totals = self.gradient(simd, piece, next, wants_dx, self.gamma, sums);
            summed = known.summed(totals, len, self.sums());
            if let Some(dx) = dx_rows.next() {
                write_row(simd, staged_dx, dx);
            }
            swap(&mut x, &mut next_x);
            swap(&mut dy, &mut next_dy);
            self.flush(simd, row + 1 - rows.start, row + 1 == rows.end, sums, running);
        }
    }

    /// Reads `x`, or recovers `x_hat`, and `dy` of a row.
    fn stage<S: Simd>(&self, simd: S, row: usize, x: &mut [T::Acc], dy: &mut [T::Acc]) {
        read_row(simd, self.source().index_axis(Axis(0), row), x);
        if let Saved::Output { .. } = self.saved {
            self.recover(simd, x);
        }
        read_row(simd, self.dy.index_axis(Axis(0), row), dy);
    }

    /// Adds the sums of a chunk to those of the segment, at the end of a chunk.
    fn flush<S: Simd>(
        &self,
        simd: S,
        rows: usize,
        is_last: bool,
        sums: &mut [WeightSums<T::Acc>],
        running: &mut [TwoPart<T::Acc>],
    ) {
        if self.weights && (is_last || rows.is_multiple_of(CHUNK)) {
            flush(simd, rows <= CHUNK, sums, running);
        }
    }

    /// `x_hat = (y - beta) / gamma` in the place of a row of `y` (eq. 12).
    fn recover<S: Simd>(&self, simd: S, row: &mut [T::Acc]) {
        simd.vectorize(
            #[inline(always)]
            || {
                let columns = self.gamma.iter().zip(self.beta);
                for (y, (Block(gamma), Block(beta))) in row.chunks_mut(BLOCK).zip(columns) {
                    for ((y, &gamma), &beta) in y.iter_mut().zip(gamma).zip(beta) {
                        *y = (*y - beta) / gamma;
                    }
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

    fn sums(&self) -> Sums {
        let centre_gradient = self.kind == Kind::LayerNorm;
        let recentre = centre_gradient && matches!(self.saved, Saved::Statistics { .. });
        Sums { centre_gradient, recentre }
    }

    fn gradient<S: Simd, E: Element<Acc = T::Acc>>(
        &self,
        simd: S,
        piece: Piece<'_, E>,
        next: Unsummed<'_, E>,
        wants_dx: bool,
        gamma: &[Block<T::Acc>],
        weights: &mut [WeightSums<T::Acc>],
    ) -> Totals {
        let run = match (wants_dx, self.weights, self.dres.is_some()) {
            (true, true, false) => gradient::<S, E, true, true, false>,
            (true, true, true) => gradient::<S, E, true, true, true>,
            (true, false, false) => gradient::<S, E, true, false, false>,
            (true, false, true) => gradient::<S, E, true, false, true>,
            (false, ..) => gradient::<S, E, false, true, false>,
        };
        run(simd, piece, next, gamma, weights)
    }
}
