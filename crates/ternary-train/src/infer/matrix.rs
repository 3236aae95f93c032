//! A matrix of a model, float or packed.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use tensor_utils::{Isa, check_shape, f16, try_array};

use super::float;
use crate::{Activations, Error, PackedMatrix, Tiling};

/// A matrix `[out, in]` that activations are multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub enum Matrix {
    /// 32 bits a weight; activations stay float.
    Float(Array2<f32>),
    /// 32 bits a weight; activations are rounded as llama.cpp rounds them for weights of type `Q2_0`: to
    /// its type `Q8_0`, int8 in blocks of 32 with an f16 scale.
    Blocks(Array2<f32>),
    /// 2 bits a weight and a scale a group; activations are rounded to int8 per token.
    Packed(PackedMatrix),
}

impl Matrix {
    /// Rows and columns.
    pub fn dim(&self) -> (usize, usize) {
        match self {
            Self::Float(w) | Self::Blocks(w) => w.dim(),
            Self::Packed(w) => w.dim(),
        }
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Float(w) | Self::Blocks(w) => 4 * w.len(),
            Self::Packed(w) => w.bytes(),
        }
    }

    /// Writes row `i` to `out` `[columns]`.
    ///
    /// # Errors
    /// [`Error::Option`] if there is no such row, [`Error::Shape`] for the length of `out`.
    pub fn row_into(&self, out: &mut [f32], i: usize) -> Result<(), Error> {
        let w = match self {
            Self::Packed(w) => return w.row_into(out, i),
            Self::Float(w) | Self::Blocks(w) => w,
        };
        if i >= w.nrows() {
            return Err(Error::option("row", format!("below {}", w.nrows()), i));
        }
        check_shape("out", &[out.len()], &[w.ncols()])?;
        out.iter_mut().zip(w.row(i)).for_each(|(to, &x)| *to = x);
        Ok(())
    }

    /// `y = x W^T` `[tokens, rows]`, for `x` `[tokens, columns]`. A token has the same bits alone and
    /// among others, on any number of threads.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shapes do not fit or there is no memory, [`Error::Isa`].
    pub fn product(&self, x: ArrayView2<'_, f32>) -> Result<Array2<f32>, Error> {
        let [y] = products([self], x)?;
        Ok(y)
    }

    fn product_into(
        &self,
        y: ArrayViewMut2<'_, f32>,
        x: ArrayView2<'_, f32>,
        quantized: Option<&Activations>,
    ) -> Result<(), Error> {
        match (self, quantized) {
            (Self::Float(w), _) => Ok(float::product_into(y, w, x, Isa::active()?)?),
            (Self::Blocks(w), _) => {
                let mut rounded = x.to_owned();
                round_to_blocks(rounded.as_slice_mut().unwrap_or_default(), x.ncols());
                Ok(float::product_into(y, w, rounded.view(), Isa::active()?)?)
            }
            (Self::Packed(w), Some(x)) => w.product_into(y, x, &Tiling::default()),
            (Self::Packed(w), None) => {
                w.product_into(y, &Activations::new(&x, w.group())?, &Tiling::default())
            }
        }
    }
}

/// Rounds each 32 elements of a row to `Q8_0` of llama.cpp: `d = max |x| / 127`, `q = round(x / d)`, and
/// what is left of `x` is `q` times `d` rounded to f16.
fn round_to_blocks(x: &mut [f32], columns: usize) {
    for block in x.chunks_mut(columns.max(1)).flat_map(|row| row.chunks_mut(32)) {
        let most = block.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let inverse = if most == 0.0 { 0.0 } else { 127.0 / most };
        let scale = f16::from_f32(most / 127.0).to_f32();
        block.iter_mut().for_each(|x| *x = (*x * inverse).round_ties_even() * scale);
    }
}

/// The products of several matrices with the same activations, which are rounded once.
pub(super) fn products<const N: usize>(
    matrices: [&Matrix; N],
    x: ArrayView2<'_, f32>,
) -> Result<[Array2<f32>; N], Error> {
    let x = x.as_standard_layout();
    let x = x.view();
    let mut quantized: Option<Activations> = None;
    let mut results = [const { None }; N];
    for (matrix, result) in matrices.iter().zip(&mut results) {
        let (rows, columns) = matrix.dim();
        check_shape("x", x.shape(), &[x.nrows(), columns])?;
        if let Matrix::Packed(w) = matrix
            && quantized.as_ref().is_none_or(|x| x.group() != w.group())
        {
            quantized = Some(Activations::new(&x, w.group())?);
        }
        let mut y = try_array("y", (x.nrows(), rows))?;
        matrix.product_into(y.view_mut(), x, quantized.as_ref())?;
        *result = Some(y);
    }
    Ok(results.map(Option::unwrap_or_default))
}
