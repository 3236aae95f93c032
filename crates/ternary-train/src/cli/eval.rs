//! `eval`: the loss of a model on a text, beside what simpler models reach.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::builder::RangedU64ValueParser;
use ternary_train::formats::read_folder;
use ternary_train::{
    Config, Corpus, Error, NGram, Tokenizer, TrainOptions, Trainer, windows_of, xz_bits_per_byte,
};

use super::values::{at_least_one, of_command_line};
use crate::cli::say;

/// Measure a model on a text.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the model
    model: PathBuf,
    /// Texts to measure with, UTF-8. One that does not end with a newline gets one
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    text: Vec<PathBuf>,
    /// Texts that the model was trained on, for the baselines to learn from
    #[arg(long, value_name = "FILE", num_args = 1..)]
    train: Vec<PathBuf>,
    /// Windows that are measured, from the start of the text. Default: all
    #[arg(long, value_parser = at_least_one())]
    windows: Option<usize>,
    /// Tokens of a window
    #[arg(long, default_value_t = 64, value_parser = at_least_one())]
    context: usize,
    /// Windows that are computed at once
    #[arg(long, default_value_t = 8, value_parser = at_least_one())]
    batch: usize,
    /// Order of the n-gram baseline, over bytes: 1 to 8
    #[arg(long, default_value_t = 6, value_parser = RangedU64ValueParser::<usize>::new().range(1..=8))]
    ngram: usize,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (config, weights) = read_folder(&args.model)?;
    let tokenizer = Tokenizer::read(&args.model)?;
    let corpus = Corpus::by_work(&args.train, &args.text)?;
    let tokens = tokenizer.encode(&corpus.validation)?;
    let options =
        TrainOptions { sequences: args.batch, length: args.context, ..TrainOptions::default() };
    // The weights are ternary already: to project them again would change them.
    let config = Config { ternary: None, ..config };
    let mut trainer = Trainer::new(&config, &options, &weights).map_err(of_command_line)?;
    let windows = windows_of(tokens.len(), args.context).min(args.windows.unwrap_or(usize::MAX));
    let loss = trainer.evaluate(&tokens, windows).map_err(|error| match error {
        Error::TooShort { .. } => anyhow::anyhow!(error)
            .context("--text is too short (a file that does not end with a newline gets one)"),
        error => error.into(),
    })?;
    // What the tokens say, which a tokenizer that normalises makes another text than --text.
    let text: Vec<u8> =
        tokens[1..=loss.tokens].iter().flat_map(|&token| tokenizer.token_bytes(token)).collect();
    let bytes = text.len().max(1);
    say(format_args!(
        "tokens               {} in {windows} windows of {}",
        loss.tokens, args.context
    ));
    say(format_args!("loss                 {:.4} nats a token", loss.mean()));
    say(format_args!(
        "perplexity           {:.3} (tokenizer {})",
        loss.mean().exp(),
        tokenizer.name()
    ));
    say(format_args!(
        "accuracy             {:.1} %",
        100.0 * loss.correct as f64 / loss.tokens as f64
    ));
    say(format_args!(
        "bits per byte        {:.4}",
        loss.sum / std::f64::consts::LN_2 / bytes as f64
    ));
    let train = corpus.train.as_bytes();
    if !args.train.is_empty() {
        let mut ngram = NGram::new(args.ngram);
        ngram.learn(train);
        let name = format!("{}-gram of bytes", args.ngram);
        say(format_args!(
            "{name:20} {:.4} bits per byte, learnt from --train",
            ngram.bits_per_byte(&text)
        ));
        let after = xz_bits_per_byte(train, &text).context("xz")?;
        say(format_args!("xz after --train     {after:.4} bits per byte"));
    }
    say(format_args!(
        "xz alone             {:.4} bits per byte",
        xz_bits_per_byte(&[], &text).context("xz")?
    ));
    Ok(())
}
