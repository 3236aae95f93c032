//! The cases in `fixtures/dflash`, whose answers were computed in Python.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use dflash::{Accepted, TokenTree, accept_greedy, accept_greedy_reference};
use ndarray::Array2;
use serde_json::json;
use tensor_utils::testing::{Case, recorded_cases};
use tensor_utils::{Element, bf16, f16};

fn check<T: Element>(case: &Case) {
    assert_eq!(case.params, json!({}));
    let tokens =
        |name| case.integers(name).iter().map(|&t| u32::try_from(t).unwrap()).collect::<Vec<_>>();
    let given = tokens("in.tree_tokens");
    let tree = TokenTree::new(&given, &case.integers("in.tree_parents")).unwrap();
    let nodes = case.integers("out.accepted_nodes");
    let nodes = nodes.iter().map(|&node| usize::try_from(node).unwrap()).collect();
    let want = Accepted { nodes, tokens: tokens("out.tokens") };

    let logits: Array2<T> = case.array("in.logits");
    assert_eq!(accept_greedy(&tree, logits.view()).unwrap(), want);
    let wide = logits.mapv(Element::to_f64);
    // The reference reads every row.
    if !wide.iter().any(|x| x.is_nan()) {
        let got = accept_greedy_reference(&given, tree.parents(), wide.view()).unwrap();
        assert_eq!(got, want);
    }
}

#[test]
fn cases_from_python() {
    for case in recorded_cases(env!("CARGO_MANIFEST_DIR"), "dflash", 16) {
        match case.dtype("in.logits").as_str() {
            "f64" => check::<f64>(&case),
            "f32" => check::<f32>(&case),
            "bf16" => check::<bf16>(&case),
            "f16" => check::<f16>(&case),
            other => panic!("in.logits has type {other}"),
        }
    }
}
