//! Tensors in a `.safetensors` file.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, tensor::Metadata};
use serde_json::{Map, Value, json};
use tensor_utils::{bf16, f16};

use super::check_finite;
use crate::ops::slice;
use crate::{Error, Weights};

/// A file, read as a whole; its header was checked.
pub(super) struct File {
    path: PathBuf,
    bytes: Vec<u8>,
    header: Metadata,
    /// Where the tensors begin.
    data: usize,
}

impl File {
    pub(super) fn open(path: PathBuf) -> Result<Self, Error> {
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let (length, header) = SafeTensors::read_metadata(&bytes)
            .map_err(|error| Error::file(&path, format!("not safetensors: {error}")))?;
        Ok(Self { path, bytes, header, data: size_of::<u64>() + length })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Names of the tensors, in the order in which they lie.
    pub(super) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    pub(super) fn holds(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// Reads a tensor of exactly this shape, widened to f32.
    pub(super) fn read(&self, name: &str, shape: &[usize], to: &mut [f32]) -> Result<(), Error> {
        let refuse = |what: String| Error::file(&self.path, format!("`{name}` {what}"));
        let tensor = self.header.info(name).ok_or_else(|| refuse("is missing".to_owned()))?;
        if tensor.shape != shape {
            let got = &tensor.shape;
            return Err(refuse(format!("has shape {got:?}, the config asks for {shape:?}")));
        }
        // The header was checked: offsets are those of the shape, and the last one is the end of the file.
        let (from, to_end) = tensor.data_offsets;
        let data = &self.bytes[self.data..][from..to_end];
        let halves = |of: fn(u16) -> f32| {
            let halves = data.as_chunks::<2>().0.iter();
            halves.map(move |&bytes| of(u16::from_le_bytes(bytes)))
        };
        match tensor.dtype {
            Dtype::F32 => {
                let values = data.as_chunks::<4>().0.iter();
                to.iter_mut().zip(values).for_each(|(to, &x)| *to = f32::from_le_bytes(x));
            }
            Dtype::F16 => {
                let values = halves(|bits| f16::from_bits(bits).to_f32());
                to.iter_mut().zip(values).for_each(|(to, x)| *to = x);
            }
            Dtype::BF16 => {
                let values = halves(|bits| bf16::from_bits(bits).to_f32());
                to.iter_mut().zip(values).for_each(|(to, x)| *to = x);
            }
            other => return Err(refuse(format!("is {other:?}, expected F32, F16 or BF16"))),
        }
        check_finite(&self.path, name, to)
    }
}

/// A tensor to write: name, shape and elements.
pub(super) type Tensor<'a> = (String, Vec<usize>, &'a [f32]);

/// All weights, where they are.
pub(super) fn tensors(weights: &Weights) -> Result<Vec<Tensor<'_>>, Error> {
    let matrices = weights.matrices().into_iter().map(|named| {
        let shape = named.weight.shape().to_vec();
        Ok((named.name, shape, slice("weights", named.weight.view())?))
    });
    let norms = weights.norms().into_iter().map(|named| {
        let shape = named.weight.shape().to_vec();
        Ok((named.name, shape, slice("weights", named.weight.view())?))
    });
    matrices.chain(norms).collect()
}

/// Writes tensors in f32.
pub(super) fn write(file: &mut fs::File, tensors: &[Tensor<'_>]) -> std::io::Result<()> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0;
    for (name, shape, values) in tensors {
        let end = offset + 4 * values.len();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [offset, end]});
        header.insert(name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // The tensors begin at a multiple of 8.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (_, _, values) in tensors {
        for value in *values {
            file.write_all(&value.to_le_bytes())?;
        }
    }
    file.flush()
}
