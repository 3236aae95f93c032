//! Packed copies of queries, keys and values, in the compute type and in the order in which the
//! register tiles read them.
//!
//! With vectors of `L` lanes and panels of `W = 2 L` columns:
//!
//! - keys: `[panel][D][W]`, panel `c` holding keys `c W .. (c + 1) W` transposed;
//! - values: `[panel][key][W]`, panel `c` holding value columns `c W .. (c + 1) W`; if the value
//!   size, rounded up to `L`, leaves a single vector, the last panel is `L` wide;
//! - queries: `[tile][D][rows of the tile]`.
//!
//! Columns and keys that do not exist are 0.

use std::array;

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1};
use tensor_utils::simd::{Simd, SimdBase, SimdFloat, SimdFrom, SimdMask};
use tensor_utils::{Element, Float, narrow, widen};

/// Lanes of the native vector of `A`.
pub(crate) const fn lanes<S: Simd, A: Float>() -> usize {
    <A::Vector<S> as SimdBase<S>>::LEN
}

/// Columns of a panel: two vectors.
pub(crate) const fn panel_width<S: Simd, A: Float>() -> usize {
    2 * lanes::<S, A>()
}

/// Packs a block of keys `[keys, D]`; `scratch` holds [`lanes`] rows of `D` rounded up to lanes.
#[inline(always)]
pub(crate) fn pack_keys<S: Simd, T: Element>(
    simd: S,
    keys: ArrayView2<'_, T>,
    panels: &mut [T::Acc],
    scratch: &mut [T::Acc],
) {
    let (count, d) = keys.dim();
    let lanes = lanes::<S, T::Acc>();
    let width = 2 * lanes;
    let padded = d.next_multiple_of(lanes);
    for first in (0..count.next_multiple_of(width)).step_by(lanes) {
        let present = count.saturating_sub(first).min(lanes);
        for (i, row) in scratch.chunks_exact_mut(padded).take(lanes).enumerate() {
            let filled = if i < present { widen_row(keys.row(first + i), row) } else { 0 };
            row[filled..].fill(T::Acc::ZERO);
        }
        let panel = &mut panels[first / width * d * width..][..d * width];
        let column = first % width;
        for d0 in (0..d).step_by(lanes) {
            let depth = lanes.min(d - d0);
            let out = &mut panel[d0 * width..][..depth * width];
            match lanes {
                16 => transpose::<S, T::Acc, 16>(simd, scratch, padded, d0, out, width, column),
                8 => transpose::<S, T::Acc, 8>(simd, scratch, padded, d0, out, width, column),
                4 => transpose::<S, T::Acc, 4>(simd, scratch, padded, d0, out, width, column),
                _ => transpose::<S, T::Acc, 2>(simd, scratch, padded, d0, out, width, column),
            }
        }
    }
}

/// Transposes the `L` x `L` square at column `d0` of `rows` into column `column` of `out`, as many
/// rows as `out` has. Each of the log2 L steps rotates the bits of (row, lane) by one.
#[inline(always)]
fn transpose<S: Simd, A: Float, const L: usize>(
    simd: S,
    rows: &[A],
    stride: usize,
    d0: usize,
    out: &mut [A],
    out_stride: usize,
    column: usize,
) {
    let mut square: [A::Vector<S>; L] =
        array::from_fn(|i| A::Vector::from_slice(simd, &rows[i * stride + d0..][..L]));
    let mut step = 1;
    while step < L {
        square = array::from_fn(|i| {
            let (low, high) = (square[i / 2], square[i / 2 + L / 2]);
            if i % 2 == 0 { low.zip_low(high) } else { low.zip_high(high) }
        });
        step *= 2;
    }
    for (row, vector) in out.chunks_exact_mut(out_stride).zip(&square) {
        vector.store_slice(&mut row[column..][..L]);
    }
}

/// Packs a block of values `[keys, E]`, room for `capacity` keys a panel; `scratch` holds `E`
/// rounded up to lanes. Returns whether all of them are finite.
#[inline(always)]
pub(crate) fn pack_values<S: Simd, T: Element>(
    simd: S,
    values: ArrayView2<'_, T>,
    panels: &mut [T::Acc],
    capacity: usize,
    scratch: &mut [T::Acc],
) -> bool {
    let (count, e) = values.dim();
    let lanes = lanes::<S, T::Acc>();
    let width = 2 * lanes;
    let padded = e.next_multiple_of(lanes);
    let zero = <T::Acc as Float>::Vector::<S>::simd_from(simd, T::Acc::ZERO);
    // x * 0 is 0 for finite x and NaN for all others.
    let mut not_finite = zero;
    for key in 0..count.next_multiple_of(width) {
        let row = &mut scratch[..padded];
        let filled = if key < count { widen_row(values.row(key), row) } else { 0 };
        row[filled..].fill(T::Acc::ZERO);
        for column in (0..padded).step_by(lanes) {
            let vector = <T::Acc as Float>::Vector::<S>::from_slice(simd, &row[column..][..lanes]);
            not_finite = vector.mul_add(zero, not_finite);
            let panel = column / width * width;
            let panel_width = width.min(padded - panel);
            let at = panel * capacity + key * panel_width + column % width;
            vector.store_slice(&mut panels[at..][..lanes]);
        }
    }
    not_finite.simd_eq(zero).all_true()
}

/// Packs one query into column `column` of a tile of `height` rows, times `scale`.
#[inline(always)]
pub(crate) fn pack_query<T: Element>(
    query: ArrayView1<'_, T>,
    scale: T::Acc,
    tile: &mut [T::Acc],
    height: usize,
    column: usize,
) {
    for (out, &x) in tile.chunks_exact_mut(height).zip(query) {
        out[column] = x.to_acc() * scale;
    }
}

/// Widens a row; returns its length.
#[inline(always)]
fn widen_row<T: Element>(row: ArrayView1<'_, T>, out: &mut [T::Acc]) -> usize {
    match row.to_slice() {
        Some(row) => widen(row, &mut out[..row.len()]),
        None => out.iter_mut().zip(row).for_each(|(out, x)| *out = x.to_acc()),
    }
    row.len()
}

/// Rounds a row to the element type.
#[inline(always)]
pub(crate) fn narrow_row<T: Element>(row: &[T::Acc], mut out: ArrayViewMut1<'_, T>) {
    match out.as_slice_mut() {
        Some(out) => narrow(&row[..out.len()], out),
        None => out.iter_mut().zip(row).for_each(|(out, &x)| *out = T::from_acc(x)),
    }
}
