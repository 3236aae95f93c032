//! The cases in `fixtures/attn-flash`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::{AncestorMask, Attention, Options, Window, attention, attention_reference};
use ndarray::{Array3, Array4};
use tensor_utils::testing::{Case, Poison, check_close, recorded_cases};
use tensor_utils::{Element, bf16, f16};

fn check<T>(case: &Case)
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let (q, k, v): (Array4<T>, Array4<T>, Array4<T>) =
        (case.array("in.q"), case.array("in.k"), case.array("in.v"));
    let bias = case.floats("in.bias");
    let mask = case.get("in.mask").map(|mask| mask.mapv(|x| x != 0.0));
    let lengths = case.get("in.kv_len").map(|lengths| lengths.mapv(|x| x as usize));
    let sinks = case.floats("in.sink");
    let parents = case.get("in.tree_parents").map(|_| case.integers("in.tree_parents"));
    let tree = parents.map(|p| AncestorMask::from_parents(&p).unwrap());

    let mut options = Options::<T>::default();
    for (param, value) in case.params.as_object().unwrap() {
        match param.as_str() {
            "causal" => options.causal = value.as_bool().unwrap(),
            "scale" => options.scale = value.as_f64(),
            "softcap" => options.softcap = value.as_f64(),
            "window" => {
                let sides = value.as_u64().map(|window| window as usize - 1);
                options.window = Window { left: sides, right: sides };
            }
            _ => panic!("unknown parameter {param}"),
        }
    }
    options.bias = bias.as_ref().map(|bias| bias.view());
    options.mask = mask.as_ref().map(|mask| mask.view());
    options.key_lengths = lengths.as_ref().map(|lengths| lengths.as_slice().unwrap());
    options.sinks = sinks.as_ref().map(|sinks| sinks.as_slice().unwrap());
    options.tree = tree.as_ref();

    let want = Attention { o: case.array("out.o"), lse: case.array("out.lse") };
    let (q, k, v) = (q.view(), k.view(), v.view());
    let reference = attention_reference(q, k, v, &options).unwrap();
    check_result(case, "reference", &reference.o, &reference.lse, &want);
    for tiling in common::tilings() {
        let got = common::attention_tiled((q, k, v), &options, &tiling).unwrap();
        check_result(case, &format!("{tiling:?}"), &got.o, &got.lse, &want);
    }
    let got = attention(q, k, v, &options).unwrap();
    check_result(case, "default", &got.o, &got.lse, &want);
}

fn check_result<T: Element, A: Element>(
    case: &Case,
    who: &str,
    o: &Array4<T>,
    lse: &Array3<A>,
    want: &Attention<f64>,
) {
    check_close(o, &want.o, case.tolerance).unwrap_or_else(|error| panic!("{who}: o: {error}"));
    check_close(lse, &want.lse, case.tolerance)
        .unwrap_or_else(|error| panic!("{who}: lse: {error}"));
}

#[test]
fn cases_from_pytorch() {
    for case in recorded_cases(env!("CARGO_MANIFEST_DIR"), "attn-flash", 39) {
        match case.dtype("in.q").as_str() {
            "f64" => check::<f64>(&case),
            "f32" => check::<f32>(&case),
            "bf16" => check::<bf16>(&case),
            "f16" => check::<f16>(&case),
            other => panic!("in.q has type {other}"),
        }
    }
}
