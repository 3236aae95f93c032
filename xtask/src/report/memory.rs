//! Peak memory beyond inputs and outputs, over the length of the sequence.

use anyhow::Result;
use attn_flash::{Attention, Options, attention, attention_naive};
use attn_flash_bwd::{Inputs, attention_backward, attention_backward_naive};
use ndarray::Array4;
use serde::{Deserialize, Serialize};
use tensor_utils::testing::Seeded;

use crate::ALLOCATOR;

/// Lengths at which the kernels are measured.
const LENGTHS: [usize; 6] = [128, 256, 512, 1024, 2048, 4096];
/// The naive algorithms are slow: above this length they are left out.
const NAIVE_LIMIT: usize = 512;
const HEAD_SIZE: usize = 64;

/// One kernel and the naive algorithm.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Curve {
    pub(super) kernel: String,
    pub(super) shape: String,
    pub(super) points: Vec<Point>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Point {
    pub(super) length: usize,
    /// Measured.
    pub(super) ours: usize,
    /// Measured, where the naive algorithm was run.
    pub(super) naive: Option<usize>,
    /// What the N x N matrices of the naive algorithm take.
    pub(super) matrices: usize,
}

/// Measures the kernels whose naive algorithm needs quadratic memory, on causal f32 calls of one
/// head.
pub(super) fn measure() -> Result<Vec<Curve>> {
    let curve = |kernel: &str, points| Curve {
        kernel: kernel.to_owned(),
        shape: format!("[1, 1, N, {HEAD_SIZE}] f32, causal"),
        points,
    };
    let mut forward = Vec::new();
    let mut backward = Vec::new();
    for length in LENGTHS {
        let call = Call::new(length)?;
        let matrix = length * length * size_of::<f32>();
        forward.push(Point {
            length,
            ours: peak(|| call.forward())?,
            naive: (length <= NAIVE_LIMIT).then(|| peak(|| call.forward_naive())).transpose()?,
            matrices: matrix,
        });
        backward.push(Point {
            length,
            ours: peak(|| call.backward())?,
            naive: (length <= NAIVE_LIMIT).then(|| peak(|| call.backward_naive())).transpose()?,
            // P and dS.
            matrices: 2 * matrix,
        });
    }
    Ok(vec![curve("attn-flash", forward), curve("attn-flash-bwd", backward)])
}

/// The most memory in use at once while `run` runs, less the bytes of what it returns.
fn peak(run: impl FnOnce() -> Result<usize>) -> Result<usize> {
    ALLOCATOR.reset_peak();
    let outputs = run()?;
    Ok(ALLOCATOR.peak_above_baseline().saturating_sub(outputs))
}

struct Call {
    q: Array4<f32>,
    k: Array4<f32>,
    v: Array4<f32>,
    d_o: Array4<f32>,
    forward: Attention<f32>,
}

impl Call {
    fn new(length: usize) -> Result<Self> {
        let mut seeded = Seeded::new(length as u64);
        let [q, k, v, d_o] = [(); 4].map(|()| seeded.normal((1, 1, length, HEAD_SIZE)));
        let forward = attention(q.view(), k.view(), v.view(), &options())?;
        Ok(Self { q, k, v, d_o, forward })
    }

    fn inputs(&self) -> Inputs<'_, f32> {
        Inputs {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            o: self.forward.o.view(),
            lse: self.forward.lse.view(),
            d_o: self.d_o.view(),
            d_lse: None,
        }
    }

    /// Bytes of o and lse.
    fn forward(&self) -> Result<usize> {
        let result = attention(self.q.view(), self.k.view(), self.v.view(), &options())?;
        Ok((result.o.len() + result.lse.len()) * size_of::<f32>())
    }

    fn forward_naive(&self) -> Result<usize> {
        let result = attention_naive(self.q.view(), self.k.view(), self.v.view(), &options())?;
        Ok((result.o.len() + result.lse.len()) * size_of::<f32>())
    }

    /// Bytes of dq, dk, dv and delta.
    fn backward(&self) -> Result<usize> {
        let result = attention_backward(&self.inputs(), &options())?;
        Ok((3 * result.dq.len() + result.delta.len()) * size_of::<f32>())
    }

    fn backward_naive(&self) -> Result<usize> {
        let result = attention_backward_naive(&self.inputs(), &options())?;
        Ok((3 * result.dq.len() + result.delta.len()) * size_of::<f32>())
    }
}

fn options<'a>() -> Options<'a, f32> {
    Options { causal: true, ..Options::default() }
}
