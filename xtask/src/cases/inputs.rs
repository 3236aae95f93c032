//! What an adapter takes its inputs from: typed, named in every error, and nothing left over.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use ndarray::{Array, ArrayD, Dimension};
use safetensors::Dtype;
use serde::de::{DeserializeOwned, Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use tensor_utils::Element;

use super::file::CaseFile;
use super::tensor::{Output, Stored, Tensor};

/// The inputs and parameters of a case. Taking a tensor removes it.
pub(crate) struct Inputs<'a> {
    kernel: &'a str,
    params: &'a str,
    tensors: BTreeMap<String, Tensor<'a>>,
    asked_for: Vec<&'static str>,
    folder: &'a Path,
    outputs: &'a BTreeMap<String, Tensor<'a>>,
}

impl<'a> Inputs<'a> {
    /// `folder` is the one that the case file is in.
    pub(super) fn new(case: &'a CaseFile<'a>, folder: &'a Path) -> Self {
        let (kernel, params) = (case.kernel.as_str(), case.params.as_str());
        let (tensors, outputs) = (case.inputs.clone(), &case.outputs);
        Self { kernel, params, tensors, asked_for: Vec::new(), folder, outputs }
    }

    /// The folder that the case file is in, for what lies beside it.
    pub(super) fn folder(&self) -> &'a Path {
        self.folder
    }

    /// The shape of an expected output, where it says how much is to be computed.
    pub(super) fn output_shape(&self, name: &str) -> Option<&'a [usize]> {
        self.outputs.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// An output in the compute type, such as the lse; rounded to the type `T` of the inputs where the case
    /// has it so.
    pub(super) fn statistic<T, D>(&self, name: &'static str, array: Array<T::Acc, D>) -> Output
    where
        T: Element<Acc: Stored> + Stored,
        D: Dimension,
    {
        match self.outputs.get(name) {
            Some(wanted) if wanted.dtype == T::DTYPE => Output::new(name, array.mapv(T::from_acc)),
            _ => Output::new(name, array),
        }
    }

    /// The parameters. `P` has a default for each and `#[serde(deny_unknown_fields)]`.
    pub(super) fn params<P: DeserializeOwned>(&self) -> Result<P> {
        // By way of a map, because serde also reads a struct from a list of its fields.
        serde_json::from_str(self.params)
            .and_then(|Object(object)| P::deserialize(Value::Object(object)))
            .with_context(|| format!("the metadata key `params` is `{}`", self.params))
    }

    /// The type of a required tensor, which stays where it is.
    pub(super) fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.tensors.get(name).with_context(|| missing(name))?.dtype)
    }

    /// A required tensor of exactly this type.
    pub(super) fn array<T: Stored, D: Dimension>(
        &mut self,
        name: &'static str,
    ) -> Result<Array<T, D>> {
        let tensor = self.take(name).with_context(|| missing(name))?;
        with_axes(name, in_context(name, tensor.array())?)
    }

    /// A tensor of exactly this type, if it is there.
    pub(super) fn optional<T: Stored, D: Dimension>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<Array<T, D>>> {
        let Some(tensor) = self.take(name) else { return Ok(None) };
        with_axes(name, in_context(name, tensor.array())?).map(Some)
    }

    /// A tensor of floats that convert to `T` exactly, if it is there.
    pub(super) fn optional_widened<T: Element + Stored, D: Dimension>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<Array<T, D>>> {
        let Some(tensor) = self.take(name) else { return Ok(None) };
        with_axes(name, in_context(name, tensor.array_widened())?).map(Some)
    }

    /// A tensor of booleans, stored as U8 or BOOL, if it is there.
    pub(super) fn optional_booleans(&mut self, name: &'static str) -> Result<Option<ArrayD<bool>>> {
        self.take(name).map(|tensor| in_context(name, tensor.booleans())).transpose()
    }

    /// Rejects tensors that the adapter did not ask for.
    pub(super) fn finish(self) -> Result<()> {
        if let Some(name) = self.tensors.keys().next() {
            let known: Vec<_> = self.asked_for.iter().map(|name| format!("in.{name}")).collect();
            bail!("unknown tensor `in.{name}`: {} takes {}", self.kernel, known.join(", "));
        }
        Ok(())
    }

    fn take(&mut self, name: &'static str) -> Option<Tensor<'a>> {
        self.asked_for.push(name);
        self.tensors.remove(name)
    }
}

/// A JSON object, each of whose keys is there once.
struct Object(Map<String, Value>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;

        impl<'de> Visitor<'de> for Keys {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut object = Map::new();
                while let Some((key, value)) = map.next_entry::<String, Value>()? {
                    if object.contains_key(&key) {
                        return Err(A::Error::custom(format_args!(
                            "the key `{key}` is there twice"
                        )));
                    }
                    object.insert(key, value);
                }
                Ok(Object(object))
            }
        }

        deserializer.deserialize_map(Keys)
    }
}

/// Rejects an array whose shape is none of `expected`.
pub(super) fn expect_shape<T>(name: &str, array: &ArrayD<T>, expected: &[&[usize]]) -> Result<()> {
    if expected.contains(&array.shape()) {
        return Ok(());
    }
    let expected: Vec<_> = expected.iter().map(|shape| format!("{shape:?}")).collect();
    bail!("`in.{name}` has shape {:?}, expected {}", array.shape(), expected.join(" or "))
}

/// Rejects an array without axes, which has no rows.
pub(super) fn expect_rows<T>(name: &str, array: &ArrayD<T>) -> Result<()> {
    ensure!(array.ndim() > 0, "`in.{name}` has shape [], expected at least one axis");
    Ok(())
}

fn missing(name: &str) -> String {
    format!("the tensor `in.{name}` is missing")
}

fn in_context<T>(name: &str, result: Result<T>) -> Result<T> {
    result.map_err(|error| anyhow::anyhow!("`in.{name}` {error:#}"))
}

fn with_axes<T, D: Dimension>(name: &str, array: ArrayD<T>) -> Result<Array<T, D>> {
    let shape = array.shape().to_vec();
    array.into_dimensionality().map_err(|_| {
        let axes = D::NDIM.unwrap_or(0);
        anyhow::anyhow!("`in.{name}` has shape {shape:?}, expected {axes} axes")
    })
}
