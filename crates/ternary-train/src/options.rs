//! What to compute.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use tensor_utils::Isa;

use crate::Error;

/// How a matrix is made ternary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Projection {
    /// How scale and codes follow from the weights. Default [`Rule::AbsMean`].
    pub rule: Rule,
    /// Consecutive weights of a row that share a scale: a multiple of 32 up to 256. The last group of
    /// a row may be shorter; it is a group of the weights it has. Default 128.
    pub group: usize,
}

impl Default for Projection {
    fn default() -> Self {
        Self { rule: Rule::AbsMean, group: 128 }
    }
}

/// How the scale `s` and the codes `t` of a group follow from its weights `w`. Sums are in f64; scales are
/// rounded to f32 and then to f16 before the codes are taken, as PyTorch rounds an f64 to f16 (one in some
/// 30,000 is not the nearest f16 therefore). A weight at the edge of the zero band becomes 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// `s = mean |w|`, `t = clip(round(w / s), -1, 1)` with halves to even: Ma et al., The era of
    /// 1-bit LLMs (2024), equations 1 to 3, per group.
    AbsMean,
    /// `t = sign(w)` where `|w| > 0.7 mean |w|`, else 0; `s` is the mean of those `|w|`: Li, Zhang
    /// and Liu, Ternary weight networks (2016), equations 3 and 6, with their rounded constant.
    Twn,
    /// The `s` and `t` that minimise `sum (w - s t)^2`: for each number `k` of nonzero codes the
    /// largest `|w|` are best and `s` is their mean; the best `k` is searched. Then
    /// `t = clip(round(w / s), -1, 1)`.
    Optimal,
}

impl Rule {
    /// All rules.
    pub const ALL: [Self; 3] = [Self::AbsMean, Self::Twn, Self::Optimal];

    /// The name that [`FromStr`] takes.
    pub fn name(self) -> &'static str {
        match self {
            Self::AbsMean => "absmean",
            Self::Twn => "twn",
            Self::Optimal => "optimal",
        }
    }
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|rule| rule.name() == name)
            .ok_or_else(|| Error::option("rule", "absmean, twn or optimal", name))
    }
}

/// How the work is done. It changes no bits of packed products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tiling {
    /// Instruction set. `None`: [`Isa::active`].
    pub isa: Option<Isa>,
}
