//! Which tokens a beam may not continue with, by all options together.

use crate::options::check_tokens;
use crate::{Error, Follow, Options, Rule};

/// What the one-token words of [`Options::bad_words`] and the longer ones come to, made once for a search.
#[derive(Debug, Clone)]
pub(crate) struct BadWords<'a> {
    /// Bit `i % 64` of word `i / 64` says whether token `i` may follow anything; empty: all may.
    allowed: Vec<u64>,
    /// How many may not.
    pub(crate) banned: usize,
    /// The tokens before, and the one that may not follow them.
    longer: Vec<(&'a [u32], u32)>,
}

impl<'a> BadWords<'a> {
    /// Of options that were checked.
    pub(crate) fn new(options: &Options<'a>, vocabulary: usize) -> Self {
        let mut words = Self { allowed: Vec::new(), banned: 0, longer: Vec::new() };
        for word in options.bad_words {
            match word.as_slice() {
                [] => {}
                [token] if options.eos.contains(token) => {}
                [token] => words.ban(*token, vocabulary),
                [before @ .., last] => words.longer.push((before, *last)),
            }
        }
        words
    }

    fn ban(&mut self, token: u32, vocabulary: usize) {
        if self.allowed.is_empty() {
            self.allowed = all_tokens(vocabulary);
        }
        self.banned += usize::from(self.allows(token));
        forbid(&mut self.allowed, token);
    }

    /// Whether the token may follow anything.
    pub(crate) fn allows(&self, token: u32) -> bool {
        let word = self.allowed.get(token as usize / 64);
        word.is_none_or(|word| word >> (token % 64) & 1 == 1)
    }

    /// The bits of the tokens that are neither banned nor `forbidden`.
    pub(crate) fn mask(&self, forbidden: &[u32], vocabulary: usize) -> Vec<u64> {
        let is_empty = self.allowed.is_empty();
        let mut mask = if is_empty { all_tokens(vocabulary) } else { self.allowed.clone() };
        forbidden.iter().for_each(|&token| forbid(&mut mask, token));
        mask
    }
}

fn all_tokens(vocabulary: usize) -> Vec<u64> {
    vec![u64::MAX; vocabulary.div_ceil(64)]
}

fn forbid(mask: &mut [u64], token: u32) {
    mask[token as usize / 64] &= !(1 << (token % 64));
}

/// What a beam may continue with, bad words of one token apart; sorted, without repetitions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Restriction {
    pub(crate) forbidden: Vec<u32>,
    /// If there, nothing else is allowed.
    pub(crate) allowed: Option<Vec<u32>>,
}

/// Whether any option restricts what depends on the beam.
pub(crate) fn is_restricted(options: &Options<'_>, bad_words: &BadWords<'_>) -> bool {
    options.min_new_tokens > 0
        || options.min_length > 0
        || options.no_repeat_ngram > 0
        || !bad_words.longer.is_empty()
        || options.constraint.is_some()
}

/// What may follow `sequence`, which begins with a prompt of `prompt` tokens.
pub(crate) fn restrict(
    options: &Options<'_>,
    bad_words: &BadWords<'_>,
    vocabulary: usize,
    item: usize,
    (sequence, prompt): (&[u32], usize),
) -> Result<Restriction, Error> {
    let generated = &sequence[prompt..];
    let mut forbidden = Vec::new();
    if is_too_short(options, generated.len(), sequence.len()) {
        forbidden.extend(options.eos);
    }
    repetitions(sequence, options.no_repeat_ngram, &mut forbidden);
    let words = bad_words.longer.iter().filter(|(before, _)| sequence.ends_with(before));
    forbidden.extend(words.map(|(_, last)| last));
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
