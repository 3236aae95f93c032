//! Products of bf16, two at a time: operands hold [`Pair`]s of the steps `2 k` and `2 k + 1` of a product.
//!
//! A product of two bf16 is exact in `f32`, in which the sums are. The instruction (`vdpbf16ps`) takes
//! operands below the smallest normal number for 0 and flushes such sums; NaN and infinities are as
//! elsewhere.

use fearless_simd::{Bytes, Simd, SimdBase, SimdFrom, SimdMask};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use ndarray::ArrayView2;

use super::pack::{panel_index, transpose};
use super::{UNROLL, lanes, panel_width};
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
pub use avx512::{Bf16Dot, Rounded};

/// Two bf16, the first in the low half.
pub type Pair = u32;

/// Steps of a product over `columns` numbers: a multiple of [`UNROLL`].
pub const fn pair_depth(columns: usize) -> usize {
    columns.div_ceil(2).next_multiple_of(UNROLL)
}

/// Stride of rows of pairs of `columns` numbers: at least [`pair_depth`], and a multiple of lanes.
pub const fn pair_stride<S: Simd>(columns: usize) -> usize {
    pair_depth(columns).next_multiple_of(lanes::<S, f32>())
}

/// Copies rows of bf16 to `to`, as pairs of neighbours in a row, [`pair_stride`] apart, the rest of
/// each row 0. Returns whether all elements are finite.
pub fn copy_pairs<S: Simd>(simd: S, rows: ArrayView2<'_, bf16>, to: &mut [Pair]) -> bool {
    simd.vectorize(
        #[inline(always)]
        || {
            let stride = pair_stride::<S>(rows.ncols());
            if let Some(all) = rows.to_slice()
                && rows.ncols() == 2 * stride
            {
                return copy_slice(simd, all, &mut to[..all.len() / 2]);
            }
            let mut finite = true;
            for (row, to) in rows.outer_iter().zip(to.chunks_exact_mut(stride)) {
                match row.to_slice() {
                    Some(row) => finite &= copy_slice(simd, row, to),
                    None => {
                        let bits = |column| row.get(column).map_or(0, |x| Pair::from(x.to_bits()));
                        for (k, to) in to.iter_mut().enumerate() {
                            *to = bits(2 * k) | bits(2 * k + 1) << 16;
                        }
                        finite &= row.iter().all(|x| x.is_finite());
                    }
                }
            }
            finite
        },
    )
}

/// [`copy_pairs`] of one row; `to` has whole vectors.
#[inline(always)]
fn copy_slice<S: Simd>(simd: S, row: &[bf16], to: &mut [Pair]) -> bool {
    let lanes = lanes::<S, f32>();
    let mut not_finite = S::u32s::simd_from(simd, 0);
    let mut copy = |bits: S::u16s, to: &mut [Pair]| {
        let pairs: S::u32s = bits.bitcast();
        pairs.store_slice(to);
        // Of infinities and NaN all bits of the exponent are set, and one more carries.
        not_finite |= ((pairs & 0x7f80_7f80) + 0x0080_0080) & 0x8000_8000;
    };
    let whole = row.reinterpret_cast().chunks_exact(2 * lanes);
    let (rest, filled) = (whole.remainder(), row.len().div_ceil(2 * lanes) * lanes);
    for (bits, to) in whole.zip(to.chunks_exact_mut(lanes)) {
        copy(S::u16s::from_slice(simd, bits), to);
    }
    if !rest.is_empty() {
        let bits = S::u16s::from_fn(simd, |i| rest.get(i).copied().unwrap_or(0));
        copy(bits, &mut to[filled - lanes..filled]);
    }
    to[filled..].fill(0);
    not_finite.simd_eq(0).all_true()
}

/// Packs the transpose of `count` rows that [`copy_pairs`] has copied: panels `[panel][pair][W]` as
/// [`pack_transposed`](super::pack::pack_transposed) has them, [`pair_depth`] deep. Rows that do not
/// exist are 0. `rows` has room for a multiple of the panel width.
pub fn pack_pairs_transposed<S: Simd>(
    simd: S,
    (count, columns): (usize, usize),
    rows: &mut [Pair],
    panels: &mut [Pair],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (lanes, width) = (lanes::<S, f32>(), panel_width::<S, f32>());
            let (depth, stride) = (pair_depth(columns), pair_stride::<S>(columns));
            let padded = count.next_multiple_of(width);
            rows[count * stride..padded * stride].fill(0);
            for first in (0..padded).step_by(lanes) {
                let panel = &mut panels[first / width * depth * width..][..depth * width];
                let squares = panel.chunks_mut(lanes * width).zip((0..).step_by(lanes));
                for (out, column) in squares {
                    let (from, to) = (&rows[first * stride + column..], &mut out[first % width..]);
                    match lanes {
                        16 => transpose::<S, S::u32s, 16>(simd, from, stride, to, width),
                        8 => transpose::<S, S::u32s, 8>(simd, from, stride, to, width),
                        _ => transpose::<S, S::u32s, 4>(simd, from, stride, to, width),
                    }
                }
            }
        },
    );
}

/// Packs rows that [`copy_pairs`] has copied as pairs of neighbours in a column, of rows `2 k` and
/// `2 k + 1`: panels `[panel][k][width]` with room for `capacity` pairs of rows, as
/// [`pack_columns`](super::pack::pack_columns) has them. `count` rows up to an even number are packed.
pub fn pack_row_pairs<S: Simd>(
    simd: S,
    (count, columns): (usize, usize),
    rows: &[Pair],
    panels: &mut [Pair],
    capacity: usize,
    width: usize,
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (lanes, stride) = (lanes::<S, f32>(), pair_stride::<S>(columns));
            let padded = columns.next_multiple_of(lanes);
            let load = |row: usize, at: usize| {
                S::u32s::from_slice(simd, &rows[row * stride + at..][..lanes])
            };
            for k in 0..count.div_ceil(2) {
                for column in (0..padded).step_by(2 * lanes) {
                    let first = load(2 * k, column / 2);
                    let second = load(2 * k + 1, column / 2);
                    let even = (first & 0xffff) | (second << 16);
                    let odd = (first >> 16) | (second & 0xffff_0000);
                    let parts = [even.zip_low(odd), even.zip_high(odd)];
                    for (column, part) in (column..padded).step_by(lanes).zip(parts) {
                        let at = panel_index(column, k, padded, capacity, width);
                        part.store_slice(&mut panels[at..][..lanes]);
                    }
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;
    use crate::{Isa, Kernel, dispatch};

    /// Packs rows in each way into buffers full of a junk pair and checks every place that is read.
    struct Check<'a>(ArrayView2<'a, bf16>);

    impl Kernel for Check<'_> {
        type Output = ();

        fn run<S: Simd>(self, simd: S) {
            const JUNK: Pair = 0x7fff_7fff;
            let rows = self.0;
            let (count, columns) = rows.dim();
            let (width, stride) = (panel_width::<S, f32>(), pair_stride::<S>(columns));
            let padded = count.next_multiple_of(width);
            let at = |i: usize, j: usize| rows.get((i, j)).map_or(0, |x| Pair::from(x.to_bits()));

            let mut copy = vec![JUNK; padded * stride];
            assert!(copy_pairs(simd, rows, &mut copy));
            for (place, &got) in copy[..count * stride].iter().enumerate() {
                let (i, k) = (place / stride, place % stride);
                assert_eq!(got, at(i, 2 * k) | at(i, 2 * k + 1) << 16, "row {i}, pair {k}");
            }

            let depth = pair_depth(columns);
            let mut panels = vec![JUNK; padded * depth];
            pack_pairs_transposed(simd, rows.dim(), &mut copy, &mut panels);
            for (place, got) in panels.into_iter().enumerate() {
                let (panel, within) = (place / (depth * width), place % (depth * width));
                let (i, k) = (panel * width + within % width, within / width);
                assert_eq!(got, at(i, 2 * k) | at(i, 2 * k + 1) << 16, "row {i}, pair {k}");
            }

            let (columns, capacity) = (columns.next_multiple_of(lanes::<S, f32>()), padded / 2);
            for width in [width, columns] {
                let mut panels = vec![JUNK; capacity * columns];
                pack_row_pairs(simd, (padded, rows.ncols()), &copy, &mut panels, capacity, width);
                for k in 0..capacity {
                    for j in 0..columns {
                        let got = panels[panel_index(j, k, columns, capacity, width)];
                        assert_eq!(got, at(2 * k, j) | at(2 * k + 1, j) << 16, "pair {k}, {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_place_that_is_read_is_written() {
        for count in [0, 1, 7, 16, 33] {
            for columns in [1, 2, 3, 5, 16, 17, 32, 40, 64, 65] {
                let rows = Array2::from_shape_fn((count, 2 * columns), |(i, j)| {
                    bf16::from_bits((1 + i * 200 + j) as u16)
                });
                for isa in Isa::available() {
                    let own = rows.slice(s![.., ..columns]).to_owned();
                    dispatch(isa, Check(own.view())).unwrap();
                    dispatch(isa, Check(rows.slice(s![.., ..columns]))).unwrap();
                    dispatch(isa, Check(rows.slice(s![.., ..;2]))).unwrap();
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_noticed() {
        struct Finite(bf16, usize);
        impl Kernel for Finite {
            type Output = [bool; 2];
            fn run<S: Simd>(self, simd: S) -> [bool; 2] {
                let mut rows = Array2::from_elem((5, 39), bf16::MAX);
                rows[[4, self.1]] = self.0;
                let mut to = vec![0; 5 * pair_stride::<S>(39)];
                [rows.view(), rows.slice(s![.., ..;-1])].map(|rows| copy_pairs(simd, rows, &mut to))
            }
        }
        for isa in Isa::available() {
            for column in [0, 1, 31, 32, 38] {
                assert_eq!(dispatch(isa, Finite(bf16::MIN, column)).unwrap(), [true; 2]);
                for x in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
                    assert_eq!(dispatch(isa, Finite(x, column)).unwrap(), [false; 2]);
                }
            }
        }
    }
}
