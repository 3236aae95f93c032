//! Products of a packed matrix with activations.

use fearless_simd::Level;
use ndarray::{Array2, ArrayViewMut2, Axis};
use rayon::prelude::*;
use tensor_utils::{Isa, IsaError, check_shape, try_array};

use super::block::{BLOCKS, Stripe};
use super::layout::{COLUMNS, ROWS, STEP};
use super::{Activations, PackedMatrix, portable};
use crate::{Error, Tiling};

/// Bytes of codes that are worth another thread.
const GRAIN: usize = 1 << 16;

impl PackedMatrix {
    /// `y = x W^T` `[tokens, rows]`, see [`product_into`](Self::product_into).
    ///
    /// # Errors
    /// As [`product_into`](Self::product_into), and [`Error::Shape`] if there is no memory.
    pub fn product(&self, x: &Activations, tiling: &Tiling) -> Result<Array2<f32>, Error> {
        let mut y = try_array("y", (x.tokens(), self.rows))?;
        self.product_into(y.view_mut(), x, tiling)?;
        Ok(y)
    }

    /// Writes `y = x W^T` to `y` `[tokens, rows]`, any strides; fast when rows are contiguous, else through a copy
    /// of the result, which it allocates.
    ///
    /// The sums within a group are exact. Multiplied by the scale of the group, they are added in f32
    /// from the first group to the last, two roundings each, and the total is multiplied by the scale
    /// of the token. So every instruction set gives the same bits, as does any number of threads
    /// and any other tokens in the call.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit, [`Error::Option`] if the activations were made for
    /// another group size, [`Error::Isa`] for an instruction set that is not there.
    pub fn product_into(
        &self,
        mut y: ArrayViewMut2<'_, f32>,
        x: &Activations,
        tiling: &Tiling,
    ) -> Result<(), Error> {
        check_shape("x", &[x.tokens(), x.columns()], &[x.tokens(), self.columns])?;
        check_shape("y", y.shape(), &[x.tokens(), self.rows])?;
        if x.group() != self.group {
            let what = format!("{}, as that of the matrix", self.group);
            return Err(Error::option("group", what, x.group()));
        }
        let path = Path::new(Isa::resolve(tiling.isa)?)?;
        if y.is_empty() || self.columns == 0 {
            y.fill(0.0);
            return Ok(());
        }
        if y.strides()[1] != 1 && y.ncols() > 1 {
            y.assign(&self.product(x, tiling)?);
            return Ok(());
        }
        let block_bytes = self.steps() * STEP;
        let blocks = GRAIN.div_ceil(block_bytes).next_multiple_of(BLOCKS);
        let scales = self.scales.par_chunks(blocks * self.groups() * ROWS);
        let stripes = self.codes.par_chunks(blocks * block_bytes).zip(scales);
        let outputs: Vec<_> = y.axis_chunks_iter_mut(Axis(1), blocks * ROWS).collect();
        outputs.into_par_iter().zip(stripes).for_each(|(y, (codes, scales))| {
            let (steps, groups) = (self.steps(), self.groups());
            let group_steps = self.group / COLUMNS;
            path.run(Stripe { codes, scales, steps, groups, group_steps }, x, y);
        });
        Ok(())
    }
}

/// The code that runs, with the proof that the processor has its instructions.
#[derive(Clone, Copy)]
enum Path {
    Portable,
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    Avx2(fearless_simd::Avx2),
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    Avx512(fearless_simd::Avx512),
}

impl Path {
    fn new(isa: Isa) -> Result<Self, IsaError> {
        let level = Level::new();
        match isa {
            Isa::Portable => Some(Self::Portable),
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Isa::Avx2 => level.as_avx2().map(Self::Avx2),
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Isa::Avx512 | Isa::Avx512Bf16 if isa.is_available() => {
                level.as_avx512().map(Self::Avx512)
            }
            _ => None,
        }
        .ok_or(IsaError::Unavailable(isa))
    }

    fn run(self, stripe: Stripe<'_>, x: &Activations, y: ArrayViewMut2<'_, f32>) {
        match self {
            Self::Portable => portable::product(stripe, x, y),
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Self::Avx2(simd) if x.tokens() == 1 => super::avx2::vector(simd, stripe, x, y),
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Self::Avx2(simd) => super::avx2::matrix(simd, stripe, x, y),
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Self::Avx512(simd) if matches!(x.tokens(), 1 | 2 | 4 | 8) => {
                super::avx512::vectors(simd, stripe, x, y)
            }
            #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
            Self::Avx512(simd) => super::avx512::matrix(simd, stripe, x, y),
        }
    }
}
