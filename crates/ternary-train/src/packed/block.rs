//! The piece of a product that one thread computes: some blocks of rows with all tokens.

use ndarray::ArrayViewMut2;

use super::Activations;
use super::layout::{COLUMNS, ROWS, STEP};

/// Tokens whose sums are kept at once: their activations of one group and these sums stay in the
/// first-level cache while the codes of the group, unpacked once, go over them.
pub(super) const TOKENS: usize = 64;
/// Steps of the longest group.
pub(super) const MAX_STEPS: usize = 256 / COLUMNS;

/// Consecutive blocks of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Stripe<'a> {
    /// `[blocks][steps][STEP]`.
    pub(super) codes: &'a [u8],
    /// `[blocks][groups][ROWS]`.
    pub(super) scales: &'a [u16],
    pub(super) steps: usize,
    pub(super) groups: usize,
    /// Steps of a group; the last may have fewer.
    pub(super) group_steps: usize,
}

/// A block, or two, of a stripe.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// `[steps][STEP]`.
    pub(super) codes: &'a [u8],
    /// `[groups][ROWS]`.
    pub(super) scales: &'a [u16],
}

impl<'a> Stripe<'a> {
    /// The blocks, with the rows they begin at.
    pub(super) fn blocks(self) -> impl Iterator<Item = (usize, Block<'a>)> {
        let codes = self.codes.chunks_exact((self.steps * STEP).max(1));
        let scales = self.scales.chunks_exact((self.groups * ROWS).max(1));
        let blocks = codes.zip(scales).map(|(codes, scales)| Block { codes, scales });
        (0..).step_by(ROWS).zip(blocks)
    }
}

impl<'a> Block<'a> {
    /// The codes and scales of each group.
    #[inline(always)]
    pub(super) fn groups(
        self,
        group_steps: usize,
    ) -> impl Iterator<Item = (&'a [u8], &'a [u16; ROWS])> {
        self.codes.chunks(group_steps * STEP).zip(self.scales.as_chunks().0)
    }
}

/// One token of the activations.
#[derive(Clone, Copy)]
pub(super) struct Token<'a> {
    /// `[steps][4]` words of four columns.
    pub(super) words: &'a [[i8; 4]],
    pub(super) scale: f32,
    /// `[groups]`.
    pub(super) sums: &'a [i32],
}

impl Activations {
    #[inline(always)]
    pub(super) fn token(&self, i: usize) -> Token<'_> {
        let words = self.words_per_token();
        let groups = self.columns.div_ceil(self.group);
        Token {
            words: &self.words[i * words..][..words],
            scale: self.scales[i],
            sums: &self.sums[i * groups..][..groups],
        }
    }
}

/// Adds `scale * sum`, with two roundings, to the totals of a block.
#[inline(always)]
pub(super) fn store(y: &mut ArrayViewMut2<'_, f32>, token: usize, first: usize, row: &[f32; ROWS]) {
    let count = ROWS.min(y.ncols() - first);
    let mut y = y.row_mut(token);
    if let Some(y) = y.as_slice_mut() {
        y[first..first + count].copy_from_slice(&row[..count]);
    }
}
