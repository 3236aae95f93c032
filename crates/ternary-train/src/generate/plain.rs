//! One token after the other.

use ndarray::{Array1, ArrayView2};
use softmax_topk::{Draw, Options, PerRow, sample};

use super::{Choice, GenerateOptions, read_prompt};
use crate::Error;
use crate::infer::{Chunk, LogitRows, Model};

/// Continues every prompt, all of them together in each step. `on_token` gets the number of the prompt
/// and the token as soon as it is known.
///
/// A prompt has the same continuation alone and in a batch (sampled: with the seed of its place).
///
/// # Errors
/// [`Error::Option`] for an empty prompt, a token outside the vocabulary or an option out of range,
/// [`Error::Sampling`] for logits with NaN, [`Error::Cache`] if there is no memory.
///
/// # Examples
/// ```
/// use ternary_train::generate::{GenerateOptions, generate};
/// use ternary_train::infer::Model;
/// use ternary_train::{Preset, Projection, Weights};
///
/// let mut config = Preset::Nano.config(256);
/// let mut weights = Weights::random(&config, 1)?;
/// weights.project(Projection::default())?;
/// config.ternary = Some(Projection::default());
/// let model = Model::packed(config, weights)?;
/// let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
/// let tokens = generate(&model, &[b"To be".map(u32::from)], &options, |_, _| {})?;
/// assert_eq!(tokens[0].len(), 5);
/// # Ok::<(), ternary_train::Error>(())
/// ```
pub fn generate(
    model: &Model,
    prompts: &[impl AsRef<[u32]>],
    options: &GenerateOptions,
    mut on_token: impl FnMut(usize, u32),
) -> Result<Vec<Vec<u32>>, Error> {
    let config = model.config();
    options.check(config.vocab_size)?;
    let rows = |prompt: &[u32]| (prompt.len() + options.max_new_tokens).next_multiple_of(64);
    let mut cache = model.cache(prompts.iter().map(|prompt| rows(prompt.as_ref())).sum())?;
    let mut texts = vec![Vec::new(); prompts.len()];
    if options.max_new_tokens == 0 {
        return Ok(texts);
    }
    let mut live = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let seq = cache.create()?;
        let logits = read_prompt(model, &mut cache, seq, prompt.as_ref())?;
        let token = choose(logits.view(), &[index], 0, &options.choice)?[0];
        live.push((index, seq, token));
    }
    for step in 1.. {
        for &(index, seq, token) in &live {
            texts[index].push(token);
            on_token(index, token);
            if options.eos.contains(&token) || step >= options.max_new_tokens {
                cache.free(seq)?;
            }
        }
        live.retain(|&(_, seq, _)| cache.contains(seq));
        if live.is_empty() {
            break;
        }
        let tokens: Vec<_> = live.iter().map(|&(_, seq, token)| (seq, [token])).collect();
        let chunks: Vec<_> = tokens.iter().map(|(seq, token)| Chunk::line(*seq, token)).collect();
        let logits = model.forward(&mut cache, &chunks, LogitRows::Last)?;
        let indices: Vec<_> = live.iter().map(|&(index, ..)| index).collect();
        let chosen = choose(logits.view(), &indices, step, &options.choice)?;
        live.iter_mut().zip(chosen).for_each(|((.., token), new)| *token = new);
    }
    Ok(texts)
}

/// The next token of each row; `indices` are the prompts that the rows belong to.
fn choose(
    logits: ArrayView2<'_, f32>,
    indices: &[usize],
    step: usize,
    choice: &Choice,
) -> Result<Vec<u32>, Error> {
    let sampling = match choice {
        Choice::Greedy => {
            let rows = logits.outer_iter().enumerate();
            return Ok(rows.map(|(i, row)| dflash::argmax(row, i)).collect::<Result<_, _>>()?);
        }
        Choice::Sampled(sampling) => sampling,
    };
    let k = sampling.top_k.unwrap_or(usize::MAX).min(logits.ncols());
    let options = Options {
        temperature: PerRow::All(sampling.temperature),
        top_p: PerRow::All(sampling.top_p),
        min_p: PerRow::All(sampling.min_p),
        ..Options::default()
    };
    let draw =
        |&index: &usize| Draw { seed: sampling.seed.wrapping_add(index as u64), step: step as u64 };
    let draws: Array1<Draw> = indices.iter().map(draw).collect();
    Ok(sample(logits, k, &options, draws.view())?.tokens.to_vec())
}
