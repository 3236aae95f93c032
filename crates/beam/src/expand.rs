//! The best tokens of every row of logits, with their log-probabilities.

use ndarray::{ArrayView1, ArrayView2};
use rayon::prelude::*;
use tensor_utils::Element;

use crate::ModelOutput;
use crate::restrict::Restriction;

/// What a row has to offer: tokens by falling log-probability, equal ones by their ids.
#[derive(Debug, Clone, Default)]
pub(crate) struct Offer {
    pub(crate) tokens: Vec<(u32, f64)>,
    /// Whether there are more tokens than those.
    pub(crate) more: bool,
}

/// Why a row of logits is no distribution.
pub(crate) type Problem = (usize, &'static str);

/// The `width` best tokens of each row that its restriction allows; `restrictions` is empty if there is
/// none at all.
pub(crate) fn expand<T: Element>(
    logits: ArrayView2<'_, T>,
    width: usize,
    output: ModelOutput,
    restrictions: &[Restriction],
) -> Result<Vec<Offer>, Problem> {
    let extra = restrictions.iter().map(|r| r.forbidden.len()).max().unwrap_or(0);
    let count = width.saturating_add(extra).min(logits.ncols());
    let rows: Vec<_> = (0..logits.nrows()).collect();
    rows.into_par_iter()
        .map(|row| {
            let none = Restriction::default();
            let restriction = restrictions.get(row).unwrap_or(&none);
            let logits = logits.row(row);
            let best = best(logits, count);
            offer(logits, &best, width, output, restriction).map_err(|problem| (row, problem))
        })
        .collect()
}

fn best<T: Element>(logits: ArrayView1<'_, T>, count: usize) -> (Vec<u32>, f64) {
    let mut tokens: Vec<_> = (0..logits.len() as u32).collect();
    let value = |token: u32| logits[token as usize].to_f64();
    tokens.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
    let largest = value(tokens[0]);
    let sum: f64 = logits.iter().map(|x| (x.to_f64() - largest).exp()).sum();
    tokens.truncate(count);
    (tokens, -sum.ln())
}

fn offer<T: Element>(
    logits: ArrayView1<'_, T>,
    (tokens, best_logprob): &(Vec<u32>, f64),
    width: usize,
    output: ModelOutput,
    restriction: &Restriction,
) -> Result<Offer, &'static str> {
    let value = |token: u32| logits[token as usize].to_f64();
    let largest = value(tokens[0]);
    if best_logprob.is_nan() {
        return Err("have a NaN");
    }
    if largest == f64::NEG_INFINITY {
        return Err("are -inf for every token");
    }
    let logprob = |token: u32| match output {
        ModelOutput::Logits => ((value(token) - largest) + best_logprob).min(0.0),
        ModelOutput::LogProbabilities => value(token).min(0.0),
    };
    if output == ModelOutput::LogProbabilities && largest > 1e-3 {
        return Err("are above 0, which log-probabilities never are");
    }
    let allowed = |token: &u32| restriction.forbidden.binary_search(token).is_err();
    let with_logprob = |&token: &u32| (token, logprob(token));
    let possible = |(_, logprob): &(u32, f64)| *logprob > f64::NEG_INFINITY;
    let mut offered: Vec<_> = match &restriction.allowed {
        None => tokens.iter().filter(|t| allowed(t)).map(with_logprob).filter(possible).collect(),
        Some(listed) => {
            let of_list = listed.iter().filter(|t| allowed(t)).map(with_logprob).filter(possible);
            let mut offered: Vec<_> = of_list.collect();
            offered.sort_by(|a, b| b.1.total_cmp(&a.1));
            offered
        }
    };
    let total = match &restriction.allowed {
        None if tokens.len() == logits.len() => offered.len(),
        None => usize::MAX,
        Some(_) => offered.len(),
    };
    offered.truncate(width);
    Ok(Offer { more: total > offered.len(), tokens: offered })
}
