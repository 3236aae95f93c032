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
        Err(_) if !folder.join(Tokenizer::FILE).exists() && config.vocab_size == 256 => {
            Tokenizer::bytes()
        }
        Err(error) => return Err(error).context("the model has no tokenizer that can be read"),
    };
    Ok((config, weights, tokenizer))
}

/// How products are computed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arithmetic {
    /// Packed if the weights are ternary, else in f32.
    OfTheModel,
    /// In f32.
    Float,
    /// As llama.cpp does with the exported file.
    LlamaCpp,
}

/// The model ready to run.
pub(crate) fn open_model(folder: &Path, arithmetic: Arithmetic) -> Result<(Model, Tokenizer)> {
    let (config, weights, tokenizer) = open(folder)?;
    let model = match arithmetic {
        Arithmetic::OfTheModel if config.ternary.is_some() => Model::packed(config, weights),
        Arithmetic::OfTheModel | Arithmetic::Float => Model::float(config, weights),
        Arithmetic::LlamaCpp => Model::like_llama_cpp(config, weights),
    };
    let model = model.with_context(|| format!("{}", folder.display()))?;
    Ok((model, tokenizer))
}
