//! What a search returns.

/// What came of each prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// In the order of the prompts.
    pub items: Vec<Item>,
}

/// What came of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// The best sequences, best first. Fewer than asked for if vocabulary, length and options do not
    /// yield more; none at all if the first token is forbidden altogether.
    pub hypotheses: Vec<Hypothesis>,
    /// How the search went.
    pub report: Report,
}

/// A sequence that was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// The generated tokens, with the end token if it has one.
    pub tokens: Vec<u32>,
    /// The sum of `token_logprobs` in order, never penalised.
    pub logprob: f64,
    /// `logprob / tokens.len()^alpha`.
    pub score: f64,
    /// Whether it has an end token.
    pub finished: bool,
    /// The log-probability of each token.
    pub token_logprobs: Vec<f64>,
    /// For each token the live beam of its group that it continued, best first: 0 for the first token.
    pub beam_indices: Vec<usize>,
    /// The group that found it; 0 without groups.
    pub group: usize,
}

/// How the search for a prompt went, and what it could have missed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// How many calls of the model scored beams of this prompt.
    pub steps: usize,
    /// Why it ended.
    pub stop: Stop,
    /// No sequence that begins with a beam which was live at the end scores above this; -inf if there
    /// was none. If the worst returned score is above it, going on could not have changed the result.
    pub live_bound: f64,
    /// No sequence that begins with a candidate which was dropped on the way scores above this; -inf if
    /// none was.
    pub pruned_bound: f64,
}

/// Why the search for a prompt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stop {
    /// It has not: [`Search::finish`](crate::Search::finish) was called before.
    Unfinished,
    /// The rule said so: all beams finished, early stopping, or patience.
    Rule,
    /// What it returns could not change any more ([`Options::exact_stop`](crate::Options::exact_stop)).
    Decided,
    /// `max_new_tokens` were generated, whatever the rule says then.
    Length,
    /// No token could follow any beam.
    Exhausted,
}

impl Item {
    /// Whether the first sequence is proven to be the best of *all* sequences that the options allow, not
    /// only of those that the search looked at. Never, if it is one that [`Stop::Unfinished`] cut short.
    pub fn is_optimal(&self) -> bool {
        let Report { stop, live_bound, pruned_bound, .. } = self.report;
        self.hypotheses.first().is_some_and(|best| {
            let is_complete = best.finished || stop != Stop::Unfinished;
            is_complete && best.score >= live_bound.max(pruned_bound)
        })
    }
}
