//! Generating text: greedy, sampled, by beam search, or speculatively with the prompt as a draft.

mod beams;
mod options;
mod plain;
mod speculative;

pub use beams::generate_beams;
pub use options::{Choice, GenerateOptions, Sampling};
pub use plain::generate;
pub use speculative::{generate_speculatively, generate_with};

use kvcache::{Cache, SeqId};
use ndarray::Array2;

use crate::Error;
use crate::infer::{Chunk, LogitRows, Model};

/// Tokens of a prompt that are read at once; it bounds memory and changes no bits.
const CHUNK: usize = 512;

/// The sum of what `rows` gives for the length of each prompt: the rows of their cache.
///
/// # Errors
/// [`Error::Option`] if there are more than can be counted.
fn cache_rows(
    prompts: &[impl AsRef<[u32]>],
    max_new_tokens: usize,
    rows: impl Fn(usize) -> Option<usize>,
) -> Result<usize, Error> {
    let mut lengths = prompts.iter().map(|prompt| prompt.as_ref().len());
    let sum = lengths.try_fold(0_usize, |sum, length| sum.checked_add(rows(length)?));
    sum.ok_or_else(|| Error::option("max_new_tokens", "as many as can be counted", max_new_tokens))
}

/// Reads the prompt of a new sequence; returns the logits `[1, V]` of what follows.
fn read_prompt(
    model: &Model,
    cache: &mut Cache,
    seq: SeqId,
    prompt: &[u32],
) -> Result<Array2<f32>, Error> {
    let mut logits = Array2::default((0, 0));
    if prompt.is_empty() {
        return Err(Error::option("prompt", "at least one token", "none"));
    }
    for tokens in prompt.chunks(CHUNK) {
        logits = model.forward(cache, &[Chunk::line(seq, tokens)], LogitRows::Last)?;
    }
    Ok(logits)
}
