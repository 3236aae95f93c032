//! `export`: a model in another format.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use ternary_train::formats::{write_folder, write_gguf};
use ternary_train::{Projection, Rule};

use super::folder::open;
use crate::cli::say;

/// Writes a model in another format.
#[derive(Args)]
pub(crate) struct Export {
    /// Folder of the model.
    #[arg(long)]
    model: PathBuf,
    /// What to write.
    #[arg(long, value_enum)]
    format: Format,
    /// The file (gguf) or folder (safetensors) to write.
    #[arg(long)]
    out: PathBuf,
    /// Make the matrices of a float model ternary first, by this rule: absmean, twn or optimal.
    #[arg(long)]
    project: Option<Rule>,
    /// Weights that share a scale, with `--project`.
    #[arg(long, requires = "project", default_value_t = Projection::default().group)]
    group: usize,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// For llama.cpp: one file, with type Q2_0 for ternary matrices and the tokenizer.
    Gguf,
    /// For Transformers: a folder with `config.json`, f32 weights and the tokenizer.
    Safetensors,
}

impl Export {
    pub(crate) fn run(self) -> Result<()> {
        let (mut config, mut weights, tokenizer) = open(&self.model)?;
        if let Some(rule) = self.project {
            if config.ternary.is_some() {
                bail!("the model is ternary already; projecting it again would change its scales");
            }
            let projection = Projection { rule, group: self.group };
            weights.project(projection)?;
            config.ternary = Some(projection);
        }
        match self.format {
            Format::Gguf => write_gguf(&self.out, &config, &weights, &tokenizer)?,
            Format::Safetensors => write_folder(&self.out, &config, &weights, Some(&tokenizer))?,
        }
        say(self.out.display());
        Ok(())
    }
}
