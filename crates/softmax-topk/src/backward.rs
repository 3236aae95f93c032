//! The gradient of the logits.

use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use rayon::join;
use tensor_utils::simd::{Select, Simd, SimdBase, SimdFloat};
use tensor_utils::{Element, Float, Isa, Kernel, check_shape, dispatch, narrow, try_array};

use crate::call::{Call, RowOptions, check_tokens};
use crate::score::Score;
use crate::source::{STRIPE, Source, Stripe, load, splat};
use crate::sweep::{Coldness, sum};
use crate::{Error, Logit, NanPolicy, Options, TopKView};

/// Tokens that are worth another thread.
const GRAIN: usize = 1 << 15;

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
/// Tokens that are not allowed have gradient 0, and so has a row that is -inf wholly. Tokens of +inf
/// have NaN, and so has a whole row with NaN, but for its tokens of -inf, which have 0.
///
/// Takes no [`Tiling`](crate::Tiling) and runs on [`Isa::active`]. Allocates the result alone. The time
/// grows with `N (k + N)` for `N` given tokens in each row.
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

/// [`softmax_topk_backward`] into the caller's array `[R, V]`. Allocates nothing.
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
    let backward = Backward { call: &call, top: &top, gradients };
    Ok(dispatch(Isa::active()?, Rows { backward, d_logits })?)
}

/// What is the same for all rows.
struct Backward<'c, 'a, 'o, 't, 'g, T: Logit> {
    call: &'c Call<'a, 'o, T>,
    top: &'c TopKView<'t, T::Acc>,
    gradients: &'c TopKGradients<'g, T::Acc>,
}

struct Rows<'c, 'a, 'o, 't, 'g, 'd, T: Logit> {
    backward: Backward<'c, 'a, 'o, 't, 'g, T>,
    d_logits: ArrayViewMut2<'d, T>,
}

impl<T: Logit> Kernel for Rows<'_, '_, '_, '_, '_, '_, T> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        self.backward.split(simd, 0, self.d_logits);
    }
}

impl<T: Logit> Backward<'_, '_, '_, '_, '_, T> {
    /// Halves the rows until they are not worth another thread.
    fn split<S: Simd>(&self, simd: S, first: usize, mut d_logits: ArrayViewMut2<'_, T>) {
        let (rows, vocabulary) = d_logits.dim();
        if rows <= 1 || rows * vocabulary <= GRAIN {
            for (row, d_logits) in d_logits.axis_iter_mut(Axis(0)).enumerate() {
                self.row(simd, first + row, d_logits);
            }
            return;
        }
        let (left, right) = d_logits.split_at(Axis(0), rows / 2);
        join(|| self.split(simd, first, left), || self.split(simd, first + rows / 2, right));
    }

    fn row<S: Simd>(&self, simd: S, row: usize, mut d_logits: ArrayViewMut1<'_, T>) {
        let options = self.call.row_options(row);
        let source = Source::new(self.call, row, options.nan == NanPolicy::Ignore);
        let indices = self.top.indices.index_axis(Axis(0), row);
        let max = source.get(indices[0] as usize);
        if max == T::Acc::NEG_INFINITY {
            d_logits.fill(T::default());
            return;
        }
        let temperature = options.temperature;
        // Not by way of the lse: rounded, it is as far off as the scores are large. Beside NaN or +inf no
        // number has a probability.
        let sum = if max.is_finite() {
            sum(simd, &source, 0..source.stripes(), max, temperature)
        } else {
            1.0
        };
        let (common, shares) = self.sums(row, options);
        let probability =
            |score: T::Acc| ((score.to_f64() - max.to_f64()) / temperature).exp() / sum;
        let factor = T::Acc::from_f64(common / sum / temperature);
        if factor.is_finite() || !common.is_finite() {
            let dense = Dense { max, coldness: Coldness::of(temperature), factor };
            dense.fill(simd, &source, &mut d_logits);
        } else {
            // Of a temperature near 0: its products are in range where a probability is small enough.
            for (token, d) in d_logits.iter_mut().enumerate() {
                let score = source.get(token);
                let is_possible = score > T::Acc::NEG_INFINITY;
                let own = if is_possible { common * probability(score) / temperature } else { 0.0 };
                *d = T::from_f64(own);
            }
        }
        // Tokens with gradients of their own are computed again, so that they are rounded once.
        let mut again = |token: usize, column: Option<usize>| {
            let score = source.get(token);
            if score == T::Acc::NEG_INFINITY {
                return;
            }
            let p = probability(score);
            let of_column = column.map_or(0.0, |j| self.of_column(row, j, options, shares));
            let own = of_column + self.of_given(row, token);
            d_logits[token] = T::from_f64((common * p + own) / temperature);
        };
        let columns = if self.gradients.probs.is_some() { self.kept(row) } else { 0 };
        for column in 0..columns {
            again(indices[column] as usize, Some(column));
        }
        if let (Some(_), Some(tokens)) = (&self.gradients.token_logprobs, self.call.tokens(row)) {
            for &token in tokens {
                again(token as usize, (0..columns).find(|&column| indices[column] == token));
            }
        }
    }

    /// Columns of a row that were not cut.
    fn kept(&self, row: usize) -> usize {
        (self.top.kept[row] as usize).min(self.call.k)
    }

    /// What the probabilities of all tokens are multiplied by (eq. 9), and the sum of the gradients of
    /// the columns, each times its probability unless logarithms were asked for.
    fn sums(&self, row: usize, options: RowOptions) -> (f64, f64) {
        let TopKGradients { probs, lse, token_logprobs } = self.gradients;
        let mut common = lse.map_or(0.0, |lse| lse[row].to_f64());
        let shares: f64 = probs.map_or(0.0, |d| {
            (0..self.kept(row)).map(|j| d[[row, j]].to_f64() * self.weight(row, j, options)).sum()
        });
        if !options.renormalise {
            common -= shares;
        }
        if let Some(d) = token_logprobs {
            common -= d.row(row).iter().map(|d| d.to_f64()).sum::<f64>();
        }
        (common, shares)
    }

    /// The derivative of an output by its logarithm.
    fn weight(&self, row: usize, column: usize, options: RowOptions) -> f64 {
        if options.log { 1.0 } else { self.top.probs[[row, column]].to_f64() }
    }

    /// What the gradient of a column adds to its token.
    fn of_column(&self, row: usize, column: usize, options: RowOptions, shares: f64) -> f64 {
        let Some(d) = self.gradients.probs else { return 0.0 };
        let own = d[[row, column]].to_f64() * self.weight(row, column, options);
        if !options.renormalise {
            return own;
        }
        let prob = self.top.probs[[row, column]].to_f64();
        own - shares * if options.log { prob.exp() } else { prob }
    }

    /// What the gradients of given tokens add to a token.
    fn of_given(&self, row: usize, token: usize) -> f64 {
        let (Some(d), Some(tokens)) = (self.gradients.token_logprobs, self.call.tokens(row)) else {
            return 0.0;
        };
        let own = tokens.iter().zip(d.row(row)).filter(|&(&given, _)| given as usize == token);
        own.map(|(_, d)| d.to_f64()).sum()
    }
}

/// The part of the gradient that every token has: a multiple of its probability.
struct Dense<A> {
    max: A,
    coldness: Coldness<A>,
    /// The multiple, for the exponential relative to the maximum.
    factor: A,
}

impl<A: Score> Dense<A> {
    fn fill<S: Simd, T: Logit<Acc = A>>(
        &self,
        simd: S,
        source: &Source<'_, T>,
        to: &mut ArrayViewMut1<'_, T>,
    ) {
        let len = source.len();
        simd.vectorize(
            #[inline(always)]
            || {
                source.for_each(
                    simd,
                    0..source.stripes(),
                    #[inline(always)]
                    |stripe, scores| {
                        let d = self.of_stripe(simd, scores);
                        let (start, end) = (stripe * STRIPE, len.min((stripe + 1) * STRIPE));
                        match to.as_slice_mut() {
                            Some(to) => narrow(&d, &mut to[start..end]),
                            None => {
                                for token in start..end {
                                    to[token] = T::from_acc(d[token - start]);
                                }
                            }
                        }
                    },
                );
            },
        );
    }

    #[inline(always)]
    fn of_stripe<S: Simd>(&self, simd: S, scores: &Stripe<A>) -> Stripe<A> {
        let lanes = A::Vector::<S>::LEN;
        let (max, factor) = (splat::<S, A>(simd, self.max), splat(simd, self.factor));
        let Coldness { high, low } = self.coldness;
        let (high, low) = (splat::<S, A>(simd, high), splat(simd, low));
        let none = splat::<S, A>(simd, A::NEG_INFINITY);
        let mut d = [A::ZERO; STRIPE];
        for i in 0..STRIPE / lanes {
            let score = load(simd, scores, i * lanes);
            let below = score - max;
            let scaled = below * high;
            // Of -inf there is no product with 0.
            let scaled = scaled.simd_eq(none).select(none, below.mul_add(low, scaled));
            let e = A::exp_nonpositive_vector(simd, scaled);
            let value = score.simd_eq(none).select(splat(simd, A::ZERO), e * factor);
            value.store_slice(&mut d[i * lanes..][..lanes]);
        }
        d
    }
}
