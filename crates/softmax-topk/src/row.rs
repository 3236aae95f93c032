//! The forward pass over rows.

use ndarray::Axis;
use rayon::join;
use tensor_utils::{Element, Float};

use crate::call::{Call, RowOptions};
use crate::{Error, Logit, NanPolicy, TopKMut, Workspace};

/// A type that scores are computed in.
pub trait Score: Float {}

impl Score for f32 {}
impl Score for f64 {}

/// Computes a checked call.
pub(crate) fn topk<T: Logit>(
    call: Call<'_, '_, T>,
    top: TopKMut<'_, T::Acc>,
    _workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    split(&call, 0, top)
}

fn split<T: Logit>(
    call: &Call<'_, '_, T>,
    first: usize,
    top: TopKMut<'_, T::Acc>,
) -> Result<(), Error> {
    let rows = top.lse.len();
    if rows == 0 {
        return Ok(());
    }
    if rows == 1 {
        return one_row(call, first, top);
    }
    let (left, right) = top.split_at(rows / 2);
    let (left, right) = join(|| split(call, first, left), || split(call, first + rows / 2, right));
    left.and(right)
}

fn one_row<T: Logit>(
    call: &Call<'_, '_, T>,
    row: usize,
    mut top: TopKMut<'_, T::Acc>,
) -> Result<(), Error> {
    let options = call.row_options(row);
    let mut scores: Vec<T::Acc> =
        call.logits.index_axis(Axis(0), row).iter().map(|x| x.to_acc()).collect();
    if let Some(bias) = call.bias(row) {
        scores.iter_mut().zip(bias).for_each(|(score, &bias)| *score += bias);
    }
    if let Some(mask) = call.mask(row) {
        for (token, score) in scores.iter_mut().enumerate() {
            if !mask.allows(token) {
                *score = T::Acc::NEG_INFINITY;
            }
        }
    }
    let mut has_nan = false;
    if let Some(token) = scores.iter().position(|score| score.is_nan()) {
        match options.nan {
            NanPolicy::Error => return Err(Error::Nan { row, token }),
            NanPolicy::Greatest => has_nan = true,
            NanPolicy::Ignore => scores
                .iter_mut()
                .filter(|score| score.is_nan())
                .for_each(|score| *score = T::Acc::NEG_INFINITY),
        }
    }
    let max = scores.iter().copied().fold(T::Acc::NEG_INFINITY, T::Acc::max_nan).to_f64();
    let weight = |score: T::Acc| -> f64 {
        if score.to_f64() == max {
            1.0
        } else {
            ((score.to_f64() - max) / options.temperature).exp()
        }
    };
    let sum = if max == f64::NEG_INFINITY { 0.0 } else { scores.iter().map(|&s| weight(s)).sum() };
    let lse = max / options.temperature + f64::ln(sum);
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let before = |a: &u32, b: &u32| {
        let (x, y) = (scores[*a as usize], scores[*b as usize]);
        let by_value = match (x.is_nan(), y.is_nan()) {
            (false, false) => y.partial_cmp(&x).unwrap_or(std::cmp::Ordering::Equal),
            (x, y) => y.cmp(&x),
        };
        by_value.then(a.cmp(b))
    };
    if call.k < order.len() {
        order.select_nth_unstable_by(call.k - 1, before);
    }
    order[..call.k].sort_unstable_by(before);
    let order = &order[..call.k];
    let logprob = |score: T::Acc| -> f64 {
        if has_nan || lse.is_nan() {
            f64::NAN
        } else if max == f64::NEG_INFINITY {
            f64::NEG_INFINITY
        } else if score.to_f64() == max {
            -sum.ln()
        } else {
            (score.to_f64() - max) / options.temperature - sum.ln()
        }
    };
    let RowOptions { top_p, min_p, .. } = options;
    let best = logprob(scores[order[0] as usize]);
    let (mut kept, mut before_it) = (0, 0.0);
    for &token in order {
        let logprob = logprob(scores[token as usize]);
        let possible = logprob > f64::NEG_INFINITY;
        if !possible
            || (min_p > 0.0 && (logprob - best).exp() < min_p)
            || (top_p < 1.0 && before_it >= top_p)
        {
            break;
        }
        before_it += logprob.exp();
        kept += 1;
    }
    for (j, &token) in order.iter().enumerate() {
        let mut logprob =
            if j < kept || has_nan { logprob(scores[token as usize]) } else { f64::NEG_INFINITY };
        if options.renormalise && j < kept {
            logprob -= before_it.ln();
        }
        top.indices[[0, j]] = token;
        top.probs[[0, j]] = T::Acc::from_f64(if options.log { logprob } else { logprob.exp() });
    }
    top.lse[0] = T::Acc::from_f64(lse);
    top.kept[0] = kept as u32;
    if let (Some(out), Some(tokens)) = (&mut top.tokens, call.tokens(row)) {
        for (j, token) in tokens.iter().enumerate() {
            out.logprobs[[0, j]] = T::Acc::from_f64(logprob(scores[*token as usize]));
            let ahead = (0..scores.len() as u32).filter(|other| before(other, token).is_lt());
            out.ranks[[0, j]] = ahead.count() as u32;
        }
    }
    Ok(())
}
