//! The backward pass against finite differences in f64.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs};
use softmax_topk::{TokenScores, TopK, softmax_topk, softmax_topk_backward};
use tensor_utils::testing::GradCheck;

/// The sum of all outputs times their gradients; those of columns that were cut have no effect.
fn weighted(inputs: &Inputs<f64>, top: &TopK<f64>) -> f64 {
    let mut sum = (&top.lse * &inputs.d_lse).sum();
    for ((row, column), prob) in top.probs.indexed_iter() {
        if column < top.kept[row] as usize {
            sum += prob * inputs.d_probs[[row, column]];
        }
    }
    if let Some(TokenScores { logprobs, .. }) = &top.tokens {
        sum += (logprobs * &inputs.d_tokens).sum();
    }
    sum
}

fn check(features: Features) {
    let inputs = Inputs::<f64>::new(features);
    let options = inputs.options();
    let forward =
        |logits: &ndarray::Array2<f64>| softmax_topk(logits.view(), features.k, &options).unwrap();
    let top = forward(&inputs.logits);
    let gradient =
        softmax_topk_backward(&inputs.gradients(), inputs.logits.view(), top.view(), &options)
            .unwrap();
    GradCheck::default()
        .check(|logits| weighted(&inputs, &forward(logits)), &inputs.logits, &gradient)
        .unwrap_or_else(|error| panic!("{features:?}: {error}"));
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (vocabulary, k) in [(1, 1), (9, 9), (150, 12)] {
        let plain = Features { tokens: 2, temperatures: true, ..Features::new(2, vocabulary, k) };
        for log in [false, true] {
            for renormalise in [false, true] {
                let features = Features { log, renormalise, ..plain };
                check(features);
                check(Features { bias: true, top_p: 0.7, ..features });
                check(Features { min_p: 0.1, ..features });
                // The lse of a row in which nothing is allowed is -inf.
                if vocabulary > 1 {
                    check(Features { mask_bits: 32, allowed: 0.7, tokens: 0, ..features });
                }
            }
        }
    }
}
