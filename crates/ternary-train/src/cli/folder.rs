//! Opening a model's folder.

use std::path::Path;

use anyhow::{Context, Result};
use ternary_train::formats::read_folder;
use ternary_train::infer::Model;
use ternary_train::{Config, Tokenizer, Weights};

/// Configuration, weights and tokenizer; without a tokenizer file, bytes if the vocabulary is theirs.
pub(crate) fn open(folder: &Path) -> Result<(Config, Weights, Tokenizer)> {
    let (config, weights) = read_folder(folder)?;
    let tokenizer = match Tokenizer::read(folder) {
        Ok(tokenizer) => tokenizer,
        Err(_) if !folder.join("tokenizer.json").exists() && config.vocab_size == 256 => {
            Tokenizer::bytes()
        }
        Err(error) => return Err(error).context("the model has no tokenizer that can be read"),
    };
    Ok((config, weights, tokenizer))
}

/// The model ready to run: packed if its weights are ternary, unless `float` is asked for.
pub(crate) fn open_model(folder: &Path, float: bool) -> Result<(Model, Tokenizer)> {
    let (config, weights, tokenizer) = open(folder)?;
    let is_packed = config.ternary.is_some() && !float;
    let model = if is_packed { Model::packed } else { Model::float }(config, weights)?;
    Ok((model, tokenizer))
}
