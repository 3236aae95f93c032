//! Activations in int8, a scale for each token.

use ndarray::{ArrayRef, Ix2};
use rayon::prelude::*;
use tensor_utils::{check_shape, try_vec};

use super::layout::COLUMNS;
use crate::{Error, Projection};

/// Elements that are worth another thread.
const GRAIN: usize = 1 << 15;
/// `x + ROUND - ROUND` is `x` rounded to an integer, halves to even, for `|x| <= 2^22`.
const ROUND: f32 = 12_582_912.0;

/// Vectors `[tokens, columns]` in int8: `x = q scale` with `scale = max |x| / 127` of the token and
/// `q` rounded to the nearest, halves to even, so in -127 to 127.
///
/// A token of zeros, or of numbers below 3.7e-37, has scale 0. One with NaN or infinity has scale NaN, and so are its products.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    pub(super) columns: usize,
    pub(super) group: usize,
    /// `[tokens][steps][4]`: four columns each, filled up with zeros.
    pub(super) words: Vec<[i8; 4]>,
    /// `[tokens]`.
    pub(super) scales: Vec<f32>,
    /// `[tokens][groups]`: what the `q` of each group add up to.
    pub(super) sums: Vec<i32>,
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
        let one = |i: usize, words: &mut [[i8; 4]], scale: &mut f32, sums: &mut [i32]| {
            let row = x.row(i);
            *scale = match row.as_slice() {
                Some(row) => quantize(row, words),
                None => quantize(&row.to_vec(), words),
            };
            for (sum, part) in sums.iter_mut().zip(words.chunks(group / 4)) {
                *sum = part.as_flattened().iter().map(|&q| i32::from(q)).sum();
            }
        };
        if tokens * columns <= GRAIN {
            let rows = self.words.chunks_mut(words).zip(&mut self.scales);
            let rows = rows.zip(self.sums.chunks_mut(groups)).enumerate();
            rows.for_each(|(i, ((words, scale), sums))| one(i, words, scale, sums));
        } else {
            let rows = self.words.par_chunks_mut(words).zip(&mut self.scales);
            let rows = rows.zip(self.sums.par_chunks_mut(groups)).enumerate();
            rows.for_each(|(i, ((words, scale), sums))| one(i, words, scale, sums));
        }
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

    pub(super) fn words_per_token(&self) -> usize {
        self.columns.div_ceil(COLUMNS) * COLUMNS / 4
    }
}

/// Quantizes a vector; returns its scale.
fn quantize(x: &[f32], words: &mut [[i8; 4]]) -> f32 {
    let mut most = [0.0_f32; 16];
    let mut not_finite = [0.0_f32; 16];
    for chunk in x.chunks(16) {
        for ((most, nan), x) in most.iter_mut().zip(&mut not_finite).zip(chunk) {
            *most = if x.abs() > *most { x.abs() } else { *most };
            *nan += x * 0.0;
        }
    }
    let most = most.into_iter().fold(0.0_f32, f32::max);
    let q = words.as_flattened_mut();
    let (q, rest) = q.split_at_mut(x.len());
    rest.fill(0);
    if not_finite.iter().any(|nan| nan.is_nan()) {
        q.fill(0);
        return f32::NAN;
    }
    let inverse = 127.0 / most;
    if inverse.is_infinite() {
        // Zeros, or numbers so small that they count as zeros.
        q.fill(0);
        return 0.0;
    }
    for (q, x) in q.iter_mut().zip(x) {
        // The low bits of the sum are the integer.
        *q = (x * inverse + ROUND).to_bits() as i8;
    }
    most / 127.0
}
