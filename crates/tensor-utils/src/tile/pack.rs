//! Packed copies of matrices, in the compute type and in the order in which tiles read them.
//!
//! With vectors of `L` lanes and panels of `W = 2 L` columns:
//!
//! - [`copy_rows`]: row-major, rows a stride apart;
//! - [`pack_columns`]: `[panel][row][W]`, panel `c` holding columns `c W .. (c + 1) W` of each row; if
//!   the columns, rounded up to `L`, leave a single vector, the last panel is `L` wide;
//! - [`pack_transposed`]: `[panel][column][W]`, panel `c` holding rows `c W .. (c + 1) W`,
//!   transposed.
//!
//! Rows and columns that do not exist are 0.

use std::array;

use fearless_simd::{Simd, SimdBase, SimdFloat, SimdFrom, SimdMask};
use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1};

use super::{UNROLL, lanes, panel_width};
use crate::{Element, Float, narrow, widen};

/// Depth of the panels of [`pack_transposed`] for `columns` columns: a multiple of [`UNROLL`].
pub const fn panel_depth(columns: usize) -> usize {
    columns.next_multiple_of(UNROLL)
}

/// Copies rows, times `scale`, to `to`, `stride` apart (at least the columns rounded up to lanes),
/// the rest of each row 0. Returns whether all elements are finite.
pub fn copy_rows<S: Simd, T: Element>(
    simd: S,
    rows: ArrayView2<'_, T>,
    scale: T::Acc,
    to: &mut [T::Acc],
    stride: usize,
) -> bool {
    simd.vectorize(
        #[inline(always)]
        || {
            let zero = <T::Acc as Float>::Vector::<S>::simd_from(simd, T::Acc::ZERO);
            let mut not_finite = zero;
            for (row, to) in rows.outer_iter().zip(to.chunks_exact_mut(stride)) {
                let filled = widen_row(row, to);
                to[filled..].fill(T::Acc::ZERO);
                for chunk in to.chunks_exact_mut(lanes::<S, T::Acc>()) {
                    let vector = <T::Acc as Float>::Vector::<S>::from_slice(simd, chunk);
                    not_finite = vector.mul_add(zero, not_finite);
                    (vector * scale).store_slice(chunk);
                }
            }
            all_zero(simd, not_finite)
        },
    )
}

/// Packs rows, times `scale`, into panels with room for `capacity` rows each, up to a multiple of the
/// panel width.
/// `scratch` holds the columns rounded up to lanes. Returns whether all elements are finite.
pub fn pack_columns<S: Simd, T: Element>(
    simd: S,
    rows: ArrayView2<'_, T>,
    scale: T::Acc,
    panels: &mut [T::Acc],
    capacity: usize,
    scratch: &mut [T::Acc],
) -> bool {
    simd.vectorize(
        #[inline(always)]
        || {
            let (count, columns) = rows.dim();
            let lanes = lanes::<S, T::Acc>();
            let width = panel_width::<S, T::Acc>();
            let padded = columns.next_multiple_of(lanes);
            let zero = <T::Acc as Float>::Vector::<S>::simd_from(simd, T::Acc::ZERO);
            let mut not_finite = zero;
            let whole = whole_rows(&rows, padded);
            for i in 0..count.next_multiple_of(width) {
                let row = match whole {
                    Some(whole) if i < count => &whole[i * padded..][..padded],
                    _ => {
                        let row = &mut scratch[..padded];
                        let filled = if i < count { widen_row(rows.row(i), row) } else { 0 };
                        row[filled..].fill(T::Acc::ZERO);
                        row
                    }
                };
                for (column, chunk) in (0..).step_by(lanes).zip(row.chunks_exact(lanes)) {
                    let vector = <T::Acc as Float>::Vector::<S>::from_slice(simd, chunk);
                    not_finite = vector.mul_add(zero, not_finite);
                    let at = panel_index(column, i, padded, capacity, width);
                    (vector * scale).store_slice(&mut panels[at..][..lanes]);
                }
            }
            all_zero(simd, not_finite)
        },
    )
}

/// Where [`pack_columns`] puts column `column` of row `row`: `columns` is their number rounded up to
/// lanes, `width` that of a panel.
#[inline(always)]
pub const fn panel_index(
    column: usize,
    row: usize,
    columns: usize,
    capacity: usize,
    width: usize,
) -> usize {
    let panel = column / width * width;
    let own_width = if columns - panel < width { columns - panel } else { width };
    panel * capacity + row * own_width + column % width
}

/// Packs the transpose of some rows into panels of [`panel_depth`]; `scratch` holds [`lanes`] rows
/// of the columns rounded up to lanes.
pub fn pack_transposed<S: Simd, T: Element>(
    simd: S,
    rows: ArrayView2<'_, T>,
    panels: &mut [T::Acc],
    scratch: &mut [T::Acc],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (count, columns) = rows.dim();
            let lanes = lanes::<S, T::Acc>();
            let width = panel_width::<S, T::Acc>();
            let padded = columns.next_multiple_of(lanes);
            let depth = panel_depth(columns);
            let whole = whole_rows(&rows, padded);
            for first in (0..count.next_multiple_of(width)).step_by(lanes) {
                let from = match whole {
                    Some(whole) if first + lanes <= count => &whole[first * padded..],
                    _ => {
                        for (i, row) in scratch.chunks_exact_mut(padded).take(lanes).enumerate() {
                            let exists = first + i < count;
                            let filled =
                                if exists { widen_row(rows.row(first + i), row) } else { 0 };
                            row[filled..].fill(T::Acc::ZERO);
                        }
                        &*scratch
                    }
                };
                let panel = &mut panels[first / width * depth * width..][..depth * width];
                let squares = panel.chunks_mut(lanes * width).zip((0..).step_by(lanes));
                for (out, column) in squares {
                    let to = &mut out[first % width..];
                    if column >= padded {
                        // With two lanes the panel is deeper than the padded rows.
                        to.chunks_mut(width).for_each(|row| row[..lanes].fill(T::Acc::ZERO));
                        continue;
                    }
                    let from = &from[column..];
                    match lanes {
                        16 => transpose::<S, <T::Acc as Float>::Vector<S>, 16>(
                            simd, from, padded, to, width,
                        ),
                        8 => transpose::<S, <T::Acc as Float>::Vector<S>, 8>(
                            simd, from, padded, to, width,
                        ),
                        4 => transpose::<S, <T::Acc as Float>::Vector<S>, 4>(
                            simd, from, padded, to, width,
                        ),
                        _ => transpose::<S, <T::Acc as Float>::Vector<S>, 2>(
                            simd, from, padded, to, width,
                        ),
                    }
                }
            }
        },
    )
}

/// The rows as one slice, if they lie one after the other in the compute type and need no padding:
/// then they need no copy.
#[inline(always)]
fn whole_rows<'a, T: Element>(rows: &'a ArrayView2<'_, T>, padded: usize) -> Option<&'a [T::Acc]> {
    rows.as_slice().filter(|_| rows.ncols() == padded).and_then(T::as_acc_slice)
}

/// Transposes the `L` x `L` square at the start of `rows` to the start of `out`, as many rows as
/// `out` has. Each of the log2 L steps rotates the bits of (row, lane) by one.
#[inline(always)]
pub(super) fn transpose<S: Simd, V: SimdBase<S>, const L: usize>(
    simd: S,
    rows: &[V::Element],
    stride: usize,
    out: &mut [V::Element],
    out_stride: usize,
) {
    let mut square: [V; L] = array::from_fn(|i| V::from_slice(simd, &rows[i * stride..][..L]));
    let mut step = 1;
    while step < L {
        square = array::from_fn(|i| {
            let (low, high) = (square[i / 2], square[i / 2 + L / 2]);
            if i % 2 == 0 { low.zip_low(high) } else { low.zip_high(high) }
        });
        step *= 2;
    }
    for (row, vector) in out.chunks_mut(out_stride).zip(&square) {
        vector.store_slice(&mut row[..L]);
    }
}

/// Whether a sum of `x * 0` is 0: it is for finite x, and NaN if any is not.
#[inline(always)]
fn all_zero<S: Simd, V: SimdFloat<S>>(simd: S, sum: V) -> bool
where
    V::Element: From<i8>,
{
    sum.simd_eq(V::simd_from(simd, V::Element::from(0_i8))).all_true()
}

/// Widens a row into the start of `to`; returns its length.
#[inline(always)]
pub fn widen_row<T: Element>(row: ArrayView1<'_, T>, to: &mut [T::Acc]) -> usize {
    match row.to_slice() {
        Some(row) => widen(row, &mut to[..row.len()]),
        None => to.iter_mut().zip(row).for_each(|(to, x)| *to = x.to_acc()),
    }
    row.len()
}

/// Rounds the start of a row to the element type.
#[inline(always)]
pub fn narrow_row<T: Element>(row: &[T::Acc], mut to: ArrayViewMut1<'_, T>) {
    match to.as_slice_mut() {
        Some(to) => narrow(&row[..to.len()], to),
        None => to.iter_mut().zip(row).for_each(|(to, &x)| *to = T::from_acc(x)),
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;
    use crate::{Isa, Kernel, dispatch};

    /// Packs `rows` in each way into buffers full of NaN and checks every place that is read.
    struct Check<'a>(ArrayView2<'a, f64>);

    impl Kernel for Check<'_> {
        type Output = ();

        fn run<S: Simd>(self, simd: S) {
            let rows = self.0;
            let (count, columns) = rows.dim();
            let (lanes, width) = (lanes::<S, f64>(), panel_width::<S, f64>());
            let padded = columns.next_multiple_of(lanes);
            let capacity = count.next_multiple_of(width);
            let at = |i: usize, j: usize| rows.get((i, j)).copied().unwrap_or(0.0);
            let mut scratch = vec![f64::NAN; lanes * (padded + 16)];

            let depth = panel_depth(columns);
            let mut panels = vec![f64::NAN; capacity * depth];
            pack_transposed(simd, rows, &mut panels, &mut scratch);
            for (place, got) in panels.into_iter().enumerate() {
                let (panel, within) = (place / (depth * width), place % (depth * width));
                assert_eq!(got, at(panel * width + within % width, within / width));
            }

            let mut panels = vec![f64::NAN; capacity * padded];
            assert!(pack_columns(simd, rows, 2.0, &mut panels, capacity, &mut scratch));
            for i in 0..capacity {
                for j in 0..padded {
                    let place = panel_index(j, i, padded, capacity, width);
                    assert_eq!(panels[place], 2.0 * at(i, j), "row {i}, column {j}");
                }
            }

            let stride = crate::tile::row_stride::<S, f64>(columns);
            let mut copy = vec![f64::NAN; count * stride];
            assert!(copy_rows(simd, rows, 2.0, &mut copy, stride));
            for (place, got) in copy.into_iter().enumerate() {
                assert_eq!(got, 2.0 * at(place / stride, place % stride));
            }
        }
    }

    #[test]
    fn every_place_that_is_read_is_written() {
        for count in [0, 1, 7, 16, 33] {
            for columns in [1, 2, 3, 5, 16, 17, 40] {
                let rows =
                    Array2::from_shape_fn((count, 2 * columns), |(i, j)| (1 + i * 100 + j) as f64);
                for isa in Isa::available() {
                    let own = rows.slice(s![.., ..columns]).to_owned();
                    dispatch(isa, Check(own.view())).unwrap();
                    dispatch(isa, Check(rows.slice(s![.., ..;2]))).unwrap();
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_noticed() {
        struct Finite(f64);
        impl Kernel for Finite {
            type Output = [bool; 2];
            fn run<S: Simd>(self, simd: S) -> [bool; 2] {
                let mut rows = Array2::zeros((5, 9));
                rows[[4, 8]] = self.0;
                let mut buffer = vec![0.0; 1024];
                let mut scratch = vec![0.0; 1024];
                [
                    copy_rows(simd, rows.view(), 1.0, &mut buffer, 16),
                    pack_columns(simd, rows.view(), 1.0, &mut buffer, 32, &mut scratch),
                ]
            }
        }
        for isa in Isa::available() {
            assert_eq!(dispatch(isa, Finite(f64::MAX)).unwrap(), [true; 2]);
            for x in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                assert_eq!(dispatch(isa, Finite(x)).unwrap(), [false; 2]);
            }
        }
    }
}
