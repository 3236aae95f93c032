//! Gradients against finite differences of the forward pass, in f64: every input, every option.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::{Options, attention};
use attn_flash_bwd::{Gradients, Strategy, Tiling};
use common::ways::{combine, options};
use common::{Broadcast, Call, Features, Sizes, UserMask};
use ndarray::{Array1, Array3, Array4, ArrayView4};
use tensor_utils::testing::{GradCheck, GradError, Seeded, isas};

/// `sum(o * w) + sum(lse * u)` for `w = d_o` and `u = d_lse`, over the rows that see something.
fn loss(
    call: &Call<f64>,
    q: ArrayView4<'_, f64>,
    k: ArrayView4<'_, f64>,
    v: ArrayView4<'_, f64>,
    options: &Options<'_, f64, &UserMask>,
) -> f64 {
    let result = attention(q, k, v, options).unwrap();
    let from_o = (&result.o * &call.d_o).sum();
    let from_lse = call.d_lse.as_ref().map_or(0.0, |d_lse| {
        let terms = result.lse.iter().zip(d_lse).filter(|(lse, _)| lse.is_finite());
        terms.map(|(lse, u)| lse * u).sum()
    });
    from_o + from_lse
}

/// Checks all gradients of one call; the error says which is wrong.
fn check(call: &Call<f64>, got: &Gradients<f64>, with: &GradCheck) -> Result<(), String> {
    let Call { q, k, v, setting, .. } = call;
    let (qv, kv, vv) = (q.view(), k.view(), v.view());
    let named = |name: &'static str| move |error: GradError| format!("{name}: {error}");
    let options = || setting.options();
    let of_q = |q: &Array4<f64>| loss(call, q.view(), kv, vv, &options());
    with.check(of_q, q, &got.dq).map_err(named("dq"))?;
    let of_k = |k: &Array4<f64>| loss(call, qv, k.view(), vv, &options());
    with.check(of_k, k, &got.dk).map_err(named("dk"))?;
    let of_v = |v: &Array4<f64>| loss(call, qv, kv, v.view(), &options());
    with.check(of_v, v, &got.dv).map_err(named("dv"))?;
    assert_eq!(got.dbias.is_some(), setting.bias.is_some());
    if let (Some(bias), Some(dbias)) = (&setting.bias, &got.dbias) {
        let of_bias = |bias: &ndarray::ArrayD<f64>| {
            loss(call, qv, kv, vv, &Options { bias: Some(bias.view()), ..options() })
        };
        with.check(of_bias, bias, dbias).map_err(named("dbias"))?;
    }
    assert_eq!(got.dsinks.is_some(), setting.sinks.is_some());
    if let (Some(sinks), Some(dsinks)) = (&setting.sinks, &got.dsinks) {
        let of_sinks = |sinks: &Array1<f64>| {
            loss(call, qv, kv, vv, &Options { sinks: sinks.as_slice(), ..options() })
        };
        with.check(of_sinks, &Array1::from(sinks.clone()), dsinks).map_err(named("dsinks"))?;
    }
    Ok(())
}

/// A call in which a gradient comes in through `o` and `lse`.
fn call(sizes: Sizes, features: &Features, seed: u64) -> Call<f64> {
    let mut call = Call::new(sizes, features, seed);
    call.d_lse = Some(Seeded::new(seed ^ 1).normal(call.lse.dim()));
    call
}

const SMALL: [Sizes; 3] = [
    Sizes { batch: 2, key_heads: 1, group: 2, n: 5, m: 7, d: 3, e: 4 },
    Sizes { batch: 1, key_heads: 2, group: 1, n: 6, m: 4, d: 2, e: 3 },
    Sizes { batch: 1, key_heads: 1, group: 3, n: 3, m: 37, d: 2, e: 1 },
];

fn small_tilings() -> impl Iterator<Item = Tiling> {
    let strategies = [Strategy::SavedOutput, Strategy::TwoPass];
    let isas = isas().into_iter();
    isas.flat_map(move |isa| strategies.map(|strategy| common::tiling((2, 32), strategy, isa)))
}

/// All elements of all inputs with the step and the tolerances of PyTorch's `gradcheck`.
fn check_small(features: &Features, seed: u64) {
    for sizes in SMALL {
        let call = call(sizes, features, seed);
        for tiling in small_tilings() {
            check(&call, &call.run(&tiling), &GradCheck::default())
                .unwrap_or_else(|error| panic!("{error}\n{sizes:?} {features:?} {tiling:?}"));
        }
    }
}

#[test]
fn each_option() {
    for (seed, features) in options().iter().enumerate() {
        check_small(features, seed as u64);
    }
}

#[test]
fn many_options_at_once() {
    let options = options();
    for seed in 0..20 {
        let mut all = Features::default();
        for features in options.iter().skip(seed % 5).step_by(2 + seed / 5) {
            let features = Features { query_offset: None, ..features.clone() };
            all = combine(&all, &features);
        }
        check_small(&all, seed as u64);
    }
    check_small(&common::everything(), 1);
}

/// The gradient through `o` alone, through `lse` alone, and through neither.
#[test]
fn either_gradient_alone() {
    let features = Features { sinks: true, bias: Some(Broadcast::Rows), ..Features::default() };
    let both = call(SMALL[0], &features, 1);
    let mut of_o = both.clone();
    of_o.d_lse = None;
    let mut of_lse = both;
    of_lse.d_o.fill(0.0);
    let mut of_nothing = of_lse.clone();
    of_nothing.d_lse = Some(Array3::zeros(of_lse.lse.dim()));
    for call in [of_o, of_lse, of_nothing] {
        for tiling in small_tilings() {
            check(&call, &call.run(&tiling), &GradCheck::default()).unwrap();
        }
    }
}

/// `[1, 1, 64, 32]`, causal, in blocks of 16 (the keys' rounded up to 32): all of dv, and
/// spot checks of dq and dk, to a relative error of 1e-5.
#[test]
fn sharp_on_one_head() {
    let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n: 64, m: 64, d: 32, e: 32 };
    let features = Features { causal: true, ..Features::default() };
    let call = Call::<f64>::new(sizes, &features, 2);
    assert!(call.d_lse.is_none());
    let (q, k, v) = (call.q.view(), call.k.view(), call.v.view());
    let options = call.options();
    // The loss is linear in v, so that a large step has no error of its own.
    let all = GradCheck { eps: 1e-2, atol: 1e-11, rtol: 1e-5, max_elements: 64 * 32, seed: 0 };
    // A step of 1e-4 is off by 1e-8 of the third derivative, and by 1e-10 of rounding.
    let spots = GradCheck { eps: 1e-4, atol: 1e-8, rtol: 1e-5, max_elements: 200, seed: 0 };
    for isa in isas() {
        for strategy in [Strategy::SavedOutput, Strategy::TwoPass] {
            let got = call.run(&common::tiling((16, 16), strategy, isa));
            let of_v = |v: &Array4<f64>| loss(&call, q, k, v.view(), &options);
            assert_eq!(all.check(of_v, &call.v, &got.dv).unwrap().checked, 64 * 32);
            let of_q = |q: &Array4<f64>| loss(&call, q.view(), k, v, &options);
            assert_eq!(spots.check(of_q, &call.q, &got.dq).unwrap().checked, 200);
            let of_k = |k: &Array4<f64>| loss(&call, q, k.view(), v, &options);
            assert_eq!(spots.check(of_k, &call.k, &got.dk).unwrap().checked, 200);
        }
    }
}

/// Of a large tensor some elements are checked one by one, and then all along one direction.
#[test]
fn large_tensor_is_spot_checked() {
    let sizes = Sizes { batch: 2, key_heads: 2, group: 2, n: 150, m: 300, d: 16, e: 16 };
    let features = Features { causal: true, softcap: Some(5.0), ..Features::default() };
    let call = call(sizes, &features, 3);
    let spots = GradCheck { max_elements: 20, ..GradCheck::default() };
    let strategies = [Strategy::SavedOutput, Strategy::TwoPass];
    for (isa, strategy) in isas().into_iter().zip(strategies.into_iter().cycle()) {
        let mut got = call.run(&common::tiling((64, 64), strategy, isa));
        check(&call, &got, &spots).unwrap();
        // A wrong element that no spot check hits shows along the direction.
        got.dk[[1, 1, 299, 15]] += 1.0;
        check(&call, &got, &spots).unwrap_err();
    }
}
