//! A matrix of a model, float or packed.

use ndarray::{Array2, ArrayView2, ArrayViewMut2};
use tensor_utils::{Isa, check_shape, try_array};

use super::{float, llama_cpp};
use crate::{Activations, Error, PackedMatrix, Tiling};

/// A matrix `[out, in]` that activations are multiplied with.
#[derive(Debug, Clone, PartialEq)]
pub enum Matrix {
    /// 32 bits a weight; activations stay float.
    Float(Array2<f32>),
    /// Products as llama.cpp computes them.
    LlamaCpp(llama_cpp::Weights),
    /// 2 bits a weight and a scale a group; activations are rounded to int8 per token.
    Packed(PackedMatrix),
}

impl Matrix {
    /// Rows and columns.
    pub fn dim(&self) -> (usize, usize) {
        match self {
            Self::Float(w) => w.dim(),
            Self::LlamaCpp(w) => w.dim(),
            Self::Packed(w) => w.dim(),
        }
    }

    /// Bytes of the weights.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Float(w) => 4 * w.len(),
            Self::LlamaCpp(w) => w.bytes(),
            Self::Packed(w) => w.bytes(),
        }
    }

    /// Writes row `i` to `out` `[columns]`.
    ///
    /// # Errors
    /// [`Error::Option`] if there is no such row, [`Error::Shape`] for the length of `out`.
    pub fn row_into(&self, out: &mut [f32], i: usize) -> Result<(), Error> {
        let (rows, columns) = self.dim();
        if i >= rows {
            return Err(Error::option("row", format!("below {rows}"), i));
        }
        check_shape("out", &[out.len()], &[columns])?;
        match self {
            Self::Float(w) => out.iter_mut().zip(w.row(i)).for_each(|(to, &x)| *to = x),
            Self::LlamaCpp(w) => out.iter_mut().enumerate().for_each(|(j, to)| *to = w.at(i, j)),
            Self::Packed(w) => w.row_into(out, i)?,
        }
        Ok(())
    }

    /// `y = x W^T` `[tokens, rows]`, for `x` `[tokens, columns]`. A token has the same bits alone and
    /// among others (not so with float weights in llama.cpp's order), on any number of threads.
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
            (Self::LlamaCpp(w), _) => w.product_into(y, x),
            (Self::Packed(w), Some(x)) => w.product_into(y, x, &Tiling::default()),
            (Self::Packed(w), None) => {
                w.product_into(y, &Activations::new(&x, w.group())?, &Tiling::default())
            }
        }
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
