//! The oracle: softmax, then a full sort, in plain loops.
//!
//! Shares no code with the fast path. The functions that end in `_reference` say what the result is;
//! [`softmax_topk_naive`] says how precise and how fast a plain program is in the same type.

use std::cmp::Ordering;

use ndarray::{Array1, Array2, ArrayView2};
use tensor_utils::{Element, Float, check_shape};

use crate::score::Score;
use crate::{Error, Logit, Mask, NanPolicy, Options, PerRow, TokenScores, TopK, TopKGradients};

/// [`softmax_topk`](crate::softmax_topk), computed in `f64` throughout and not rounded.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn softmax_topk_reference<T: Logit>(
    logits: ArrayView2<'_, T>,
    k: usize,
    options: &Options<'_, T::Acc>,
) -> Result<TopK<f64>, Error> {
    compute::<T, f64>(logits, k, options)
}

/// The same with all arithmetic in the type that `T` computes in.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn softmax_topk_naive<T: Logit>(
    logits: ArrayView2<'_, T>,
    k: usize,
    options: &Options<'_, T::Acc>,
) -> Result<TopK<T::Acc>, Error> {
    compute::<T, T::Acc>(logits, k, options)
}

/// [`softmax_topk_backward`](crate::softmax_topk_backward), computed in `f64` throughout and not
/// rounded, from the reference's own forward pass.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
pub fn softmax_topk_backward_reference<T: Logit>(
    gradients: &TopKGradients<'_, T::Acc>,
    logits: ArrayView2<'_, T>,
    k: usize,
    options: &Options<'_, T::Acc>,
) -> Result<Array2<f64>, Error> {
    let forward = compute::<T, f64>(logits, k, options)?;
    let (rows, vocabulary) = logits.dim();
    let tokens = options.tokens.as_ref().map_or(0, |tokens| tokens.dim().1);
    if let Some(d_probs) = &gradients.probs {
        check_shape("gradients.probs", d_probs.shape(), &[rows, k])?;
    }
    if let Some(d_lse) = &gradients.lse {
        check_shape("gradients.lse", d_lse.shape(), &[rows])?;
    }
    if let Some(d_tokens) = &gradients.token_logprobs {
        check_shape("gradients.token_logprobs", d_tokens.shape(), &[rows, tokens])?;
    }
    let mut d_logits = Array2::zeros((rows, vocabulary));
    for row in 0..rows {
        let lse = forward.lse[row];
        if lse == f64::NEG_INFINITY {
            continue;
        }
        let temperature = at(options.temperature, row);
        let scores = scores::<T, f64>(logits, options, row);
        let p: Vec<f64> = scores.iter().map(|s| (s / temperature - lse).exp()).collect();
        let mut d = vec![0.0; vocabulary];
        // The definition: sum over outputs of their gradient times their derivative.
        if let Some(d_lse) = &gradients.lse {
            for i in 0..vocabulary {
                d[i] += d_lse[row].to_f64() * p[i];
            }
        }
        if let (Some(d_tokens), Some(tokens)) = (&gradients.token_logprobs, &options.tokens) {
            for (j, &token) in tokens.row(row).iter().enumerate() {
                let g = d_tokens[[row, j]].to_f64();
                for i in 0..vocabulary {
                    d[i] += g * (f64::from(i == token as usize) - p[i]);
                }
            }
        }
        if let Some(d_probs) = &gradients.probs {
            let kept = &forward.indices.row(row).to_vec()[..forward.kept[row] as usize];
            let kept: Vec<usize> = kept.iter().map(|&token| token as usize).collect();
            let kept_sum: f64 = kept.iter().map(|&i| p[i]).sum();
            for (j, &token) in kept.iter().enumerate() {
                let g = d_probs[[row, j]].to_f64();
                // The softmax over all tokens, or over those that were kept.
                let (members, mass): (Vec<usize>, f64) = if options.renormalise {
                    (kept.clone(), kept_sum)
                } else {
                    ((0..vocabulary).collect(), 1.0)
                };
                let factor = if options.log { 1.0 } else { p[token] / mass };
                for i in members {
                    d[i] += g * factor * (f64::from(i == token) - p[i] / mass);
                }
            }
        }
        for i in 0..vocabulary {
            let masked = scores[i] == f64::NEG_INFINITY;
            d_logits[[row, i]] = if masked { 0.0 } else { d[i] / temperature };
        }
    }
    Ok(d_logits)
}

/// The value of an option for a row.
fn at(option: PerRow<'_>, row: usize) -> f64 {
    match option {
        PerRow::All(value) => value,
        PerRow::Each(values) => values[row],
    }
}

fn allowed(mask: &Option<Mask<'_>>, row: usize, token: usize) -> bool {
    match mask {
        None => true,
        Some(Mask::U32(words)) => {
            let row = if words.dim().0 == 1 { 0 } else { row };
            words[[row, token / 32]] >> (token % 32) & 1 == 1
        }
        Some(Mask::U64(words)) => {
            let row = if words.dim().0 == 1 { 0 } else { row };
            words[[row, token / 64]] >> (token % 64) & 1 == 1
        }
    }
}

/// The scores of a row, NaN included unless it is ignored.
fn scores<T: Element, A: Float>(
    logits: ArrayView2<'_, T>,
    options: &Options<'_, T::Acc>,
    row: usize,
) -> Vec<A> {
    let mut scores = Vec::new();
    for token in 0..logits.dim().1 {
        let mut score = logits[[row, token]].to_acc();
        if let Some(bias) = &options.bias {
            score += bias[[if bias.dim().0 == 1 { 0 } else { row }, token]];
        }
        let ignored = score.is_nan() && options.nan == NanPolicy::Ignore;
        if ignored || !allowed(&options.mask, row, token) {
            score = T::Acc::NEG_INFINITY;
        }
        scores.push(A::from_f64(score.to_f64()));
    }
    scores
}

/// Descending, NaN first, equal values by index.
fn order<A: Float>(scores: &[A], a: usize, b: usize) -> Ordering {
    let (x, y) = (scores[a], scores[b]);
    let by_value = match (x.is_nan(), y.is_nan()) {
        (true, true) => Ordering::Equal,
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
        (false, false) => y.partial_cmp(&x).unwrap_or(Ordering::Equal),
    };
    by_value.then(a.cmp(&b))
}

fn check<T: Logit>(
    logits: ArrayView2<'_, T>,
    k: usize,
    options: &Options<'_, T::Acc>,
) -> Result<(), Error> {
    let (rows, vocabulary) = logits.dim();
    if vocabulary == 0 || vocabulary > u32::MAX as usize {
        return Err(Error::Vocabulary { vocabulary });
    }
    if k == 0 || k > vocabulary {
        return Err(Error::K { k, vocabulary });
    }
    let of_rows = |given: usize| if given == 1 { 1 } else { rows };
    if let Some(bias) = &options.bias {
        check_shape("bias", bias.shape(), &[of_rows(bias.dim().0), vocabulary])?;
    }
    let (mask, bits) = match &options.mask {
        None => (None, 1),
        Some(Mask::U32(words)) => (Some(words.dim()), 32),
        Some(Mask::U64(words)) => (Some(words.dim()), 64),
    };
    if let Some((given, words)) = mask {
        check_shape("mask", &[given, words], &[of_rows(given), vocabulary.div_ceil(bits)])?;
    }
    let temperatures = "a positive finite number, at most a thousandth of the largest of the compute type and \
                        with a finite reciprocal in it";
    let ranges: [(_, _, _, fn(f64) -> bool); 3] = [
        ("temperature", options.temperature, temperatures, |t| {
            let reciprocal = T::Acc::from_f64(1.0 / t);
            t > 0.0 && t <= -T::Acc::LOWEST.to_f64() / 1000.0 && reciprocal.is_finite()
        }),
        ("top_p", options.top_p, "above 0 and at most 1", |p| p > 0.0 && p <= 1.0),
        ("min_p", options.min_p, "at least 0 and at most 1", |p| (0.0..=1.0).contains(&p)),
    ];
    for (option, values, expected, fits) in ranges {
        if let PerRow::Each(values) = values {
            check_shape(option, values.shape(), &[rows])?;
        }
        for row in 0..rows {
            let got = at(values, row);
            if !fits(got) {
                return Err(Error::Option { option, row, expected, got });
            }
        }
    }
    if let Some(tokens) = &options.tokens {
        check_shape("tokens", tokens.shape(), &[rows, tokens.dim().1])?;
        for ((row, _), &token) in tokens.indexed_iter() {
            if token as usize >= vocabulary {
                return Err(Error::Token { arg: "tokens", row, token, vocabulary });
            }
        }
    }
    Ok(())
}

/// Softmax and sort with all arithmetic in `A`.
fn compute<T: Logit, A: Float>(
    logits: ArrayView2<'_, T>,
    k: usize,
    options: &Options<'_, T::Acc>,
) -> Result<TopK<A>, Error> {
    check(logits, k, options)?;
    let (rows, vocabulary) = logits.dim();
    let n = options.tokens.as_ref().map_or(0, |tokens| tokens.dim().1);
    let mut top = TopK {
        indices: Array2::default((rows, k)),
        probs: Array2::default((rows, k)),
        lse: Array1::default(rows),
        kept: Array1::default(rows),
        tokens: options.tokens.as_ref().map(|_| TokenScores {
            logprobs: Array2::default((rows, n)),
            ranks: Array2::default((rows, n)),
        }),
    };
    for row in 0..rows {
        let scores = scores::<T, A>(logits, options, row);
        let nan = scores.iter().position(|score| score.is_nan());
        if let (Some(token), NanPolicy::Error) = (nan, options.nan) {
            return Err(Error::Nan { row, token });
        }
        let (logprobs, lse) = log_softmax(&scores, at(options.temperature, row), nan.is_some());
        let mut sorted: Vec<usize> = (0..vocabulary).collect();
        sorted.sort_by(|&a, &b| order(&scores, a, b));

        // Of score -inf none is kept, and beside +inf nothing else.
        let infinite = scores.iter().any(|score| score.to_f64() == f64::INFINITY);
        let is_possible = |token: usize| {
            let score = scores[token].to_f64();
            if infinite { score == f64::INFINITY } else { score > f64::NEG_INFINITY }
        };
        let possible = sorted[..k].iter().take_while(|&&token| nan.is_none() && is_possible(token));
        let possible = &sorted[..possible.count()];
        let kept = kept(&logprobs, possible, at(options.top_p, row), at(options.min_p, row));
        let kept_sum: A = sorted[..kept].iter().map(|&i| logprobs[i].exp()).sum();
        for j in 0..k {
            let token = sorted[j];
            let mut logprob =
                if j < kept || nan.is_some() { logprobs[token] } else { A::NEG_INFINITY };
            if options.renormalise && j < kept {
                logprob -= kept_sum.ln();
            }
            top.indices[[row, j]] = token as u32;
            top.probs[[row, j]] = if options.log { logprob } else { logprob.exp() };
        }
        top.lse[row] = lse;
        top.kept[row] = kept as u32;
        if let (Some(scores_of), Some(tokens)) = (&mut top.tokens, &options.tokens) {
            for (j, &token) in tokens.row(row).iter().enumerate() {
                let token = token as usize;
                let rank = sorted.iter().position(|&i| i == token).unwrap_or_default();
                scores_of.logprobs[[row, j]] = logprobs[token];
                scores_of.ranks[[row, j]] = rank as u32;
            }
        }
    }
    Ok(top)
}

/// The log-probabilities over all tokens, and the lse.
fn log_softmax<A: Float>(scores: &[A], temperature: f64, has_nan: bool) -> (Vec<A>, A) {
    let nan = A::from_f64(f64::NAN);
    if has_nan {
        return (vec![nan; scores.len()], nan);
    }
    let temperature = A::from_f64(temperature);
    let scaled: Vec<A> = scores.iter().map(|&score| score / temperature).collect();
    let max = scaled.iter().copied().fold(A::NEG_INFINITY, A::max_nan);
    if max == A::NEG_INFINITY {
        return (scaled, max);
    }
    if !max.is_finite() {
        let equal = scaled.iter().filter(|&&s| s == max).count();
        let share = A::ZERO - A::from_f64(equal as f64).ln();
        let logprobs =
            scaled.iter().map(|&s| if s == max { share } else { A::NEG_INFINITY }).collect();
        return (logprobs, max);
    }
    let mut sum = A::ZERO;
    for &s in &scaled {
        sum += (s - max).exp();
    }
    (scaled.iter().map(|&s| s - max - sum.ln()).collect(), max + sum.ln())
}

/// How many of the sorted tokens the cuts keep.
fn kept<A: Float>(logprobs: &[A], sorted: &[usize], top_p: f64, min_p: f64) -> usize {
    let best = sorted.first().map_or(0.0, |&token| logprobs[token].to_f64());
    let mut before = 0.0;
    let mut kept = 0;
    for &token in sorted {
        let logprob = logprobs[token].to_f64();
        let enough = min_p == 0.0 || (logprob - best).exp() >= min_p;
        let needed = top_p == 1.0 || before < top_p;
        if !(enough && needed) {
            break;
        }
        before += logprob.exp();
        kept += 1;
    }
    kept
}
