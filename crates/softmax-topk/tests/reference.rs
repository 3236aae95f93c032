//! The fast path against the reference, on every instruction set and with either number of passes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Layout, Values, tilings};
use softmax_topk::{
    Logit, NanPolicy, Options, Passes, PerRow, Tiling, TopK, softmax_topk, softmax_topk_backward,
    softmax_topk_backward_reference, softmax_topk_naive, softmax_topk_reference,
};
use tensor_utils::testing::{ErrorRatios, Tolerance, check_close, error_ratio};
use tensor_utils::{Element, bf16, f16};

/// Checks the results of all `tilings`, or that they are the error of the reference.
fn check_forward<T: Logit>(inputs: &Inputs<T>, tilings: &[Tiling]) {
    let want = softmax_topk_reference(inputs.logits.view(), inputs.features.k, &inputs.options());
    for tiling in tilings {
        match (inputs.forward(tiling), &want) {
            (Ok(got), Ok(want)) => check_top(inputs, tiling, &got, want),
            (Err(got), Err(want)) => assert_eq!(&got, want, "{:?} {tiling:?}", inputs.features),
            (got, want) => panic!("{:?} {tiling:?}: {got:?}, wanted {want:?}", inputs.features),
        }
    }
}

fn check_top<T: Logit>(inputs: &Inputs<T>, tiling: &Tiling, got: &TopK<T::Acc>, want: &TopK<f64>) {
    let context = format!("{} {:?} {tiling:?}", T::NAME, inputs.features);
    assert_eq!(got.indices, want.indices, "{context}");
    assert_eq!(got.kept, want.kept, "{context}");
    let rounding = <T::Acc as Element>::EPSILON;
    // Of a logarithm; a probability also has the rounding of its own logarithm, relatively. In f64 the
    // reference has itself the rounding of a long sum.
    let places = if T::NAME == "f64" { 256.0 } else { 4.0 };
    let log = Tolerance { abs: places * rounding, rel: places * rounding };
    let prob = Tolerance { abs: 1e-37, rel: 128.0 * rounding };
    let fail = |what: &str, error| panic!("{context}: {what}: {error}");
    let of_probs = if inputs.features.log { log } else { prob };
    check_close(&got.probs, &want.probs, of_probs).unwrap_or_else(|e| fail("probs", e));
    check_close(&got.lse, &want.lse, log).unwrap_or_else(|e| fail("lse", e));
    assert_eq!(got.tokens.is_some(), want.tokens.is_some());
    if let (Some(got), Some(want)) = (&got.tokens, &want.tokens) {
        assert_eq!(got.ranks, want.ranks, "{context}");
        check_close(&got.logprobs, &want.logprobs, log).unwrap_or_else(|e| fail("tokens", e));
    }
}

fn check_backward<T: Logit>(inputs: &Inputs<T>) {
    let (logits, gradients, options) = (inputs.logits.view(), inputs.gradients(), inputs.options());
    let top = softmax_topk(logits, inputs.features.k, &options).unwrap();
    let got = softmax_topk_backward(&gradients, logits, top.view(), &options).unwrap();
    let want =
        softmax_topk_backward_reference(&gradients, logits, inputs.features.k, &options).unwrap();
    // A probability has the rounding of its logarithm, and is multiplied by a sum of gradients.
    let scale = 100.0 * ((inputs.features.k + inputs.features.tokens) as f64).sqrt();
    let bound = scale * <T::Acc as Element>::EPSILON;
    let tolerance = Tolerance { abs: bound, rel: bound + T::EPSILON };
    check_close(&got, &want, tolerance)
        .unwrap_or_else(|error| panic!("{} {:?}: {error}", T::NAME, inputs.features));
}

#[test]
fn sizes_around_stripes_and_segments() {
    for vocabulary in [1, 2, 15, 16, 17, 127, 128, 129, 256, 1000, 4095, 16383, 16385, 40_000] {
        for k in [1, 2, 50, vocabulary / 16, vocabulary / 3, vocabulary] {
            if k == 0 || k > vocabulary {
                continue;
            }
            let inputs = Inputs::<f32>::new(Features::new(2, vocabulary, k));
            check_forward(&inputs, &tilings());
        }
    }
}

#[test]
fn every_kind_of_values_under_every_policy() {
    for values in Values::ALL {
        for nan in [NanPolicy::Error, NanPolicy::Greatest, NanPolicy::Ignore] {
            for (vocabulary, k) in [(1, 1), (70, 70), (300, 7), (5000, 50)] {
                let inputs = Features { values, nan, tokens: 3, ..Features::new(3, vocabulary, k) };
                let log = Features { log: true, temperatures: true, ..inputs };
                check_forward(&Inputs::<f32>::new(inputs), &tilings());
                check_forward(&Inputs::<f64>::new(log), &tilings());
                check_forward(&Inputs::<bf16>::new(inputs), &tilings());
            }
        }
    }
}

/// Features with every option, alone and together.
fn options() -> Vec<Features> {
    let plain = Features::new(3, 500, 20);
    let mut all = vec![
        Features { temperatures: true, ..plain },
        Features { mask_bits: 32, ..plain },
        Features { mask_bits: 64, shared: true, ..plain },
        Features { mask_bits: 32, allowed: 0.01, ..plain },
        Features { mask_bits: 64, allowed: 0.0, ..plain },
        Features { bias: true, ..plain },
        Features { bias: true, shared: true, ..plain },
        Features { top_p: 0.5, ..plain },
        Features { top_p: 1e-9, ..plain },
        Features { min_p: 0.2, ..plain },
        Features { min_p: 1.0, ..plain },
        Features { tokens: 4, ..plain },
        Features {
            temperatures: true,
            mask_bits: 32,
            bias: true,
            top_p: 0.8,
            min_p: 0.01,
            tokens: 2,
            ..plain
        },
    ];
    for i in 0..all.len() {
        all.push(Features { log: true, ..all[i] });
        all.push(Features { renormalise: true, ..all[i] });
        all.push(Features { log: true, renormalise: true, ..all[i] });
    }
    all
}

#[test]
fn every_option() {
    for features in options() {
        let inputs = Inputs::<f32>::new(features);
        check_forward(&inputs, &tilings());
        let tiling = [Tiling::default()];
        check_forward(&Inputs::<f64>::new(features), &tiling);
        check_forward(&Inputs::<bf16>::new(features), &tiling);
        check_forward(&Inputs::<f16>::new(features), &tiling);
    }
}

#[test]
fn gradients_with_every_option() {
    for features in options() {
        check_backward(&Inputs::<f32>::new(features));
        check_backward(&Inputs::<f64>::new(features));
        check_backward(&Inputs::<bf16>::new(features));
        check_backward(&Inputs::<f16>::new(features));
    }
    let plain = Features { tokens: 1, ..Features::new(2, 1, 1) };
    for vocabulary in [1, 127, 128, 129, 3000] {
        check_backward(&Inputs::<f32>::new(Features { vocabulary, ..plain }));
    }
    for values in [Values::MinusInfinity, Values::MostlyMinusInfinity, Values::Equal] {
        let features = Features { values, vocabulary: 200, k: 30, ..plain };
        check_backward(&Inputs::<f32>::new(features));
    }
    let features = Features { values: Values::SomeNan, nan: NanPolicy::Ignore, ..plain };
    check_backward(&Inputs::<f32>::new(Features { vocabulary: 300, k: 9, ..features }));
}

#[test]
fn the_nan_of_a_token_that_is_not_allowed_means_nothing() {
    let features = Features { mask_bits: 32, tokens: 5, ..Features::new(3, 700, 30) };
    let clean = Inputs::<f32>::new(features);
    let mut dirty = clean.clone();
    for ((row, token), logit) in dirty.logits.indexed_iter_mut() {
        if clean.mask_32[[row, token / 32]] >> (token % 32) & 1 == 0 {
            *logit = [f32::NAN, f32::INFINITY, 1e30][token % 3];
        }
    }
    for tiling in tilings() {
        assert_eq!(clean.forward(&tiling).unwrap(), dirty.forward(&tiling).unwrap());
    }
    let top = clean.forward(&Tiling::default()).unwrap();
    let backward = |inputs: &Inputs<f32>| {
        let (gradients, options) = (inputs.gradients(), inputs.options());
        softmax_topk_backward(&gradients, inputs.logits.view(), top.view(), &options).unwrap()
    };
    assert_eq!(backward(&clean), backward(&dirty));
}

#[test]
fn views_of_any_layout_give_the_same_bits() {
    fn check<T: Logit>() {
        for features in [
            Features::new(4, 900, 20),
            Features { mask_bits: 64, bias: true, tokens: 2, ..Features::new(4, 900, 20) },
        ] {
            let inputs = Inputs::<T>::new(features);
            for tiling in tilings() {
                let want = inputs.forward(&tiling).unwrap();
                for layout in Layout::ALL {
                    layout.with(&inputs.logits, |logits| {
                        assert_eq!(inputs.forward_of(logits, &tiling).unwrap(), want, "{layout:?}");
                    });
                }
            }
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
    check::<f16>();
}

#[test]
fn a_long_row_is_like_many_short_ones() {
    let features = Features { tokens: 2, temperatures: true, ..Features::new(1, 300_000, 64) };
    check_forward(&Inputs::<f32>::new(features), &tilings());
    check_forward(&Inputs::<bf16>::new(features), &tilings());
}

/// The median error is not above that of softmax and sort in the same type, none is twice it.
#[test]
fn errors_are_those_of_the_naive_algorithm_at_most() {
    fn check<T: Logit>(tiling: &Tiling) {
        let mut ratios = ErrorRatios::default();
        for (seed, vocabulary) in [100, 333, 1000, 4000, 20_000, 60_000].into_iter().enumerate() {
            for temperatures in [false, true] {
                for log in [false, true] {
                    let features = Features {
                        seed: seed as u64,
                        temperatures,
                        log,
                        ..Features::new(4, vocabulary, 50)
                    };
                    let inputs = Inputs::<T>::new(features);
                    let (k, options) = (50, inputs.options());
                    let got = inputs.forward(tiling).unwrap();
                    let naive = softmax_topk_naive(inputs.logits.view(), k, &options).unwrap();
                    let want = softmax_topk_reference(inputs.logits.view(), k, &options).unwrap();
                    let name = |what| format!("{what} {features:?}");
                    let probs = error_ratio(&got.probs, &naive.probs, &want.probs).unwrap();
                    ratios.push(name("probs"), probs);
                    let lse = error_ratio(&got.lse, &naive.lse, &want.lse).unwrap();
                    ratios.push(name("lse"), lse);
                }
            }
        }
        ratios.check(1.0, 2.0).unwrap_or_else(|error| panic!("{} {tiling:?}: {error}", T::NAME));
    }
    for tiling in tilings() {
        check::<f32>(&tiling);
        check::<bf16>(&tiling);
    }
}

#[test]
fn one_and_two_passes_choose_alike() {
    let features = Features { temperatures: true, ..Features::new(3, 20_000, 300) };
    let inputs = Inputs::<f32>::new(features);
    let of = |passes| inputs.forward(&Tiling { isa: None, passes }).unwrap();
    assert_eq!(of(Passes::One).indices, of(Passes::Two).indices);
}

#[test]
fn temperatures_at_the_ends_of_their_range() {
    for temperature in [1e-30, 1e-3, 1e30] {
        let inputs = Inputs::<f32>::new(Features::new(2, 400, 400));
        let options =
            Options { temperature: PerRow::All(temperature), log: true, ..Options::default() };
        let got = softmax_topk(inputs.logits.view(), 400, &options).unwrap();
        let want = softmax_topk_reference(inputs.logits.view(), 400, &options).unwrap();
        assert_eq!(got.indices, want.indices);
        let tolerance = Tolerance { abs: 1e-6, rel: 1e-6 };
        check_close(&got.probs, &want.probs, tolerance).unwrap();
        check_close(&got.lse, &want.lse, tolerance).unwrap();
    }
}
