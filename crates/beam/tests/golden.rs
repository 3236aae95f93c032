//! The cases in `fixtures/beam`: the pool by a plain Python program, the rule of Transformers by
//! Transformers itself. `cargo xtask verify-cases` checks the fast path by its own adapter; here, it and
//! the reference.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use beam::{Bigram, EarlyStopping, Hypothesis, Options, Rule, beam_search, beam_search_reference};
use ndarray::Array2;
use serde_json::Value;
use tensor_utils::testing::{Case, recorded_cases};

const PADDING: i64 = -1;

fn unpadded(row: &[i64]) -> Vec<u32> {
    row.iter().take_while(|&&token| token != PADDING).map(|&token| token as u32).collect()
}

fn tokens_of(value: &Value) -> Vec<u32> {
    match value {
        Value::Array(all) => all.iter().map(|token| token.as_u64().unwrap() as u32).collect(),
        one => vec![one.as_u64().unwrap() as u32],
    }
}

fn rule_of(params: &Value) -> Rule {
    if params["rule"] == "pool" {
        return Rule::Pool;
    }
    assert_eq!(params["rule"], "transformers");
    let early_stopping = match &params["early_stopping"] {
        Value::Bool(true) => EarlyStopping::Immediate,
        Value::Null | Value::Bool(false) => EarlyStopping::Heuristic,
        never => {
            assert_eq!(never, "never");
            EarlyStopping::Never
        }
    };
    Rule::Transformers { early_stopping }
}

fn check(case: &Case) {
    let params = &case.params;
    let table: Array2<f64> = case.array("in.bigram");
    let vocabulary = table.nrows();
    let longest = case.get("in.prompts").unwrap().shape()[1];
    let prompts: Vec<_> = case.integers("in.prompts").chunks_exact(longest).map(unpadded).collect();

    let eos = tokens_of(&params["eos"]);
    let words = params["bad_words_ids"].as_array().cloned().unwrap_or_default();
    let bad_words: Vec<_> = words.iter().map(tokens_of).collect();
    let count = |name: &str| params[name].as_u64().unwrap_or(0) as usize;
    let options = Options {
        num_beams: count("num_beams"),
        num_return: params["num_return_sequences"].as_u64().map(|n| n as usize),
        max_new_tokens: count("max_new_tokens"),
        eos: &eos,
        alpha: params["alpha"].as_f64().unwrap(),
        rule: rule_of(params),
        min_new_tokens: count("min_new_tokens"),
        min_length: count("min_length"),
        no_repeat_ngram: count("no_repeat_ngram_size"),
        bad_words: &bad_words,
        ..Options::default()
    };
    let output = beam_search(&mut Bigram::new(table.clone()).unwrap(), &prompts, &options).unwrap();

    let shape = case.get("out.sequences").unwrap().shape().to_vec();
    let sequences = case.integers("out.sequences");
    let scores: Array2<f64> = case.array("out.scores");
    let scores = scores.as_slice().unwrap();
    for (item, prompt) in prompts.iter().enumerate() {
        let mut next =
            |sequence: &[u32]| Ok(table.row(*sequence.last().unwrap() as usize).to_vec());
        let reference = beam_search_reference(&mut next, vocabulary, prompt, &options).unwrap();
        let check = |who: &str, found: &[Hypothesis]| {
            assert_eq!(found.len(), shape[1], "{who}");
            for (beam, hypothesis) in found.iter().enumerate() {
                let row = item * shape[1] + beam;
                let wanted = unpadded(&sequences[row * shape[2]..][..shape[2]]);
                assert_eq!(hypothesis.tokens, wanted, "{who}, prompt {item}, beam {beam}");
                let error = (hypothesis.score - scores[row]).abs();
                assert!(error <= case.tolerance.abs * (1.0 + scores[row].abs()), "{who}: {error}");
            }
        };
        check("reference", &reference);
        check("search", &output.items[item].hypotheses);
    }
}

#[test]
fn cases_of_others() {
    for case in recorded_cases(env!("CARGO_MANIFEST_DIR"), "beam", 83) {
        check(&case);
    }
}
