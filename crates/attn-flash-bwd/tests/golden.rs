//! The cases in `fixtures/attn-flash-bwd`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::attention;
use attn_flash_bwd::{Gradients, Inputs, attention_backward, attention_backward_reference};
use common::{ByName, Setting};
use ndarray::{Array4, Ix3, Ix4};
use tensor_utils::testing::{Case, Poison, check_close, recorded_cases};
use tensor_utils::{Element, bf16, f16};

/// What autograd found.
fn want(case: &Case) -> Gradients<f64> {
    Gradients {
        dq: case.array("out.dq"),
        dk: case.array("out.dk"),
        dv: case.array("out.dv"),
        delta: case.array("out.delta"),
        dbias: case.floats("out.dbias"),
        dsinks: case.get("out.dsink").map(|_| case.array("out.dsink")),
    }
}

fn check<T>(case: &Case)
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let (q, k, v): (Array4<T>, Array4<T>, Array4<T>) =
        (case.array("in.q"), case.array("in.k"), case.array("in.v"));
    let setting = Setting::<T>::recorded(case);
    let options = setting.without_user_mask();

    let forward = attention(q.view(), k.view(), v.view(), &options).unwrap();
    check_close(&forward.o, &case.array::<f64, Ix4>("out.o"), case.tolerance).unwrap();
    check_close(&forward.lse, &case.array::<f64, Ix3>("out.lse"), case.tolerance).unwrap();
    let d_o = case.array("in.do");
    let inputs = Inputs {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        o: forward.o.view(),
        lse: forward.lse.view(),
        d_o: d_o.view(),
        d_lse: None,
    };
    let want = want(case);
    check_result(
        case,
        "reference",
        &attention_backward_reference(&inputs, &options).unwrap(),
        &want,
    );
    for tiling in common::tilings() {
        let got = common::backward_tiled(&inputs, &options, &tiling).unwrap();
        check_result(case, &format!("{tiling:?}"), &got, &want);
    }
    check_result(case, "default", &attention_backward(&inputs, &options).unwrap(), &want);
}

fn check_result(case: &Case, who: &str, got: &impl ByName, want: &Gradients<f64>) {
    let (got, want) = (got.by_name(), want.by_name());
    assert_eq!(got.len(), want.len(), "{who}");
    for ((name, got), (_, want)) in got.iter().zip(&want) {
        check_close(got, want, case.tolerance)
            .unwrap_or_else(|error| panic!("{who}: {name}: {error}"));
    }
}

#[test]
fn cases_from_pytorch() {
    for case in recorded_cases(env!("CARGO_MANIFEST_DIR"), "attn-flash-bwd", 38) {
        match case.dtype("in.q").as_str() {
            "f64" => check::<f64>(&case),
            "f32" => check::<f32>(&case),
            "bf16" => check::<bf16>(&case),
            "f16" => check::<f16>(&case),
            other => panic!("in.q has type {other}"),
        }
    }
}
