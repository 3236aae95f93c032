//! Decoding with a random model of the shape of Qwen3-0.6B, float against packed.

use std::time::Instant;

use anyhow::Result;
use ternary_train::generate::{GenerateOptions, generate};
use ternary_train::infer::Model;
use ternary_train::{Config, Projection, Weights};

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
    println!("random model of the shape of Qwen3-0.6B, {} parameters", config.parameters());
    println!("packed {:.3} bits a weight", packed.bytes() as f64 * 8.0 / matrices as f64);
    let mut best = [f64::INFINITY; 2];
    for _ in 0..3 {
        for ((model, tokens), best) in [(&float, 8), (&packed, 48)].into_iter().zip(&mut best) {
            *best = best.min(seconds_a_token(model, tokens)?);
        }
    }
    let [float, packed] = best.map(|seconds| 1.0 / seconds);
    println!("float {float:.1} tokens/s, packed {packed:.1} tokens/s: {:.1} times", packed / float);
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
