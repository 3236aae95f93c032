//! The gradient of the bias: `dS`, added up over the axes along which the bias is broadcast.
//!
//! Each element of it is owned by one task, which walks over everything that is added up in it in
//! index order: no partial sums, and the same bits for any number of threads. It recomputes `P` and
//! `dP`; only callers that want it pay for it.

use std::ops::Range;

use ndarray::{ArrayViewMut4, ArrayViewMutD, Axis, Ix4};
use tensor_utils::{Element, Float};

use crate::arithmetic::Products;
use crate::block::{Band, Target, bands};
use crate::run::Pass;
use crate::workspace::{BAND, Scratch};

/// The pass that the gradient belongs to, and delta of all rows.
pub(crate) struct BiasGradient<'a, 'p, 'c, 's, 'i, P, T: Element> {
    pass: &'a Pass<'p, 'c, 's, 'i, P, T>,
    delta: &'a [T::Acc],
    /// Along which axes the bias is repeated.
    broadcast: [bool; 4],
}

/// A part of the bias: where it begins on each axis.
#[derive(Debug, Clone, Copy)]
struct Origin([usize; 4]);

impl<P: Products<T>, T: Element> BiasGradient<'_, '_, '_, '_, '_, P, T> {
    /// Overwrites `dbias`, in the shape of the bias.
    pub(crate) fn run(
        pass: &Pass<'_, '_, '_, '_, P, T>,
        delta: &[T::Acc],
        mut dbias: ArrayViewMutD<'_, T>,
    ) {
        while dbias.ndim() < 4 {
            dbias = dbias.insert_axis(Axis(0));
        }
        let (Some(bias), Ok(dbias)) = (&pass.call.bias, dbias.into_dimensionality::<Ix4>()) else {
            return;
        };
        let broadcast = std::array::from_fn(|axis| dbias.shape()[axis] != bias.shape()[axis]);
        BiasGradient { pass, delta, broadcast }.split(Origin([0; 4]), dbias);
    }

    /// Halves the part until it is one head's band against one block of keys.
    fn split(&self, origin: Origin, dbias: ArrayViewMut4<'_, T>) {
        if dbias.is_empty() {
            return;
        }
        let limits = [1, 1, BAND, self.pass.key_block];
        let Some(axis) = (0..4).find(|&axis| dbias.shape()[axis] > limits[axis]) else {
            return self.part(origin, dbias);
        };
        // Cut at multiples of the limit, so that parts are the blocks of the other gradients.
        let half = (dbias.shape()[axis] / 2).next_multiple_of(limits[axis]);
        let (left, right) = dbias.split_at(Axis(axis), half);
        let mut right_origin = origin;
        right_origin.0[axis] += half;
        rayon::join(|| self.split(origin, left), || self.split(right_origin, right));
    }

    /// One part: everything that is added up in it, in index order.
    fn part(&self, origin: Origin, mut dbias: ArrayViewMut4<'_, T>) {
        let sizes = self.pass.call.sizes;
        let [batch, head, query, key] = origin.0;
        let Some(bias) = &self.pass.call.bias else { return };
        // A broadcast axis has stride 0 and length 1 in dbias: all of it is added up here.
        let span = |axis: usize, start: usize, whole: usize| {
            let own = start..start + dbias.shape()[axis];
            if self.broadcast[axis] { 0..whole } else { own }
        };
        let (entries, heads) = (span(0, batch, sizes.batch), span(1, head, sizes.heads));
        let (rows, keys) = (span(2, query, bias.shape()[2]), span(3, key, bias.shape()[3]));
        let mut scratch = self.pass.slots.slot();
        let scratch = &mut *scratch;
        let (height, width) = (dbias.shape()[2], dbias.shape()[3]);
        scratch.sums[..height * width].fill(T::Acc::ZERO);
        for entry in entries {
            for head in heads.clone() {
                self.add_head(entry, head, rows.clone(), keys.clone(), (height, width), scratch);
            }
        }
        let sums = scratch.sums[..height * width].iter();
        dbias.iter_mut().zip(sums).for_each(|(to, &sum)| *to = T::from_acc(sum));
    }

    /// Adds `dS` of one head for `rows` and `keys` to the sums, `shape.0` rows of `shape.1`; along
    /// an axis of which the sums have 1, everything.
    fn add_head(
        &self,
        entry: usize,
        head: usize,
        rows: Range<usize>,
        keys: Range<usize>,
        shape: (usize, usize),
        scratch: &mut Scratch<T::Acc>,
    ) {
        let sequence = self.pass.sequence(entry);
        let views = self.pass.saved.entry(entry);
        let start = self.pass.delta_start(entry, head);
        let delta = &self.delta[start..][..sequence.queries];
        let head = self.pass.head(&views, sequence, head, Target::Score);
        let rows = rows.start..rows.end.min(sequence.queries);
        let keys = keys.start..keys.end.min(sequence.keys);
        for block in head.key_blocks() {
            if block.end <= keys.start || keys.end <= block.start || rows.is_empty() {
                continue;
            }
            let finite = head.pack_keys(&block, scratch);
            for band in bands(rows.clone()) {
                let Some(band) = head.band(band, &block, finite, Some(delta), scratch) else {
                    continue;
                };
                add_band(
                    &band,
                    rows.start,
                    block.start - keys.start,
                    head.key_block,
                    shape,
                    scratch,
                );
            }
        }
    }
}

/// Adds `dS` of a band to the sums; its first row and column are those given.
fn add_band<A: Float>(
    band: &Band,
    first_row: usize,
    first_column: usize,
    stride: usize,
    (height, width): (usize, usize),
    scratch: &mut Scratch<A>,
) {
    for (i, row) in band.rows.clone().enumerate() {
        let row = if height == 1 { 0 } else { row - first_row };
        let ds = &scratch.dp[i * stride..][..stride];
        let sums = &mut scratch.sums[row * width..][..width];
        if width == 1 {
            let sum: f64 = ds[band.columns.clone()].iter().map(|x| x.to_f64()).sum();
            sums[0] += A::from_f64(sum);
            continue;
        }
        // Columns past the last key are 0 and have no place in the sums.
        let end = band.columns.end.min(width - first_column);
        for (sum, &ds) in sums[first_column..][..end].iter_mut().zip(ds).skip(band.columns.start) {
            *sum += ds;
        }
    }
}
