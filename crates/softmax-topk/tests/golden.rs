//! The cases in `fixtures/softmax-topk`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::tilings;
use ndarray::{Array2, ArrayRef, Dimension};
use softmax_topk::{
    Logit, Options, PerRow, TopK, Workspace, rows, softmax_topk, softmax_topk_into,
    softmax_topk_reference,
};
use tensor_utils::testing::{Case, Tolerance, check_close, recorded_cases};
use tensor_utils::{Element, bf16, f16};

fn check<T: Logit>(case: &Case) {
    let tensor = case.floats("in.logits").unwrap();
    let logits: Array2<T> = rows("logits", tensor.view()).unwrap().to_owned();
    let mut options = Options::<T::Acc>::default();
    let mut k = 0;
    for (param, value) in case.params.as_object().unwrap() {
        match param.as_str() {
            "k" => k = value.as_u64().unwrap() as usize,
            "temperature" => options.temperature = PerRow::All(value.as_f64().unwrap()),
            "log" => options.log = value.as_bool().unwrap(),
            _ => panic!("unknown parameter {param}: {value}"),
        }
    }
    let want = softmax_topk_reference(logits.view(), k, &options).unwrap();
    check_top(case, "reference", &want);
    let mut got = softmax_topk(logits.view(), k, &options).unwrap();
    for tiling in tilings() {
        let mut workspace = Workspace::new(logits.dim().0, logits.dim().1, k, &tiling).unwrap();
        softmax_topk_into(got.view_mut(), logits.view(), &options, &mut workspace).unwrap();
        check_top(case, &format!("{tiling:?}"), &got);
    }
}

fn check_top<A: Element>(case: &Case, who: &str, top: &TopK<A>) {
    let indices = top.indices.mapv(f64::from);
    let exact = Tolerance { abs: 0.0, rel: 0.0 };
    check_output(case, who, "out.indices", &indices, exact);
    check_output(case, who, "out.probs", &top.probs, case.tolerance);
    check_output(case, who, "out.lse", &top.lse, case.tolerance);
}

fn check_output<T: Element, D: Dimension>(
    case: &Case,
    who: &str,
    name: &str,
    got: &ArrayRef<T, D>,
    tolerance: Tolerance,
) {
    let want = case.get(name).unwrap();
    let want = want.to_shape(got.raw_dim()).unwrap().to_owned();
    check_close(got, &want, tolerance).unwrap_or_else(|error| panic!("{who}: {name}: {error}"));
}

#[test]
fn cases_from_pytorch() {
    for case in recorded_cases(env!("CARGO_MANIFEST_DIR"), "softmax-topk", 30) {
        match case.dtype("in.logits").as_str() {
            "f64" => check::<f64>(&case),
            "f32" => check::<f32>(&case),
            "bf16" => check::<bf16>(&case),
            "f16" => check::<f16>(&case),
            other => panic!("in.logits has type {other}"),
        }
    }
}
