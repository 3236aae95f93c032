//! The fast path against the reference, on every instruction set and with either number of passes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Layout, Values, tilings};
use ndarray::{Array1, Array2, array};
use softmax_topk::{
    Logit, NanPolicy, Options, Passes, PerRow, Tiling, TopK, TopKGradients, softmax_topk,
    softmax_topk_backward, softmax_topk_backward_reference, softmax_topk_naive,
    softmax_topk_reference,
};
use tensor_utils::testing::{ErrorRatios, Tolerance, check_close, error_ratio};
use tensor_utils::{Element, Float, bf16, f16};

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

/// The gradient with all arithmetic in the type that is computed in.
fn naive_gradient<T: Logit>(
    gradients: &TopKGradients<'_, T::Acc>,
    logits: &Array2<T>,
    temperature: f64,
    top: &TopK<T::Acc>,
    tokens: &Array2<u32>,
) -> Array2<T> {
    let temperature = T::Acc::from_f64(temperature);
    let mut all = Array2::default(logits.dim());
    for row in 0..logits.dim().0 {
        let x: Vec<T::Acc> = logits.row(row).iter().map(|x| x.to_acc()).collect();
        let max = x.iter().copied().fold(T::Acc::NEG_INFINITY, T::Acc::max_nan);
        let e: Vec<_> = x.iter().map(|&x| ((x - max) / temperature).exp()).collect();
        let sum: T::Acc = e.iter().copied().sum();
        let mut own = vec![T::Acc::ZERO; x.len()];
        if let Some(d) = gradients.probs {
            for (&token, &d) in top.indices.row(row).iter().zip(d.row(row)) {
                own[token as usize] += d * (e[token as usize] / sum);
            }
        }
        if let Some(d) = gradients.token_logprobs {
            for (&token, &d) in tokens.row(row).iter().zip(d.row(row)) {
                own[token as usize] += d;
            }
        }
        let of_own: T::Acc = own.iter().copied().sum();
        let common = gradients.lse.map_or(T::Acc::ZERO, |d| d[row]) - of_own;
        for token in 0..x.len() {
            let d = (common * (e[token] / sum) + own[token]) / temperature;
            all[[row, token]] = T::from_acc(d);
        }
    }
    all
}

/// The median error of the gradient is at most 1.5 times that of the naive one, however far from 0 the
/// logits are; none is three times it.
#[test]
fn errors_of_gradients_do_not_grow_with_the_logits() {
    fn check<T: Logit>() {
        let mut ratios = ErrorRatios::default();
        for (seed, vocabulary) in [100, 1000, 20_000].into_iter().enumerate() {
            for offset in [0.0, 50.0, 1000.0] {
                for temperature in [1.0, 0.1] {
                    let features = Features { tokens: 2, ..Features::new(3, vocabulary, 20) };
                    let inputs = Inputs::<T>::new(Features { seed: seed as u64, ..features });
                    let logits = inputs.logits.mapv(|x| T::from_f64(x.to_f64() + offset));
                    let options =
                        Options { temperature: PerRow::All(temperature), ..inputs.options() };
                    let top = softmax_topk(logits.view(), 20, &options).unwrap();
                    let all = inputs.gradients();
                    let dense = TopKGradients { lse: all.lse, ..TopKGradients::default() };
                    for gradients in [dense, all] {
                        let got =
                            softmax_topk_backward(&gradients, logits.view(), top.view(), &options)
                                .unwrap();
                        let (naive, want) = (
                            naive_gradient(&gradients, &logits, temperature, &top, &inputs.tokens),
                            softmax_topk_backward_reference(
                                &gradients,
                                logits.view(),
                                20,
                                &options,
                            )
                            .unwrap(),
                        );
                        let name = format!("{vocabulary} tokens around {offset} / {temperature}");
                        ratios.push(name, error_ratio(&got, &naive, &want).unwrap());
                    }
                }
            }
        }
        ratios.check(1.5, 3.0).unwrap_or_else(|error| panic!("{}: {error}", T::NAME));
    }
    check::<f32>();
    check::<bf16>();
}

#[test]
fn gradients_at_the_edges() {
    let (inf, nan, min) = (f32::INFINITY, f32::NAN, f32::MIN);
    let options =
        Options { temperature: PerRow::All(0.5), nan: NanPolicy::Greatest, ..Options::default() };
    let d_lse = array![1.0];
    let gradients = TopKGradients { lse: Some(d_lse.view()), ..Default::default() };
    for (logits, want) in [
        (array![[inf, 1.0, -inf]], array![[nan, 0.0, 0.0]]),
        (array![[1.0, nan, -inf]], array![[nan, nan, 0.0]]),
        (array![[-inf, -inf, -inf]], array![[0.0, 0.0, 0.0]]),
        // The lse is out of range, the probabilities are not.
        (array![[min, -inf, min]], array![[1.0, 0.0, 1.0]]),
        // Further from the maximum than any number.
        (array![[min, 1.0, f32::MAX]], array![[0.0, 0.0, 2.0]]),
    ] {
        let top = softmax_topk(logits.view(), 1, &options).unwrap();
        let got = softmax_topk_backward(&gradients, logits.view(), top.view(), &options).unwrap();
        check_close(&got, &want.mapv(f64::from), Tolerance { abs: 0.0, rel: 1e-6 }).unwrap();
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
    for temperature in [1e-30, 1e-3, 1e30, 3.4e35] {
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

/// What counts as kept is told by scores: a log-probability too small for the type is not that of a token
/// without one. The certain token has 0, not -0.
#[test]
fn scores_that_are_far_apart() {
    let apart = array![[1e308_f64, -1e308, f64::NEG_INFINITY]];
    let options = Options { log: true, ..Options::default() };
    for top in [
        softmax_topk(apart.view(), 3, &options).unwrap(),
        softmax_topk_reference(apart.view(), 3, &options).unwrap(),
    ] {
        assert_eq!((top.kept[0], top.probs[[0, 0]].to_bits()), (2, 0));
    }
    let certain = array![[f64::INFINITY, 0.0, f64::NEG_INFINITY]];
    for top in [
        softmax_topk(certain.view(), 3, &options).unwrap(),
        softmax_topk_reference(certain.view(), 3, &options).unwrap(),
    ] {
        assert_eq!((top.kept[0], top.probs[[0, 0]].to_bits()), (1, 0));
    }
    let options = Options { log: true, ..Options::default() };
    let top = softmax_topk(array![[3e38_f32, -3e38]].view(), 2, &options).unwrap();
    assert_eq!((top.kept[0], top.probs[[0, 0]].to_bits()), (2, 0));
}

/// At temperatures near 0 the factor of the probabilities is out of range where the gradient is not.
#[test]
fn gradients_of_low_temperatures() {
    fn check<T: Logit>(logits: &Array2<T>, temperature: f64, d_lse: f64) {
        let options =
            Options { temperature: PerRow::All(temperature), ..Options::<T::Acc>::default() };
        let d_lse = Array1::from_elem(logits.nrows(), T::Acc::from_f64(d_lse));
        let gradients = TopKGradients { lse: Some(d_lse.view()), ..TopKGradients::default() };
        let k = logits.ncols();
        let top = softmax_topk(logits.view(), k, &options).unwrap();
        let got = softmax_topk_backward(&gradients, logits.view(), top.view(), &options).unwrap();
        let want = softmax_topk_backward_reference(&gradients, logits.view(), k, &options).unwrap();
        for (&got, &want) in got.iter().zip(&want) {
            let rounded = T::from_f64(want).to_f64();
            let error = (got.to_f64() - rounded).abs();
            assert!(
                got.to_f64() == rounded || error <= 4.0 * T::EPSILON.to_f64() * rounded.abs(),
                "{}: {got:?}, expected {want} at {temperature:e}",
                T::NAME
            );
        }
    }
    for (temperature, d_lse) in [(1e-34, -65536.0), (1e-30, -1e9), (1e-38, -20.0), (1e-35, 1e5)] {
        check(&array![[1.0_f32, 0.5, 0.0, f32::NEG_INFINITY]], temperature, d_lse);
        let close = [0.0, -30.0, -60.0].map(|d| (d * temperature) as f32);
        check(&array![close], temperature, d_lse);
        check(&array![[1.0_f64, 0.5, 0.0]], temperature, d_lse);
        check(&array![[1.0, 0.5, 0.0].map(bf16::from_f32)], temperature, d_lse);
    }
}
