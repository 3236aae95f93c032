//! What is searched for, and by which rule.

use crate::error::invalid;
use crate::{Constraint, Error};

/// The most groups of a prompt; each takes memory before anything is found.
const MAX_GROUPS: usize = 1 << 16;
/// The most beams of all prompts that live at once.
pub(crate) const MAX_LIVE: usize = 1 << 22;

/// What [`beam_search`](crate::beam_search) looks for.
///
/// A sequence is scored by `logprob / length^alpha`: `logprob` is the sum of the log-probabilities of
/// its tokens, `length` the number of *generated* tokens, the end token included and the prompt not.
///
/// Tokens that an option forbids have no probability, and the others are *not* renormalised: their
/// log-probabilities stay those of the model, as in Transformers.
#[derive(Debug, Clone)]
pub struct Options<'a> {
    /// How many sequences are kept at each step, `K`; at least 1. Default 4.
    ///
    /// More than there are sequences keeps all of them. A step with more than 4,194,304 live beams, of all prompts
    /// together, or one for which there is no memory is an error.
    pub num_beams: usize,
    /// How many sequences are returned; 1 to `num_beams`. Default `None`: `num_beams`.
    pub num_return: Option<usize>,
    /// How many tokens are generated at most, the end token included; at least 1. Default 20.
    pub max_new_tokens: usize,
    /// The tokens that end a sequence. Default: none, and every sequence has `max_new_tokens` tokens.
    pub eos: &'a [u32],
    /// The exponent of the length, finite. Default 1.
    ///
    /// Log-probabilities are negative, so a *larger* `alpha` favours *longer* sequences, 0 takes no
    /// account of the length, and a negative one favours shorter ones.
    pub alpha: f64,
    /// What becomes of finished sequences, and when the search ends. Default [`Rule::Pool`].
    pub rule: Rule,
    /// Ends the search of a prompt as soon as the sequences that it will return cannot change any more:
    /// the last of them scores above everything that the live beams can still become. Default `true`.
    ///
    /// It never changes what is returned, only how many steps that takes; see
    /// [`Report::live_bound`](crate::Report::live_bound).
    pub exact_stop: bool,
    /// What the numbers of the model are. Default [`ModelOutput::Logits`].
    pub model_output: ModelOutput,
    /// No end token before this many tokens were generated. Default 0.
    pub min_new_tokens: usize,
    /// No end token before prompt and generated tokens together are this many. Default 0.
    ///
    /// Transformers replaces it by `min_new_tokens` if both are given; so does [`Rule::Transformers`] if
    /// that is above 0.
    pub min_length: usize,
    /// No sequence of this many tokens occurs twice, prompt included; 0 turns it off. Default 0.
    pub no_repeat_ngram: usize,
    /// Sequences of tokens that are not generated: the last token of one is forbidden where the others
    /// stand before it. A word that is only an end token is allowed nevertheless, as in Transformers.
    /// Default: none.
    pub bad_words: &'a [Vec<u32>],
    /// Which tokens may follow at all, such as a [`Trie`](crate::Trie). Default: any.
    pub constraint: Option<&'a dyn Constraint>,
    /// Parts of the beams that keep their distance from each other. Default: one group.
    pub groups: Groups,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            num_beams: 4,
            num_return: None,
            max_new_tokens: 20,
            eos: &[],
            alpha: 1.0,
            rule: Rule::Pool,
            exact_stop: true,
            model_output: ModelOutput::Logits,
            min_new_tokens: 0,
            min_length: 0,
            no_repeat_ngram: 0,
            bad_words: &[],
            constraint: None,
            groups: Groups::default(),
        }
    }
}

/// What becomes of finished sequences, and when the search of a prompt ends.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Rule {
    /// Finished sequences stay among the `K` beams and compete with the live ones, by normalised score.
    ///
    /// Each live beam offers its `2 K` best tokens; of all finished sequences and all candidates, the
    /// `K` best by `logprob / length^alpha` stay. A finished one does not grow and keeps its place until
    /// better ones push it out. Ties: higher `logprob`, then token ids in order. The search ends when
    /// all `K` are finished, or no token is left; after `max_new_tokens`, live beams are returned too.
    #[default]
    Pool,
    /// The beam search of Hugging Face Transformers (`generate` since version 4.50): `K` live beams are
    /// pruned by `logprob` alone, the `K` best finished sequences are kept apart by normalised score.
    ///
    /// Of all candidates of a prompt, the `max(2, 1 + number of end tokens) K` best are looked at; ties:
    /// the better beam, then the lower token id. Those that end (by an end token, or because they have
    /// `max_new_tokens` tokens) are stored if they are among the first `K`; the first `K` others live on.
    /// One beam is greedy search, whatever `early_stopping` says, as `generate` has no beams then.
    ///
    /// Not the same where there are fewer candidates than places: Transformers fills these with beams of
    /// -1e9, which it stores and counts as finished, so that it may end sooner and return them.
    Transformers {
        /// When the search of a prompt whose `K` places are filled ends.
        early_stopping: EarlyStopping,
    },
    /// First come, first served, with patience (Kasai et al., 2022, algorithm 1): `K` live beams are
    /// pruned by `logprob` alone, and the search ends when `patience K` sequences have finished.
    ///
    /// Candidates are taken in order of `logprob` until there are `K` live ones; those that end on the
    /// way are finished. After `max_new_tokens` the live ones count as finished. The finished ones are
    /// returned by normalised score.
    Patience {
        /// How many sequences finish, as a multiple of `K`; rounded, at least 1 sequence. 1 is first come,
        /// first served. (fairseq does the same, but only the first `K` candidates may end there.)
        patience: f64,
    },
}

/// When [`Rule::Transformers`] ends the search of a prompt with `K` finished sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EarlyStopping {
    /// `early_stopping=False`: when the best live beam, were it as long as it is now when it ends, would
    /// not be better than the worst stored sequence. A heuristic where `alpha > 0`.
    #[default]
    Heuristic,
    /// `early_stopping=True`: at once.
    Immediate,
    /// `early_stopping="never"`: when no live beam can become better than the worst stored sequence.
    Never,
}

/// What the numbers of a [`Model`](crate::Model) are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ModelOutput {
    /// Logits: the log-probabilities are those of their softmax.
    #[default]
    Logits,
    /// Log-probabilities, at most 0, taken as they are. Above 0 by rounding (1e-3 at most) counts as 0.
    LogProbabilities,
}

/// Diverse beam search (Vijayakumar et al., 2018): the beams are divided into groups, each a search of
/// its own, and a group is drawn away from the tokens that the groups before it chose at the same step.
///
/// Where a group compares candidates of a step, each loses `penalty` times the number of live beams of
/// earlier groups that ended in the same token at this step. The penalty is not part of `logprob`, and
/// not kept for later steps. The sequences of all groups are returned together, by score; two groups may
/// return the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Groups {
    /// How many groups, at most 65,536; divides `num_beams`. Default 1.
    pub count: usize,
    /// What the choice of an earlier beam costs, at least 0. Default 0.
    pub penalty: f64,
}

impl Default for Groups {
    fn default() -> Self {
        Self { count: 1, penalty: 0.0 }
    }
}

impl Options<'_> {
    /// Checks every option against the vocabulary.
    pub(crate) fn check(&self, vocabulary: usize) -> Result<(), Error> {
        if vocabulary == 0 {
            return Err(invalid("vocabulary", "at least 1", 0));
        }
        if self.num_beams == 0 {
            return Err(invalid("num_beams", "at least 1", 0));
        }
        if self.max_new_tokens == 0 {
            return Err(invalid("max_new_tokens", "at least 1", 0));
        }
        if let Some(wanted) = self.num_return
            && !(1..=self.num_beams).contains(&wanted)
        {
            let expected = format!("1 to {}, the number of beams", self.num_beams);
            return Err(invalid("num_return", expected, wanted));
        }
        if !self.alpha.is_finite() {
            return Err(invalid("alpha", "a finite number", self.alpha));
        }
        if let Rule::Patience { patience } = self.rule
            && !(patience.is_finite() && patience > 0.0)
        {
            return Err(invalid("rule.patience", "a finite number above 0", patience));
        }
        let Groups { count, penalty } = self.groups;
        if count == 0 || !self.num_beams.is_multiple_of(count) {
            let expected = format!("a divisor of {}, the number of beams", self.num_beams);
            return Err(invalid("groups.count", expected, count));
        }
        if count > MAX_GROUPS {
            return Err(invalid("groups.count", format!("at most {MAX_GROUPS}"), count));
        }
        if !(penalty.is_finite() && penalty >= 0.0) {
            return Err(invalid("groups.penalty", "a finite number, at least 0", penalty));
        }
        check_tokens("eos", self.eos, vocabulary)?;
        for word in self.bad_words {
            if word.is_empty() {
                return Err(invalid("bad_words", "words of at least one token", "an empty word"));
            }
            check_tokens("bad_words", word, vocabulary)?;
        }
        Ok(())
    }

    /// How many sequences are returned.
    pub(crate) fn returned(&self) -> usize {
        self.num_return.unwrap_or(self.num_beams)
    }
}

/// Checks that the vocabulary has all `tokens`.
pub(crate) fn check_tokens(
    argument: &'static str,
    tokens: &[u32],
    vocabulary: usize,
) -> Result<(), Error> {
    match tokens.iter().find(|&&token| token as usize >= vocabulary) {
        Some(&token) => Err(Error::Token { argument, token, vocabulary }),
        None => Ok(()),
    }
}
