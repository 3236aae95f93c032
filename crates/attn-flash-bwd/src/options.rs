//! How the gradients are computed; what is computed is said by
//! [`attn_flash::Options`], the same as for the forward pass.

use tensor_utils::Isa;

/// How the work is cut. `key_block`, `query_block`, `strategy` and `isa` change the rounding, the
/// number of threads does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tiling {
    /// Query rows that visit a block of keys together, at least 1. Default 768.
    pub query_block: usize,
    /// Keys of a block, at least 1, rounded up to a multiple of 32. Default 256.
    pub key_block: usize,
    /// Where delta comes from. Default [`Strategy::SavedOutput`].
    pub strategy: Strategy,
    /// Instruction set. `None`: [`Isa::active`].
    pub isa: Option<Isa>,
}

impl Default for Tiling {
    fn default() -> Self {
        Self { query_block: 768, key_block: 256, strategy: Strategy::SavedOutput, isa: None }
    }
}

/// Where `delta_i = sum_j P_ij dP_ij` comes from (`docs/derivation.md`, section 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strategy {
    /// `delta = rowsum(do * o)`, one pass over `o`. The default.
    #[default]
    SavedOutput,
    /// The sum itself, in a pass of its own that recomputes `P` and `dP`: does not read `o`, and
    /// costs two more matrix products.
    TwoPass,
}
