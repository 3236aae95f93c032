#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod arithmetic;
mod attention;
mod batch;
mod call;
mod error;
mod mask;
mod merge;
mod observe;
mod options;
mod reference;
mod split;
mod tile;
mod tiled;
mod visibility;
mod workspace;

// Forward.
pub use attention::{
    Attention, AttentionVarlen, attention, attention_into, attention_varlen, attention_varlen_into,
};
pub use merge::{merge_states, merge_states_into};
pub use workspace::Workspace;

// Oracle.
pub use reference::{attention_naive, attention_reference, attention_varlen_reference};

// Options and errors.
pub use error::Error;
pub use mask::{AncestorMask, Coverage, Mask, NoMask, Pair, Tile};
pub use options::{Options, Tiling, Window};

// Elements (`bf16` and `f16` are those of the crate `half`), and what options and errors hold.
pub use tensor_utils::{Element, Float, Isa, IsaError, ShapeError, bf16, f16};

// For this crate's tests.
#[doc(hidden)]
pub use attention::attention_observed;
#[doc(hidden)]
pub use observe::{Observer, Step};

/// What the backward pass shares with the forward pass; no part of the interface.
#[doc(hidden)]
pub mod internals {
    pub use crate::attention::longest;
    pub use crate::batch::{Batch, sequence};
    pub use crate::call::{Call, Sequence, Sizes, check_sizes, invalid};
    pub use crate::mask::RowMask;
}
