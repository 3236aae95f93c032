#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod backward;
mod call;
mod error;
mod finish;
mod logit;
mod mass;
mod options;
mod rank;
mod reference;
mod row;
mod sample;
mod schedule;
mod score;
mod select;
mod source;
mod sweep;
mod topk;
mod workspace;

// Forward.
pub use logit::Logit;
pub use topk::{
    TokenScores, TokenScoresMut, TopK, TopKMut, TopKView, softmax_topk, softmax_topk_into,
};
pub use workspace::Workspace;

// Sampling.
pub use sample::{Draw, Samples, sample, sample_into};

// Backward.
pub use backward::{TopKGradients, softmax_topk_backward, softmax_topk_backward_into};

// Oracle.
pub use reference::{softmax_topk_backward_reference, softmax_topk_naive, softmax_topk_reference};

// Options, shapes and errors.
pub use error::Error;
pub use options::{Mask, NanPolicy, Options, Passes, PerRow, Tiling};
pub use tensor_utils::{rows, rows_mut};

// Elements (`bf16` and `f16` are those of the crate `half`), and what options and errors hold.
pub use tensor_utils::{Element, Float, Isa, IsaError, ShapeError, bf16, f16};
