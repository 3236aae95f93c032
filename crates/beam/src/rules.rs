//! One step of one group of beams, by each rule.

mod patience;
mod pool;
mod transformers;

use std::cmp::Ordering;

use crate::expand::Offer;
use crate::history::{History, NodeId, ROOT};
use crate::score::{best_reachable, normalised};
use crate::{Options, Rule};

/// Beams that compete with each other: those of a prompt, or a diverse group of them.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// Sequences without an end, by score or log-probability less what diversity costs.
    pub(crate) live: Vec<Live>,
    /// Sequences with an end; best first by the rule of Transformers, whose stop looks at the last.
    pub(crate) finished: Vec<Finished>,
    /// Whether the rule has ended the search.
    pub(crate) done: bool,
}

/// A sequence that goes on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Live {
    pub(crate) node: NodeId,
    pub(crate) logprob: f64,
    /// Its row in the model's logits.
    pub(crate) row: usize,
}

impl Live {
    /// The same, if it were to end as it is.
    pub(crate) fn end(&self, length: usize, alpha: f64) -> Finished {
        let Self { node, logprob, .. } = *self;
        Finished { node, length, logprob, score: normalised(logprob, length, alpha) }
    }
}

/// A sequence that has ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finished {
    pub(crate) node: NodeId,
    pub(crate) length: usize,
    pub(crate) logprob: f64,
    pub(crate) score: f64,
}

/// A live beam with one more token.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Index of the live beam.
    beam: usize,
    token: u32,
    token_logprob: f64,
    /// Sum of all its tokens.
    logprob: f64,
    /// The same less what diversity costs: what candidates are compared by.
    merit: f64,
}

/// A step of a group.
pub(crate) struct Step<'a> {
    pub(crate) options: &'a Options<'a>,
    /// How many beams the group keeps.
    pub(crate) beams: usize,
    /// How many tokens the candidates have.
    pub(crate) length: usize,
    /// What each row of the model has to offer.
    pub(crate) offers: &'a [Offer],
    /// The last tokens of the beams of earlier groups.
    pub(crate) chosen: &'a [u32],
}

/// How many of its best tokens each live beam offers to a group of `beams`: two for each in the pool, else
/// enough for `beams` live ones if all end tokens come first, which is as many with one end token.
pub(crate) fn offered(options: &Options<'_>, beams: usize) -> usize {
    if options.rule == Rule::Pool {
        return beams.saturating_mul(2);
    }
    let mut eos = options.eos.to_vec();
    eos.sort_unstable();
    eos.dedup();
    beams.saturating_mul((1 + eos.len()).max(2))
}

impl Group {
    /// A group before the first step; all groups begin with the row of their prompt.
    pub(crate) fn new(row: usize) -> Self {
        let live = vec![Live { node: ROOT, logprob: 0.0, row }];
        Self { live, finished: Vec::new(), done: false }
    }

    /// Replaces the beams by those of the next step. Returns the bound of what was dropped, see
    /// [`Report::pruned_bound`](crate::Report::pruned_bound).
    pub(crate) fn advance(&mut self, step: &Step<'_>, history: &mut History) -> f64 {
        let candidates = self.candidates(step);
        let unseen = step.reachable(self.unseen(step));
        let (kept, dropped) = match step.options.rule {
            Rule::Pool => pool::select(self, step, history, candidates),
            Rule::Transformers { early_stopping } => {
                transformers::select(self, step, history, candidates, early_stopping)
            }
            Rule::Patience { patience } => {
                patience::select(self, step, history, candidates, patience)
            }
        };
        self.live = kept;
        unseen.max(dropped)
    }

    /// Every token that a live beam offers.
    fn candidates(&self, step: &Step<'_>) -> Vec<Candidate> {
        let penalty = step.options.groups.penalty;
        let of_beam = |(beam, live): (usize, &Live)| {
            let Live { logprob, row, .. } = *live;
            step.offers[row].tokens.iter().map(move |&(token, token_logprob)| {
                let logprob = logprob + token_logprob;
                let chosen = step.chosen.iter().filter(|&&other| other == token).count();
                // A cost above all numbers puts it last, and does not make it impossible.
                let merit = (logprob - penalty * chosen as f64).max(f64::MIN);
                Candidate { beam, token, token_logprob, logprob, merit }
            })
        };
        let offered = self.live.iter().map(|live| step.offers[live.row].tokens.len()).sum();
        let mut candidates = Vec::with_capacity(offered);
        candidates.extend(self.live.iter().enumerate().flat_map(of_beam));
        candidates.retain(|candidate| candidate.logprob > f64::NEG_INFINITY);
        candidates
    }

    /// No token that a beam did not offer leads to more than this log-probability.
    fn unseen(&self, step: &Step<'_>) -> f64 {
        let of_beam = |live: &Live| {
            let offer = &step.offers[live.row];
            let last = offer.tokens.last().filter(|_| offer.more);
            last.map_or(f64::NEG_INFINITY, |last| live.logprob + last.1)
        };
        self.live.iter().map(of_beam).fold(f64::NEG_INFINITY, f64::max)
    }

    /// The bound of what the live beams can still become, at `length` tokens.
    pub(crate) fn live_bound(&self, options: &Options<'_>, length: usize) -> f64 {
        let best = self.live.iter().map(|live| live.logprob).fold(f64::NEG_INFINITY, f64::max);
        let most = options.max_new_tokens;
        best_reachable(best, (length + 1).min(most), most, options.alpha)
    }
}

impl Step<'_> {
    fn score(&self, logprob: f64) -> f64 {
        normalised(logprob, self.length, self.options.alpha)
    }

    /// The bound of a candidate, which may have ended or not.
    fn reachable(&self, logprob: f64) -> f64 {
        best_reachable(logprob, self.length, self.options.max_new_tokens, self.options.alpha)
    }

    fn is_end(&self, token: u32) -> bool {
        self.options.eos.contains(&token)
    }

    /// Whether these are the last tokens that may be generated.
    fn is_last(&self) -> bool {
        self.length >= self.options.max_new_tokens
    }
}

/// The `count` best candidates in order of merit, then of beams, then of tokens; and the highest
/// log-probability of the others.
fn best_of(mut candidates: Vec<Candidate>, count: usize) -> (Vec<Candidate>, f64) {
    let order = |a: &Candidate, b: &Candidate| -> Ordering {
        b.merit.total_cmp(&a.merit).then(a.beam.cmp(&b.beam)).then(a.token.cmp(&b.token))
    };
    let mut dropped = f64::NEG_INFINITY;
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, order);
        dropped = highest(&candidates[count..]);
        candidates.truncate(count);
    }
    candidates.sort_unstable_by(order);
    (candidates, dropped)
}

fn highest(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.logprob).fold(f64::NEG_INFINITY, f64::max)
}

/// Adds a candidate to the tree.
fn push(history: &mut History, live: &[Live], candidate: &Candidate) -> NodeId {
    let Candidate { beam, token, token_logprob, .. } = *candidate;
    history.push(live[beam].node, token, beam, token_logprob)
}

/// The order of the pool: score, log-probability, tokens.
pub(crate) fn compare_finished(history: &History, a: &Finished, b: &Finished) -> Ordering {
    let tokens = || history.compare(history.path(a.node, a.length), history.path(b.node, b.length));
    b.score.total_cmp(&a.score).then(b.logprob.total_cmp(&a.logprob)).then_with(tokens)
}
