//! Finding and reading what other systems have computed.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::{Array, ArrayD, Dimension, IxDyn};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::Tolerance;
use crate::{Element, bf16, f16};

/// One recorded call of a kernel, and the answer of a system that is not this one: a file of the format
/// `kernel-case/1`.
#[derive(Debug)]
pub struct Case {
    /// The file.
    pub path: PathBuf,
    /// The kernel's parameters, a JSON object.
    pub params: Value,
    /// How far off an answer may be.
    pub tolerance: Tolerance,
    tensors: HashMap<String, (Dtype, ArrayD<f64>)>,
}

impl Case {
    /// Reads a case of the kernel called `kernel`.
    ///
    /// # Panics
    /// If the file is not one; cases are part of the tests that read them.
    fn read(path: PathBuf, kernel: &str) -> Self {
        let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self::parse(path.clone(), kernel, &bytes)
            .unwrap_or_else(|| panic!("{} is not a case of {kernel}", path.display()))
    }

    fn parse(path: PathBuf, kernel: &str, bytes: &[u8]) -> Option<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
        let metadata = header.metadata().as_ref()?;
        let is = |key: &str, value| metadata.get(key).is_some_and(|found| found == value);
        let number = |key: &str| metadata.get(key)?.parse().ok();
        if !is("format", "kernel-case/1") || !is("kernel", kernel) {
            return None;
        }
        let mut tensors = HashMap::new();
        for (name, tensor) in SafeTensors::deserialize(bytes).ok()?.tensors() {
            let values = values(tensor.dtype(), tensor.data())?;
            let array = ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).ok()?;
            tensors.insert(name, (tensor.dtype(), array));
        }
        Some(Self {
            path,
            params: serde_json::from_str(metadata.get("params")?).ok()?,
            tolerance: Tolerance { abs: number("atol")?, rel: number("rtol")? },
            tensors,
        })
    }

    /// A tensor in f64, which holds every value of the other types, integers up to 2^53.
    pub fn get(&self, name: &str) -> Option<&ArrayD<f64>> {
        Some(&self.tensors.get(name)?.1)
    }

    /// A tensor as floats of type `T`.
    pub fn floats<T: Element>(&self, name: &str) -> Option<ArrayD<T>> {
        Some(self.get(name)?.mapv(T::from_f64))
    }

    /// A tensor with a fixed number of axes.
    ///
    /// # Panics
    /// If there is none, or it has another number.
    pub fn array<T: Element, D: Dimension>(&self, name: &str) -> Array<T, D> {
        let array = self.floats(name).and_then(|array| array.into_dimensionality().ok());
        array.unwrap_or_else(|| panic!("{} needs another {name}", self.path.display()))
    }

    /// The numbers of a tensor of integers, in row-major order; of floats, without their fractions.
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn integers(&self, name: &str) -> Vec<i64> {
        let array =
            self.get(name).unwrap_or_else(|| panic!("{} needs {name}", self.path.display()));
        array.iter().map(|&x| x as i64).collect()
    }

    /// The name of a tensor's type: `f64`, `f32`, `f16`, `bf16`, or one of integers; empty without the tensor.
    pub fn dtype(&self, name: &str) -> String {
        let dtype = self.tensors.get(name).map(|(dtype, _)| format!("{dtype:?}"));
        dtype.unwrap_or_default().to_lowercase()
    }
}

fn values(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f64>> {
    Some(match dtype {
        Dtype::F64 => decode(bytes, f64::from_le_bytes),
        Dtype::F32 => decode(bytes, |b| f32::from_le_bytes(b).into()),
        Dtype::F16 => decode(bytes, |b| f16::from_le_bytes(b).into()),
        Dtype::BF16 => decode(bytes, |b| bf16::from_le_bytes(b).into()),
        Dtype::I64 => decode(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::I8 => decode(bytes, |b| i8::from_le_bytes(b).into()),
        Dtype::U8 | Dtype::BOOL => decode(bytes, |[b]: [u8; 1]| b.into()),
        _ => return None,
    })
}

fn decode<const BYTES: usize>(bytes: &[u8], number: impl Fn([u8; BYTES]) -> f64) -> Vec<f64> {
    bytes.as_chunks().0.iter().map(|&bytes| number(bytes)).collect()
}

/// The folder `fixtures/NAME` of the workspace; `manifest` is the crate's `CARGO_MANIFEST_DIR`.
///
/// `None`, with a message, in a crate that was unpacked from its package: fixtures are not in it.
pub fn recorded(manifest: &str, name: &str) -> Option<PathBuf> {
    let manifest = Path::new(manifest);
    // Cargo puts this file into packages.
    if manifest.join("Cargo.toml.orig").exists() {
        println!("skipped: fixtures/{name} is not in the package");
        return None;
    }
    Some(manifest.join("../../fixtures").join(name))
}

/// The cases of a kernel in the [`recorded`] folder with its name, in the order of their names, which are
/// printed; none in an unpacked package.
///
/// # Panics
/// In the workspace, if the folder cannot be read or has fewer than `least` cases, or if one of them cannot
/// be read.
pub fn recorded_cases(manifest: &str, kernel: &str, least: usize) -> impl Iterator<Item = Case> {
    let mut paths: Vec<PathBuf> = Vec::new();
    if let Some(folder) = recorded(manifest, kernel) {
        let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
        paths.extend(files.filter(|path| path.extension().is_some_and(|end| end == "safetensors")));
        paths.sort();
        let found = paths.len();
        assert!(found >= least, "{} has {found} cases, expected {least}", folder.display());
    }
    let kernel = kernel.to_owned();
    paths.into_iter().map(move |path| {
        println!("{}", path.display());
        Case::read(path, &kernel)
    })
}
