#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod error;
mod expand;
mod history;
mod model;
mod options;
mod output;
mod reference;
mod restrict;
mod rules;
mod score;
mod search;
mod trie;

// The search.
pub use model::{Beams, Bigram, Model};
pub use output::{Hypothesis, Item, Output, Report, Stop};
pub use search::{Search, beam_search};
pub use softmax_topk::Logit;

// Oracles.
pub use reference::{beam_search_reference, brute_force};

// Options and errors.
pub use error::{Error, ModelError};
pub use options::{EarlyStopping, Groups, ModelOutput, Options, Rule};
pub use trie::{Constraint, Follow, Trie};

// Elements (`bf16` and `f16` are those of the crate `half`), and what options and errors hold.
pub use tensor_utils::{IsaError, ShapeError, bf16, f16};
