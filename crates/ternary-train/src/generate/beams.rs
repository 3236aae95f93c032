//! Beam search, the beams' keys and values shared in the cache.

use beam::{Beams, Model as Searched, Options, Output, beam_search};
use kvcache::{Cache, SeqId};
use ndarray::{Array2, ArrayView2};

use super::{cache_rows, read_prompt};
use crate::Error;
use crate::infer::{Chunk, LogitRows, Model};

/// The best continuations of each prompt; see [`beam::Options`].
///
/// Beams share the pages of what they have in common, and a beam that splits copies its last page only.
///
/// # Errors
/// [`Error::Beam`], also for what the model refuses; [`Error::Option`] or [`Error::Cache`] for more beams
/// or tokens than there can be.
pub fn generate_beams(
    model: &Model,
    prompts: &[impl AsRef<[u32]>],
    options: &Options<'_>,
) -> Result<Output, Error> {
    let config = model.config();
    let (beams, most) = (options.num_beams.max(1), options.max_new_tokens);
    let Some(tails) = beams.checked_mul(2) else {
        return Err(Error::option("num_beams", "as many as can be counted", beams));
    };
    // Every beam has pages of its own, and a page more while it is copied.
    let rows = cache_rows(prompts, most, |length| {
        let tail = most.checked_add(128)?.checked_mul(tails)?;
        length.checked_next_multiple_of(64)?.checked_add(tail)
    })?;
    let mut search = Search {
        model,
        cache: model.cache(rows)?,
        seqs: Vec::new(),
        logits: Array2::default((0, config.vocab_size)),
    };
    Ok(beam_search(&mut search, prompts, options)?)
}

/// The model as the search sees it.
struct Search<'a> {
    model: &'a Model,
    cache: Cache,
    /// The sequence of each row.
    seqs: Vec<SeqId>,
    logits: Array2<f32>,
}

impl Searched for Search<'_> {
    type Element = f32;

    fn vocabulary(&self) -> usize {
        self.model.config().vocab_size
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f32>, beam::ModelError> {
        if self.seqs.is_empty() {
            self.logits = Array2::default((beams.len(), self.vocabulary()));
            for row in 0..beams.len() {
                let seq = self.cache.create()?;
                self.seqs.push(seq);
                let logits = read_prompt(self.model, &mut self.cache, seq, beams.prompt(row))?;
                self.logits.row_mut(row).assign(&logits.row(0));
            }
            return Ok(self.logits.view());
        }
        let tokens: Vec<_> = (0..beams.len()).map(|row| [beams.last_token(row)]).collect();
        let chunks: Vec<_> =
            self.seqs.iter().zip(&tokens).map(|(&seq, token)| Chunk::line(seq, token)).collect();
        self.logits = self.model.forward(&mut self.cache, &chunks, LogitRows::Last)?;
        Ok(self.logits.view())
    }

    fn keep(&mut self, parents: &[usize]) -> Result<(), beam::ModelError> {
        let mut kept = Vec::with_capacity(parents.len());
        let mut taken = vec![false; self.seqs.len()];
        for &parent in parents {
            let seq = self.seqs[parent];
            // The first to continue a sequence takes it over.
            let first = !std::mem::replace(&mut taken[parent], true);
            kept.push(if first { seq } else { self.cache.fork(seq)? });
        }
        for (seq, taken) in self.seqs.iter().zip(taken) {
            if !taken {
                self.cache.free(*seq)?;
            }
        }
        self.seqs = kept;
        Ok(())
    }
}
