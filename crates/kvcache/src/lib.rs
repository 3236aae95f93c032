#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod append;
mod attend;
mod cache;
mod edit;
mod error;
mod form;
mod huge;
mod invariants;
mod kernel;
mod options;
mod pages;
mod plan;
mod prefix;
mod quantise;
mod raw;
mod reference;
mod reuse;
mod sequence;
mod store;
mod tables;
mod workspace;

pub mod memory;

// The cache.
pub use cache::{Cache, Stats};
pub use sequence::SeqId;
pub use tables::PageTables;

// Attention over it.
pub use attend::Attention;
pub use workspace::Workspace;

// Oracle.
pub use reference::attend_reference;

// Options and errors.
pub use error::Error;
pub use options::{Config, Layout, Options, Queries, Rows, Storage, Window};

// Elements (`bf16` and `f16` are those of the crate `half`), and what options and errors hold.
pub use tensor_utils::{Element, Float, Isa, IsaError, ShapeError, bf16, f16};
