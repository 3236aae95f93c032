//! Models and comparisons that several tests need.

#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;

use beam::{Beams, Error, Hypothesis, Item, Logit, Model, ModelError, Options, beam_search};
use ndarray::{Array2, ArrayView2};

/// A model whose logits depend on the whole sequence, prompt included: pseudo-random, the same on every
/// call.
#[derive(Debug, Clone)]
pub(crate) struct Random<T> {
    pub(crate) vocabulary: usize,
    pub(crate) seed: u64,
    /// Larger: fewer likely tokens.
    pub(crate) spread: f64,
    /// Multiples of this; 0: any value. Coarse logits have ties.
    pub(crate) grain: f64,
    /// One in this many tokens cannot follow; 0: all can.
    pub(crate) impossible: u64,
    /// Whether the numbers are at most 0, as log-probabilities.
    pub(crate) negative: bool,
    logits: Array2<T>,
    /// Rows of each call of `score`, and what `keep` was told after it.
    pub(crate) calls: Vec<usize>,
    pub(crate) kept: Vec<Vec<usize>>,
}

impl<T: Logit> Random<T> {
    pub(crate) fn new(vocabulary: usize, seed: u64) -> Self {
        Self {
            vocabulary,
            seed,
            spread: 2.0,
            grain: 0.0,
            impossible: 0,
            negative: false,
            logits: Array2::default((0, 0)),
            calls: Vec::new(),
            kept: Vec::new(),
        }
    }

    /// The logits after a sequence, in the precision of `T`.
    pub(crate) fn after(&self, sequence: &[u32]) -> Vec<f64> {
        let mut state = sequence.iter().fold(self.seed, |state, &token| mix(state, token.into()));
        let row = (0..self.vocabulary).map(|token| {
            state = mix(state, token as u64);
            let (high, low) = (state >> 32, state & 0xffff_ffff);
            // Between -2 and 2, more of them near 0.
            let value = (high as f64 + low as f64) / f64::from(1_u32 << 30);
            let value = (value - if self.negative { 8.0 } else { 4.0 }) * self.spread;
            let is_impossible = self.impossible > 0 && (state >> 7).is_multiple_of(self.impossible);
            if is_impossible && token > 0 {
                f64::NEG_INFINITY
            } else if self.grain > 0.0 {
                (value / self.grain).round() * self.grain
            } else {
                value
            }
        });
        row.map(|value| T::from_f64(value).to_f64()).collect()
    }

    /// As the oracles take it.
    pub(crate) fn next(&self) -> impl FnMut(&[u32]) -> Result<Vec<f64>, ModelError> {
        let mut seen = HashMap::new();
        move |sequence| {
            if let Some(row) = seen.get(sequence) {
                return Ok(Vec::clone(row));
            }
            let row = self.after(sequence);
            seen.insert(sequence.to_vec(), row.clone());
            Ok(row)
        }
    }
}

impl<T: Logit> Model for Random<T> {
    type Element = T;

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, T>, ModelError> {
        self.calls.push(beams.len());
        self.logits = Array2::default((beams.len(), self.vocabulary));
        for row in 0..beams.len() {
            let values = self.after(&beams.sequence(row));
            self.logits.row_mut(row).iter_mut().zip(values).for_each(|(x, v)| *x = T::from_f64(v));
        }
        Ok(self.logits.view())
    }

    fn keep(&mut self, parents: &[usize]) -> Result<(), ModelError> {
        self.kept.push(parents.to_vec());
        Ok(())
    }
}

fn mix(state: u64, value: u64) -> u64 {
    // SplitMix64.
    let mut z =
        (state ^ value.wrapping_mul(0xff51_afd7_ed55_8ccd)).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A table of log-probabilities, written by hand: what follows a generated sequence.
///
/// Tokens that are not listed have -inf.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    vocabulary: usize,
    rows: HashMap<Vec<u32>, Vec<(u32, f64)>>,
    logprobs: Array2<f64>,
}

impl Table {
    /// `rows`: the generated tokens, and the log-probabilities of what may follow.
    pub(crate) fn new(vocabulary: usize, rows: &[(&[u32], &[(u32, f64)])]) -> Self {
        let rows = rows.iter().map(|(tokens, row)| (tokens.to_vec(), row.to_vec())).collect();
        Self { vocabulary, rows, logprobs: Array2::zeros((0, 0)) }
    }

    fn row(&self, generated: &[u32]) -> Result<Vec<f64>, ModelError> {
        let entries =
            self.rows.get(generated).ok_or_else(|| format!("nothing follows {generated:?}"))?;
        let mut row = vec![f64::NEG_INFINITY; self.vocabulary];
        for &(token, logprob) in entries {
            row[token as usize] = logprob;
        }
        Ok(row)
    }

    /// As the oracles take it, for prompts of one token.
    pub(crate) fn next(&self) -> impl FnMut(&[u32]) -> Result<Vec<f64>, ModelError> {
        |sequence| self.row(&sequence[1..])
    }
}

impl Model for Table {
    type Element = f64;

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f64>, ModelError> {
        let rows: Result<Vec<_>, _> =
            (0..beams.len()).map(|row| self.row(&beams.generated(row))).collect();
        let shape = (beams.len(), self.vocabulary);
        self.logprobs = Array2::from_shape_vec(shape, rows?.concat())?;
        Ok(self.logprobs.view())
    }
}

/// The search for one prompt.
pub(crate) fn search_one<M: Model>(
    model: &mut M,
    prompt: &[u32],
    options: &Options<'_>,
) -> Result<Item, Error> {
    let mut output = beam_search(model, &[prompt], options)?;
    Ok(output.items.remove(0))
}

/// Tokens and scores, for hand-written expectations.
pub(crate) fn tokens_and_scores(item: &Item) -> Vec<(Vec<u32>, f64)> {
    item.hypotheses.iter().map(|h| (h.tokens.clone(), h.score)).collect()
}

/// The same sequences in the same order, scores to rounding.
pub(crate) fn assert_same(got: &[Hypothesis], want: &[Hypothesis], tolerance: f64, what: &str) {
    let tokens = |all: &[Hypothesis]| all.iter().map(|h| h.tokens.clone()).collect::<Vec<_>>();
    assert_eq!(tokens(got), tokens(want), "{what}");
    for (got, want) in got.iter().zip(want) {
        let close = |a: f64, b: f64| (a - b).abs() <= tolerance * (1.0 + b.abs());
        assert!(close(got.logprob, want.logprob), "{what}: {got:?} {want:?}");
        assert!(close(got.score, want.score), "{what}: {got:?} {want:?}");
        assert_eq!(got.finished, want.finished, "{what}");
        assert_eq!(got.group, want.group, "{what}");
        assert_eq!(got.beam_indices, want.beam_indices, "{what}");
        for (a, b) in got.token_logprobs.iter().zip(&want.token_logprobs) {
            assert!(close(*a, *b), "{what}: {got:?} {want:?}");
        }
    }
}
