//! The cases in `fixtures/layernorm-bwd`, whose answers PyTorch computed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Source, Wanted};
use layernorm_bwd::{Kind, layer_norm_backward_reference, layer_norm_reference, rows};
use ndarray::{Array1, Array2, ArrayRef, Dimension};
use tensor_utils::testing::{Case, Poison, check_close, isas, recorded_cases};
use tensor_utils::{Element, bf16, f16};

/// `[..., D]` as rows.
fn matrix<T: Element>(case: &Case, name: &'static str) -> Array2<T> {
    let tensor = case.get(name).unwrap();
    rows(name, tensor.view()).unwrap().mapv(T::from_f64)
}

fn vector<W: Element>(case: &Case, name: &str) -> Option<Array1<W>> {
    case.get(name).map(|_| case.array(name))
}

fn inputs<T, W>(case: &Case) -> Inputs<T, W>
where
    T: Element + Poison,
    W: Element<Acc = T::Acc> + Poison,
    T::Acc: Poison,
{
    let mut features = Features::default();
    for (param, value) in case.params.as_object().unwrap() {
        match (param.as_str(), value.as_str()) {
            ("eps", _) => features.eps = value.as_f64().unwrap(),
            ("kind", Some("layernorm")) => features.kind = Kind::LayerNorm,
            ("kind", Some("rmsnorm")) => features.kind = Kind::RmsNorm,
            _ => panic!("unknown parameter {param}: {value}"),
        }
    }
    let x: Array2<T> = matrix(case, "in.x");
    let gamma: Array1<W> = vector(case, "in.gamma").unwrap();
    let beta = vector(case, "in.beta");
    features.beta = beta.is_some();
    let none = Array1::default(gamma.len());
    Inputs {
        features,
        dres: Array2::default(x.dim()),
        dy: matrix(case, "in.dy"),
        x,
        beta: beta.unwrap_or(none.clone()),
        gamma,
        before: [none.clone(), none],
    }
}

fn check<T, W>(case: &Case)
where
    T: Element + Poison,
    W: Element<Acc = T::Acc> + Poison,
    T::Acc: Poison,
{
    let inputs = inputs::<T, W>(case);
    let (x, dy) = (inputs.x.view(), inputs.dy.view());
    let forward = layer_norm_reference(x, &inputs.options()).unwrap();
    let backward = layer_norm_backward_reference(dy, x, &inputs.options()).unwrap();
    check_output(case, "reference", "out.y", &forward.y);
    check_output(case, "reference", "out.mean", &forward.mean);
    check_output(case, "reference", "out.rstd", &forward.rstd);
    check_output(case, "reference", "out.dx", &backward.dx);
    check_output(case, "reference", "out.dgamma", &backward.dgamma);
    check_output(case, "reference", "out.dbeta", &backward.dbeta);
    for isa in isas() {
        let forward = inputs.forward(isa);
        check_output(case, isa.name(), "out.y", &forward.y);
        check_output(case, isa.name(), "out.mean", &forward.mean);
        check_output(case, isa.name(), "out.rstd", &forward.rstd);
        for source in [Source::Statistics, Source::Input] {
            let features = Features { source, ..inputs.features };
            let inputs = Inputs { features, ..inputs.clone() };
            let got = inputs.backward_wanted(Wanted::ALL, isa);
            check_output(case, isa.name(), "out.dx", &got.dx.unwrap());
            check_output(case, isa.name(), "out.dgamma", &got.dgamma.unwrap());
            check_output(case, isa.name(), "out.dbeta", &got.dbeta.unwrap());
        }
    }
}

/// Compares with an output, if the case has it.
fn check_output<T: Element, D: Dimension>(
    case: &Case,
    who: &str,
    name: &str,
    got: &ArrayRef<T, D>,
) {
    let Some(want) = case.get(name) else { return };
    let want = want.to_shape(got.raw_dim()).unwrap().to_owned();
    check_close(got, &want, case.tolerance)
        .unwrap_or_else(|error| panic!("{who}: {name}: {error}"));
}

#[test]
fn cases_from_pytorch() {
    for case in recorded_cases(env!("CARGO_MANIFEST_DIR"), "layernorm-bwd", 26) {
        match (case.dtype("in.x").as_str(), case.dtype("in.gamma").as_str()) {
            ("f64", "f64") => check::<f64, f64>(&case),
            ("f32", "f32") => check::<f32, f32>(&case),
            ("bf16", "bf16") => check::<bf16, bf16>(&case),
            ("f16", "f16") => check::<f16, f16>(&case),
            ("bf16", "f32") => check::<bf16, f32>(&case),
            (x, gamma) => panic!("in.x has type {x}, in.gamma {gamma}"),
        }
    }
}
