//! Reading a case file: safetensors with the metadata that `kernel-case/1` asks for.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, anyhow, bail, ensure};
use safetensors::{SafeTensorError, SafeTensors};

use super::check::Tolerance;
use super::tensor::Tensor;

/// The value of the metadata key `format`.
const FORMAT: &str = "kernel-case/1";

/// The product of the other axes of a tensor of which one is 0, at most.
const MOST_EMPTY: usize = 1 << 24;

/// A parsed case; the tensors point into the file's bytes.
#[derive(Debug)]
pub(super) struct CaseFile<'a> {
    /// The kernel it names, known or not.
    pub(super) kernel: String,
    /// The kernel's parameters, a JSON object.
    pub(super) params: String,
    pub(super) tolerance: Tolerance,
    /// The tensors `in.*`, without the prefix.
    pub(super) inputs: BTreeMap<String, Tensor<'a>>,
    /// The tensors `out.*`, without the prefix; at least one.
    pub(super) outputs: BTreeMap<String, Tensor<'a>>,
}

impl<'a> CaseFile<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(explain)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let format = get(&metadata, "format")?;
        ensure!(
            format == FORMAT,
            "not a case: its metadata key `format` is `{format}`, expected `{FORMAT}`",
        );

        let mut inputs = BTreeMap::new();
        let mut outputs = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(bytes).map_err(explain)?.tensors() {
            // Without a byte there may still be rows without end.
            let axes = view.shape().iter().filter(|&&axis| axis > 0);
            let rows = axes.fold(1_usize, |rows, &axis| rows.saturating_mul(axis));
            ensure!(
                !view.data().is_empty() || rows <= MOST_EMPTY,
                "`{name}` has shape {:?}, expected at most {MOST_EMPTY} rows without elements",
                view.shape(),
            );
            match name.split_once('.') {
                Some(("in", name)) => inputs.insert(name.to_owned(), view.into()),
                Some(("out", name)) => outputs.insert(name.to_owned(), view.into()),
                _ => bail!("unknown tensor `{name}`: names start with `in.` or `out.`"),
            };
        }
        ensure!(!outputs.is_empty(), "it has no tensor `out.*`, so there is nothing to check");

        Ok(Self {
            kernel: get(&metadata, "kernel")?.to_owned(),
            params: get(&metadata, "params")?.to_owned(),
            tolerance: Tolerance {
                atol: number(&metadata, "atol")?,
                rtol: number(&metadata, "rtol")?,
            },
            inputs,
            outputs,
        })
    }
}

fn get<'m>(metadata: &'m HashMap<String, String>, key: &str) -> Result<&'m str> {
    let value = metadata.get(key).with_context(|| {
        format!("not a complete case: its metadata has no key `{key}`; see docs/cases.md")
    })?;
    Ok(value)
}

fn number(metadata: &HashMap<String, String>, key: &str) -> Result<f64> {
    let text = get(metadata, key)?;
    match text.trim().parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => bail!("its metadata key `{key}` is `{text}`, expected a number that is at least 0"),
    }
}

/// Says in words what the library's error means for the file.
fn explain(error: SafeTensorError) -> anyhow::Error {
    let meaning = match &error {
        SafeTensorError::HeaderTooSmall
        | SafeTensorError::InvalidHeaderLength
        | SafeTensorError::MetadataIncompleteBuffer => {
            "truncated, or its length does not fit its header"
        }
        SafeTensorError::HeaderTooLarge
        | SafeTensorError::InvalidHeader(_)
        | SafeTensorError::InvalidHeaderDeserialization(_) => "not a safetensors file",
        _ => "a damaged safetensors file",
    };
    // Its text has that of its causes.
    anyhow!("{meaning}: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    fn file(metadata: &[(&str, &str)], tensors: &[&str]) -> Vec<u8> {
        let metadata = metadata.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
        let tensors = tensors
            .iter()
            .map(|&name| (name, TensorView::new(Dtype::F32, vec![1], &[0, 0, 128, 63]).unwrap()));
        safetensors::serialize(tensors, Some(metadata)).unwrap()
    }

    const COMPLETE: [(&str, &str); 5] =
        [("format", FORMAT), ("kernel", "k"), ("params", "{}"), ("atol", "1e-5"), ("rtol", "0")];

    fn error(bytes: &[u8]) -> String {
        format!("{:#}", CaseFile::parse(bytes).unwrap_err())
    }

    #[test]
    fn a_complete_case_is_read() {
        let bytes = file(&COMPLETE, &["in.x", "out.y"]);
        let case = CaseFile::parse(&bytes).unwrap();
        assert_eq!(case.kernel, "k");
        assert_eq!((case.tolerance.atol, case.tolerance.rtol), (1e-5, 0.0));
        assert_eq!(case.inputs["x"].array::<f32>().unwrap()[[0]], 1.0);
        assert_eq!(case.outputs.len(), 1);
    }

    #[test]
    fn a_file_cut_anywhere_is_an_error() {
        let bytes = file(&COMPLETE, &["in.x", "out.y"]);
        for length in 0..bytes.len() {
            assert!(error(&bytes[..length]).contains("truncated"), "{length} bytes");
        }
    }

    #[test]
    fn a_hostile_header_is_an_error() {
        let mut bytes = u64::MAX.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        assert!(error(&bytes).contains("not a safetensors file"));
        let header =
            br#"{"in.x":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,0]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        assert!(error(&bytes).contains("damaged"));
    }

    #[test]
    fn missing_and_wrong_metadata_is_named() {
        for missing in 0..COMPLETE.len() {
            let mut metadata = COMPLETE.to_vec();
            let (key, _) = metadata.remove(missing);
            assert!(error(&file(&metadata, &["out.y"])).contains(&format!("no key `{key}`")));
        }
        for (key, value) in [("format", "pt"), ("atol", "NaN"), ("rtol", "-1"), ("atol", "tiny")] {
            let mut metadata = COMPLETE.to_vec();
            metadata.retain(|&(k, _)| k != key);
            metadata.push((key, value));
            assert!(error(&file(&metadata, &["out.y"])).contains(&format!("`{value}`")));
        }
    }

    #[test]
    fn tensors_must_be_inputs_or_outputs() {
        assert!(error(&file(&COMPLETE, &["weight", "out.y"])).contains("unknown tensor `weight`"));
        assert!(error(&file(&COMPLETE, &["in.x"])).contains("nothing to check"));
    }
}
