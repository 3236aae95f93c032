//! How to generate.

use crate::Error;

/// How many tokens, and which.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// New tokens of each sequence, at most. Default 256.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence and stay its last. Default: none.
    pub eos: Vec<u32>,
    /// How each token is chosen. Default: greedy.
    pub choice: Choice,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 256, eos: Vec::new(), choice: Choice::Greedy }
    }
}

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Choice {
    /// The likeliest; of equals the one with the lowest number.
    #[default]
    Greedy,
    /// A random one.
    Sampled(Sampling),
}

/// The law of a random token: temperature, then the cuts in this order, each of what the one before left.
/// It is that of [`dflash::Sampling`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; positive. Default 1.
    pub temperature: f64,
    /// Only the `top_k` likeliest tokens; `None`: all. Default: all.
    pub top_k: Option<usize>,
    /// The shortest list of likeliest tokens that reaches this share of what `top_k` left, above 0, at
    /// most 1. Default 1: all.
    pub top_p: f64,
    /// Only tokens with at least this share of the likeliest one's probability, in 0 to 1. Default 0.
    pub min_p: f64,
    /// The seed; sequence `i` of a batch draws with `seed + i`. Default 0.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl GenerateOptions {
    pub(super) fn check(&self, vocab_size: usize) -> Result<(), Error> {
        match self.eos.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(Error::option("eos", format!("below {vocab_size}"), token)),
            None => Ok(()),
        }
    }
}
