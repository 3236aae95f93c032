//! The oracles: beam search as its rules read, and brute force. Whole sequences are copied, everything
//! is sorted, all arithmetic is `f64`.
//!
//! Shares no code with the fast path. A model is a function here: the logits (or log-probabilities,
//! by [`Options::model_output`]) of the token after a sequence, prompt included.

use std::cmp::Ordering;

use crate::{
    EarlyStopping, Error, Follow, Hypothesis, ModelError, ModelOutput, Options, Rule, Search,
};

/// How many sequences [`brute_force`] looks at, at most.
const LIMIT: usize = 4_000_000;

/// The logits of the token after a sequence.
type Next<'a> = dyn FnMut(&[u32]) -> Result<Vec<f64>, ModelError> + 'a;

/// A sequence in the making.
#[derive(Clone, Debug)]
struct Beam {
    /// Without the prompt.
    tokens: Vec<u32>,
    token_logprobs: Vec<f64>,
    beam_indices: Vec<usize>,
    logprob: f64,
    /// Less what diversity costs; of the last step only.
    merit: f64,
    finished: bool,
    group: usize,
}

/// What [`beam_search`](crate::beam_search) returns for one prompt, without its early stop.
///
/// # Errors
/// As [`beam_search`](crate::beam_search), except that logits are not checked. A
/// [`Constraint`](crate::Constraint) is asked about item 0.
pub fn beam_search_reference(
    mut next: impl FnMut(&[u32]) -> Result<Vec<f64>, ModelError>,
    vocabulary: usize,
    prompt: &[u32],
    options: &Options<'_>,
) -> Result<Vec<Hypothesis>, Error> {
    Search::new(&[prompt], vocabulary, options)?; // For its checks alone.
    let groups = options.groups.count;
    let mut live = vec![vec![Beam::root()]; groups];
    let mut ended: Vec<Vec<Beam>> = vec![Vec::new(); groups];
    let mut done = vec![false; groups];
    for length in 1..=options.max_new_tokens {
        if done.iter().all(|&done| done) {
            break;
        }
        let mut chosen = Vec::new();
        for group in (0..groups).filter(|&group| !done[group]).collect::<Vec<_>>() {
            let mut offers = Vec::new();
            for (index, beam) in live[group].iter().enumerate() {
                let mut offer = Vec::new();
                for (token, logprob) in distribution(&mut next, prompt, beam, options)? {
                    let others = chosen.iter().filter(|&&other| other == token).count();
                    let cost = options.groups.penalty * others as f64;
                    offer.push(beam.continued(token, logprob, cost, index, group, options));
                }
                // Stable: of equal ones the lower token. By their own log-probabilities, since sums may
                // round to the same number.
                offer.sort_by(|a, b| {
                    let own = |beam: &Beam| beam.token_logprobs.last().copied().unwrap_or(0.0);
                    descending(own(a), own(b))
                });
                offer.truncate(offered(options.num_beams, options));
                offers.push(offer);
            }
            let beams = options.num_beams / groups;
            let (live, ended) = (&mut live[group], &mut ended[group]);
            done[group] = match options.rule {
                Rule::Pool => pool(live, ended, offers, beams, options),
                Rule::Transformers { early_stopping } => {
                    transformers(live, ended, offers, beams, length, early_stopping, options)
                }
                Rule::Patience { patience } => {
                    let enough = ((patience * beams as f64).round() as usize).max(1);
                    first_come(live, ended, offers, beams, enough)
                }
            };
            if done[group] {
                live.clear();
            }
            chosen.extend(live.iter().filter_map(|beam| beam.tokens.last().copied()));
        }
    }
    let mut all: Vec<_> = ended.into_iter().chain(live).flatten().collect();
    all.sort_by(|a, b| by_score(a, b, options.alpha));
    all.truncate(options.num_return.unwrap_or(options.num_beams));
    Ok(all.into_iter().map(|beam| beam.hypothesis(options.alpha)).collect())
}

/// The best of *all* sequences, by `logprob / length^alpha`: those that end, and those of
/// `max_new_tokens`. The rule, the groups and the number of beams play no part; `num_return` sequences
/// are returned.
///
/// # Errors
/// [`Error::TooManySequences`] if there are more than a few million; else as [`beam_search_reference`].
pub fn brute_force(
    mut next: impl FnMut(&[u32]) -> Result<Vec<f64>, ModelError>,
    vocabulary: usize,
    prompt: &[u32],
    options: &Options<'_>,
) -> Result<Vec<Hypothesis>, Error> {
    Search::new(&[prompt], vocabulary, options)?; // For its checks alone.
    let too_many = Error::TooManySequences {
        limit: LIMIT,
        vocabulary,
        max_new_tokens: options.max_new_tokens,
    };
    let (mut sequences, mut length) = (1_usize, 0);
    while length < options.max_new_tokens && vocabulary > 1 {
        sequences = sequences.saturating_mul(vocabulary);
        length += 1;
        if sequences > LIMIT {
            return Err(too_many);
        }
    }
    let mut all = Vec::new();
    let mut open = vec![Beam::root()];
    while let Some(beam) = open.pop() {
        if beam.finished || beam.tokens.len() == options.max_new_tokens {
            all.push(beam);
            continue;
        }
        for (token, logprob) in distribution(&mut next, prompt, &beam, options)? {
            open.push(beam.continued(token, logprob, 0.0, 0, 0, options));
        }
    }
    all.sort_by(|a, b| by_score(a, b, options.alpha));
    all.truncate(options.num_return.unwrap_or(options.num_beams));
    Ok(all.into_iter().map(|beam| beam.hypothesis(options.alpha)).collect())
}

/// Rule `Pool`: returns whether the search is over.
fn pool(
    live: &mut Vec<Beam>,
    ended: &mut Vec<Beam>,
    offers: Vec<Vec<Beam>>,
    beams: usize,
    options: &Options<'_>,
) -> bool {
    let score = |beam: &Beam| score(beam.merit, beam.tokens.len(), options.alpha);
    let mut pool = std::mem::take(ended);
    pool.iter_mut().for_each(|beam| beam.merit = beam.logprob);
    pool.extend(offers.into_iter().flatten());
    pool.sort_by(|a, b| {
        descending(score(a), score(b))
            .then(descending(a.logprob, b.logprob))
            .then(a.tokens.cmp(&b.tokens))
    });
    pool.truncate(beams);
    (*ended, *live) = pool.into_iter().partition(|beam| beam.finished);
    live.is_empty()
}

/// Rule `Transformers`, in the order of its source (`_beam_search` in `generation/utils.py`, 5.x).
fn transformers(
    running: &mut Vec<Beam>,
    stored: &mut Vec<Beam>,
    offers: Vec<Vec<Beam>>,
    beams: usize,
    length: usize,
    early_stopping: EarlyStopping,
    options: &Options<'_>,
) -> bool {
    let hits = |beam: &Beam| beam.finished || length == options.max_new_tokens;
    let top = best_of_all(offers, beams, options);
    *running = top.iter().filter(|beam| !hits(beam)).take(beams).cloned().collect();
    let score = |beam: &Beam| score(beam.logprob, beam.tokens.len(), options.alpha);
    stored.extend(top.into_iter().take(beams).filter(hits));
    stored.sort_by(|a, b| descending(score(a), score(b))); // Stable: what was there comes first.
    stored.truncate(beams);
    // The first of them, unless diversity has a cost.
    let logprobs = running.iter().map(|beam| beam.logprob);
    let Some(best) = logprobs.max_by(f64::total_cmp) else { return true };
    let worst = if stored.len() == beams { stored.last().map(score) } else { None };
    let Some(worst) = worst else { return false };
    if options.num_beams == 1 {
        return true; // `generate` calls `_sample` then, which ends with the first end.
    }
    let hypothetical = match early_stopping {
        EarlyStopping::Immediate => return true,
        EarlyStopping::Never if options.alpha > 0.0 => options.max_new_tokens,
        EarlyStopping::Heuristic | EarlyStopping::Never => length,
    };
    let best_possible = best / (hypothetical as f64).powf(options.alpha);
    // Its condition to go on is `best_possible > worst`.
    best_possible <= worst
}

/// Rule `Patience`.
fn first_come(
    live: &mut Vec<Beam>,
    finished: &mut Vec<Beam>,
    offers: Vec<Vec<Beam>>,
    beams: usize,
    enough: usize,
) -> bool {
    let mut heap = offers.into_iter().flatten().collect::<Vec<_>>();
    heap.sort_by(by_merit);
    live.clear();
    for beam in heap {
        if live.len() == beams || finished.len() == enough {
            break;
        }
        if beam.finished { finished.push(beam) } else { live.push(beam) }
    }
    finished.len() == enough || live.is_empty()
}

/// `2 K` in the pool, else `max(2, 1 + E) K` (eq. 2) for `K` beams.
fn offered(beams: usize, options: &Options<'_>) -> usize {
    let times = match options.rule {
        Rule::Pool => 2,
        _ => (1 + distinct(options.eos).len()).max(2),
    };
    beams.saturating_mul(times)
}

/// As many best continuations of all as are [`offered`] to `beams` beams.
fn best_of_all(offers: Vec<Vec<Beam>>, beams: usize, options: &Options<'_>) -> Vec<Beam> {
    let mut all: Vec<_> = offers.into_iter().flatten().collect();
    all.sort_by(by_merit);
    all.truncate(offered(beams, options));
    all
}

/// Log-probabilities of the tokens that may follow, each by its own.
fn distribution(
    next: &mut Next<'_>,
    prompt: &[u32],
    beam: &Beam,
    options: &Options<'_>,
) -> Result<Vec<(u32, f64)>, Error> {
    let sequence = [prompt, &beam.tokens].concat();
    let logits = next(&sequence).map_err(Error::Model)?;
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - largest).exp()).sum();
    let mut allowed = Vec::new();
    for (token, &logit) in logits.iter().enumerate() {
        let logprob = match options.model_output {
            ModelOutput::Logits => logit - largest - sum.ln(),
            ModelOutput::LogProbabilities => logit.min(0.0),
        };
        let token = token as u32;
        if logprob > f64::NEG_INFINITY && may_follow(&sequence, prompt.len(), token, options) {
            allowed.push((token, logprob.min(0.0)));
        }
    }
    Ok(allowed)
}

fn may_follow(sequence: &[u32], prompt: usize, token: u32, options: &Options<'_>) -> bool {
    let generated = &sequence[prompt..];
    let is_end = options.eos.contains(&token);
    let min_length = match options.rule {
        Rule::Transformers { .. } if options.min_new_tokens > 0 => 0,
        _ => options.min_length,
    };
    let too_short = generated.len() < options.min_new_tokens || sequence.len() < min_length;
    if is_end && too_short {
        return false;
    }
    let continued = [sequence, &[token]].concat();
    let n = options.no_repeat_ngram;
    if n > 0 && continued.len() > n {
        let last = &continued[continued.len() - n..];
        if sequence.windows(n).any(|window| window == last) {
            return false;
        }
    }
    for word in options.bad_words {
        let only_an_end = word.len() == 1 && is_end;
        if !only_an_end && continued.ends_with(word) {
            return false;
        }
    }
    let Some(constraint) = options.constraint else { return true };
    let mut allowed = Vec::new();
    // The number of the prompt is not known here; the constraints of this crate do not ask for it.
    match constraint.follow(0, generated, &mut allowed) {
        Follow::Any => true,
        Follow::Listed => allowed.contains(&token),
        Follow::ListedOrEnd => is_end || allowed.contains(&token),
    }
}

impl Beam {
    fn root() -> Self {
        Self {
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            beam_indices: Vec::new(),
            logprob: 0.0,
            merit: 0.0,
            finished: false,
            group: 0,
        }
    }

    fn continued(
        &self,
        token: u32,
        logprob: f64,
        cost: f64,
        index: usize,
        group: usize,
        options: &Options<'_>,
    ) -> Self {
        let sum = self.logprob + logprob;
        Self {
            tokens: [self.tokens.as_slice(), &[token]].concat(),
            token_logprobs: [self.token_logprobs.as_slice(), &[logprob]].concat(),
            beam_indices: [self.beam_indices.as_slice(), &[index]].concat(),
            logprob: sum,
            merit: (sum - cost).max(f64::MIN),
            finished: options.eos.contains(&token),
            group,
        }
    }

    fn hypothesis(self, alpha: f64) -> Hypothesis {
        Hypothesis {
            score: score(self.logprob, self.tokens.len(), alpha),
            tokens: self.tokens,
            logprob: self.logprob,
            finished: self.finished,
            token_logprobs: self.token_logprobs,
            beam_indices: self.beam_indices,
            group: self.group,
        }
    }
}

fn score(logprob: f64, length: usize, alpha: f64) -> f64 {
    // 0 divided by a power that underflows to 0 would be NaN.
    if logprob == 0.0 { 0.0 } else { logprob / (length as f64).powf(alpha) }
}

fn descending(a: f64, b: f64) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal)
}

fn by_score(a: &Beam, b: &Beam, alpha: f64) -> Ordering {
    let of = |beam: &Beam| score(beam.logprob, beam.tokens.len(), alpha);
    descending(of(a), of(b)).then(descending(a.logprob, b.logprob)).then(a.tokens.cmp(&b.tokens))
}

/// The order of candidates within a step: merit, the beam they continue, token.
fn by_merit(a: &Beam, b: &Beam) -> Ordering {
    descending(a.merit, b.merit)
        .then(a.beam_indices.last().cmp(&b.beam_indices.last()))
        .then(a.tokens.last().cmp(&b.tokens.last()))
}

fn distinct(eos: &[u32]) -> Vec<u32> {
    let mut eos = eos.to_vec();
    eos.sort_unstable();
    eos.dedup();
    eos
}
