//! The gradient of the logits.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use rayon::join;
use tensor_utils::{Element, Float, check_shape, try_array};

use crate::call::{Call, check_tokens};
use crate::{Error, Logit, Options, TopKView};

/// The gradients of the outputs of [`softmax_topk`](crate::softmax_topk); those that are left out
/// are 0.
#[derive(Debug, Clone)]
pub struct TopKGradients<'a, A> {
    /// `[R, k]`: of [`TopK::probs`](crate::TopK::probs), be they probabilities or their logarithms.
    /// Those of columns that were cut have no effect.
    pub probs: Option<ArrayView2<'a, A>>,
    /// `[R]`: of [`TopK::lse`](crate::TopK::lse).
    pub lse: Option<ArrayView1<'a, A>>,
    /// `[R, N]`: of [`TokenScores::logprobs`](crate::TokenScores::logprobs), such as -1 / R for the
    /// mean cross-entropy.
    pub token_logprobs: Option<ArrayView2<'a, A>>,
}

impl<A> Default for TopKGradients<'_, A> {
    fn default() -> Self {
        Self { probs: None, lse: None, token_logprobs: None }
    }
}

/// The gradient of the logits `[R, V]` (and of the bias, before it is summed over rows that share
/// it) for the gradients of the outputs; `top` is the result of
/// [`softmax_topk`](crate::softmax_topk) for the same logits and options.
///
/// Which tokens are chosen and kept does not depend on the logits smoothly and counts as constant.
/// Tokens that are not allowed have gradient 0, and so has a row that is -inf wholly. A row with NaN
/// or +inf has NaN.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
///
/// # Examples
/// Cross-entropy:
/// ```
/// use ndarray::array;
/// use softmax_topk::{Options, TopKGradients, softmax_topk, softmax_topk_backward};
///
/// let logits = array![[1.0_f32, 2.0, 3.0]];
/// let targets = array![[2_u32]];
/// let options = Options { tokens: Some(targets.view()), ..Options::default() };
/// let top = softmax_topk(logits.view(), 1, &options)?;
/// let loss = -top.tokens.as_ref().map_or(0.0, |tokens| tokens.logprobs[[0, 0]]);
///
/// let d_logprobs = array![[-1.0]];
/// let gradients = TopKGradients { token_logprobs: Some(d_logprobs.view()), ..Default::default() };
/// let d_logits = softmax_topk_backward(&gradients, logits.view(), top.view(), &options)?;
/// assert!((loss - 0.4076).abs() < 1e-4);
/// assert!((d_logits[[0, 2]] - ((-loss).exp() - 1.0)).abs() < 1e-6);
/// # Ok::<(), softmax_topk::Error>(())
/// ```
pub fn softmax_topk_backward<T: Logit>(
    gradients: &TopKGradients<'_, T::Acc>,
    logits: ArrayView2<'_, T>,
    top: TopKView<'_, T::Acc>,
    options: &Options<'_, T::Acc>,
) -> Result<Array2<T>, Error> {
    let mut d_logits = try_array("d_logits", logits.dim())?;
    softmax_topk_backward_into(d_logits.view_mut(), gradients, logits, top, options)?;
    Ok(d_logits)
}

/// [`softmax_topk_backward`] into the caller's array `[R, V]`.
///
/// # Errors
/// As [`softmax_topk_backward`]. The output is untouched then.
pub fn softmax_topk_backward_into<T: Logit>(
    d_logits: ArrayViewMut2<'_, T>,
    gradients: &TopKGradients<'_, T::Acc>,
    logits: ArrayView2<'_, T>,
    top: TopKView<'_, T::Acc>,
    options: &Options<'_, T::Acc>,
) -> Result<(), Error> {
    let (rows, k) = top.indices.dim();
    let call = Call::new(logits.reborrow(), k, options)?;
    check_shape("d_logits", d_logits.shape(), logits.shape())?;
    check_shape("top.indices", top.indices.shape(), &[call.rows(), k])?;
    check_shape("top.probs", top.probs.shape(), &[rows, k])?;
    check_shape("top.lse", top.lse.shape(), &[rows])?;
    check_shape("top.kept", top.kept.shape(), &[rows])?;
    check_tokens("top.indices", top.indices, call.vocabulary())?;
    if let Some(probs) = &gradients.probs {
        check_shape("gradients.probs", probs.shape(), &[rows, k])?;
    }
    if let Some(lse) = &gradients.lse {
        check_shape("gradients.lse", lse.shape(), &[rows])?;
    }
    if let Some(logprobs) = &gradients.token_logprobs {
        let tokens = options.tokens.map_or(0, |tokens| tokens.dim().1);
        check_shape("gradients.token_logprobs", logprobs.shape(), &[rows, tokens])?;
    }
    T::backward(call, top, gradients, d_logits)
}

/// Computes a checked call.
pub(crate) fn backward<T: Logit>(
    call: Call<'_, '_, T>,
    top: TopKView<'_, T::Acc>,
    gradients: &TopKGradients<'_, T::Acc>,
    d_logits: ArrayViewMut2<'_, T>,
) -> Result<(), Error> {
    split(&call, &top, gradients, 0, d_logits);
    Ok(())
}

/// Halves the rows until one is left.
fn split<T: Logit>(
    call: &Call<'_, '_, T>,
    top: &TopKView<'_, T::Acc>,
    gradients: &TopKGradients<'_, T::Acc>,
    first: usize,
    d_logits: ArrayViewMut2<'_, T>,
) {
    let rows = d_logits.dim().0;
    if rows == 0 {
        return;
    }
    if rows == 1 {
        return one_row(call, top, gradients, first, d_logits.index_axis_move(Axis(0), 0));
    }
    let (left, right) = d_logits.split_at(Axis(0), rows / 2);
    join(
        || split(call, top, gradients, first, left),
        || split(call, top, gradients, first + rows / 2, right),
    );
}

fn one_row<T: Logit>(
    call: &Call<'_, '_, T>,
    top: &TopKView<'_, T::Acc>,
    gradients: &TopKGradients<'_, T::Acc>,
    row: usize,
    mut d_logits: ArrayViewMut1<'_, T>,
) {
    let options = call.row_options(row);
    let lse = top.lse[row].to_f64();
    if lse == f64::NEG_INFINITY {
        d_logits.fill(T::from_f64(0.0));
        return;
    }
    let (bias, mask) = (call.bias(row), call.mask(row));
    let masked = |score: T::Acc, token: usize| {
        score == T::Acc::NEG_INFINITY || mask.is_some_and(|mask| !mask.allows(token))
    };
    let score = |token: usize| {
        let score = call.logits[[row, token]].to_acc();
        bias.map_or(score, |bias| score + bias[token])
    };
    let prob = |score: T::Acc| (score.to_f64() / options.temperature - lse).exp();

    // What the probabilities of all tokens are multiplied by.
    let mut common = gradients.lse.map_or(0.0, |lse| lse[row].to_f64());
    let kept = (top.kept[row] as usize).min(call.k);
    let shares: f64 = gradients.probs.map_or(0.0, |d| {
        let share = |j: usize| {
            let p = top.probs[[row, j]].to_f64();
            d[[row, j]].to_f64() * if options.log { 1.0 } else { p }
        };
        (0..kept).map(share).sum()
    });
    if !options.renormalise {
        common -= shares;
    }
    if let Some(d) = gradients.token_logprobs {
        common -= d.row(row).iter().map(|d| d.to_f64()).sum::<f64>();
    }
    let factor = 1.0 / options.temperature;
    for (token, to) in d_logits.iter_mut().enumerate() {
        let score = score(token);
        let ignored = score.is_nan() && options.nan == crate::NanPolicy::Ignore;
        *to = if ignored || masked(score, token) {
            T::from_f64(0.0)
        } else {
            let mut d = common * prob(score);
            if let (Some(g), Some(tokens)) = (gradients.token_logprobs, call.tokens(row)) {
                for (j, &given) in tokens.iter().enumerate() {
                    if given as usize == token {
                        d += g[[row, j]].to_f64();
                    }
                }
            }
            if let Some(g) = gradients.probs
                && let Some(j) = (0..kept).find(|&j| top.indices[[row, j]] as usize == token)
            {
                let p = top.probs[[row, j]].to_f64();
                let q = if options.log { p.exp() } else { p };
                d += g[[row, j]].to_f64() * if options.log { 1.0 } else { p };
                if options.renormalise {
                    d -= q * shares;
                }
            }
            T::from_f64(d * factor)
        };
    }
}
