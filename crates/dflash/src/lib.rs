#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod argmax;
mod best_first;
mod budget;
mod choices;
mod decoder;
mod drafters;
mod drawn;
mod error;
mod greedy;
mod law;
mod options;
mod reference;
mod stochastic;
mod target;
mod tree;
mod urn;

pub mod exact;
pub mod formats;

/// The cache that generation runs over.
pub use kvcache;

// Trees.
pub use best_first::{Candidate, ScoredTree, best_first, best_first_by, best_first_logits};
pub use budget::{Budget, CostCurve, choose_budget};
pub use drawn::{DrawnTree, Siblings};
pub use tree::{MAX_NODES, TokenTree, build_tree_mask};

// Acceptance.
pub use argmax::argmax;
pub use choices::{Choices, Random};
pub use greedy::{Accepted, accept_greedy, accept_greedy_batch, row_offsets};
pub use law::Law;
pub use stochastic::{accept_drawn, accept_drawn_by, accept_matching, accept_matching_by};

// Generation.
pub use decoder::{Decoder, Finish, Generation, generate};
pub use drafters::{Draft, Drafter, ModelDrafter, ModelDrafts, NoDraft, PromptLookup, Scripted};
pub use target::{BoxError, Pass, Target};

// Oracles.
pub use reference::{accept_greedy_reference, best_paths_reference, tree_mask_reference};

// Options and errors.
pub use error::Error;
pub use options::{DecodeOptions, Decoding, Sampling};

// Elements (`bf16` and `f16` are those of the crate `half`), and what options and errors hold.
pub use tensor_utils::{Element, IsaError, ShapeError, bf16, f16};
