//! The whole way: a ternary model is trained on this crate's own documents for a few seconds, written
//! for Transformers and for llama.cpp, read again, packed, and continues a text.
//!
//! `cargo run --release -p ternary-train --example train_and_export -- [FOLDER] [STEPS]`

use std::path::PathBuf;

use ternary_train::formats::{read_folder, write_folder, write_gguf};
use ternary_train::generate::{GenerateOptions, generate};
use ternary_train::infer::Model;
use ternary_train::{Config, Preset, Projection, Tokenizer, TrainOptions, Trainer, Weights};

const TEXT: &str = concat!(include_str!("../README.md"), include_str!("../docs/derivation.md"));

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let temporary = tempfile::tempdir()?;
    let folder = arguments.next().map_or(temporary.path().to_owned(), PathBuf::from);
    let steps = arguments.next().map_or(Ok(100), |steps| steps.to_string_lossy().parse())?;

    let config = Config { ternary: Some(Projection::default()), ..Preset::Nano.config(256) };
    let options = TrainOptions { steps, warmup: steps / 10, ..TrainOptions::default() };
    let mut trainer = Trainer::new(&config, &options, &Weights::random(&config, 1)?)?;
    let tokenizer = Tokenizer::bytes();
    let tokens = tokenizer.encode(TEXT)?;
    for step in 1..=steps {
        let report = trainer.step(&tokens)?;
        if step % 50 == 0 {
            println!("step {step}: loss {:.3}", report.loss);
        }
    }

    write_folder(&folder, &config, &trainer.weights()?, Some(&tokenizer))?;
    write_gguf(&folder.join("model.gguf"), &config, &trainer.weights()?, &tokenizer)?;
    let (config, weights) = read_folder(&folder)?;
    let model = Model::packed(config, weights)?;
    let prompt = "A group of ";
    let options = GenerateOptions { max_new_tokens: 60, ..GenerateOptions::default() };
    let texts = generate(&model, &[tokenizer.encode(prompt)?], &options, |_, _| {})?;
    println!("{} kB packed: {prompt}{}", model.bytes() / 1024, tokenizer.decode(&texts[0]));
    Ok(())
}
