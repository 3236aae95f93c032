//! Beam search against Hugging Face `generate` with the same table as the model. The time inside the
//! model is not counted on either side.

use std::time::Instant;

use anyhow::Result;
use beam::{Beams, EarlyStopping, Model, ModelError, Options, Output, Rule, beam_search};
use ndarray::{Array2, ArrayD, ArrayView2, Axis};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tensor_utils::testing::largest_difference;

use super::duel::{Case, Contest};
use super::peer::{Input, Peer};

/// Rows of the table; the logits depend on the last token modulo this.
const ROWS: usize = 256;
/// Steps of a search.
const LENGTH: usize = 12;
/// Tokens of a prompt.
const PROMPT: usize = 4;

#[derive(Clone, Copy)]
struct Setup {
    batch: usize,
    beams: usize,
    vocabulary: usize,
}

/// A batch, and a single prompt.
pub(super) fn cases() -> Vec<Case> {
    let setups = [(16, 8, 50257), (1, 4, 50257)];
    setups.map(|(batch, beams, vocabulary)| case(Setup { batch, beams, vocabulary })).into()
}

fn case(setup: Setup) -> Case {
    let Setup { batch, beams, vocabulary } = setup;
    // In the first step a prompt has one row.
    let logits = (batch * (1 + (LENGTH - 1) * beams) * vocabulary) as f64;
    Case {
        package: "beam",
        kernel: "beam",
        name: format!(
            "batch {batch}, K {beams}, V {vocabulary}, {LENGTH} steps, outside the model"
        ),
        dtype: "f32",
        // An exponential as softmax-topk counts it, and a comparison.
        flops: 10.0 * logits,
        bytes: logits * size_of::<f32>() as f64,
        tolerance: 1e-4,
        prepare: Box::new(move || Ok(Box::new(Search::new(setup)))),
    }
}

/// Our side.
struct Search {
    setup: Setup,
    prompts: Array2<i64>,
    model: Table,
    output: Option<Output>,
}

/// Row `last token % ROWS` of a table; knows how long it took.
struct Table {
    table: Array2<f32>,
    logits: Array2<f32>,
    seconds: f64,
}

impl Model for Table {
    type Element = f32;

    fn vocabulary(&self) -> usize {
        self.table.ncols()
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f32>, ModelError> {
        let start = Instant::now();
        for (row, mut logits) in self.logits.outer_iter_mut().take(beams.len()).enumerate() {
            logits.assign(&self.table.row(beams.last_token(row) as usize % ROWS));
        }
        self.seconds += start.elapsed().as_secs_f64();
        Ok(self.logits.view().split_at(Axis(0), beams.len()).0)
    }
}

impl Search {
    fn new(setup: Setup) -> Self {
        let Setup { batch, beams, vocabulary } = setup;
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut uniform = || rng.random_range(-6.0..6.0_f32);
        let table = Array2::from_shape_simple_fn((ROWS, vocabulary), &mut uniform);
        let token = |(b, t): (usize, usize)| (7 + 13 * b + 5 * t) as i64 % ROWS as i64;
        let prompts = Array2::from_shape_fn((batch, PROMPT), token);
        let logits = Array2::zeros((batch * beams, vocabulary));
        let model = Table { table, logits, seconds: 0.0 };
        Self { setup, prompts, model, output: None }
    }
}

impl Contest for Search {
    fn peer_operation(&self) -> (&'static str, Value) {
        ("beam_search", json!({"num_beams": self.setup.beams, "max_new_tokens": LENGTH}))
    }

    fn inputs(&self) -> Vec<Input> {
        vec![Input::new("table", &self.model.table), Input::new("prompts", &self.prompts)]
    }

    fn run(&mut self) -> Result<()> {
        let options = Options {
            num_beams: self.setup.beams,
            eos: &[1],
            max_new_tokens: LENGTH,
            rule: Rule::Transformers { early_stopping: EarlyStopping::Heuristic },
            ..Options::default()
        };
        let row = |row: ndarray::ArrayView1<'_, i64>| row.iter().map(|&t| t as u32).collect();
        let prompts: Vec<Vec<u32>> = self.prompts.outer_iter().map(row).collect();
        self.output = Some(beam_search(&mut self.model, &prompts, &options)?);
        Ok(())
    }

    fn seconds_not_counted(&mut self) -> f64 {
        std::mem::take(&mut self.model.seconds)
    }

    fn largest_difference(&self, peer: &mut Peer) -> Result<f64> {
        Ok(self.difference(&peer.output("sequences")?, &peer.output("scores")?))
    }
}

impl Search {
    /// Of the scores, which are `f32` on the other side; infinite if the best sequences differ.
    fn difference(&self, sequences: &ArrayD<i64>, scores: &ArrayD<f32>) -> f64 {
        let items = self.output.iter().flat_map(|output| &output.items);
        let mut pairs = Vec::new();
        for (item, found) in items.map(|item| &item.hypotheses).enumerate() {
            for (rank, hypothesis) in found.iter().enumerate() {
                let row = item * self.setup.beams + rank;
                let theirs = sequences.index_axis(Axis(0), row);
                let theirs = theirs.iter().skip(PROMPT).take(hypothesis.tokens.len());
                let same = theirs.copied().eq(hypothesis.tokens.iter().map(|&t| i64::from(t)));
                pairs.push((f64::from(scores[[row]]), hypothesis.score));
                if rank == 0 && !same {
                    return f64::INFINITY;
                }
            }
        }
        largest_difference(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_that_is_nan_differs() {
        let mut search = Search::new(Setup { batch: 2, beams: 3, vocabulary: 50 });
        search.run().unwrap();
        let items = &search.output.as_ref().unwrap().items;
        let found: Vec<_> = items.iter().flat_map(|item| &item.hypotheses).collect();
        assert_eq!(found.len(), 6);
        let mut sequences = ArrayD::zeros(vec![6, PROMPT + LENGTH]);
        let mut scores = ArrayD::<f32>::zeros(vec![6]);
        for (row, hypothesis) in found.iter().enumerate() {
            scores[[row]] = hypothesis.score as f32;
            for (at, &token) in hypothesis.tokens.iter().enumerate() {
                sequences[[row, PROMPT + at]] = i64::from(token);
            }
        }
        let difference = search.difference(&sequences, &scores);
        assert!(difference < 1e-5, "{difference}");
        for row in 0..6 {
            let mut scores = scores.clone();
            scores[[row]] = f32::NAN;
            assert!(search.difference(&sequences, &scores).is_nan(), "{row}");
        }
        sequences[[3, PROMPT]] += 1;
        assert_eq!(search.difference(&sequences, &scores), f64::INFINITY);
    }
}
