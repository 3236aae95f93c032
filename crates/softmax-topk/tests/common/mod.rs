//! What the tests of this crate share: calls with all their arguments, drawn from a seed.

#![allow(dead_code, reason = "each test binary uses its own part")]

use ndarray::{Array1, Array2, ArrayView2, Axis, Slice};
use rand::RngExt;
use softmax_topk::{
    Error, Logit, Mask, NanPolicy, Options, Passes, PerRow, Tiling, TopK, TopKGradients, Workspace,
    softmax_topk, softmax_topk_into,
};
use tensor_utils::testing::{Seeded, Tolerance, isas};

/// Every instruction set with every number of passes.
pub(crate) fn tilings() -> Vec<Tiling> {
    let both = [Passes::One, Passes::Two];
    let of = |isa| both.map(|passes| Tiling { isa: Some(isa), passes });
    isas().into_iter().flat_map(of).collect()
}

/// Some roundings of log-probabilities, which are of the size of `size`.
pub(crate) fn tolerance<T: Logit>(size: f64) -> Tolerance {
    let rounding = if T::NAME == "f64" { f64::EPSILON } else { f64::from(f32::EPSILON) };
    let bound = 16.0 * rounding * size.max(1.0);
    Tolerance { abs: bound, rel: bound }
}

/// What the values of the logits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Values {
    Normal,
    /// Whole numbers, many of them equal.
    Whole,
    Equal,
    Ascending,
    Descending,
    /// 0 and -0.
    Zeros,
    /// Most are -inf.
    MostlyMinusInfinity,
    MinusInfinity,
    /// Some are +inf.
    PlusInfinity,
    /// Some are NaN.
    SomeNan,
    Nan,
    /// Of all sizes up to overflow, and both infinities.
    Extreme,
}

impl Values {
    pub(crate) const ALL: [Self; 12] = [
        Self::Normal,
        Self::Whole,
        Self::Equal,
        Self::Ascending,
        Self::Descending,
        Self::Zeros,
        Self::MostlyMinusInfinity,
        Self::MinusInfinity,
        Self::PlusInfinity,
        Self::SomeNan,
        Self::Nan,
        Self::Extreme,
    ];

    pub(crate) fn draw<T: Logit>(self, rows: usize, vocabulary: usize, seed: u64) -> Array2<T> {
        let inf = f64::INFINITY;
        let mut rng = Seeded::new(seed);
        let normal: Array2<f64> = rng.normal((rows, vocabulary));
        let mut x = normal * 3.0;
        let mut some = |share: f64| rng.rng().random_bool(share);
        for ((_, j), x) in x.indexed_iter_mut() {
            match self {
                Self::Normal => {}
                Self::Whole => *x = x.round(),
                Self::Equal => *x = 1.5,
                Self::Ascending => *x = j as f64 / 64.0,
                Self::Descending => *x = -(j as f64) / 64.0,
                Self::Zeros => *x = if *x > 0.0 { 0.0 } else { -0.0 },
                Self::MostlyMinusInfinity => *x = if some(0.95) { -inf } else { *x },
                Self::MinusInfinity => *x = -inf,
                Self::PlusInfinity => *x = if some(0.05) { inf } else { *x },
                Self::SomeNan => *x = if some(0.05) { f64::NAN } else { *x },
                Self::Nan => *x = if some(0.5) { f64::NAN } else { -f64::NAN },
                Self::Extreme => {
                    *x = [*x, *x * 1e4, f64::from(f32::MIN), -inf, *x * 1e-40][usize::from(some(
                        0.5,
                    )) + usize::from(
                        some(0.5),
                    ) * 2
                        + usize::from(some(0.1))]
                }
            }
        }
        x.mapv(T::from_f64)
    }
}

/// What is asked of the logits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Features {
    pub(crate) rows: usize,
    pub(crate) vocabulary: usize,
    pub(crate) k: usize,
    pub(crate) values: Values,
    pub(crate) seed: u64,
    pub(crate) nan: NanPolicy,
    /// One for each row.
    pub(crate) temperatures: bool,
    /// Bits of a word, or 0 for none.
    pub(crate) mask_bits: usize,
    /// Share of the tokens that are allowed.
    pub(crate) allowed: f64,
    pub(crate) bias: bool,
    /// Whether bias and mask have one row for all.
    pub(crate) shared: bool,
    pub(crate) log: bool,
    pub(crate) renormalise: bool,
    pub(crate) top_p: f64,
    pub(crate) min_p: f64,
    /// Given tokens.
    pub(crate) tokens: usize,
}

impl Features {
    pub(crate) fn new(rows: usize, vocabulary: usize, k: usize) -> Self {
        Self {
            rows,
            vocabulary,
            k,
            values: Values::Normal,
            seed: 1,
            nan: NanPolicy::Error,
            temperatures: false,
            mask_bits: 0,
            allowed: 0.5,
            bias: false,
            shared: false,
            log: false,
            renormalise: false,
            top_p: 1.0,
            min_p: 0.0,
            tokens: 0,
        }
    }
}

/// A call with all its arguments.
#[derive(Debug, Clone)]
pub(crate) struct Inputs<T: Logit> {
    pub(crate) features: Features,
    pub(crate) logits: Array2<T>,
    pub(crate) temperature: Array1<f64>,
    pub(crate) mask_32: Array2<u32>,
    pub(crate) mask_64: Array2<u64>,
    pub(crate) bias: Array2<T::Acc>,
    pub(crate) tokens: Array2<u32>,
    pub(crate) d_probs: Array2<T::Acc>,
    pub(crate) d_lse: Array1<T::Acc>,
    pub(crate) d_tokens: Array2<T::Acc>,
}

impl<T: Logit> Inputs<T> {
    pub(crate) fn new(features: Features) -> Self {
        let Features { rows, vocabulary, k, seed, .. } = features;
        let mut seeded = Seeded::new(seed + 1000);
        let of_rows = if features.shared { 1 } else { rows };
        let (temperature, bias) =
            (seeded.uniform(rows, 0.3..2.5), seeded.normal((of_rows, vocabulary)));
        let (d_probs, d_lse) = (seeded.normal((rows, k)), seeded.normal(rows));
        let d_tokens = seeded.normal((rows, features.tokens));
        let mut word = || {
            (0..64).fold(0, |word, _| {
                word << 1 | u64::from(seeded.rng().random_bool(features.allowed))
            })
        };
        let mask_64 = Array2::from_shape_simple_fn((of_rows, vocabulary.div_ceil(64)), &mut word);
        let mask_32 =
            Array2::from_shape_simple_fn((of_rows, vocabulary.div_ceil(32)), || word() as u32);
        let tokens = Array2::from_shape_simple_fn((rows, features.tokens), || {
            seeded.rng().random_range(0..vocabulary as u32)
        });
        let logits = features.values.draw(rows, vocabulary, seed);
        Self {
            features,
            logits,
            temperature,
            mask_32,
            mask_64,
            bias,
            tokens,
            d_probs,
            d_lse,
            d_tokens,
        }
    }

    pub(crate) fn options(&self) -> Options<'_, T::Acc> {
        let Features { log, renormalise, top_p, min_p, nan, .. } = self.features;
        Options {
            temperature: if self.features.temperatures {
                PerRow::Each(self.temperature.view())
            } else {
                PerRow::All(1.0)
            },
            mask: match self.features.mask_bits {
                32 => Some(Mask::U32(self.mask_32.view())),
                64 => Some(Mask::U64(self.mask_64.view())),
                _ => None,
            },
            bias: self.features.bias.then(|| self.bias.view()),
            log,
            renormalise,
            top_p: PerRow::All(top_p),
            min_p: PerRow::All(min_p),
            nan,
            tokens: (self.features.tokens > 0).then(|| self.tokens.view()),
        }
    }

    pub(crate) fn gradients(&self) -> TopKGradients<'_, T::Acc> {
        TopKGradients {
            probs: Some(self.d_probs.view()),
            lse: Some(self.d_lse.view()),
            token_logprobs: (self.features.tokens > 0).then(|| self.d_tokens.view()),
        }
    }

    pub(crate) fn forward(&self, tiling: &Tiling) -> Result<TopK<T::Acc>, Error> {
        self.forward_of(self.logits.view(), tiling)
    }

    /// The result for other logits of the same shape.
    pub(crate) fn forward_of(
        &self,
        logits: ArrayView2<'_, T>,
        tiling: &Tiling,
    ) -> Result<TopK<T::Acc>, Error> {
        let Features { rows, vocabulary, k, .. } = self.features;
        let mut top = self.blank();
        let mut workspace = Workspace::new(rows, vocabulary, k, tiling)?;
        softmax_topk_into(top.view_mut(), logits, &self.options(), &mut workspace)?;
        Ok(top)
    }

    /// Results of the right shape with values that no call has.
    pub(crate) fn blank(&self) -> TopK<T::Acc> {
        use tensor_utils::Element;
        let Features { rows, vocabulary, k, tokens, .. } = self.features;
        let zeros = Array2::<T>::default((rows, vocabulary.max(1)));
        let given = Array2::zeros((rows, tokens));
        let options = Options { tokens: (tokens > 0).then(|| given.view()), ..Options::default() };
        let mut top = softmax_topk(zeros.view(), k, &options).unwrap();
        top.indices.fill(u32::MAX);
        top.kept.fill(u32::MAX);
        top.probs.fill(T::Acc::from_f64(-7.0));
        top.lse.fill(T::Acc::from_f64(-7.0));
        top
    }
}

/// How a matrix lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Standard,
    /// Rows are contiguous but apart.
    RowsApart,
    /// Columns are contiguous.
    Transposed,
    /// Every other element of every other row, from the end.
    Reversed,
}

impl Layout {
    pub(crate) const ALL: [Self; 4] =
        [Self::Standard, Self::RowsApart, Self::Transposed, Self::Reversed];

    /// Calls `f` with a view of this layout.
    pub(crate) fn with<T: Copy + Default, R>(
        self,
        matrix: &Array2<T>,
        f: impl FnOnce(ArrayView2<'_, T>) -> R,
    ) -> R {
        let (rows, columns) = matrix.dim();
        let mut array = match self {
            Self::Standard => Array2::default((rows, columns)),
            Self::RowsApart => Array2::default((rows, columns + 3)),
            Self::Transposed => Array2::default((columns, rows)),
            Self::Reversed => Array2::default((2 * rows, 2 * columns)),
        };
        let mut view = array.view_mut();
        match self {
            Self::Standard => {}
            Self::RowsApart => view.slice_axis_inplace(Axis(1), Slice::from(..columns)),
            Self::Transposed => view = view.reversed_axes(),
            Self::Reversed => {
                view.slice_axis_inplace(Axis(0), Slice::new(0, None, -2));
                view.slice_axis_inplace(Axis(1), Slice::new(0, None, -2));
            }
        }
        view.assign(matrix);
        f(view.view())
    }
}
