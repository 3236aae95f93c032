//! Checkpoints: one file with everything that a training needs to go on with the same bits.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors, serialize_to_file};
use serde::{Deserialize, Serialize};

use super::trainer::State;
use super::{TrainOptions, Trainer};
use crate::formats::NewFile;
use crate::{Config, Error};

/// Version of the format.
const FORMAT: &str = "ternary-train-checkpoint/1";

/// What stands beside the tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    step: usize,
    /// The `config.json` of the model.
    config: String,
    options: TrainOptions,
    /// Codes that the last step flipped, which the next one reports.
    #[serde(default)]
    flipped: usize,
    /// What the caller keeps with it.
    note: String,
}

/// Writes a checkpoint in place of the one at `path`: to a temporary file beside it, which is
/// renamed when it is on the disk, so that at any moment there is a whole one. Of a program that was killed
/// meanwhile that file stays (`.checkpoint.safetensors.a1B2c3.tmp`) and may be removed. `note` comes back from
/// [`load_checkpoint`].
///
/// # Errors
/// [`Error::Io`] if the file cannot be written, [`Error::File`] if the training has diverged to weights
/// that have no ternary form, or if `path` is something else than a regular file or a symbolic link to one;
/// what is at `path` is as it was then.
pub fn save_checkpoint(path: &Path, trainer: &Trainer, note: &str) -> Result<(), Error> {
    if !trainer.is_sound() {
        return Err(Error::file(path, "not written: the weights have no ternary form"));
    }
    let State { step, latent, mean, square } = &trainer.state;
    let header = Header {
        step: *step,
        config: trainer.config.to_json(),
        options: trainer.options.clone(),
        flipped: trainer.flipped(),
        note: note.to_owned(),
    };
    let header = serde_json::to_string(&header).map_err(|error| other(path, error))?;
    let tensors = [("latent", latent), ("mean", mean), ("square", square)];
    let mut sum = crc32fast::Hasher::new();
    sum.update(header.as_bytes());
    let mut views = Vec::new();
    for (name, values) in tensors {
        let bytes = bytemuck::cast_slice(values);
        sum.update(bytes);
        let view = TensorView::new(Dtype::F32, vec![values.len()], bytes);
        views.push((name, view.map_err(|error| other(path, error))?));
    }
    let metadata = HashMap::from([
        ("format".to_owned(), FORMAT.to_owned()),
        ("training".to_owned(), header),
        ("crc32".to_owned(), format!("{:08x}", sum.finalize())),
    ]);
    let file = NewFile::beside(path)?;
    serialize_to_file(views, Some(metadata), file.path()).map_err(|error| other(path, error))?;
    // That put a file of its own there, for its owner alone.
    let permissions = file.file().metadata().map(|empty| empty.permissions());
    permissions
        .and_then(|permissions| fs::set_permissions(file.path(), permissions))
        .map_err(Error::io(path))?;
    file.put()
}

/// Reads a checkpoint; the training goes on with the bits it would have had. Returns the note as
/// well.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::File`] with its name if it is cut short, was changed
/// (a checksum covers everything) or is no checkpoint.
pub fn load_checkpoint(path: &Path) -> Result<(Trainer, String), Error> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let refuse =
        |what: &str| Error::file(path, format!("{what}: the checkpoint is damaged or none"));
    let read = |error: safetensors::SafeTensorError| refuse(&error.to_string());
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(read)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(read)?;
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let field = |key: &str| {
        metadata.get(key).ok_or_else(|| refuse(&format!("it has no `{key}` in its header")))
    };
    if field("format")? != FORMAT {
        return Err(refuse(&format!("its format is `{}`, expected `{FORMAT}`", field("format")?)));
    }
    let header = field("training")?;
    let mut sum = crc32fast::Hasher::new();
    sum.update(header.as_bytes());
    let mut vectors = Vec::new();
    for name in ["latent", "mean", "square"] {
        let tensor = tensors.tensor(name).map_err(read)?;
        sum.update(tensor.data());
        let (values, rest) = tensor.data().as_chunks::<4>();
        if tensor.dtype() != Dtype::F32 || !rest.is_empty() {
            return Err(refuse(&format!("`{name}` is not f32")));
        }
        vectors.push(values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect::<Vec<_>>());
    }
    let sum = format!("{:08x}", sum.finalize());
    if *field("crc32")? != sum {
        return Err(refuse(&format!("its checksum is {sum}, expected {}", field("crc32")?)));
    }
    let header: Header =
        serde_json::from_str(header).map_err(|error| refuse(&error.to_string()))?;
    let config = Config::from_json(&header.config)?;
    header.options.check()?;
    let tokens = header.step.checked_mul(header.options.tokens_per_step());
    if tokens.is_none_or(|tokens| tokens > isize::MAX as usize) {
        return Err(refuse(&format!("its step is {}", header.step)));
    }
    // Before room is made for a model of another size.
    if vectors.iter().any(|values| values.len() != config.parameters()) {
        return Err(refuse("its weights are not those of its configuration"));
    }
    let [latent, mean, square]: [Vec<f32>; 3] =
        vectors.try_into().map_err(|_| refuse("tensors are missing"))?;
    let state = State { step: header.step, latent, mean, square };
    let trainer = Trainer::with_state(&config, &header.options, state, header.flipped)?;
    Ok((trainer, header.note))
}

/// An error of another kind as one of the file.
fn other(path: &Path, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Io { path: path.to_owned(), source: std::io::Error::other(error) }
}
