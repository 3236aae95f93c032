//! The fast path against the reference.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ndarray::{Array1, Array2, array};
use softmax_topk::{
    Logit, Mask, NanPolicy, Options, PerRow, TopKGradients, softmax_topk, softmax_topk_backward,
    softmax_topk_backward_reference, softmax_topk_reference,
};
use tensor_utils::testing::Seeded;

fn near(got: f64, want: f64) -> bool {
    got == want
        || (got.is_nan() && want.is_nan())
        || (got - want).abs() <= 1e-5 * want.abs().max(1.0)
}

fn check<T: Logit>(logits: &Array2<T>, k: usize, options: &Options<'_, T::Acc>) {
    use tensor_utils::Element;
    let got = softmax_topk(logits.view(), k, options).unwrap();
    let want = softmax_topk_reference(logits.view(), k, options).unwrap();
    assert_eq!(got.indices, want.indices);
    assert_eq!(got.kept, want.kept);
    for (got, want) in got.probs.iter().zip(&want.probs) {
        assert!(near(got.to_f64(), *want), "{got:?} {want:?}");
    }
    for (got, want) in got.lse.iter().zip(&want.lse) {
        assert!(near(got.to_f64(), *want), "{got:?} {want:?}");
    }
    if let (Some(got), Some(want)) = (&got.tokens, &want.tokens) {
        assert_eq!(got.ranks, want.ranks);
        for (got, want) in got.logprobs.iter().zip(&want.logprobs) {
            assert!(near(got.to_f64(), *want));
        }
    }
    let (d_probs, d_lse): (Array2<T::Acc>, Array1<T::Acc>) = {
        let mut seeded = Seeded::new(9);
        (seeded.normal(got.probs.dim()), seeded.normal(got.lse.dim()))
    };
    let d_tokens: Option<Array2<T::Acc>> =
        options.tokens.map(|tokens| Seeded::new(10).normal(tokens.dim()));
    let gradients = TopKGradients {
        probs: Some(d_probs.view()),
        lse: Some(d_lse.view()),
        token_logprobs: d_tokens.as_ref().map(|d| d.view()),
    };
    let dx = softmax_topk_backward(&gradients, logits.view(), got.view(), options).unwrap();
    let want = softmax_topk_backward_reference(&gradients, logits.view(), k, options).unwrap();
    for (got, want) in dx.iter().zip(&want) {
        assert!(near(got.to_f64(), *want), "gradient {got:?} {want:?}");
    }
}

#[test]
fn every_option() {
    let (rows, v) = (3, 97);
    let logits: Array2<f32> = Seeded::new(1).normal((rows, v)) * 3.0;
    let bias: Array2<f32> = Seeded::new(2).normal((1, v));
    let mask =
        Array2::from_shape_fn((rows, 4), |(i, j)| 0xdead_beef_u32.rotate_left((i * 7 + j) as u32));
    let tokens = array![[0, 96], [5, 5], [50, 1]];
    let temperature = array![0.7, 1.0, 2.5];
    for k in [1, 5, 97] {
        for (log, renormalise) in [(false, false), (true, false), (false, true), (true, true)] {
            let options = Options {
                temperature: PerRow::Each(temperature.view()),
                mask: Some(Mask::U32(mask.view())),
                bias: Some(bias.view()),
                log,
                renormalise,
                top_p: PerRow::All(0.9),
                min_p: PerRow::All(0.01),
                nan: NanPolicy::Ignore,
                tokens: Some(tokens.view()),
            };
            check(&logits, k, &options);
            check(&logits, k, &Options { log, renormalise, ..Options::default() });
        }
    }
}
