//! The folder of the Hugging Face layout: `config.json`, the weights, the tokenizer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::check_finite;
use super::new_file::write_file;
use super::safetensors::{File, tensors, write};
use crate::ops::slice_mut;
use crate::{Config, Error, Tokenizer, Weights};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// `model.safetensors.index.json`: which file holds which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Reads configuration and weights of the model in `folder`: `config.json` and `model.safetensors` or,
/// if there is none, the files that `model.safetensors.index.json` names. Weights in f32, f16 or bf16.
///
/// # Errors
/// [`Error::Io`] for a file that cannot be read, [`Error::File`] for one that is cut short, or whose
/// tensors are missing, unknown, of another shape or type than the configuration asks for, or not
/// finite. The head may be missing if it is tied.
pub fn read_folder(folder: &Path) -> Result<(Config, Weights), Error> {
    let config = Config::read(&folder.join(CONFIG))?;
    let whole = folder.join(WEIGHTS);
    let files: Vec<PathBuf> = match folder.join(INDEX) {
        // An index beside the one file is of weights that were here before.
        index if index.exists() && !whole.exists() => {
            let text = fs::read_to_string(&index).map_err(Error::io(&index))?;
            let parsed: Index = serde_json::from_str(&text)
                .map_err(|error| Error::file(&index, error.to_string()))?;
            let names: BTreeSet<String> = parsed.weight_map.into_values().collect();
            if let Some(name) = names.iter().find(|name| Path::new(name).components().count() != 1)
            {
                return Err(Error::file(&index, format!("`{name}` is not the name of a file")));
            }
            names.into_iter().map(|name| folder.join(name)).collect()
        }
        _ => vec![whole],
    };
    let files = files.into_iter().map(File::open).collect::<Result<Vec<_>, _>>()?;
    check_size(folder, &config, &files)?;
    let mut weights = Weights::zeros(&config)?;
    let mut known = BTreeSet::new();
    for named in weights.matrices_mut() {
        let (rows, columns) = named.weight.dim();
        let to = slice_mut("weights", named.weight.view_mut())?;
        read_one(folder, &files, &named.name, &[rows, columns], to)?;
        known.insert(named.name);
    }
    for named in weights.norms_mut() {
        let length = named.weight.len();
        let to = slice_mut("weights", named.weight.view_mut())?;
        read_one(folder, &files, &named.name, &[length], to)?;
        known.insert(named.name);
    }
    for file in &files {
        let tied_head = |name: &str| config.tie_word_embeddings && name == "lm_head.weight";
        let mut names = file.names().into_iter();
        if let Some(name) = names.find(|name| !known.contains(name) && !tied_head(name)) {
            return Err(Error::file(file.path(), format!("the tensor `{name}` is not Qwen3's")));
        }
    }
    Ok((config, weights))
}

/// Checks that the files are large enough for the model, before room is made for it.
fn check_size(folder: &Path, config: &Config, files: &[File]) -> Result<(), Error> {
    /// The least bytes of a weight: f16 and bf16.
    const SMALLEST: usize = 2;
    let bytes: usize = files.iter().map(File::len).sum();
    let weights = config.parameters();
    if weights > bytes / SMALLEST {
        let what = format!("its files have {bytes} bytes, `{CONFIG}` asks for {weights} weights");
        return Err(Error::file(folder, what));
    }
    Ok(())
}

fn read_one(
    folder: &Path,
    files: &[File],
    name: &str,
    shape: &[usize],
    to: &mut [f32],
) -> Result<(), Error> {
    match files.iter().find(|file| file.holds(name)) {
        Some(file) => file.read(name, shape, to),
        None => Err(Error::file(folder, format!("the tensor `{name}` is missing"))),
    }
}

/// Writes `config.json`, `model.safetensors` in f32 and the tokenizer's files to `folder`, which is
/// made if it does not exist. Transformers opens it as a `Qwen3ForCausalLM`.
///
/// Each file is written beside its place and then moved there, so none is ever half written; of a program that
/// was killed meanwhile a file such as `.model.safetensors.a1B2c3.tmp` stays, which may be removed. A symbolic
/// link stays one, and what it points to is written. The index of weights that were in the folder before is
/// removed; the files that it names stay.
///
/// # Errors
/// [`Error::Io`] if a file cannot be written; [`Error::Config`] and [`Error::Shape`] if the weights
/// are not those of the configuration, [`Error::Op`] if they are not row-major, [`Error::File`] if they are
/// not finite, or if something else than a regular file has the place of one.
pub fn write_folder(
    folder: &Path,
    config: &Config,
    weights: &Weights,
    tokenizer: Option<&Tokenizer>,
) -> Result<(), Error> {
    weights.check(config)?;
    let tensors = tensors(weights)?;
    let path = folder.join(WEIGHTS);
    tensors.iter().try_for_each(|(name, _, values)| check_finite(&path, name, values))?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    write_file(&folder.join(CONFIG), |file| file.write_all(config.to_json().as_bytes()))?;
    write_file(&path, |file| write(file, &tensors))?;
    let index = folder.join(INDEX);
    if index.exists() {
        fs::remove_file(&index).map_err(Error::io(&index))?;
    }
    match tokenizer {
        Some(tokenizer) => tokenizer.write(folder),
        None => Ok(()),
    }
}
