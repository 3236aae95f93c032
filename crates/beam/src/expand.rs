//! The best tokens of every row of logits, with their log-probabilities: one read, by `softmax-topk`.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use softmax_topk::{Logit, Mask, softmax_topk};
use tensor_utils::Element;

use crate::restrict::{BadWords, Restriction};
use crate::{Error, ModelOutput};

/// How far above 0 rounding may have brought a model's log-probability.
const SLACK: f64 = 1e-3;

/// What a row has to offer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Offer {
    /// With their log-probabilities: the highest first, of equal ones the lower token.
    pub(crate) tokens: Vec<(u32, f64)>,
    /// Whether the row has more than those.
    pub(crate) more: bool,
}

/// Why an expansion failed: a row that is no distribution, or something else.
pub(crate) enum Failure {
    Row(usize, &'static str),
    Other(Error),
}

/// How many tokens are asked for in place of forbidden ones at least, if so many are forbidden; more are asked for
/// only where these do not do.
const SPARE: usize = 64;

/// How many of its best tokens each row is asked for: of every row as many, `forbidden` being the most of any.
pub(crate) fn asked(width: usize, forbidden: usize, vocabulary: usize) -> usize {
    // One more says whether there are more.
    let spare = forbidden.min(width.max(SPARE));
    width.saturating_add(spare).saturating_add(1).min(vocabulary)
}

/// The `width` best tokens of each row that its restriction and the bad words allow, of the `count` that it is
/// [`asked`] for, or of all. There are as many `restrictions` as rows, or none at all.
pub(crate) fn expand<T: Logit>(
    logits: ArrayView2<'_, T>,
    (width, count): (usize, usize),
    output: ModelOutput,
    restrictions: &[Restriction],
    bad_words: &BadWords<'_>,
) -> Result<Vec<Offer>, Failure> {
    let options = softmax_topk::Options { log: true, ..softmax_topk::Options::default() };
    let best = softmax_topk(logits, count, &options).map_err(failure)?;
    let offer = |row: usize| {
        let values = Values {
            logits: logits.index_axis(Axis(0), row),
            best: best.indices[[row, 0]],
            best_logprob: best.probs[[row, 0]].to_f64(),
            output,
        };
        let limits = Limits { bad_words, restriction: restrictions.get(row) };
        values.check().map_err(|problem| Failure::Row(row, problem))?;
        let offer = values.offer(best.indices.row(row), width, &limits);
        if offer.more || limits.are_met_by(count, width, logits.ncols()) {
            return Ok(offer);
        }
        let allowed = best_allowed(values.logits, width, &limits)?;
        Ok(values.offer(allowed.row(0), width, &limits))
    };
    (0..logits.nrows()).map(offer).collect()
}

/// `[1, width + 1]`: the best tokens of a row that are allowed, then perhaps others.
fn best_allowed<T: Logit>(
    logits: ArrayView1<'_, T>,
    width: usize,
    limits: &Limits<'_>,
) -> Result<Array2<u32>, Failure> {
    let mask = limits.bad_words.mask(limits.forbidden(), logits.len());
    let mask = ArrayView1::from(&mask).insert_axis(Axis(0));
    // Log-probabilities are those over all tokens, so these are not taken from here.
    let options =
        softmax_topk::Options { mask: Some(Mask::U64(mask)), ..softmax_topk::Options::default() };
    let count = width.saturating_add(1).min(logits.len());
    Ok(softmax_topk(logits.insert_axis(Axis(0)), count, &options).map_err(failure)?.indices)
}

fn failure(error: softmax_topk::Error) -> Failure {
    match error {
        softmax_topk::Error::Nan { row, .. } => Failure::Row(row, "have a NaN"),
        softmax_topk::Error::Shape(error) => Failure::Other(error.into()),
        softmax_topk::Error::Isa(error) => Failure::Other(error.into()),
        other => Failure::Other(Error::Expansion(other)),
    }
}

/// What may follow a row.
struct Limits<'a> {
    bad_words: &'a BadWords<'a>,
    restriction: Option<&'a Restriction>,
}

impl Limits<'_> {
    fn forbidden(&self) -> &[u32] {
        self.restriction.map_or(&[], |row| &row.forbidden)
    }

    /// If there, nothing else is allowed.
    fn listed(&self) -> Option<&[u32]> {
        self.restriction.and_then(|row| row.allowed.as_deref())
    }

    fn allow(&self, token: u32) -> bool {
        self.bad_words.allows(token) && self.forbidden().binary_search(&token).is_err()
    }

    /// Whether among the `count` best tokens are `width` that are allowed and one more, or all that there are.
    fn are_met_by(&self, count: usize, width: usize, vocabulary: usize) -> bool {
        let forbidden = self.bad_words.banned + self.forbidden().len();
        self.listed().is_some() || count == vocabulary || count.saturating_sub(forbidden) > width
    }
}

/// A row of logits.
struct Values<'a, T> {
    logits: ArrayView1<'a, T>,
    /// Its best token.
    best: u32,
    best_logprob: f64,
    output: ModelOutput,
}

impl<T: Element> Values<'_, T> {
    fn get(&self, token: u32) -> f64 {
        self.logits[token as usize].to_f64()
    }

    /// What makes it no distribution.
    fn check(&self) -> Result<(), &'static str> {
        let largest = self.get(self.best);
        if largest == f64::INFINITY {
            return Err("have +inf");
        }
        if largest == f64::NEG_INFINITY {
            return Err("are -inf for every token");
        }
        if self.output == ModelOutput::LogProbabilities && largest > SLACK {
            return Err("are above 0, which log-probabilities never are");
        }
        Ok(())
    }

    /// The distance to the best logit is exact in `f64`, so one token has the same log-probability
    /// whichever way it is found, and no two have the same because `f32` is coarse.
    fn logprob(&self, token: u32) -> f64 {
        match self.output {
            ModelOutput::Logits => self.best_logprob + (self.get(token) - self.get(self.best)),
            ModelOutput::LogProbabilities => self.get(token),
        }
        .min(0.0)
    }

    fn offer(&self, best: ArrayView1<'_, u32>, width: usize, limits: &Limits<'_>) -> Offer {
        let with_logprob = |&token: &u32| (token, self.logprob(token));
        let is_possible = |(_, logprob): &(u32, f64)| *logprob > f64::NEG_INFINITY;
        let offers = |tokens: &mut dyn ExactSizeIterator<Item = &u32>| {
            let mut offers = Vec::with_capacity(tokens.len());
            let allowed = tokens.filter(|&&token| limits.allow(token));
            offers.extend(allowed.map(with_logprob).filter(is_possible));
            offers
        };
        let mut tokens = match limits.listed() {
            None => offers(&mut best.iter()),
            Some(listed) => {
                let mut tokens = offers(&mut listed.iter());
                tokens.sort_by(|a, b| b.1.total_cmp(&a.1));
                tokens
            }
        };
        let more = tokens.len() > width;
        tokens.truncate(width);
        // A list may be far longer than what is kept of it.
        tokens.shrink_to_fit();
        Offer { tokens, more }
    }
}
