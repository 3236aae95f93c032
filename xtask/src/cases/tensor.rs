//! Tensors as case files store them, and the values a comparison works on.

use anyhow::{Context, Result, bail, ensure};
use half::{bf16, f16};
use ndarray::{Array, ArrayD, Dimension, IxDyn};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tensor_utils::Element;

/// A type that case files store.
pub(crate) trait Stored: Copy {
    /// Its name in the file.
    const DTYPE: Dtype;
    /// Its size in bytes.
    const SIZE: usize;

    /// Reads one value; `bytes` has [`Stored::SIZE`] bytes.
    fn read(bytes: &[u8]) -> Self;

    /// Appends the value as a file stores it.
    fn write(self, bytes: &mut Vec<u8>);

    /// Widens values for comparison; exact.
    fn widen(values: impl Iterator<Item = Self>) -> Values;
}

macro_rules! impl_stored {
    ($($t:ty: $dtype:ident as $values:ident($wide:ty)),+ $(,)?) => {$(
        impl Stored for $t {
            const DTYPE: Dtype = Dtype::$dtype;
            const SIZE: usize = size_of::<$t>();

            fn read(bytes: &[u8]) -> Self {
                let mut array = [0; size_of::<$t>()];
                array.copy_from_slice(bytes);
                Self::from_le_bytes(array)
            }

            fn write(self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }

            fn widen(values: impl Iterator<Item = Self>) -> Values {
                Values::$values(values.map(<$wide>::from).collect())
            }
        }
    )+};
}

impl_stored! {
    f64: F64 as Floats(f64),
    f32: F32 as Floats(f64),
    f16: F16 as Floats(f64),
    bf16: BF16 as Floats(f64),
    i64: I64 as Integers(i64),
    i8: I8 as Integers(i64),
    u8: U8 as Integers(i64),
}

/// Values of an output, widened.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Values {
    /// Compared with a tolerance.
    Floats(Vec<f64>),
    /// Compared exactly.
    Integers(Vec<i64>),
}

/// A tensor in a file.
#[derive(Debug, Clone)]
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    data: &'a [u8],
}

impl<'a> From<TensorView<'a>> for Tensor<'a> {
    fn from(view: TensorView<'a>) -> Self {
        Self { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data() }
    }
}

impl Tensor<'_> {
    /// The tensor as an array of exactly this type.
    pub(crate) fn array<T: Stored>(&self) -> Result<ArrayD<T>> {
        ensure!(self.dtype == T::DTYPE, "is {:?}, expected {:?}", self.dtype, T::DTYPE);
        self.with_shape(self.data.chunks_exact(T::SIZE).map(T::read).collect())
    }

    /// The tensor as an array of `T`, from any type whose values `T` represents exactly.
    pub(crate) fn array_widened<T: Element + Stored>(&self) -> Result<ArrayD<T>> {
        let (from, to) = (self.dtype, T::DTYPE);
        ensure!(widens(from, to), "is {from:?}, expected {to:?} or a type that it holds exactly");
        let values = match self.values()? {
            Values::Floats(values) => values.into_iter().map(T::from_f64).collect(),
            Values::Integers(_) => Vec::new(),
        };
        self.with_shape(values)
    }

    /// The tensor as booleans: U8 or BOOL, 0 is false.
    pub(crate) fn booleans(&self) -> Result<ArrayD<bool>> {
        match self.dtype {
            Dtype::BOOL | Dtype::U8 => {}
            other => bail!("is {other:?}, expected U8 or BOOL"),
        }
        let bytes = Self { dtype: Dtype::U8, ..self.clone() };
        Ok(bytes.array::<u8>()?.mapv(|byte| byte != 0))
    }

    fn with_shape<T>(&self, values: Vec<T>) -> Result<ArrayD<T>> {
        ArrayD::from_shape_vec(IxDyn(&self.shape), values)
            .with_context(|| format!("has shape {:?}, which cannot be held in memory", self.shape))
    }

    /// The values, widened for comparison.
    pub(crate) fn values(&self) -> Result<Values> {
        fn widen<T: Stored>(tensor: &Tensor<'_>) -> Result<Values> {
            Ok(T::widen(tensor.array::<T>()?.into_iter()))
        }
        match self.dtype {
            Dtype::F64 => widen::<f64>(self),
            Dtype::F32 => widen::<f32>(self),
            Dtype::F16 => widen::<f16>(self),
            Dtype::BF16 => widen::<bf16>(self),
            Dtype::I64 => widen::<i64>(self),
            Dtype::I8 => widen::<i8>(self),
            Dtype::U8 => widen::<u8>(self),
            other => bail!("is {other:?}, a type that no kernel computes"),
        }
    }
}

/// Whether `to` is `from`, or a type of floats that holds every value of `from`.
pub(super) fn widens(from: Dtype, to: Dtype) -> bool {
    match from {
        Dtype::F16 | Dtype::BF16 => to == from || matches!(to, Dtype::F32 | Dtype::F64),
        Dtype::F32 => matches!(to, Dtype::F32 | Dtype::F64),
        _ => to == from,
    }
}

/// Whether there is another type that [`widens`] it.
pub(super) fn may_be_wider(dtype: Dtype) -> bool {
    dtype != Dtype::F64 && widens(dtype, Dtype::F64)
}

/// The rows of a result with the axes of the input again.
pub(super) fn reshaped<T, D: Dimension>(array: Array<T, D>, shape: &[usize]) -> Result<ArrayD<T>> {
    let (elements, _) = array.into_raw_vec_and_offset();
    ArrayD::from_shape_vec(IxDyn(shape), elements).context("the result has another size")
}

/// An output that a kernel computed.
pub(crate) struct Output {
    /// Its name without `out.`.
    pub(crate) name: &'static str,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Values,
}

impl Output {
    pub(crate) fn new<T: Stored, D: Dimension>(name: &'static str, array: Array<T, D>) -> Self {
        let shape = array.shape().to_vec();
        Self { name, dtype: T::DTYPE, shape, values: T::widen(array.into_iter()) }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array1, Array2, arr1};

    use super::*;

    #[test]
    fn results_get_the_axes_of_the_input_and_keep_their_order() {
        let rows = Array2::from_shape_fn((6, 2), |(row, column)| 2 * row + column);
        let got = reshaped(rows, &[3, 2, 2]).unwrap();
        assert_eq!((got.shape(), got[[2, 0, 1]]), (&[3, 2, 2][..], 9));
        assert_eq!(reshaped(arr1(&[7]), &[]).unwrap()[[]], 7);
        for shape in [&[4][..], &[2, 3], &[5, 0]] {
            assert!(reshaped(Array1::<f32>::zeros(5), shape).is_err(), "{shape:?}");
        }
    }
}
