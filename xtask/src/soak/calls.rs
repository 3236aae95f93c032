//! Calls whose answers are known: kernels give the bits they gave alone, and speculation gives the text
//! of plain generation.

use anyhow::{Result, ensure};
use attn_flash::attention;
use dflash::{DecodeOptions, Decoding};
use ndarray::{Array2, Array4};
use softmax_topk::softmax_topk;
use tensor_utils::testing::Seeded;
use ternary_train::generate::{GenerateOptions, generate, generate_speculatively};
use ternary_train::infer::Model;
use ternary_train::{Config, Preset, Weights};

/// Tokens of the model.
const VOCABULARY: usize = 50;

/// Inputs, and what came of them before there was any other thread.
pub(super) struct Calls {
    x: Array4<f32>,
    attention: Array4<f32>,
    logits: Array2<f32>,
    top: Array2<u32>,
    model: Model,
}

impl Calls {
    pub(super) fn new() -> Result<Self> {
        let mut seeded = Seeded::new(1);
        let x = seeded.normal((2, 3, 200, 32));
        let logits = seeded.normal((5, 9000));
        let shape = Config { num_hidden_layers: 1, ..Preset::Nano.config(VOCABULARY) };
        let model = Model::float(shape.clone(), Weights::random(&shape, 1)?)?;
        let attention = attend(&x)?;
        let top = select(&logits)?;
        Ok(Self { x, attention, logits, top, model })
    }

    /// Makes all calls once more.
    pub(super) fn repeat(&self, seed: u64) -> Result<()> {
        ensure!(attend(&self.x)? == self.attention, "attention gave other bits");
        ensure!(select(&self.logits)? == self.top, "softmax-topk chose other tokens");
        let prompt: Vec<u32> =
            (0..20).map(|i| ((seed + i * i) % VOCABULARY as u64) as u32).collect();
        let prompts = [&prompt[..], &prompt[..7]];
        let options = GenerateOptions { max_new_tokens: 24, ..GenerateOptions::default() };
        let plain = generate(&self.model, &prompts, &options, |_, _| {})?;
        let options = DecodeOptions {
            max_new_tokens: 24,
            decoding: Decoding::Greedy,
            budget: 8,
            ..DecodeOptions::default()
        };
        let speculated = generate_speculatively(&self.model, &prompts, &options)?;
        for (plain, speculated) in plain.iter().zip(&speculated) {
            ensure!(*plain == speculated.tokens, "speculation gave another text");
        }
        Ok(())
    }
}

fn attend(x: &Array4<f32>) -> Result<Array4<f32>> {
    let options = attn_flash::Options { causal: true, ..attn_flash::Options::default() };
    Ok(attention(x.view(), x.view(), x.view(), &options)?.o)
}

fn select(logits: &Array2<f32>) -> Result<Array2<u32>> {
    Ok(softmax_topk(logits.view(), 20, &softmax_topk::Options::default())?.indices)
}
