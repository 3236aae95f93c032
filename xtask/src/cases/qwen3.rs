//! A whole model: logits of a prompt, and greedy decoding through the cache.

use std::path::{Component, Path};

use anyhow::{Context, Result, ensure};
use ndarray::{Array2, Array3};
use serde::Deserialize;
use ternary_train::formats::read_folder;
use ternary_train::generate::{GenerateOptions, generate};
use ternary_train::infer::{Chunk, LogitRows, Model};

use super::inputs::Inputs;
use super::tensor::Output;

/// Tokens that are generated unless the case says how many.
const STEPS: usize = 24;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Params {
    /// A folder beside the case file.
    model: String,
}

/// The path of a folder beside the case file. One that leads elsewhere would be another folder on another machine.
fn beside(model: &str) -> Result<&Path> {
    let path = Path::new(model);
    let is_below = |part| matches!(part, Component::Normal(_) | Component::CurDir);
    ensure!(
        !model.is_empty() && path.components().all(is_below),
        "the parameter `model` is `{model}`, expected the name of a folder beside the case file",
    );
    Ok(path)
}

/// Runs the model in the folder that the case names.
pub(super) fn run(inputs: &mut Inputs<'_>) -> Result<Vec<Output>> {
    let params: Params = inputs.params()?;
    let folder = inputs.folder().join(beside(&params.model)?);
    let (config, weights) = read_folder(&folder)
        .with_context(|| format!("the model `{}` cannot be read", params.model))?;
    let model = Model::float(config, weights)?;
    let ids: Array2<i64> = inputs.array("ids")?;
    let prompts: Vec<Vec<u32>> = ids
        .outer_iter()
        .map(|row| row.iter().map(|&id| u32::try_from(id)).collect::<Result<_, _>>())
        .collect::<Result<_, _>>()
        .context("`in.ids` has a token that is negative or too large")?;
    let (batch, length) = ids.dim();

    let mut cache = model.cache(batch * length.next_multiple_of(64))?;
    let seqs = prompts.iter().map(|_| cache.create()).collect::<Result<Vec<_>, _>>()?;
    let chunks: Vec<_> =
        seqs.iter().zip(&prompts).map(|(&seq, prompt)| Chunk::line(seq, prompt)).collect();
    let logits = model.forward(&mut cache, &chunks, LogitRows::All)?;
    let vocabulary = logits.ncols();
    let logits =
        Array3::from_shape_vec((batch, length, vocabulary), logits.into_raw_vec_and_offset().0)?;

    let steps = inputs.output_shape("greedy").map_or(STEPS, |shape| shape.last().map_or(0, |&s| s));
    let options = GenerateOptions { max_new_tokens: steps, ..GenerateOptions::default() };
    let texts = generate(&model, &prompts, &options, |_, _| {})?;
    ensure!(texts.iter().all(|text| text.len() == steps), "generation ended early");
    let greedy = Array2::from_shape_fn((batch, steps), |(b, i)| i64::from(texts[b][i]));
    Ok(vec![Output::new("logits", logits), Output::new("greedy", greedy)])
}
