//! Tensors in a `.safetensors` file.

use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};
use tensor_utils::{bf16, f16};

use crate::{Error, Weights};

/// A file, read as a whole; its header was checked.
pub(super) struct File {
    path: PathBuf,
    bytes: Vec<u8>,
    names: Vec<String>,
}

impl File {
    pub(super) fn open(path: PathBuf) -> Result<Self, Error> {
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let names = match SafeTensors::deserialize(&bytes) {
            Ok(tensors) => tensors.names().into_iter().map(ToOwned::to_owned).collect(),
            Err(error) => return Err(Error::file(&path, format!("not safetensors: {error}"))),
        };
        Ok(Self { path, bytes, names })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Reads a tensor of exactly this shape, widened to f32.
    pub(super) fn read(&self, name: &str, shape: &[usize], to: &mut [f32]) -> Result<(), Error> {
        let refuse = |what: String| Error::file(&self.path, format!("`{name}` {what}"));
        let tensors = SafeTensors::deserialize(&self.bytes);
        let tensors = tensors.map_err(|error| refuse(error.to_string()))?;
        let tensor = tensors.tensor(name).map_err(|error| refuse(error.to_string()))?;
        if tensor.shape() != shape {
            let got = tensor.shape();
            return Err(refuse(format!("has shape {got:?}, the config asks for {shape:?}")));
        }
        let data = tensor.data();
        let halves = |of: fn(u16) -> f32| {
            let halves = data.as_chunks::<2>().0.iter();
            halves.map(move |&bytes| of(u16::from_le_bytes(bytes)))
        };
        match tensor.dtype() {
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
        Ok(())
    }
}

/// Writes all weights in f32, straight from where they are.
pub(super) fn write(file: &mut fs::File, weights: &Weights) -> std::io::Result<()> {
    let matrices = weights.matrices();
    let norms = weights.norms();
    let slices = matrices.iter().map(|named| {
        let shape = named.weight.shape().to_vec();
        (&named.name, shape, named.weight.as_slice().unwrap_or_default())
    });
    let slices = slices.chain(norms.iter().map(|named| {
        let shape = named.weight.shape().to_vec();
        (&named.name, shape, named.weight.as_slice().unwrap_or_default())
    }));
    let slices: Vec<_> = slices.collect();
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0;
    for (name, shape, values) in &slices {
        let end = offset + 4 * values.len();
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [offset, end]});
        header.insert((*name).clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // The tensors begin at a multiple of 8.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::with_capacity(1 << 20, file);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (_, _, values) in slices {
        for value in values {
            file.write_all(&value.to_le_bytes())?;
        }
    }
    file.flush()
}
