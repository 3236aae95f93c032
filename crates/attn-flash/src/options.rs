//! What to compute ([`Options`]) and how ([`Tiling`]).

use ndarray::{ArrayView2, ArrayViewD};
use tensor_utils::{Element, Isa};

use crate::{AncestorMask, Mask, NoMask};

/// What attention computes; [`Options::default`] is plain softmax attention.
///
/// Query `i` stands at position `p = i + query_offset`, key `j` at position `j`. The score of the
/// pair is
///
/// ```text
/// s = softcap(scale * q_i . k_j) + bias[i, j] - alibi_slope * |p - j|
/// ```
///
/// where `softcap(x) = c tanh(x / c)`, and the pair is visible if *every* condition that is set
/// holds: `causal`, `window`, `key_lengths`, `mask`, `tree`, `user_mask`, and `s` is not `-inf`
/// (so a bias of `-inf` masks). A pair that is not visible has no effect, whatever its key, value
/// or bias holds, NaN included.
///
/// For packed batches ([`attention_varlen`](crate::attention_varlen)) every sequence is a batch
/// entry with its own `N` and `M`: `bias` and `mask` broadcast to `[sequences, H, longest N,
/// longest M]`, `key_lengths` has one length a sequence, and a `tree` must fit every sequence.
#[derive(Debug, Clone)]
pub struct Options<'a, T: Element, M: Mask = NoMask> {
    /// Factor of the dot products, finite in the compute type. `None`: `1 / sqrt(D)`.
    pub scale: Option<f64>,
    /// Whether a query sees only keys at its own position and before: `j <= p`. Default `false`.
    pub causal: bool,
    /// Position of query 0. `None`: `M - N`, so that the last query stands at the last key.
    ///
    /// Drawn for `causal` with `N = 2`, `M = 4` (`x` visible):
    ///
    /// ```text
    /// None (= 2)   Some(0)
    /// x x x .      x . . .
    /// x x x x      x x . .
    /// ```
    pub query_offset: Option<isize>,
    /// How far a query sees. Default: everywhere.
    pub window: Window,
    /// Bound `c` of the scores, finite and above 0 in the compute type: `c tanh(s / c)`, before bias and
    /// ALiBi. Default: none.
    pub softcap: Option<f64>,
    /// Added to the scores; broadcasts to `[B, H, N, M]`. Default: none.
    pub bias: Option<ArrayViewD<'a, T>>,
    /// `false` masks; broadcasts to `[B, H, N, M]`. Default: none.
    pub mask: Option<ArrayViewD<'a, bool>>,
    /// Number of valid keys of each batch entry, `[B]`: keys at or past it are masked. Positions
    /// still count from `M`. Default: all `M`.
    pub key_lengths: Option<&'a [usize]>,
    /// ALiBi slopes, `[B, H]` or `[1, H]` (Press, Smith and Lewis, 2021). Default: none.
    pub alibi_slopes: Option<ArrayView2<'a, T::Acc>>,
    /// A logit per head, `[H]`, that joins the softmax's denominator but has no value; it counts in
    /// the lse. `-inf` is none. Default: none.
    pub sinks: Option<&'a [T::Acc]>,
    /// Ancestor mask of a token tree: the `N` queries are the last `N` keys; each sees the first
    /// `M - N` keys, its ancestors and itself. Default: none.
    pub tree: Option<&'a AncestorMask>,
    /// A mask in code. Default: [`NoMask`].
    pub user_mask: M,
}

impl<T: Element> Default for Options<'_, T> {
    fn default() -> Self {
        Self {
            scale: None,
            causal: false,
            query_offset: None,
            window: Window::default(),
            softcap: None,
            bias: None,
            mask: None,
            key_lengths: None,
            alibi_slopes: None,
            sinks: None,
            tree: None,
            user_mask: NoMask,
        }
    }
}

impl<'a, T: Element, M: Mask> Options<'a, T, M> {
    /// The same options with `mask` as the user mask.
    pub fn with_user_mask<U: Mask>(self, mask: U) -> Options<'a, T, U> {
        Options {
            scale: self.scale,
            causal: self.causal,
            query_offset: self.query_offset,
            window: self.window,
            softcap: self.softcap,
            bias: self.bias,
            mask: self.mask,
            key_lengths: self.key_lengths,
            alibi_slopes: self.alibi_slopes,
            sinks: self.sinks,
            tree: self.tree,
            user_mask: mask,
        }
    }
}

/// A sliding window: the query at position `p` sees keys `p - left ..= p + right`.
///
/// `causal` with `left: Some(w - 1)` is the window of `w` keys that Mistral and Gemma use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// Keys before the query's own. `None`: all.
    pub left: Option<usize>,
    /// Keys after the query's own. `None`: all.
    pub right: Option<usize>,
}

/// How the work is cut. None of it changes what is computed; `key_block` and `isa` change the
/// rounding, nothing else does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tiling {
    /// Query rows that share one packed block of keys, at least 1. Default 1536.
    pub query_block: usize,
    /// Keys between two corrections of the running maximum, at least 1, rounded up to a multiple of
    /// 32. Default 512.
    pub key_block: usize,
    /// Instruction set. `None`: [`Isa::active`].
    pub isa: Option<Isa>,
}

impl Default for Tiling {
    fn default() -> Self {
        Self { query_block: 1536, key_block: 512, isa: None }
    }
}
