//! The cases in `fixtures/dflash`, whose answers were computed in Python.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use dflash::{Accepted, TokenTree, accept_greedy, accept_greedy_reference};
use ndarray::Array2;
use safetensors::{Dtype, SafeTensors};
use tensor_utils::testing::recorded_cases;
use tensor_utils::{bf16, f16};

fn decode<const BYTES: usize, T>(bytes: &[u8], number: impl Fn([u8; BYTES]) -> T) -> Vec<T> {
    bytes.chunks_exact(BYTES).map(|chunk| number(chunk.try_into().unwrap())).collect()
}

fn integers(case: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    decode(case.tensor(name).unwrap().data(), i64::from_le_bytes)
}

fn check(bytes: &[u8]) {
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    assert_eq!((&*metadata["format"], &*metadata["kernel"]), ("kernel-case/1", "dflash"));
    assert_eq!(metadata["params"], "{}");
    let case = SafeTensors::deserialize(bytes).unwrap();
    let tokens = |name| integers(&case, name).iter().map(|&t| u32::try_from(t).unwrap()).collect();
    let given: Vec<u32> = tokens("in.tree_tokens");
    let tree = TokenTree::new(&given, &integers(&case, "in.tree_parents")).unwrap();
    let nodes = integers(&case, "out.accepted_nodes");
    let nodes = nodes.iter().map(|&node| usize::try_from(node).unwrap()).collect();
    let want = Accepted { nodes, tokens: tokens("out.tokens") };

    let logits = case.tensor("in.logits").unwrap();
    let shape = (logits.shape()[0], logits.shape()[1]);
    macro_rules! check_as {
        ($t:ty) => {{
            let values = decode(logits.data(), <$t>::from_le_bytes);
            let logits = Array2::from_shape_vec(shape, values).unwrap();
            assert_eq!(accept_greedy(&tree, logits.view()).unwrap(), want);
            let wide = logits.mapv(f64::from);
            // The reference reads every row.
            if !wide.iter().any(|x| x.is_nan()) {
                let got = accept_greedy_reference(&given, tree.parents(), wide.view()).unwrap();
                assert_eq!(got, want);
            }
        }};
    }
    match logits.dtype() {
        Dtype::F64 => check_as!(f64),
        Dtype::F32 => check_as!(f32),
        Dtype::F16 => check_as!(f16),
        Dtype::BF16 => check_as!(bf16),
        other => panic!("in.logits has type {other:?}"),
    }
}

#[test]
fn cases_from_python() {
    let Some(paths) = recorded_cases(env!("CARGO_MANIFEST_DIR"), "dflash") else { return };
    assert!(paths.len() >= 16, "only {} cases found", paths.len());
    for path in paths {
        println!("{}", path.display());
        check(&fs::read(&path).unwrap());
    }
}
