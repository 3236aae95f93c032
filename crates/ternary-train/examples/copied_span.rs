//! Samples of a model, within and outside of what it was trained on, and the longest span of each
//! that stands word for word in the training text: how much it learnt by heart.
//!
//! `cargo run --release -p ternary-train --example copied_span -- MODEL TRAIN_TEXT...`
//!
//! Without arguments: of a model that was trained on this crate's documents for a moment, which has
//! learnt little.

use std::env::args_os;
use std::path::{Path, PathBuf};

use ternary_train::formats::{read_folder, write_folder};
use ternary_train::generate::{Choice, GenerateOptions, Sampling, generate};
use ternary_train::infer::Model;
use ternary_train::{
    Config, Corpus, Error, Preset, Projection, Tokenizer, TrainOptions, Trainer, Weights, find_leak,
};

const PROMPTS: [(&str, &str); 6] = [
    ("in domain", "KING HENRY\tWhat say you, my lord?\n\n"),
    ("in domain", "To be, or not to be: that is "),
    ("in domain", "\n\n\tACT II\n\n\nSCENE I\t"),
    ("out of domain", "The processor reads the instruction and "),
    ("out of domain", "Yesterday the parliament voted on "),
    ("out of domain", "fn main() {\n    let x = "),
];
const TOKENS: usize = 400;
const DOCUMENTS: &str =
    concat!(include_str!("../README.md"), include_str!("../docs/derivation.md"));

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut paths = args_os().skip(1).map(PathBuf::from);
    let temporary = tempfile::tempdir()?;
    let (folder, train) = match paths.next() {
        Some(folder) => (folder, Corpus::by_work(&paths.collect::<Vec<_>>(), &[])?.train),
        None => {
            train_briefly(temporary.path())?;
            (temporary.path().to_owned(), DOCUMENTS.to_owned())
        }
    };
    let (config, weights) = read_folder(&folder)?;
    let tokenizer = Tokenizer::read(&folder)?;
    let model = if config.ternary.is_some() {
        Model::packed(config, weights)
    } else {
        Model::float(config, weights)
    }?;
    let sampling = Sampling { temperature: 0.8, seed: 1, ..Sampling::default() };
    for (name, choice) in
        [("greedy", Choice::Greedy), ("temperature 0.8", Choice::Sampled(sampling))]
    {
        let options = GenerateOptions { max_new_tokens: TOKENS, choice, ..Default::default() };
        let prompts = PROMPTS.map(|(_, prompt)| tokenizer.encode(prompt));
        let prompts: Vec<_> = prompts.into_iter().collect::<Result<_, Error>>()?;
        let continuations = generate(&model, &prompts, &options, |_, _| {})?;
        for ((domain, prompt), tokens) in PROMPTS.iter().zip(&continuations) {
            let text = tokenizer.decode(tokens);
            let (length, span) = longest_copy(&train, &text);
            println!("=== {domain}, {name}; copied: {length} of {} bytes, {span:?}", text.len());
            println!("{prompt}[..]{text}\n");
        }
    }
    Ok(())
}

/// Writes a model that has seen the documents a few times.
fn train_briefly(folder: &Path) -> Result<(), Error> {
    let config = Config { ternary: Some(Projection::default()), ..Preset::Nano.config(256) };
    let options = TrainOptions { steps: 30, warmup: 3, ..TrainOptions::default() };
    let mut trainer = Trainer::new(&config, &options, &Weights::random(&config, 1)?)?;
    let tokenizer = Tokenizer::bytes();
    let tokens = tokenizer.encode(DOCUMENTS)?;
    for _ in 0..options.steps {
        trainer.step(&tokens)?;
    }
    write_folder(folder, &config, &trainer.weights()?, Some(&tokenizer))
}

/// The longest span of `text` that `train` has too, in bytes: if a span is shared, its parts are, so
/// halving finds the length.
fn longest_copy(train: &str, text: &str) -> (usize, String) {
    let (mut shared, mut not) = (0, text.len() + 1);
    while shared + 1 < not {
        let length = shared.midpoint(not);
        if find_leak(train, text, length).is_some() { shared = length } else { not = length }
    }
    // What is found may be several copies that overlap; the first is one of them.
    let span = find_leak(train, text, shared).map_or(String::new(), |leak| leak.longest);
    (shared, String::from_utf8_lossy(&span.as_bytes()[..shared.min(span.len())]).into_owned())
}
