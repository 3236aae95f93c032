//! The backward passes of layer norm and RMS norm against those of PyTorch, without the forward
//! passes; and the precision of `dx` where the mean is large.

use anyhow::Result;
use layernorm_bwd::{
    Gradients, GradientsMut, Kind, Options, Saved, Tiling, Workspace, layer_norm,
    layer_norm_backward, layer_norm_backward_into, layer_norm_backward_naive,
    layer_norm_backward_reference,
};
use ndarray::{Array1, Array2};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use rayon::ThreadPool;
use serde_json::{Value, json};
use tensor_utils::{Element, bf16, testing};

use super::attn_flash::largest_difference;
use super::duel::{Case, Contest};
use super::peer::{Input, Peer};
use super::precision::{Errors, PrecisionCase, Spread};
use crate::cases::Stored;

/// What distinguishes a case from others of its element type.
#[derive(Clone, Copy)]
struct Setup {
    /// All axes but the last are rows.
    shape: [usize; 3],
    kind: Kind,
    /// Whether our side allocates its results and workspace, as PyTorch does.
    allocating: bool,
}

/// Training shapes, and a small one.
pub(super) fn cases() -> Vec<Case> {
    let [large, wide] = [[4, 2048, 1024], [2, 2048, 4096]].map(Setup::layer_norm);
    let [medium, small] = [[8, 512, 768], [2, 128, 1024]].map(Setup::layer_norm);
    vec![
        case::<f32>(large, 1e-4),
        case::<f32>(large.allocating(), 1e-4),
        case::<f32>(wide, 1e-4),
        case::<f32>(wide.allocating(), 1e-4),
        case::<f32>(medium, 1e-4),
        case::<f32>(small, 1e-4),
        case::<f32>(large.rms_norm(), 1e-4),
        case::<bf16>(large, 0.25),
        case::<bf16>(medium, 0.25),
    ]
}

/// Inputs with standard deviation 1 around these means.
pub(super) fn precision() -> Vec<PrecisionCase> {
    [0.0, 1e2, 1e4, 1e6]
        .into_iter()
        .map(|mean| PrecisionCase {
            package: "layernorm-bwd",
            kernel: "layernorm-bwd",
            name: format!("dx, mean {mean:e}, deviation 1, [256, 1024]"),
            dtype: f32::NAME,
            measure: Box::new(move |peer, pool| errors(mean, peer, pool)),
        })
        .collect()
}

impl Setup {
    fn layer_norm(shape: [usize; 3]) -> Self {
        Self { shape, kind: Kind::LayerNorm, allocating: false }
    }

    fn rms_norm(self) -> Self {
        Self { kind: Kind::RmsNorm, ..self }
    }

    fn allocating(self) -> Self {
        Self { allocating: true, ..self }
    }

    fn rows(self) -> usize {
        self.shape[0] * self.shape[1]
    }

    fn name(self) -> String {
        let kind = match self.kind {
            Kind::LayerNorm => "layer norm",
            Kind::RmsNorm => "RMS norm",
        };
        let form = if self.allocating { ", allocating" } else { "" };
        format!("{:?} {kind}{form}", self.shape)
    }
}

fn case<T: Element + Stored>(setup: Setup, tolerance: f64) -> Case
where
    T::Acc: Stored,
{
    let elements = (setup.rows() * setup.shape[2]) as f64;
    Case {
        package: "layernorm-bwd",
        kernel: "layernorm-bwd",
        name: setup.name(),
        dtype: T::NAME,
        // Section 5 of the crate's docs/derivation.md.
        flops: 17.0 * elements,
        // x, dy and dx.
        bytes: 3.0 * elements * size_of::<T>() as f64,
        tolerance,
        prepare: Box::new(move || Ok(Box::new(Backward::<T>::new(setup)?))),
    }
}

/// Our side.
struct Backward<T: Element> {
    setup: Setup,
    x: Array2<T>,
    dy: Array2<T>,
    /// In the compute type: PyTorch rounds the statistics of a 16-bit gamma to 16 bits.
    gamma: Array1<T::Acc>,
    mean: Array1<T::Acc>,
    rstd: Array1<T::Acc>,
    gradients: Gradients<T, T::Acc>,
    workspace: Workspace<T::Acc>,
}

impl<T: Element> Backward<T> {
    fn new(setup: Setup) -> Result<Self> {
        let [.., d] = setup.shape;
        let rng = &mut ChaCha8Rng::seed_from_u64(4);
        let x = normal(rng, (setup.rows(), d), 0.0);
        let dy = normal(rng, (setup.rows(), d), 0.0);
        let gamma = normal(rng, (1, d), 1.0).remove_axis(ndarray::Axis(0));
        let forward = layer_norm(x.view(), &options(setup.kind, &gamma))?;
        let gradients = Gradients {
            dx: Array2::default(x.dim()),
            dgamma: Array1::default(d),
            dbeta: Array1::default(d),
        };
        let workspace = Workspace::new(setup.rows(), d, &Tiling::default())?;
        let (mean, rstd) = (forward.mean, forward.rstd);
        Ok(Self { setup, x, dy, gamma, mean, rstd, gradients, workspace })
    }
}

/// Random numbers of standard deviation 1 around `mean`.
fn normal<T: Element>(rng: &mut ChaCha8Rng, shape: (usize, usize), mean: f64) -> Array2<T> {
    // The sum of twelve numbers in [0, 1) has mean 6 and variance 1.
    Array2::from_shape_simple_fn(shape, || {
        T::from_f64(mean - 6.0 + (0..12).map(|_| rng.random::<f64>()).sum::<f64>())
    })
}

fn options<T: Element>(kind: Kind, gamma: &Array1<T>) -> Options<'_, T> {
    Options { kind, gamma: Some(gamma.view()), ..Options::default() }
}

fn peer_operation(kind: Kind) -> (&'static str, Value) {
    let name = match kind {
        Kind::LayerNorm => "layer_norm_backward",
        Kind::RmsNorm => "rms_norm_backward",
    };
    (name, json!({"eps": Options::<f32>::default().eps}))
}

impl<T: Element + Stored> Contest for Backward<T>
where
    T::Acc: Stored,
{
    fn peer_operation(&self) -> (&'static str, Value) {
        peer_operation(self.setup.kind)
    }

    fn inputs(&self) -> Vec<Input> {
        vec![Input::new("x", &self.x), Input::new("dy", &self.dy), Input::new("gamma", &self.gamma)]
    }

    fn run(&mut self) -> Result<()> {
        let Self { setup, x, dy, gamma, mean, rstd, gradients, workspace } = self;
        let options = options(setup.kind, gamma);
        let saved = Saved::Statistics { x: x.view(), mean: mean.view(), rstd: rstd.view() };
        if setup.allocating {
            *gradients = layer_norm_backward(dy.view(), saved, &options)?;
            return Ok(());
        }
        let to = GradientsMut {
            dx: Some(gradients.dx.view_mut()),
            dgamma: Some(gradients.dgamma.view_mut()),
            // RMS norm has no beta.
            dbeta: (setup.kind == Kind::LayerNorm).then(|| gradients.dbeta.view_mut()),
            ..GradientsMut::default()
        };
        layer_norm_backward_into(to, dy.view(), saved, &options, workspace)?;
        Ok(())
    }

    /// Of `dx`, and of the sums over rows relative to the root of their number, which their size
    /// grows with. Not of the sums for 16-bit inputs: PyTorch's are off by a tenth, as if they were
    /// added up in 16 bits.
    fn largest_difference(&self, peer: &mut Peer) -> Result<f64> {
        let dx: Array2<T> = peer.output("dx")?.into_dimensionality()?;
        let mut differences = vec![largest_difference(&self.gradients.dx, &dx)];
        let scale = (self.setup.rows() as f64).sqrt();
        let mut weights = Vec::new();
        if T::IS_COMPUTE_TYPE {
            weights.push(("dgamma", &self.gradients.dgamma));
            if self.setup.kind == Kind::LayerNorm {
                weights.push(("dbeta", &self.gradients.dbeta));
            }
        }
        for (name, ours) in weights {
            let theirs: Array1<T::Acc> = peer.output(name)?.into_dimensionality()?;
            differences.push(largest_difference(ours, &theirs) / scale);
        }
        Ok(testing::largest_difference(differences.into_iter().map(|difference| (difference, 0.0))))
    }
}

const ROW: ndarray::Axis = ndarray::Axis(0);

/// The largest error of `dx` for inputs around `mean`.
fn errors(mean: f64, peer: Option<&mut Peer>, pool: &ThreadPool) -> Result<Errors> {
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    let shape = (256, 1024);
    let (x, dy): (Array2<f32>, Array2<f32>) = (normal(rng, shape, mean), normal(rng, shape, 0.0));
    let gamma = normal(rng, (1, shape.1), 1.0).remove_axis(ROW);
    let options = options(Kind::LayerNorm, &gamma);

    let want = layer_norm_backward_reference(dy.view(), x.view(), &options)?.dx;
    let naive: Gradients<_, f32> = layer_norm_backward_naive(dy.view(), x.view(), &options)?;
    let ours = pool.install(|| {
        let forward = layer_norm(x.view(), &options)?;
        let (mean, rstd) = (forward.mean.view(), forward.rstd.view());
        layer_norm_backward(dy.view(), Saved::Statistics { x: x.view(), mean, rstd }, &options)
    })?;
    let (operation, peer_options) = peer_operation(Kind::LayerNorm);
    let inputs = [Input::new("x", &x), Input::new("dy", &dy), Input::new("gamma", &gamma)];
    let theirs = peer.map(|peer| -> Result<Array2<f32>> {
        peer.load(operation, &peer_options, &inputs)?;
        peer.run(1)?;
        Ok(peer.output("dx")?.into_dimensionality()?)
    });
    Ok(Errors {
        ours: spread_of(&ours.dx, &want),
        naive: spread_of(&naive.dx, &want),
        peer: theirs.transpose()?.map(|theirs| spread_of(&theirs, &want)),
    })
}

fn spread_of<A: Element, B: Element>(got: &Array2<A>, want: &Array2<B>) -> Spread {
    Spread::new(got.iter().copied().zip(want.iter().copied()))
}
