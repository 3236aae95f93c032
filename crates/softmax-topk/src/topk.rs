//! The public entry points of the forward pass, and its results.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayViewMut1, ArrayViewMut2, Axis};
use tensor_utils::{Float, check_shape, try_array};

use crate::call::Call;
use crate::{Error, Logit, Options, Tiling, Workspace};

/// The result of [`softmax_topk`], for `R` rows.
#[derive(Debug, Clone, PartialEq)]
pub struct TopK<A> {
    /// `[R, k]`: the best tokens of each row, best first; of equal scores the lower token first.
    pub indices: Array2<u32>,
    /// `[R, k]`: their probabilities, or log-probabilities if [`Options::log`] asks for them; 0 or
    /// -inf from [`kept`](Self::kept) on. NaN in a row with NaN, if that is
    /// [`NanPolicy::Greatest`](crate::NanPolicy::Greatest).
    pub probs: Array2<A>,
    /// `[R]`: the logarithm of the sum of `e^(score / temperature)` over all tokens. Infinite where a
    /// temperature below 1 takes it out of the range of `A`; the probabilities are right all the same.
    pub lse: Array1<A>,
    /// `[R]`: how many of the `k` the cuts [`Options::top_p`] and [`Options::min_p`] kept; tokens of
    /// score -inf do not count, nor others beside +inf. At least 1, but 0 in a row without a score above -inf or
    /// with NaN.
    pub kept: Array1<u32>,
    /// Of the tokens of [`Options::tokens`].
    pub tokens: Option<TokenScores<A>>,
}

/// What is known of given tokens, for `R` rows with `N` of them.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScores<A> {
    /// `[R, N]`: their log-probabilities over all tokens, before any cut.
    pub logprobs: Array2<A>,
    /// `[R, N]`: how many tokens come before them in the order of [`TopK::indices`].
    pub ranks: Array2<u32>,
}

/// Views of a [`TopK`] without its given tokens, as the backward pass takes them.
#[derive(Debug, Clone, Copy)]
pub struct TopKView<'a, A> {
    /// See [`TopK::indices`].
    pub indices: ArrayView2<'a, u32>,
    /// See [`TopK::probs`].
    pub probs: ArrayView2<'a, A>,
    /// See [`TopK::lse`]. The backward pass checks its shape and does not read it: it sums the row again.
    pub lse: ArrayView1<'a, A>,
    /// See [`TopK::kept`].
    pub kept: ArrayView1<'a, u32>,
}

/// Where [`softmax_topk_into`] writes; `k` is the number of columns of `indices`.
#[derive(Debug)]
pub struct TopKMut<'a, A> {
    /// See [`TopK::indices`].
    pub indices: ArrayViewMut2<'a, u32>,
    /// See [`TopK::probs`].
    pub probs: ArrayViewMut2<'a, A>,
    /// See [`TopK::lse`].
    pub lse: ArrayViewMut1<'a, A>,
    /// See [`TopK::kept`].
    pub kept: ArrayViewMut1<'a, u32>,
    /// See [`TopK::tokens`]; there exactly if [`Options::tokens`] is.
    pub tokens: Option<TokenScoresMut<'a, A>>,
}

/// Where the results of given tokens go.
#[derive(Debug)]
pub struct TokenScoresMut<'a, A> {
    /// See [`TokenScores::logprobs`].
    pub logprobs: ArrayViewMut2<'a, A>,
    /// See [`TokenScores::ranks`].
    pub ranks: ArrayViewMut2<'a, u32>,
}

/// The `k` most probable tokens of each row of `logits` `[R, V]`, their probabilities, and the
/// log-sum-exp over all tokens, in one read of the logits.
///
/// Views of any strides; fast when the last axis is contiguous. [`rows`](crate::rows) makes a matrix
/// of an array with more axes. Probabilities are in the type that is computed in, `f32` for 16-bit
/// logits.
///
/// The order is total: score descending, then token ascending; it is the same on every instruction
/// set. At the edges:
/// - 0 and -0 are equal;
/// - tokens of score +inf share the probability evenly, all others have 0, and the lse is +inf;
/// - a row of -inf, or that the mask forbids wholly, has probabilities 0, lse -inf and tokens 0 to
///   k - 1;
/// - probabilities below the smallest normal number of the compute type are exactly 0, their
///   logarithms are not cut off;
/// - NaN: [`Options::nan`];
/// - no rows are fine, no tokens are an error.
///
/// The same bits come out for any number of threads and for a row alone or in a batch.
///
/// Source: Milakov and Gimelshein, Online normalizer calculation for softmax (2018), algorithms 3 and
/// 4; `docs/derivation.md`.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
///
/// # Examples
/// ```
/// use ndarray::array;
/// use softmax_topk::{Options, softmax_topk};
///
/// let logits = array![[0.0_f32, 3.0, 1.0, 3.0]];
/// let top = softmax_topk(logits.view(), 2, &Options { log: true, ..Options::default() })?;
/// assert_eq!(top.indices, array![[1, 3]]);
/// assert!((top.lse[0] - 3.7817).abs() < 1e-4);
/// assert!((top.probs[[0, 0]] - (3.0 - top.lse[0])).abs() < 1e-6);
/// # Ok::<(), softmax_topk::Error>(())
/// ```
pub fn softmax_topk<T: Logit>(
    logits: ArrayView2<'_, T>,
    k: usize,
    options: &Options<'_, T::Acc>,
) -> Result<TopK<T::Acc>, Error> {
    let (rows, vocabulary) = logits.dim();
    // Before anything of size k is allocated.
    Call::new(logits.reborrow(), k, options)?;
    let mut top = TopK::new(rows, k, options)?;
    let mut workspace = Workspace::new(rows, vocabulary, k, &Tiling::default())?;
    softmax_topk_into(top.view_mut(), logits, options, &mut workspace)?;
    Ok(top)
}

/// [`softmax_topk`] into the caller's arrays.
///
/// Allocates nothing. (Rayon's queues may, the first time a pool is entered.)
///
/// # Errors
/// As [`softmax_topk`]; [`Error::WorkspaceTooSmall`] if the workspace was made for fewer or shorter
/// rows or a smaller `k`. The outputs are untouched, except after [`Error::Nan`].
pub fn softmax_topk_into<T: Logit>(
    top: TopKMut<'_, T::Acc>,
    logits: ArrayView2<'_, T>,
    options: &Options<'_, T::Acc>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    let k = top.indices.dim().1;
    let call = Call::new(logits.reborrow(), k, options)?;
    top.check(logits.dim().0, k, options)?;
    workspace.check(logits.dim().0, logits.dim().1, k)?;
    T::topk(call, top, workspace)
}

impl<A: Float> TopK<A> {
    /// Zeros for `rows` rows.
    pub(crate) fn new(rows: usize, k: usize, options: &Options<'_, A>) -> Result<Self, Error> {
        let scores = |tokens: ArrayView2<'_, u32>| -> Result<_, Error> {
            let (logprobs, ranks) = ("token_logprobs", "token_ranks");
            Ok(TokenScores {
                logprobs: try_array(logprobs, tokens.dim())?,
                ranks: try_array(ranks, tokens.dim())?,
            })
        };
        Ok(Self {
            indices: try_array("indices", (rows, k))?,
            probs: try_array("probs", (rows, k))?,
            lse: try_array("lse", rows)?,
            kept: try_array("kept", rows)?,
            tokens: options.tokens.map(scores).transpose()?,
        })
    }

    /// Views to read.
    pub fn view(&self) -> TopKView<'_, A> {
        TopKView {
            indices: self.indices.view(),
            probs: self.probs.view(),
            lse: self.lse.view(),
            kept: self.kept.view(),
        }
    }

    /// Views to write.
    pub fn view_mut(&mut self) -> TopKMut<'_, A> {
        TopKMut {
            indices: self.indices.view_mut(),
            probs: self.probs.view_mut(),
            lse: self.lse.view_mut(),
            kept: self.kept.view_mut(),
            tokens: self.tokens.as_mut().map(|tokens| TokenScoresMut {
                logprobs: tokens.logprobs.view_mut(),
                ranks: tokens.ranks.view_mut(),
            }),
        }
    }
}

impl<A: Float> TopKMut<'_, A> {
    fn check(&self, rows: usize, k: usize, options: &Options<'_, A>) -> Result<(), Error> {
        check_shape("indices", self.indices.shape(), &[rows, k])?;
        check_shape("probs", self.probs.shape(), &[rows, k])?;
        check_shape("lse", self.lse.shape(), &[rows])?;
        check_shape("kept", self.kept.shape(), &[rows])?;
        // Without tokens on one side, that side counts as having none.
        let wanted = options.tokens.map_or(0, |tokens| tokens.dim().1);
        let Some(tokens) = &self.tokens else {
            return if wanted == 0 { Ok(()) } else { Err(Error::TokensMissing { wanted }) };
        };
        if options.tokens.is_none() && tokens.logprobs.dim().1 > 0 {
            return Err(Error::TokensUnasked);
        }
        check_shape("tokens.logprobs", tokens.logprobs.shape(), &[rows, wanted])?;
        check_shape("tokens.ranks", tokens.ranks.shape(), &[rows, wanted])?;
        Ok(())
    }

    /// The same views for a shorter time.
    pub(crate) fn reborrow(&mut self) -> TopKMut<'_, A> {
        TopKMut {
            indices: self.indices.view_mut(),
            probs: self.probs.view_mut(),
            lse: self.lse.view_mut(),
            kept: self.kept.view_mut(),
            tokens: self.tokens.as_mut().map(|tokens| TokenScoresMut {
                logprobs: tokens.logprobs.view_mut(),
                ranks: tokens.ranks.view_mut(),
            }),
        }
    }

    /// The rows before `row`, and the others.
    pub(crate) fn split_at(self, row: usize) -> (Self, Self) {
        let (indices, indices_below) = self.indices.split_at(Axis(0), row);
        let (probs, probs_below) = self.probs.split_at(Axis(0), row);
        let (lse, lse_below) = self.lse.split_at(Axis(0), row);
        let (kept, kept_below) = self.kept.split_at(Axis(0), row);
        let (tokens, tokens_below) = self.tokens.map(|tokens| tokens.split_at(row)).unzip();
        let below = Self {
            indices: indices_below,
            probs: probs_below,
            lse: lse_below,
            kept: kept_below,
            tokens: tokens_below,
        };
        (Self { indices, probs, lse, kept, tokens }, below)
    }
}

impl<A> TokenScoresMut<'_, A> {
    fn split_at(self, row: usize) -> (Self, Self) {
        let (logprobs, logprobs_below) = self.logprobs.split_at(Axis(0), row);
        let (ranks, ranks_below) = self.ranks.split_at(Axis(0), row);
        let below = Self { logprobs: logprobs_below, ranks: ranks_below };
        (Self { logprobs, ranks }, below)
    }
}
