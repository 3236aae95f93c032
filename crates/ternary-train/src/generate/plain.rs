//! One token after the other.

use ndarray::{Array1, ArrayView2, Axis};
use softmax_topk::{Draw, Options, PerRow, sample, softmax_topk};

use super::{Choice, GenerateOptions, cache_rows, read_prompt};
use crate::Error;
use crate::infer::{Chunk, LogitRows, Model};

/// Continues every prompt, all of them together in each step. `on_token` gets the number of the prompt
/// and the token as soon as it is known.
///
/// A prompt has the same continuation alone and in a batch (sampled: with the seed of its place).
///
/// # Errors
/// [`Error::Option`] for an empty prompt, a token outside the vocabulary or an option out of range,
/// [`Error::Sampling`] or, without a temperature, [`Error::Decoding`] for logits with NaN, [`Error::Cache`] if there is no memory.
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
    let most = options.max_new_tokens;
    let rows =
        cache_rows(prompts, most, |length| length.checked_add(most)?.checked_next_multiple_of(64))?;
    let mut cache = model.cache(rows)?;
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
    let temperature = PerRow::All(sampling.temperature);
    let mut options = Options {
        temperature,
        top_p: PerRow::All(sampling.top_p),
        min_p: PerRow::All(sampling.min_p),
        ..Options::default()
    };
    // `sample` takes `top_p` of all tokens; here it is of those that `top_k` left.
    let top_p;
    if k < logits.ncols() && sampling.top_p > 0.0 && sampling.top_p < 1.0 {
        let plain = Options { temperature, ..Options::default() };
        let left = softmax_topk(logits, k, &plain)?.probs.mapv(f64::from).sum_axis(Axis(1));
        top_p = left.mapv(|left| (sampling.top_p * left).min(1.0));
        options.top_p = PerRow::Each(top_p.view());
    }
    let draw =
        |&index: &usize| Draw { seed: sampling.seed.wrapping_add(index as u64), step: step as u64 };
    let draws: Array1<Draw> = indices.iter().map(draw).collect();
    Ok(sample(logits, k, &options, draws.view())?.tokens.to_vec())
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::generate::Sampling;

    /// Speculative text has this law as well.
    #[test]
    fn cuts_leave_what_those_of_dflash_leave() {
        const DRAWS: usize = 4000;
        let logits = array![[0.3_f32, 0.1, 0.4, 0.2].map(f32::ln)];
        for (top_k, top_p, min_p, kept) in [
            (Some(2), 0.5, 0.0, 1),
            (Some(2), 0.6, 0.0, 2),
            (Some(3), 0.75, 0.0, 2),
            (Some(3), 1.0, 0.6, 2),
            (None, 0.75, 0.0, 3),
            (None, 0.5, 0.3, 2),
        ] {
            let law = dflash::Sampling {
                top_k,
                top_p: Some(top_p),
                min_p: Some(min_p),
                ..dflash::Sampling::default()
            };
            let law = dflash::Law::from_logits(logits.row(0), 0, &law).unwrap();
            assert_eq!(law.tokens().len(), kept);
            let sampling = Sampling { top_k, top_p, min_p, ..Sampling::default() };
            let mut counts = [0; 4];
            for step in 0..DRAWS {
                let drawn = choose(logits.view(), &[0], step, &Choice::Sampled(sampling)).unwrap();
                counts[drawn[0] as usize] += 1;
            }
            for (token, count) in (0..).zip(counts) {
                let (got, exact) = (f64::from(count) / DRAWS as f64, law.probability(token));
                assert!((got - exact).abs() < 0.03, "{top_k:?} {top_p} {min_p}: {token} {got}");
                assert!(count == 0 || exact > 0.0, "{top_k:?} {top_p} {min_p}: {token}");
            }
        }
    }
}
