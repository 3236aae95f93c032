//! Activations in int8, a scale for each token.
//!
//! They lie as the products read them: tokens in *panels* of up to 64, and in a panel group after
//! group, so that all that is multiplied with the codes of one group is in one place. Within that,
//! tokens are taken in *tiles* of 8 (the last ones of 4, 2 and 1), word after word: a word is the
//! four columns that one instruction multiplies.
//!
//! ```text
//! words   [panels][groups][tiles][words of the group][tokens of the tile]
//! sums    [panels][groups][tokens]
//! ```

use ndarray::{ArrayRef, ArrayView1, Ix2};
use rayon::prelude::*;
use tensor_utils::{check_shape, try_vec};

use super::layout::COLUMNS;
use crate::{Error, Projection};

/// Tokens of a panel: the words of one group of so many stay in the first-level cache while the codes
/// of the group, unpacked once, go over them.
pub(super) const TOKENS: usize = 64;
/// Tokens of a full tile.
const TILE: usize = 8;
/// Columns of the longest group.
const MAX_GROUP: usize = 256;
/// `x + ROUND - ROUND` is `x` rounded to an integer, halves to even, for `|x| <= 2^22`.
const ROUND: f32 = 12_582_912.0;

/// Vectors `[tokens, columns]` in int8: `x = q scale` with `scale = max |x| / 127` of the token and
/// `q` rounded to the nearest, halves to even, so in -127 to 127.
///
/// A token of zeros, or of numbers below 3.7e-37, has scale 0. One with NaN or infinity has scale NaN, and so are its products.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    columns: usize,
    group: usize,
    words: Vec<[i8; 4]>,
    /// `[tokens]`.
    scales: Vec<f32>,
    /// What the `q` of each group add up to.
    sums: Vec<i32>,
}

impl Activations {
    /// Room for `tokens` vectors of `columns`, for matrices with this group size; all zero.
    ///
    /// # Errors
    /// [`Error::Option`] for the group size, [`Error::Shape`] if there is no memory.
    pub fn zeros(tokens: usize, columns: usize, group: usize) -> Result<Self, Error> {
        Projection { group, ..Projection::default() }.check()?;
        let words = columns.div_ceil(COLUMNS) * COLUMNS / 4;
        Ok(Self {
            columns,
            group,
            words: try_vec("words", &[tokens, words])?,
            scales: try_vec("scales", &[tokens])?,
            sums: try_vec("sums", &[tokens, columns.div_ceil(group)])?,
        })
    }

    /// The activations `x` `[tokens, columns]`.
    ///
    /// # Errors
    /// As [`zeros`](Self::zeros).
    pub fn new(x: &ArrayRef<f32, Ix2>, group: usize) -> Result<Self, Error> {
        let mut activations = Self::zeros(x.nrows(), x.ncols(), group)?;
        activations.assign(x)?;
        Ok(activations)
    }

    /// Overwrites the activations, for the same number of columns and at most as many tokens as any
    /// time before without allocating.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of columns or if there is no memory.
    pub fn assign(&mut self, x: &ArrayRef<f32, Ix2>) -> Result<(), Error> {
        let (tokens, columns) = x.dim();
        check_shape("x", x.shape(), &[tokens, self.columns])?;
        let (words, groups) = (self.words_per_token(), columns.div_ceil(self.group));
        self.words.resize(tokens * words, [0; 4]);
        self.scales.resize(tokens, 0.0);
        self.sums.resize(tokens * groups, 0);
        if columns == 0 {
            return Ok(());
        }
        let group = self.group;
        let panel =
            |(i, ((words, scales), sums)): (usize, ((&mut [_], &mut [f32]), &mut [i32]))| {
                for (first, tokens) in tiles(scales.len()) {
                    for token in first..first + tokens {
                        let place = Place { panel: scales.len(), first, tokens, token };
                        let row = x.row(i * TOKENS + token);
                        scales[token] = quantize(row, group, place, words, sums);
                    }
                }
            };
        let panels = self.words.par_chunks_mut(TOKENS * words);
        let panels = panels.zip(self.scales.par_chunks_mut(TOKENS));
        let panels = panels.zip(self.sums.par_chunks_mut(TOKENS * groups)).enumerate();
        panels.for_each(panel);
        Ok(())
    }

    /// Vectors.
    pub fn tokens(&self) -> usize {
        self.scales.len()
    }

    /// Elements of each vector.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Columns of a group.
    pub fn group(&self) -> usize {
        self.group
    }

    fn words_per_token(&self) -> usize {
        self.columns.div_ceil(COLUMNS) * COLUMNS / 4
    }

    /// The panels, each with its first token.
    #[inline(always)]
    pub(super) fn panels(&self) -> impl Iterator<Item = (usize, Panel<'_>)> {
        let words = self.words.chunks((TOKENS * self.words_per_token()).max(1));
        let sums = self.sums.chunks((TOKENS * self.columns.div_ceil(self.group)).max(1));
        let group_words = self.group / 4;
        let panels = words.zip(sums).zip(self.scales.chunks(TOKENS));
        let panels =
            panels.map(move |((words, sums), scales)| Panel { words, sums, scales, group_words });
        (0..).step_by(TOKENS).zip(panels)
    }
}

/// Up to 64 tokens.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    words: &'a [[i8; 4]],
    sums: &'a [i32],
    /// `[tokens]`.
    pub(super) scales: &'a [f32],
    group_words: usize,
}

/// One group of a tile's tokens.
#[derive(Clone, Copy)]
pub(super) struct TileGroup<'a> {
    /// `[words][tokens]`.
    pub(super) words: &'a [[i8; 4]],
    /// `[tokens]`.
    pub(super) sums: &'a [i32],
}

impl<'a> Panel<'a> {
    /// Group by group, the words and sums of all tokens.
    #[inline(always)]
    pub(super) fn groups(self) -> impl Iterator<Item = TileGroup<'a>> {
        let tokens = self.scales.len();
        let words = self.words.chunks(self.group_words * tokens);
        words.zip(self.sums.chunks_exact(tokens)).map(|(words, sums)| TileGroup { words, sums })
    }
}

impl<'a> TileGroup<'a> {
    /// The tiles of a panel's group, each with its first token.
    #[inline(always)]
    pub(super) fn tiles(self) -> impl Iterator<Item = (usize, TileGroup<'a>)> {
        let words = self.words.len() / self.sums.len();
        tiles(self.sums.len()).map(move |(first, tokens)| {
            let sums = &self.sums[first..first + tokens];
            (first, TileGroup { words: &self.words[first * words..][..tokens * words], sums })
        })
    }
}

/// First token and number of tokens of each tile of a panel.
#[inline(always)]
fn tiles(tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let rest = tokens - first;
        // The largest power of two that fits.
        let tile = TILE.min(1 << rest.checked_ilog2()?);
        first += tile;
        Some((first - tile, tile))
    })
}

/// Where a token lies: its panel's tokens, its tile's first token and tokens, and itself.
#[derive(Clone, Copy)]
struct Place {
    panel: usize,
    first: usize,
    tokens: usize,
    token: usize,
}

/// Quantizes a token into its place in the words and sums of a panel; returns its scale.
fn quantize(
    x: ArrayView1<'_, f32>,
    group: usize,
    place: Place,
    words: &mut [[i8; 4]],
    sums: &mut [i32],
) -> f32 {
    let (mut most, mut not_finite) = ([0.0_f32; 16], [0.0_f32; 16]);
    each_part(x, group, |x| {
        for chunk in x.chunks(16) {
            for ((most, nan), x) in most.iter_mut().zip(&mut not_finite).zip(chunk) {
                *most = if x.abs() > *most { x.abs() } else { *most };
                *nan += x * 0.0;
            }
        }
    });
    let most = most.into_iter().fold(0.0_f32, f32::max);
    let (inverse, scale) = if not_finite.iter().any(|nan| nan.is_nan()) {
        (0.0, f32::NAN)
    } else if (127.0 / most).is_infinite() {
        // Zeros, or numbers so small that they count as zeros.
        (0.0, 0.0)
    } else {
        (127.0 / most, most / 127.0)
    };
    let mut groups = words.chunks_mut(group / 4 * place.panel).zip(sums.chunks_mut(place.panel));
    each_part(x, group, |x| {
        let Some((words, sums)) = groups.next() else { return };
        let mut q = [0_i8; MAX_GROUP];
        for (q, x) in q.iter_mut().zip(x) {
            // The low bits of the sum are the integer; those of NaN are not used.
            *q = if inverse == 0.0 { 0 } else { (x * inverse + ROUND).to_bits() as i8 };
        }
        sums[place.token] = q.iter().map(|&q| i32::from(q)).sum();
        let length = words.len() / place.panel;
        let tile = &mut words[place.first * length..][..place.tokens * length];
        let own = tile.iter_mut().skip(place.token - place.first).step_by(place.tokens);
        own.zip(q.as_chunks().0).for_each(|(to, &word)| *to = word);
    });
    scale
}

/// Calls `visit` with the contiguous elements of each group.
fn each_part(x: ArrayView1<'_, f32>, group: usize, mut visit: impl FnMut(&[f32])) {
    let mut buffer = [0.0; MAX_GROUP];
    for first in (0..x.len()).step_by(group) {
        let length = group.min(x.len() - first);
        match x.to_slice() {
            Some(x) => visit(&x[first..first + length]),
            None => {
                let part = x.iter().skip(first);
                buffer[..length].iter_mut().zip(part).for_each(|(to, &x)| *to = x);
                visit(&buffer[..length]);
            }
        }
    }
}
