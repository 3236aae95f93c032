//! How to decode: what to sample from, how much to verify, when to stop.

use crate::error::invalid;
use crate::greedy::check_tokens;
use crate::{CostCurve, Error, MAX_NODES};

/// From the target's logits to the distribution that a token is drawn from; the default is the
/// softmax itself.
///
/// The cuts apply in this order, each to what the one before left: temperature, `top_k`, `top_p`,
/// `min_p`; then what is left is divided by its sum. Ties at a cut: lower ids stay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// The logits are divided by it: positive and finite. Default 1. (For 0, use
    /// [`accept_greedy`](crate::accept_greedy).)
    pub temperature: f64,
    /// Only the most likely `k`, at least 1. Default: all.
    pub top_k: Option<usize>,
    /// Only the most likely tokens up to and including the one that brings their probability to
    /// this, in (0, 1]. Default: all.
    pub top_p: Option<f64>,
    /// Only tokens at least this times as likely as the most likely one, in [0, 1]. Default: all.
    pub min_p: Option<f64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, min_p: None }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Option`] names the field.
    pub fn check(&self) -> Result<(), Error> {
        let t = self.temperature;
        if !(t > 0.0 && t.is_finite()) {
            return Err(invalid("temperature", "a positive number", t));
        }
        if self.top_k == Some(0) {
            return Err(invalid("top_k", "at least 1", 0));
        }
        if let Some(p) = self.top_p.filter(|&p| !(p > 0.0 && p <= 1.0)) {
            return Err(invalid("top_p", "a number above 0 and at most 1", p));
        }
        if let Some(p) = self.min_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return Err(invalid("min_p", "a number from 0 to 1", p));
        }
        Ok(())
    }
}

/// How the target's tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Decoding {
    /// The likeliest token, the lowest id among equals (temperature 0).
    #[default]
    Greedy,
    /// A random token. Each sequence has a generator of its own, from the seed and its number, so its
    /// tokens do not depend on the rest of the batch.
    Sampled {
        /// The law.
        sampling: Sampling,
        /// The seed.
        seed: u64,
    },
}

/// How a [`Decoder`](crate::Decoder) works.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeOptions<'a> {
    /// How tokens are chosen. Default: greedy.
    pub decoding: Decoding,
    /// New tokens of each sequence, at most; at least 1. Default 256.
    pub max_new_tokens: usize,
    /// Tokens that end a sequence and stay its last. Default: none.
    pub eos: &'a [u32],
    /// Nodes of a tree, at most; 0 is plain decoding. Default 16: on a CPU, passes become dearer soon.
    pub budget: usize,
    /// The measured cost of a pass. With it, of a tree with scores ([`Draft::Scored`](crate::Draft))
    /// only the part that is worth its cost is verified, where the time that its drafting took counts
    /// too ([`choose_budget`](crate::choose_budget)). Default: all of it.
    pub cost: Option<&'a CostCurve>,
}

impl Default for DecodeOptions<'_> {
    fn default() -> Self {
        Self {
            decoding: Decoding::default(),
            max_new_tokens: 256,
            eos: &[],
            budget: 16,
            cost: None,
        }
    }
}

impl DecodeOptions<'_> {
    pub(crate) fn check(&self, vocabulary: usize) -> Result<(), Error> {
        if self.max_new_tokens == 0 {
            return Err(invalid("max_new_tokens", "at least 1", 0));
        }
        if self.budget > MAX_NODES {
            return Err(invalid("budget", format!("at most {MAX_NODES}"), self.budget));
        }
        if let Decoding::Sampled { sampling, .. } = &self.decoding {
            sampling.check()?;
        }
        check_tokens("eos", self.eos, vocabulary)
    }
}
