//! The cases in `fixtures/attn-flash`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::{Attention, attention, attention_reference};
use common::Setting;
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
    let setting = Setting::<T>::recorded(case);
    let options = setting.without_user_mask();

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
