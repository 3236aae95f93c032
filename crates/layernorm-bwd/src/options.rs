//! What to compute ([`Options`]) and how ([`Tiling`]).

use ndarray::ArrayView1;
use tensor_utils::{Element, Isa};

/// What the norm computes; [`Options::default`] is layer norm without gamma and beta.
///
/// The type `W` of gamma, beta and their gradients may be another than that of `x`, as long as both
/// compute in the same type: `bf16` activations with an `f32` gamma are `Options<f32>`.
#[derive(Debug, Clone)]
pub struct Options<'a, W: Element> {
    /// Which norm. Default [`Kind::LayerNorm`].
    pub kind: Kind,
    /// Added to the variance (the mean square, for RMS norm); at least 0 and finite. With 0 a row
    /// without variance (for RMS norm, of zeros) is NaN, and small rows are imprecise, see
    /// [`layer_norm`](crate::layer_norm). Default 1e-5.
    pub eps: f64,
    /// Factor of each column, `[D]`. Default: 1.
    pub gamma: Option<ArrayView1<'a, W>>,
    /// Whether the factor is `1 + gamma` instead of `gamma`, as in Gemma; does nothing without gamma. Default
    /// `false`.
    pub one_plus_gamma: bool,
    /// Term of each column, `[D]`. Default: 0.
    pub beta: Option<ArrayView1<'a, W>>,
}

impl<W: Element> Default for Options<'_, W> {
    fn default() -> Self {
        Self { kind: Kind::default(), eps: 1e-5, gamma: None, one_plus_gamma: false, beta: None }
    }
}

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Kind {
    /// `x_hat = (x - mean(x)) / sqrt(var(x) + eps)`, with the variance divided by `D`.
    #[default]
    LayerNorm,
    /// `x_hat = x / sqrt(mean(x^2) + eps)`.
    RmsNorm,
}

/// How the work is done. It changes the rounding, not what is computed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tiling {
    /// Instruction set. `None`: [`Isa::active`].
    pub isa: Option<Isa>,
}
