//! What to compute ([`Options`]) and how ([`Tiling`]).

use ndarray::{ArrayView1, ArrayView2};
use tensor_utils::{Float, Isa};

/// What is computed of the logits; [`Options::default`] is the plain softmax, as probabilities.
///
/// `A` is the type that is computed in: `f64` for `f64` logits, `f32` for all others. `R` rows, `V`
/// tokens.
///
/// The *score* of a token is its logit plus its bias, rounded to `A`, or -inf if the mask forbids it.
/// Order and ties are those of the scores; the temperature divides them afterwards.
#[derive(Debug, Clone)]
pub struct Options<'a, A: Float> {
    /// Divides the scores; positive, at most a thousandth of the largest number of `A`, and with a finite
    /// reciprocal in `A`. Default 1.
    ///
    /// There is no temperature 0: the best token is the first of the top-k, whatever the temperature.
    pub temperature: PerRow<'a>,
    /// Which tokens are allowed. Default: all.
    pub mask: Option<Mask<'a>>,
    /// Added to the logits, `[R, V]` or `[1, V]` for all rows. Default: nothing.
    pub bias: Option<ArrayView2<'a, A>>,
    /// Whether log-probabilities are wanted instead of probabilities. Default `false`.
    pub log: bool,
    /// Whether the probabilities are divided by the sum of those that the cuts kept. Default `false`.
    pub renormalise: bool,
    /// Keeps the shortest list of best tokens whose probabilities reach this sum, and no more than
    /// `k`; above 0, at most 1. The probabilities are those over all tokens. Default 1: all are kept.
    pub top_p: PerRow<'a>,
    /// Keeps tokens with at least this share of the best token's probability; in `[0, 1]`. Default 0.
    pub min_p: PerRow<'a>,
    /// What NaN among the scores means. Default [`NanPolicy::Error`].
    pub nan: NanPolicy,
    /// Tokens whose log-probability and rank are wanted, `[R, N]`. Default: none. A rank takes a look at every
    /// score that may be before the token: a fifth of the time of the row for each of a few random ones.
    pub tokens: Option<ArrayView2<'a, u32>>,
}

impl<A: Float> Default for Options<'_, A> {
    fn default() -> Self {
        Self {
            temperature: PerRow::All(1.0),
            mask: None,
            bias: None,
            log: false,
            renormalise: false,
            top_p: PerRow::All(1.0),
            min_p: PerRow::All(0.0),
            nan: NanPolicy::default(),
            tokens: None,
        }
    }
}

/// A number for each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PerRow<'a> {
    /// The same for all rows.
    All(f64),
    /// `[R]`.
    Each(ArrayView1<'a, f64>),
}

/// Tokens that are allowed, one bit each, as constrained decoding makes them: token `i` is bit
/// `i % B` of word `i / B`, of words of `B` bits; 1 allows it.
///
/// Bits past the last token are ignored. What a token that is not allowed has for a logit has no
/// effect, be it NaN.
#[derive(Debug, Clone, Copy)]
pub enum Mask<'a> {
    /// `[R, ceil(V / 32)]`, or `[1, ceil(V / 32)]` for all rows.
    U32(ArrayView2<'a, u32>),
    /// `[R, ceil(V / 64)]`, or `[1, ceil(V / 64)]` for all rows.
    U64(ArrayView2<'a, u64>),
}

/// What NaN among the scores means. The NaN of a token that is not allowed means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum NanPolicy {
    /// The call fails with [`Error::Nan`](crate::Error::Nan).
    #[default]
    Error,
    /// NaN is greater than all numbers, as in PyTorch's `topk`: it comes first, lower index first, and
    /// the row's probabilities and lse are NaN, as those of PyTorch's `softmax`.
    Greatest,
    /// The token counts as if it were not allowed: its score is -inf.
    Ignore,
}

/// How the work is done. It changes the rounding, not what is computed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tiling {
    /// Instruction set. `None`: [`Isa::active`].
    pub isa: Option<Isa>,
    /// How often the logits are read. Default [`Passes::One`].
    pub passes: Passes,
}

/// How often the logits are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Passes {
    /// Once: the sum of exponentials is corrected when the maximum grows (online softmax).
    #[default]
    One,
    /// Twice: the maximum first, then the sum.
    Two,
}
