//! Which tokens a beam may not continue with, by all options together.

use crate::options::check_tokens;
use crate::{Error, Follow, Options, Rule};

/// What a beam may continue with; sorted, without repetitions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Restriction {
    pub(crate) forbidden: Vec<u32>,
    /// If there, nothing else is allowed.
    pub(crate) allowed: Option<Vec<u32>>,
}

/// Whether any option restricts anything.
pub(crate) fn is_restricted(options: &Options<'_>) -> bool {
    options.min_new_tokens > 0
        || options.min_length > 0
        || options.no_repeat_ngram > 0
        || !options.bad_words.is_empty()
        || options.constraint.is_some()
}

/// What may follow `sequence`, which begins with a prompt of `prompt` tokens.
pub(crate) fn restrict(
    options: &Options<'_>,
    vocabulary: usize,
    item: usize,
    sequence: &[u32],
    prompt: usize,
) -> Result<Restriction, Error> {
    let generated = &sequence[prompt..];
    let mut forbidden = Vec::new();
    if is_too_short(options, generated.len(), sequence.len()) {
        forbidden.extend(options.eos);
    }
    repetitions(sequence, options.no_repeat_ngram, &mut forbidden);
    for word in options.bad_words {
        if let [before @ .., last] = word.as_slice()
            && sequence.ends_with(before)
            && !(before.is_empty() && options.eos.contains(last))
        {
            forbidden.push(*last);
        }
    }
    forbidden.sort_unstable();
    forbidden.dedup();
    let allowed = match options.constraint {
        Some(constraint) => {
            let mut allowed = Vec::new();
            let follow = constraint.follow(item, generated, &mut allowed);
            if follow == Follow::ListedOrEnd {
                allowed.extend(options.eos);
            }
            check_tokens("constraint", &allowed, vocabulary)?;
            allowed.sort_unstable();
            allowed.dedup();
            (follow != Follow::Any).then_some(allowed)
        }
        None => None,
    };
    Ok(Restriction { forbidden, allowed })
}

/// Whether an end token may not follow so many generated tokens, `all` with the prompt.
fn is_too_short(options: &Options<'_>, generated: usize, all: usize) -> bool {
    let is_replaced =
        matches!(options.rule, Rule::Transformers { .. }) && options.min_new_tokens > 0;
    generated < options.min_new_tokens || (all < options.min_length && !is_replaced)
}

/// Adds every token that would complete a sequence of `n` tokens which is there already.
fn repetitions(sequence: &[u32], n: usize, forbidden: &mut Vec<u32>) {
    if n == 0 || sequence.len() < n {
        return;
    }
    let before = &sequence[sequence.len() + 1 - n..];
    let again = sequence.windows(n).filter(|window| window.starts_with(before));
    forbidden.extend(again.filter_map(|window| window.last()));
}
