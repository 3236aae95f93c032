//! Several tokens a step: what the prompt suggests, verified by the model in one pass.

use dflash::{BoxError, DecodeOptions, Drafter, Generation, MAX_NODES, Pass, PromptLookup, Target};
use kvcache::{Cache, Rows};
use ndarray::ArrayViewMut2;

use super::cache_rows;
use crate::Error;
use crate::infer::{Chunk, LogitRows, Model};

/// Continues every prompt with drafts that repeat what followed the last tokens earlier in the text:
/// the tokens of [`generate`](super::generate), in fewer passes. Sampled text has the law of
/// plain sampling, not its tokens.
///
/// # Errors
/// [`Error::Decoding`]; [`Error::Option`] or [`Error::Cache`] for more tokens than there can be.
pub fn generate_speculatively(
    model: &Model,
    prompts: &[impl AsRef<[u32]>],
    options: &DecodeOptions<'_>,
) -> Result<Vec<Generation>, Error> {
    generate_with(model, prompts, options, &mut PromptLookup::default())
}

/// [`generate_speculatively`] with any drafter.
///
/// # Errors
/// As [`generate_speculatively`].
pub fn generate_with(
    model: &Model,
    prompts: &[impl AsRef<[u32]>],
    options: &DecodeOptions<'_>,
    drafter: &mut impl Drafter,
) -> Result<Vec<Generation>, Error> {
    let most = options.max_new_tokens;
    // The decoder refuses a larger tree.
    let tree = options.budget.min(MAX_NODES) + 1;
    let rows = cache_rows(prompts, most, |length| {
        length.checked_add(most)?.checked_add(tree)?.checked_next_multiple_of(64)
    })?;
    let mut cache = model.cache(rows)?;
    let prompts: Vec<_> = prompts.iter().map(AsRef::as_ref).collect();
    Ok(dflash::generate(&mut Verified(model), &mut cache, drafter, &prompts, options.clone())?)
}

/// The model as the verification sees it.
struct Verified<'a>(&'a Model);

impl Target for Verified<'_> {
    fn vocabulary(&self) -> usize {
        self.0.config().vocab_size
    }

    fn forward(
        &mut self,
        cache: &mut Cache,
        batch: &[Pass<'_>],
        logits: Option<ArrayViewMut2<'_, f32>>,
    ) -> Result<(), BoxError> {
        let chunks: Vec<_> = batch
            .iter()
            .map(|pass| match pass.rows {
                Rows::Last(_) => Chunk::line(pass.seq, &pass.tokens),
                Rows::Tree(parents) => Chunk::tree(pass.seq, &pass.tokens, parents),
            })
            .collect();
        match logits {
            Some(mut logits) => {
                logits.assign(&self.0.forward(cache, &chunks, LogitRows::All)?);
            }
            None => {
                self.0.forward(cache, &chunks, LogitRows::None)?;
            }
        }
        Ok(())
    }
}
