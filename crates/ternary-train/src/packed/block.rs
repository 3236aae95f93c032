//! The piece of a product that one thread computes: some blocks of rows with all tokens.

use ndarray::ArrayViewMut2;

use super::Activations;
use super::activations::{TOKENS, TileGroup};
use super::layout::{COLUMNS, ROWS, STEP};

/// Steps of the longest group.
const MAX_STEPS: usize = 256 / COLUMNS;
/// Words of four columns of the longest group.
pub(super) const MAX_WORDS: usize = 4 * MAX_STEPS;
/// Blocks that are multiplied with a panel of tokens together: so often is a word read from the
/// first-level cache once it is there.
pub(super) const BLOCKS: usize = 4;

/// Steps between a step that is read and the one that is fetched from memory meanwhile: 6 KB, past the
/// end of the page, where the processor's own fetching stops.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
pub(super) const AHEAD: usize = 96;

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

/// A block of a stripe.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// `[steps][STEP]`.
    pub(super) codes: &'a [u8],
    /// `[groups][ROWS]`.
    pub(super) scales: &'a [u16],
}

/// What a block adds up for some tokens.
pub(super) type Totals = [[f32; ROWS]];

impl<'a> Stripe<'a> {
    /// The blocks, with the rows they begin at.
    #[inline(always)]
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

/// Writes the products of the stripe's rows with every token to `y` `[tokens, rows]`.
///
/// `unpack` unpacks the codes of a group of one block; `add` adds the products of some unpacked blocks
/// with a tile of tokens, times the scales of the blocks, to the totals of each block.
#[inline(always)]
pub(super) fn each_panel<P>(
    stripe: Stripe<'_>,
    x: &Activations,
    mut y: ArrayViewMut2<'_, f32>,
    empty: P,
    unpack: impl Fn(&[u8], &mut P),
    add: impl Fn(&[P], &[&[u16; ROWS]], TileGroup<'_>, &mut [&mut Totals]),
) where
    P: Copy,
{
    let mut planes = [empty; BLOCKS];
    for (first_token, panel) in x.panels() {
        let mut blocks = stripe.blocks();
        loop {
            let mut count = 0;
            let some: [_; BLOCKS] = std::array::from_fn(|_| blocks.next().inspect(|_| count += 1));
            if count == 0 {
                break;
            }
            let mut totals = [[[0.0; ROWS]; TOKENS]; BLOCKS];
            let mut groups = some.map(|block| {
                block.into_iter().flat_map(|(_, block)| block.groups(stripe.group_steps))
            });
            for x in panel.groups() {
                let mut scales = [&[0; ROWS]; BLOCKS];
                for ((groups, planes), scales) in
                    groups.iter_mut().zip(&mut planes).zip(&mut scales)
                {
                    if let Some((codes, group_scales)) = groups.next() {
                        unpack(codes, planes);
                        *scales = group_scales;
                    }
                }
                for (token, x) in x.tiles() {
                    let tokens = token..token + x.sums.len();
                    let mut totals = totals.each_mut().map(|totals| &mut totals[tokens.clone()]);
                    add(&planes[..count], &scales[..count], x, &mut totals[..count]);
                }
            }
            for ((first_row, _), totals) in some.into_iter().flatten().zip(&totals) {
                for ((token, total), scale) in (first_token..).zip(totals).zip(panel.scales) {
                    store(&mut y, token, first_row, &total.map(|total| total * scale));
                }
            }
        }
    }
}

/// Writes the products of a block with one token.
#[inline(always)]
pub(super) fn store(y: &mut ArrayViewMut2<'_, f32>, token: usize, first: usize, row: &[f32; ROWS]) {
    let count = ROWS.min(y.ncols() - first);
    let mut y = y.row_mut(token);
    if let Some(y) = y.as_slice_mut() {
        y[first..first + count].copy_from_slice(&row[..count]);
    }
}
