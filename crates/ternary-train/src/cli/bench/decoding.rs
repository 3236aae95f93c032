//! Decoding with a random model of the shape of Qwen3-0.6B, float against packed.

use std::time::Instant;

use anyhow::Result;
use ternary_train::generate::{GenerateOptions, generate};
use ternary_train::infer::Model;
use ternary_train::{Config, Projection, Weights};

use super::Pairs;
use super::machine::Machine;
use crate::cli::say;

/// The shape of Qwen3-0.6B.
fn config() -> Config {
    Config {
        vocab_size: 151_936,
        hidden_size: 1024,
        intermediate_size: 3072,
        num_hidden_layers: 28,
        num_attention_heads: 16,
        num_key_value_heads: 8,
        head_dim: 128,
        max_position_embeddings: 40_960,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        tie_word_embeddings: true,
        eos_token_ids: Vec::new(),
        ternary: Some(Projection::default()),
    }
}

pub(super) fn run() -> Result<()> {
    let config = config();
    let mut weights = Weights::random(&config, 1)?;
    weights.project(Projection::default())?;
    let packed = Model::packed(config.clone(), weights.clone())?;
    let float = Model::float(config.clone(), weights)?;
    let matrices = float.bytes() / 4;
    say(format_args!(
        "random model of the shape of Qwen3-0.6B, {} parameters",
        config.parameters()
    ));
    say(format_args!("packed {:.3} bits a weight", packed.bytes() as f64 * 8.0 / matrices as f64));
    let machine = Machine::new();
    let mut pairs = Pairs::default();
    for _ in 0..6 {
        let bandwidth = machine.read_bandwidth();
        let mut results = [0.0; 5];
        for (i, (model, tokens)) in [(&float, 8), (&packed, 48)].into_iter().enumerate() {
            let speed = 1.0 / seconds_a_token(model, tokens)?;
            results[2 * i] = speed;
            results[2 * i + 1] = 100.0 * speed * model.bytes() as f64 / bandwidth;
        }
        results[4] = results[2] / results[0];
        pairs.add(results);
    }
    let [float, float_read, packed, packed_read, ratio] = pairs.medians();
    say(format_args!(
        "float  {float:6.1} tokens/s, weights read at {float_read:3.0} % of the bandwidth"
    ));
    say(format_args!(
        "packed {packed:6.1} tokens/s, weights read at {packed_read:3.0} % of the bandwidth"
    ));
    say(format_args!("packed generation is {ratio:.1} times as fast"));
    Ok(())
}

/// The time of a step, the prompt's apart.
fn seconds_a_token(model: &Model, tokens: usize) -> Result<f64> {
    let options = GenerateOptions { max_new_tokens: tokens + 1, ..GenerateOptions::default() };
    let mut first = None;
    generate(model, &[[1, 2, 3, 4]], &options, |_, _| {
        first.get_or_insert_with(Instant::now);
    })?;
    Ok(first.map_or(f64::INFINITY, |first| first.elapsed().as_secs_f64() / tokens as f64))
}
