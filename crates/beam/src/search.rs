//! The search itself: one call of the model a step for all live beams of all prompts.

use tensor_utils::check_shape;

use crate::error::invalid;
use crate::expand::{Failure, Offer, asked, expand};
use crate::history::{History, ROOT};
use crate::model::Row;
use crate::options::{MAX_LIVE, check_tokens};
use crate::output::{Hypothesis, Item, Output, Report, Stop};
use crate::restrict::{BadWords, Restriction, is_restricted, restrict};
use crate::rules::{Finished, Group, Step, compare_finished, offered};
use crate::{Beams, Error, Model, Options, Rule};

/// Bytes from which on a step is tried for whether there is memory for it.
const ASKED_FOR: usize = 64 << 20;

/// Searches for the best continuations of each prompt.
///
/// | argument | | |
/// | --- | --- | --- |
/// | `model` | | scores the live beams of all prompts in one call a step |
/// | `prompts` | `B` | token ids, of any lengths, at least one token each |
/// | `options` | | how many beams, how long, by which rule |
///
/// The result for a prompt does not depend on the other prompts: it has the same bits as in a search of
/// its own, if the model's logits have. Nor does it depend on the number of threads.
///
/// Log-probabilities are summed in `f64` and never penalised. Those of a step are
/// `(x - x_max) - ln(sum(exp(x - x_max)))`, the second term in the compute type of the logits.
/// They are not stored: of each row, only the best `max(2, 1 + number of end tokens) K` tokens are.
///
/// Memory beyond the model's: 24 bytes for each beam and step; and in a step, when each of `R` live beams
/// offers `C` tokens (2 `K` with one end token), 16 bytes for each of these `R C`, and the larger of
///
/// - 4 bytes and the size of a logit for each of the `R C` again, while they are found, and
/// - 40 bytes for each of the `K C` candidates of one prompt, with [`Rule::Pool`](crate::Rule::Pool) 128, while
///   the best are selected;
///
/// at most 300 bytes a live beam and 16 KiB besides, and a [`softmax_topk::Workspace`]: about `V / 8` numbers of
/// the compute type for each thread. Forbidden tokens add to `C`, at most the larger of 64 and as many again; `V` bits
/// say which are bad words.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit, the row of logits that is no distribution,
/// or what went wrong in the model. A step for which there is no memory is an error about `num_beams`.
///
/// # Examples
/// ```
/// use beam::{Bigram, Options, beam_search};
/// use ndarray::array;
///
/// // Token 0 ends a sequence; row t has the logits of what follows token t.
/// let mut model = Bigram::new(array![[0.0, 0.0, 0.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]])?;
/// let options = Options { num_beams: 2, eos: &[0], max_new_tokens: 5, ..Options::default() };
/// let output = beam_search(&mut model, &[[1], [2]], &options)?;
/// assert_eq!(output.items[0].hypotheses[0].tokens, [2, 0]);
/// # Ok::<(), beam::Error>(())
/// ```
pub fn beam_search<M: Model>(
    model: &mut M,
    prompts: &[impl AsRef<[u32]>],
    options: &Options<'_>,
) -> Result<Output, Error> {
    let mut search = Search::new(prompts, model.vocabulary(), options)?;
    while search.step(model)? {}
    Ok(search.finish())
}

/// A search that is made step by step, to show the best sequence so far or to stop it at any time.
///
/// ```
/// use beam::{Bigram, Options, Search};
/// use ndarray::array;
///
/// let mut model = Bigram::new(array![[0.0, 0.0, 0.0], [1.0, 0.0, 2.0], [2.0, 1.0, 0.0]])?;
/// let options = Options { num_beams: 2, eos: &[0], max_new_tokens: 5, ..Options::default() };
/// let mut search = Search::new(&[[1]], 3, &options)?;
/// while search.step(&mut model)? {
///     if let Some(best) = search.best(0) {
///         println!("{:?} {}", best.tokens, if best.finished { "ends" } else { ".." });
///     }
/// }
/// assert_eq!(search.finish().items[0].hypotheses[0].tokens, [2, 0]);
/// # Ok::<(), beam::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Search<'a> {
    options: &'a Options<'a>,
    bad_words: BadWords<'a>,
    vocabulary: usize,
    prompts: Vec<Vec<u32>>,
    histories: Vec<History>,
    states: Vec<State>,
    /// The live beams of all prompts, as the model sees them.
    rows: Vec<Row>,
    /// Tokens generated so far.
    length: usize,
}

/// A prompt's search.
#[derive(Debug, Clone)]
struct State {
    groups: Vec<Group>,
    steps: usize,
    stop: Stop,
    live_bound: f64,
    pruned_bound: f64,
}

impl<'a> Search<'a> {
    /// A search that has not begun, in a vocabulary of `vocabulary` tokens.
    ///
    /// # Errors
    /// [`Error`] names the argument or option that does not fit.
    pub fn new(
        prompts: &[impl AsRef<[u32]>],
        vocabulary: usize,
        options: &'a Options<'a>,
    ) -> Result<Self, Error> {
        options.check(vocabulary)?;
        let prompts: Vec<_> = prompts.iter().map(|prompt| prompt.as_ref().to_vec()).collect();
        for (item, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() {
                return Err(Error::EmptyPrompt { item });
            }
            check_tokens("prompts", prompt, vocabulary)?;
        }
        let state = |item: usize| State {
            groups: vec![Group::new(item); options.groups.count],
            steps: 0,
            stop: Stop::Unfinished,
            live_bound: f64::NEG_INFINITY,
            pruned_bound: f64::NEG_INFINITY,
        };
        let row = |item: usize| Row { item, node: ROOT, length: 0 };
        Ok(Self {
            options,
            bad_words: BadWords::new(options, vocabulary),
            vocabulary,
            histories: vec![History::default(); prompts.len()],
            states: (0..prompts.len()).map(state).collect(),
            rows: (0..prompts.len()).map(row).collect(),
            length: 0,
            prompts,
        })
    }

    /// Whether a step is left to be made.
    pub fn is_done(&self) -> bool {
        self.rows.is_empty()
    }

    /// Makes a step: one call of [`Model::score`] and one of [`Model::keep`]. Returns whether another
    /// one is left; when none is left any more, it does nothing.
    ///
    /// # Errors
    /// As [`beam_search`]. The search is as it was before the step then, unless [`Model::keep`] failed.
    pub fn step<M: Model>(&mut self, model: &mut M) -> Result<bool, Error> {
        if self.is_done() {
            return Ok(false);
        }
        let offers = self.offers(model)?;
        self.length += 1;
        for (item, state) in self.states.iter_mut().enumerate() {
            if state.stop == Stop::Unfinished {
                state.advance(self.options, self.length, &offers, &mut self.histories[item]);
            }
        }
        let parents = self.collect_rows();
        model.keep(&parents).map_err(Error::Model)?;
        Ok(!self.is_done())
    }

    /// What every row offers.
    fn offers<M: Model>(&self, model: &mut M) -> Result<Vec<Offer>, Error> {
        let Self { options, vocabulary, ref bad_words, .. } = *self;
        if model.vocabulary() != vocabulary {
            let expected = format!("{vocabulary}, as at the beginning");
            return Err(invalid("model.vocabulary", expected, model.vocabulary()));
        }
        let beams = Beams { rows: &self.rows, prompts: &self.prompts, histories: &self.histories };
        let mut restrictions = Vec::new();
        if is_restricted(options, bad_words) {
            for row in 0..beams.len() {
                restrictions.push(self.restriction(&beams, row)?);
            }
        }
        let width = offered(options, options.num_beams);
        let forbidden = restrictions.iter().map(|row| row.forbidden.len()).max().unwrap_or(0);
        let count = asked(width, bad_words.banned + forbidden, vocabulary);
        self.check_size(count, size_of::<M::Element>())?;
        let logits = model.score(&beams).map_err(Error::Model)?;
        check_shape("logits", logits.shape(), &[self.rows.len(), vocabulary])?;
        let output = options.model_output;
        let offers = expand(logits, (width, count), output, &restrictions, bad_words);
        offers.map_err(|failure| match failure {
            Failure::Row(row, problem) => Error::Logits { row, item: self.rows[row].item, problem },
            Failure::Other(error) => error,
        })
    }

    fn restriction(&self, beams: &Beams<'_>, row: usize) -> Result<Restriction, Error> {
        let prompt = beams.prompt(row).len();
        let sequence = beams.sequence(row);
        let item = beams.item(row);
        restrict(self.options, &self.bad_words, self.vocabulary, item, (&sequence, prompt))
    }

    /// Checks that there is memory for a step in which each live beam is asked for `count` tokens, with logits of
    /// `logit` bytes: as much as [`beam_search`] says.
    fn check_size(&self, count: usize, logit: usize) -> Result<(), Error> {
        let live = self.rows.len();
        let of_prompt = self.rows.chunk_by(|a, b| a.item == b.item).map(<[Row]>::len).max();
        let of_candidate = if self.options.rule == Rule::Pool { 128 } else { 40 };
        let tokens = live.saturating_mul(count);
        let candidates = of_prompt.unwrap_or(0).saturating_mul(count);
        let found = tokens.saturating_mul(4 + logit);
        let bytes = candidates.saturating_mul(of_candidate).max(found);
        let bytes = tokens.saturating_mul(16).saturating_add(bytes);
        let is_free = bytes < ASKED_FOR || Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
        if live <= MAX_LIVE && is_free {
            return Ok(());
        }
        let expected = format!(
            "so few that step {} fits: it has {live} live beams (at most {MAX_LIVE} may live), of which \
             each offers {count} tokens, and takes {bytes} bytes",
            self.length + 1,
        );
        Err(invalid("num_beams", expected, self.options.num_beams))
    }

    /// Numbers the live beams of all prompts; returns the row that each continues.
    fn collect_rows(&mut self) -> Vec<usize> {
        let mut parents = Vec::new();
        self.rows.clear();
        for (item, state) in self.states.iter_mut().enumerate() {
            for live in state.groups.iter_mut().flat_map(|group| &mut group.live) {
                parents.push(live.row);
                live.row = self.rows.len();
                self.rows.push(Row { item, node: live.node, length: self.length });
            }
        }
        parents
    }

    /// The best sequence for prompt `item` so far, finished or live, by score; `None` before the first
    /// step, and if there is no such prompt or nothing may be generated.
    pub fn best(&self, item: usize) -> Option<Hypothesis> {
        let (state, history) = (self.states.get(item)?, self.histories.get(item)?);
        let all = state.all(self.options, self.length, history);
        Some(hypothesis(self.options, history, all.first()?))
    }

    /// The best sequences so far. Of a search that is not done, live beams count as they are.
    pub fn finish(self) -> Output {
        let items = self.states.iter().zip(&self.histories);
        let items = items.map(|(state, history)| {
            let mut all = state.all(self.options, self.length, history);
            all.truncate(self.options.returned());
            let hypotheses = all.iter().map(|found| hypothesis(self.options, history, found));
            let hypotheses = hypotheses.collect();
            let State { steps, stop, pruned_bound, .. } = *state;
            let live_bound = state.live_bound(self.options, self.length);
            Item { hypotheses, report: Report { steps, stop, live_bound, pruned_bound } }
        });
        Output { items: items.collect() }
    }
}

impl State {
    fn advance(
        &mut self,
        options: &Options<'_>,
        length: usize,
        offers: &[Offer],
        history: &mut History,
    ) {
        self.steps += 1;
        let beams = options.num_beams / options.groups.count;
        let mut chosen = Vec::new();
        for group in self.groups.iter_mut().filter(|group| !group.done) {
            let step = Step { options, beams, length, offers, chosen: &chosen };
            self.pruned_bound = group.advance(&step, history).max(self.pruned_bound);
            if group.done {
                // What is left of it is only good for the bound.
                let bound = group.live_bound(options, length);
                self.live_bound = bound.max(self.live_bound);
                group.live.clear();
            } else if options.groups.penalty > 0.0 {
                let tokens = group.live.iter().filter_map(|live| history.last_token(live.node));
                chosen.extend(tokens);
            }
        }
        self.stop = self.stop(options, length, history);
        if self.stop == Stop::Decided {
            self.live_bound = self.live_bound(options, length);
        }
        if self.stop != Stop::Unfinished {
            for Group { live, finished, .. } in &mut self.groups {
                // At the greatest length, live beams are results.
                let results = live.drain(..).filter(|_| self.stop == Stop::Length);
                finished.extend(results.map(|live| live.end(length, options.alpha)));
            }
        }
    }

    /// Why the search is over, if it is.
    fn stop(&self, options: &Options<'_>, length: usize, history: &History) -> Stop {
        let is_done = self.groups.iter().all(|group| group.done);
        if is_done && self.groups.iter().all(|group| group.finished.is_empty()) {
            return Stop::Exhausted;
        }
        if length >= options.max_new_tokens {
            return Stop::Length;
        }
        if is_done {
            return Stop::Rule;
        }
        if options.exact_stop && self.is_decided(options, length, history) {
            return Stop::Decided;
        }
        Stop::Unfinished
    }

    /// Whether enough sequences have finished, and nothing that lives can become better than those.
    fn is_decided(&self, options: &Options<'_>, length: usize, history: &History) -> bool {
        let finished = self.groups.iter().flat_map(|group| &group.finished);
        let mut finished: Vec<_> = finished.collect();
        let last = options.returned() - 1;
        if finished.len() <= last {
            return false;
        }
        let order = |a: &&Finished, b: &&Finished| compare_finished(history, a, b);
        let (_, worst, _) = finished.select_nth_unstable_by(last, order);
        worst.score > self.live_bound(options, length)
    }

    /// What no continuation of a live beam reaches, or of one that was live when its group ended.
    fn live_bound(&self, options: &Options<'_>, length: usize) -> f64 {
        let of_groups = self.groups.iter().map(|group| group.live_bound(options, length));
        of_groups.fold(self.live_bound, f64::max)
    }

    /// All sequences with their groups, live ones as they are, best first.
    fn all(
        &self,
        options: &Options<'_>,
        length: usize,
        history: &History,
    ) -> Vec<(usize, Finished)> {
        let mut all = Vec::new();
        for (index, group) in self.groups.iter().enumerate() {
            all.extend(group.finished.iter().map(|finished| (index, *finished)));
            if length > 0 {
                let as_ended = group.live.iter().map(|live| live.end(length, options.alpha));
                all.extend(as_ended.map(|live| (index, live)));
            }
        }
        all.sort_by(|a, b| compare_finished(history, &a.1, &b.1));
        all
    }
}

fn hypothesis(
    options: &Options<'_>,
    history: &History,
    (group, sequence): &(usize, Finished),
) -> Hypothesis {
    let Finished { node, logprob, score, .. } = *sequence;
    let mut tokens = Vec::new();
    history.tokens_into(node, &mut tokens);
    let (token_logprobs, beam_indices) = history.provenance(node);
    let finished = tokens.last().is_some_and(|last| options.eos.contains(last));
    Hypothesis { tokens, logprob, score, finished, token_logprobs, beam_indices, group: *group }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn live_beams_are_limited() {
        let options = Options { num_beams: usize::MAX, ..Options::default() };
        let mut search = Search::new(&[[1]], 2, &options).unwrap();
        search.rows = vec![search.rows[0]; MAX_LIVE];
        search.check_size(1, 4).unwrap();
        search.rows.push(search.rows[0]);
        let error = search.check_size(1, 4).unwrap_err().to_string();
        assert!(error.contains("4194305 live beams (at most 4194304"), "{error}");
    }
}
