//! Products with a float matrix whose bits do not depend on how many tokens there are.
//!
//! Each element is one chain of vector additions along the row, so a token alone, which is bound by
//! the memory, and a batch, which is bound by arithmetic, give the same bits.

use std::array;

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;
use tensor_utils::simd::{Simd, SimdBase, SimdFloat, SimdFrom};
use tensor_utils::{Isa, IsaError, Kernel, dispatch};

/// Weights that are worth another thread.
const GRAIN: usize = 1 << 16;

/// Writes `y = x W^T` to `y` `[tokens, rows]`, all with contiguous rows.
pub(super) fn product_into(
    mut y: ArrayViewMut2<'_, f32>,
    w: &Array2<f32>,
    x: ArrayView2<'_, f32>,
    isa: Isa,
) -> Result<(), IsaError> {
    let rows = GRAIN.div_ceil(w.ncols().max(1)).next_multiple_of(8);
    let outputs: Vec<_> = y.axis_chunks_iter_mut(Axis(1), rows).collect();
    let stripes: Vec<_> = outputs.into_iter().zip(w.axis_chunks_iter(Axis(0), rows)).collect();
    stripes.into_par_iter().try_for_each(|(y, w)| dispatch(isa, Stripe { y, w, x }))
}

struct Stripe<'a> {
    y: ArrayViewMut2<'a, f32>,
    w: ArrayView2<'a, f32>,
    x: ArrayView2<'a, f32>,
}

impl Kernel for Stripe<'_> {
    type Output = ();

    fn run<S: Simd>(mut self, simd: S) {
        simd.vectorize(
            #[inline(always)]
            || {
                let tokens = self.x.nrows();
                let fours = tokens / 4 * 4;
                for t in (0..fours).step_by(4) {
                    self.tokens::<S, 4, 4>(simd, t);
                }
                for t in fours..tokens {
                    self.tokens::<S, 1, 8>(simd, t);
                }
            },
        );
    }
}

impl Stripe<'_> {
    /// All rows for `N` tokens from `t` on, `R` rows at a time.
    #[inline(always)]
    fn tokens<S: Simd, const N: usize, const R: usize>(&mut self, simd: S, t: usize) {
        let x: [&[f32]; N] = array::from_fn(|n| row(self.x, t + n));
        let rows = self.w.nrows();
        let whole = rows / R * R;
        for r in (0..whole).step_by(R) {
            let w: [&[f32]; R] = array::from_fn(|i| row(self.w, r + i));
            let sums = tile(simd, x, w);
            for (n, sums) in sums.iter().enumerate() {
                for (i, &sum) in sums.iter().enumerate() {
                    self.y[[t + n, r + i]] = sum;
                }
            }
        }
        for r in whole..rows {
            let sums = tile(simd, x, [row(self.w, r)]);
            for (n, &[sum]) in sums.iter().enumerate() {
                self.y[[t + n, r]] = sum;
            }
        }
    }
}

#[inline(always)]
fn row<'a>(matrix: ArrayView2<'a, f32>, i: usize) -> &'a [f32] {
    matrix.index_axis_move(Axis(0), i).to_slice().unwrap_or_default()
}

/// The products of `N` by `R` rows.
#[inline(always)]
fn tile<S: Simd, const N: usize, const R: usize>(
    simd: S,
    x: [&[f32]; N],
    w: [&[f32]; R],
) -> [[f32; R]; N] {
    let lanes = S::f32s::LEN;
    let length = x[0].len();
    let x = x.map(|x| &x[..length]);
    let w = w.map(|w| &w[..length]);
    let mut sums = [[S::f32s::simd_from(simd, 0.0); R]; N];
    let whole = length / lanes * lanes;
    for i in (0..whole).step_by(lanes) {
        let w: [S::f32s; R] = array::from_fn(|r| S::f32s::from_slice(simd, &w[r][i..i + lanes]));
        for n in 0..N {
            let x = S::f32s::from_slice(simd, &x[n][i..i + lanes]);
            for r in 0..R {
                sums[n][r] = w[r].mul_add(x, sums[n][r]);
            }
        }
    }
    let mut result = [[0.0; R]; N];
    for n in 0..N {
        for r in 0..R {
            let mut parts = [0.0; 16];
            sums[n][r].store_slice(&mut parts[..lanes]);
            let rest = x[n][whole..].iter().zip(&w[r][whole..]);
            rest.zip(&mut parts).for_each(|((x, w), part)| *part += x * w);
            let mut half = lanes / 2;
            while half > 0 {
                for i in 0..half {
                    parts[i] += parts[i + half];
                }
                half /= 2;
            }
            result[n][r] = parts[0];
        }
    }
    result
}
