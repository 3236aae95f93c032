//! Softmax and top-k in one read against PyTorch's `softmax`, then `topk`.

use std::f64::consts::TAU;

use anyhow::Result;
use ndarray::Array2;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use softmax_topk::{Logit, Options, Tiling, TopK, Workspace, softmax_topk, softmax_topk_into};
use tensor_utils::bf16;

use super::attn_flash::largest_difference;
use super::duel::{Case, Contest};
use super::peer::{Input, Peer};
use crate::cases::Stored;

/// Vocabularies of GPT-2 and Qwen, whole batches and one row, and a small classifier.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case::<f32>(64, 50257, 50),
        case::<f32>(64, 50257, 256),
        case::<f32>(64, 151_936, 50),
        case::<f32>(1, 151_936, 50),
        case::<f32>(16, 1_000_000, 50),
        case::<f32>(64, 1000, 8),
        case::<bf16>(64, 50257, 50),
    ]
}

fn case<T>(rows: usize, vocabulary: usize, k: usize) -> Case
where
    T: Logit + Stored,
    T::Acc: Stored,
{
    let logits = (rows * vocabulary) as f64;
    Case {
        package: "softmax-topk",
        kernel: "softmax-topk",
        name: format!("{rows}x{vocabulary} k {k}"),
        dtype: T::NAME,
        // A difference, an exponential, an addition, a comparison.
        flops: 4.0 * logits,
        bytes: logits * size_of::<T>() as f64,
        // Of sorted probabilities; the peer rounds them to its type.
        // PyTorch adds up the exponentials of a row in f32: off by 1.2e-5 for a million of them.
        tolerance: T::EPSILON.max(1e-4),
        prepare: Box::new(move || Ok(Box::new(Forward::<T>::new(rows, vocabulary, k)?))),
    }
}

/// Of a normal distribution (Box and Muller, 1958) of deviation 3.
fn logit(rng: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    3.0 * radius * (TAU * rng.random::<f64>()).cos()
}

/// Our side.
struct Forward<T: Logit> {
    logits: Array2<T>,
    top: TopK<T::Acc>,
    workspace: Workspace<T::Acc>,
}

impl<T: Logit> Forward<T> {
    fn new(rows: usize, vocabulary: usize, k: usize) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let logits =
            Array2::from_shape_simple_fn((rows, vocabulary), || T::from_f64(logit(&mut rng)));
        let top = softmax_topk(logits.view(), k, &Options::default())?;
        let workspace = Workspace::new(rows, vocabulary, k, &Tiling::default())?;
        Ok(Self { logits, top, workspace })
    }
}

impl<T> Contest for Forward<T>
where
    T: Logit + Stored,
    T::Acc: Stored,
{
    fn peer_operation(&self) -> (&'static str, Value) {
        ("softmax_topk", json!({"k": self.top.indices.dim().1}))
    }

    fn inputs(&self) -> Vec<Input> {
        vec![Input::new("logits", &self.logits)]
    }

    fn run(&mut self) -> Result<()> {
        let (top, logits) = (self.top.view_mut(), self.logits.view());
        softmax_topk_into(top, logits, &Options::default(), &mut self.workspace)?;
        Ok(())
    }

    /// Of the probabilities alone: PyTorch orders equal ones as it likes.
    fn largest_difference(&self, peer: &mut Peer) -> Result<f64> {
        let theirs = peer.output::<T>("probs")?.into_dimensionality()?;
        Ok(largest_difference(&self.top.probs, &theirs))
    }
}
