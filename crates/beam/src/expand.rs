//! The best tokens of every row of logits, with their log-probabilities: one read, by `softmax-topk`.

use ndarray::{ArrayView1, ArrayView2};
use softmax_topk::{Logit, softmax_topk};
use tensor_utils::Element;

use crate::restrict::Restriction;
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

/// The `width` best tokens of each row that its restriction allows. There are as many `restrictions` as
/// rows, or none at all.
pub(crate) fn expand<T: Logit>(
    logits: ArrayView2<'_, T>,
    width: usize,
    output: ModelOutput,
    restrictions: &[Restriction],
) -> Result<Vec<Offer>, Failure> {
    // So many more that enough are left without the forbidden ones, and one that says whether there are
    // more: of every row, since other rows must not change what is found of it.
    let extra = restrictions.iter().map(|row| row.forbidden.len()).max().unwrap_or(0);
    let count = width.saturating_add(extra).saturating_add(1).min(logits.ncols());
    let options = softmax_topk::Options { log: true, ..softmax_topk::Options::default() };
    let best = softmax_topk(logits, count, &options).map_err(|error| match error {
        softmax_topk::Error::Nan { row, .. } => Failure::Row(row, "have a NaN"),
        softmax_topk::Error::Shape(error) => Failure::Other(error.into()),
        softmax_topk::Error::Isa(error) => Failure::Other(error.into()),
        other => Failure::Other(Error::Expansion(other)),
    })?;
    let offer = |row: usize| {
        let values = Values {
            logits: logits.index_axis(ndarray::Axis(0), row),
            best: best.indices[[row, 0]],
            best_logprob: best.probs[[row, 0]].to_f64(),
            output,
        };
        let restriction = restrictions.get(row);
        let tokens = best.indices.row(row);
        values.check().map_err(|problem| Failure::Row(row, problem))?;
        Ok(values.offer(tokens, width, restriction))
    };
    (0..logits.nrows()).map(offer).collect()
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

    fn offer(
        &self,
        best: ArrayView1<'_, u32>,
        width: usize,
        restriction: Option<&Restriction>,
    ) -> Offer {
        let is_allowed =
            |token: &u32| restriction.is_none_or(|row| row.forbidden.binary_search(token).is_err());
        let with_logprob = |&token: &u32| (token, self.logprob(token));
        let is_possible = |(_, logprob): &(u32, f64)| *logprob > f64::NEG_INFINITY;
        let offers = |tokens: &mut dyn ExactSizeIterator<Item = &u32>| {
            let mut offers = Vec::with_capacity(tokens.len());
            let allowed = tokens.filter(|token| is_allowed(token));
            offers.extend(allowed.map(with_logprob).filter(is_possible));
            offers
        };
        let mut tokens = match restriction.and_then(|row| row.allowed.as_ref()) {
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
