//! What the tests of this crate share: calls with all their arguments, drawn from a seed.

#![allow(dead_code, reason = "each test binary uses its own part")]

use layernorm_bwd::{
    Gradients, GradientsMut, Kind, Normalised, Options, Saved, StatisticsMut, Tiling, Workspace,
    layer_norm_backward_into, layer_norm_backward_reference, layer_norm_into,
};
use ndarray::{
    Array, Array1, Array2, ArrayView2, ArrayViewMut, Axis, Dimension, IntoDimension, Slice,
};
use tensor_utils::testing::{Guarded, Poison, Seeded, Tolerance};
use tensor_utils::{Element, Isa};

/// Some roundings of numbers of the size of 1.
pub(crate) fn tolerance<T: Element>() -> Tolerance {
    match T::NAME {
        "f64" => Tolerance { abs: 4e-14, rel: 4e-14 },
        "f32" => Tolerance { abs: 1.5e-5, rel: 1.5e-5 },
        _ => Tolerance { abs: 2e-5, rel: T::EPSILON / 2.0 + 1e-5 },
    }
}

/// An output with margins, also between its rows, unless it is empty.
enum Output<T, D: Dimension> {
    Guarded(Guarded<T, D>),
    Empty(Array<T, D>),
}

impl<T: Poison, D: Dimension> Output<T, D> {
    fn new(shape: impl IntoDimension<Dim = D>) -> Self {
        let shape = shape.into_dimension();
        if shape.size() == 0 {
            Self::Empty(Array::default(shape))
        } else {
            Self::Guarded(Guarded::padded(shape))
        }
    }

    fn view_mut(&mut self) -> ArrayViewMut<'_, T, D> {
        match self {
            Self::Guarded(guarded) => guarded.view_mut(),
            Self::Empty(array) => array.view_mut(),
        }
    }

    fn finish(self) -> Array<T, D> {
        match self {
            Self::Guarded(guarded) => guarded.finish().unwrap(),
            Self::Empty(array) => array,
        }
    }
}

/// What the backward pass is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Statistics,
    Input,
    Output,
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

    /// An array and the part of it that holds `matrix`.
    pub(crate) fn lay_out<T: Element>(self, matrix: &Array2<T>) -> Laid<T> {
        let (rows, d) = matrix.dim();
        let array = match self {
            Self::Standard => matrix.clone(),
            Self::RowsApart => Array2::default((rows, d + 3)),
            Self::Transposed => Array2::default((d, rows)),
            Self::Reversed => Array2::default((2 * rows, 2 * d)),
        };
        let mut laid = Laid { layout: self, dim: (rows, d), array };
        let mut to = laid.array.view_mut();
        match self {
            Self::Standard => {}
            Self::RowsApart => to.slice_axis_mut(Axis(1), Slice::from(..d)).assign(matrix),
            Self::Transposed => to.reversed_axes().assign(matrix),
            Self::Reversed => {
                for axis in [Axis(0), Axis(1)] {
                    to.slice_axis_inplace(axis, Slice::new(0, None, -2));
                }
                to.assign(matrix);
            }
        }
        laid
    }
}

/// A matrix in some [`Layout`].
#[derive(Debug, Clone)]
pub(crate) struct Laid<T> {
    layout: Layout,
    dim: (usize, usize),
    array: Array2<T>,
}

impl<T: Element> Laid<T> {
    pub(crate) fn view(&self) -> ArrayView2<'_, T> {
        let mut view = self.array.view();
        match self.layout {
            Layout::Standard => view,
            Layout::RowsApart => {
                view.slice_axis_inplace(Axis(1), Slice::from(..self.dim.1));
                view
            }
            Layout::Transposed => view.reversed_axes(),
            Layout::Reversed => {
                for axis in [Axis(0), Axis(1)] {
                    view.slice_axis_inplace(axis, Slice::new(0, None, -2));
                }
                view
            }
        }
    }
}

/// What a call computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Features {
    pub(crate) kind: Kind,
    pub(crate) eps: f64,
    pub(crate) gamma: bool,
    pub(crate) one_plus_gamma: bool,
    pub(crate) beta: bool,
    pub(crate) dres: bool,
    pub(crate) accumulate: bool,
    pub(crate) source: Source,
    /// Mean of the elements of `x`, whose deviation is 1.
    pub(crate) mean: f64,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            kind: Kind::LayerNorm,
            eps: 1e-5,
            gamma: true,
            one_plus_gamma: false,
            beta: true,
            dres: false,
            accumulate: false,
            source: Source::Statistics,
            mean: 0.0,
        }
    }
}

/// Every option by itself, and some together.
pub(crate) fn all_features() -> Vec<Features> {
    let plain = Features::default;
    let mut all = Vec::new();
    for kind in [Kind::LayerNorm, Kind::RmsNorm] {
        for source in [Source::Statistics, Source::Input, Source::Output] {
            let plain = || Features { kind, source, ..plain() };
            all.extend([
                plain(),
                Features { gamma: false, ..plain() },
                Features { beta: false, ..plain() },
                Features { gamma: false, beta: false, ..plain() },
                Features { one_plus_gamma: true, ..plain() },
                Features { eps: 0.3, ..plain() },
                Features { dres: true, ..plain() },
                Features { accumulate: true, ..plain() },
                Features { accumulate: true, dres: true, one_plus_gamma: true, ..plain() },
            ]);
        }
    }
    all
}

/// The arrays of a call.
#[derive(Debug, Clone)]
pub(crate) struct Inputs<T, W> {
    pub(crate) features: Features,
    pub(crate) x: Array2<T>,
    pub(crate) dy: Array2<T>,
    pub(crate) dres: Array2<T>,
    pub(crate) gamma: Array1<W>,
    pub(crate) beta: Array1<W>,
    /// What dgamma and dbeta are added to.
    pub(crate) before: [Array1<W>; 2],
}

/// Which gradients to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) dx: bool,
    pub(crate) dgamma: bool,
    pub(crate) dbeta: bool,
}

impl Wanted {
    pub(crate) const ALL: Self = Self { dx: true, dgamma: true, dbeta: true };
}

/// Computed gradients.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Some3<T, W> {
    pub(crate) dx: Option<Array2<T>>,
    pub(crate) dgamma: Option<Array1<W>>,
    pub(crate) dbeta: Option<Array1<W>>,
}

impl<T, W> Inputs<T, W>
where
    T: Element + Poison,
    W: Element<Acc = T::Acc> + Poison,
    T::Acc: Poison,
{
    pub(crate) fn new(features: Features, rows: usize, d: usize, seed: u64) -> Self {
        let mut seeded = Seeded::new(seed);
        let mut x: Array2<f64> = seeded.normal((rows, d));
        x += features.mean;
        Self {
            features,
            x: x.mapv(T::from_f64),
            dy: seeded.normal((rows, d)),
            dres: seeded.normal((rows, d)),
            // Not near 0, which recovering x_hat from y divides by.
            gamma: seeded.uniform(d, 0.5..1.5),
            beta: seeded.normal(d),
            before: [seeded.normal(d), seeded.normal(d)],
        }
    }

    pub(crate) fn options(&self) -> Options<'_, W> {
        let Features { kind, eps, gamma, one_plus_gamma, beta, .. } = self.features;
        Options {
            kind,
            eps,
            gamma: gamma.then(|| self.gamma.view()),
            one_plus_gamma,
            beta: beta.then(|| self.beta.view()),
        }
    }

    /// The forward pass into guarded outputs.
    pub(crate) fn forward(&self, isa: Isa) -> Normalised<T> {
        self.forward_of(self.x.view(), isa)
    }

    pub(crate) fn forward_of(&self, x: ArrayView2<'_, T>, isa: Isa) -> Normalised<T> {
        let (rows, d) = x.dim();
        let mut workspace = Workspace::new(rows, d, &Tiling { isa: Some(isa) }).unwrap();
        let mut y = Output::<T, _>::new((rows, d));
        let mut mean = Output::<T::Acc, _>::new(rows);
        let mut rstd = Output::<T::Acc, _>::new(rows);
        let statistics = StatisticsMut { mean: mean.view_mut(), rstd: rstd.view_mut() };
        let options = self.options();
        layer_norm_into(y.view_mut(), Some(statistics), x, &options, &mut workspace).unwrap();
        Normalised { y: y.finish(), mean: mean.finish(), rstd: rstd.finish() }
    }

    /// The backward pass, after a forward pass for what it saves.
    pub(crate) fn backward(&self, isa: Isa) -> Gradients<T, W> {
        let got = self.backward_wanted(Wanted::ALL, isa);
        Gradients { dx: got.dx.unwrap(), dgamma: got.dgamma.unwrap(), dbeta: got.dbeta.unwrap() }
    }

    pub(crate) fn backward_wanted(&self, wanted: Wanted, isa: Isa) -> Some3<T, W> {
        self.backward_laid_out([Layout::Standard; 3], wanted, isa)
    }

    /// With x (or y), dy and dres in these layouts.
    pub(crate) fn backward_laid_out(
        &self,
        layouts: [Layout; 3],
        wanted: Wanted,
        isa: Isa,
    ) -> Some3<T, W> {
        let (rows, d) = self.x.dim();
        let forward = self.forward(isa);
        let x = layouts[0].lay_out(&self.x);
        let y = layouts[0].lay_out(&forward.y);
        let dy = layouts[1].lay_out(&self.dy);
        let dres = layouts[2].lay_out(&self.dres);
        let (mean, rstd) = (forward.mean.view(), forward.rstd.view());
        let saved = match self.features.source {
            Source::Statistics => Saved::Statistics { x: x.view(), mean, rstd },
            Source::Input => Saved::Input { x: x.view() },
            Source::Output => Saved::Output { y: y.view(), rstd },
        };

        let mut dx = wanted.dx.then(|| Output::<T, _>::new((rows, d)));
        let weight = |wanted: bool, before: &Array1<W>| {
            wanted.then(|| {
                let mut output = Output::<W, _>::new(d);
                if self.features.accumulate {
                    output.view_mut().assign(before);
                }
                output
            })
        };
        let mut dgamma = weight(wanted.dgamma, &self.before[0]);
        let mut dbeta = weight(wanted.dbeta, &self.before[1]);
        let mut workspace = Workspace::new(rows, d, &Tiling { isa: Some(isa) }).unwrap();
        let gradients = GradientsMut {
            dx: dx.as_mut().map(|dx| dx.view_mut()),
            dgamma: dgamma.as_mut().map(|dgamma| dgamma.view_mut()),
            dbeta: dbeta.as_mut().map(|dbeta| dbeta.view_mut()),
            accumulate: self.features.accumulate,
            dres: self.features.dres.then(|| dres.view()),
        };
        layer_norm_backward_into(gradients, dy.view(), saved, &self.options(), &mut workspace)
            .unwrap();
        Some3 {
            dx: dx.map(|dx| dx.finish()),
            dgamma: dgamma.map(|dgamma| dgamma.finish()),
            dbeta: dbeta.map(|dbeta| dbeta.finish()),
        }
    }

    /// The answer in f64, with what is added to the gradients.
    pub(crate) fn reference(&self) -> Gradients<f64, f64> {
        let mut want =
            layer_norm_backward_reference(self.dy.view(), self.x.view(), &self.options()).unwrap();
        if self.features.dres {
            want.dx += &self.dres.mapv(|x| x.to_f64());
        }
        if self.features.accumulate {
            want.dgamma += &self.before[0].mapv(|x| x.to_f64());
            want.dbeta += &self.before[1].mapv(|x| x.to_f64());
        }
        want
    }
}
