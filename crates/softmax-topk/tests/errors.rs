//! Every wrong argument has an error that names it, and the outputs are untouched.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs};
use ndarray::{Array1, Array2, Array3, array};
use softmax_topk::{
    Draw, Error, Mask, NanPolicy, Options, PerRow, Tiling, TopKGradients, Workspace, rows, sample,
    softmax_topk, softmax_topk_backward, softmax_topk_into, softmax_topk_naive,
    softmax_topk_reference,
};
use tensor_utils::{Isa, IsaError};

/// The message of the fast path, which the oracle agrees on.
fn message(logits: &Array2<f32>, k: usize, options: &Options<'_, f32>) -> String {
    let error = softmax_topk(logits.view(), k, options).unwrap_err();
    let of_naive = softmax_topk_naive(logits.view(), k, options).unwrap_err();
    assert_eq!(of_naive.to_string(), error.to_string());
    let of_reference = softmax_topk_reference(logits.view(), k, options).unwrap_err();
    assert_eq!(of_reference.to_string(), error.to_string());
    let draws = Array1::from_elem(logits.dim().0, Draw::default());
    let of_sample = sample(logits.view(), k, options, draws.view()).unwrap_err();
    assert_eq!(of_sample.to_string(), error.to_string());
    error.to_string()
}

fn logits() -> Array2<f32> {
    Array2::from_shape_fn((3, 70), |(i, j)| (i + j) as f32)
}

#[test]
fn k_is_between_1_and_the_vocabulary() {
    let expected = "expected 1 to 70, the length of the rows of `logits`";
    for k in [0, 71, usize::MAX] {
        assert_eq!(message(&logits(), k, &Options::default()), format!("`k` is {k}, {expected}"));
    }
}

#[test]
fn a_vocabulary_has_tokens() {
    for rows in [0, 1, 3] {
        for k in [0, 1, 5] {
            assert_eq!(
                message(&Array2::zeros((rows, 0)), k, &Options::default()),
                "`logits` has rows of 0 tokens, expected 1 to 4294967295"
            );
        }
    }
}

#[test]
fn vocabularies_are_counted_in_32_bits() {
    // No rows, so that nothing of that size exists.
    let vocabulary = 1 << 32;
    let logits = Array2::<f32>::zeros((0, vocabulary));
    let error = softmax_topk(logits.view(), 1, &Options::default()).unwrap_err();
    assert_eq!(error, Error::Vocabulary { vocabulary });
    assert!(error.to_string().starts_with("`logits` has rows of 4294967296 tokens"));
}

#[test]
fn options_are_in_their_range() {
    let nan = f64::NAN;
    for (wrong, text) in
        [(0.0, "0"), (-1.0, "-1"), (nan, "NaN"), (f64::INFINITY, "inf"), (1e-60, ""), (1e37, "")]
    {
        let options = Options { temperature: PerRow::All(wrong), ..Options::default() };
        let message = message(&logits(), 2, &options);
        let start = format!("option `temperature` is {text}");
        assert!(message.starts_with(&start), "{message}");
        assert!(message.contains("for row 0, expected a positive finite number"), "{message}");
    }
    for wrong in [0.0, 1.1, -0.5, nan] {
        let each = array![1.0, 0.5, wrong];
        let options = Options { top_p: PerRow::Each(each.view()), ..Options::default() };
        let message = message(&logits(), 2, &options);
        assert!(message.starts_with("option `top_p` is "), "{message}");
        assert!(message.ends_with("for row 2, expected above 0 and at most 1"), "{message}");
    }
    for wrong in [1.1, -0.5, nan] {
        let options = Options { min_p: PerRow::All(wrong), ..Options::default() };
        let message = message(&logits(), 2, &options);
        assert!(message.starts_with("option `min_p` is "), "{message}");
    }
}

#[test]
fn shapes_fit() {
    let each = Array1::ones(4);
    for (options, expected) in [
        (
            Options { temperature: PerRow::Each(each.view()), ..Options::default() },
            "`temperature` has shape [4], expected [3]",
        ),
        (
            Options { top_p: PerRow::Each(each.view()), ..Options::default() },
            "`top_p` has shape [4], expected [3]",
        ),
        (
            Options { min_p: PerRow::Each(each.view()), ..Options::default() },
            "`min_p` has shape [4], expected [3]",
        ),
        (
            Options { bias: Some(Array2::zeros((1, 69)).view()), ..Options::default() },
            "`bias` has shape [1, 69], expected [1, 70]",
        ),
        (
            Options { bias: Some(Array2::zeros((2, 70)).view()), ..Options::default() },
            "`bias` has shape [2, 70], expected [3, 70]",
        ),
        (
            Options { mask: Some(Mask::U32(Array2::zeros((1, 2)).view())), ..Options::default() },
            "`mask` has shape [1, 2], expected [1, 3]",
        ),
        (
            Options { mask: Some(Mask::U64(Array2::zeros((2, 2)).view())), ..Options::default() },
            "`mask` has shape [2, 2], expected [3, 2]",
        ),
        (
            Options { tokens: Some(Array2::zeros((2, 1)).view()), ..Options::default() },
            "`tokens` has shape [2, 1], expected [3, 1]",
        ),
        (
            Options { tokens: Some(array![[0, 1], [2, 70], [5, 5]].view()), ..Options::default() },
            "`tokens` has token 70 in row 1, expected less than 70",
        ),
    ] {
        assert_eq!(message(&logits(), 2, &options), expected);
    }
}

#[test]
fn nan_and_nothing_to_draw_are_located() {
    let mut x = logits();
    x[[1, 40]] = f32::NAN;
    x[[1, 50]] = f32::NAN;
    x[[2, 3]] = f32::NAN;
    let expected =
        "`logits`, plus `bias` if given, is NaN for token 40 in row 1, expected a number";
    assert_eq!(message(&x, 2, &Options::default()), expected);
    x.fill(1.0);
    x.row_mut(2).fill(f32::NEG_INFINITY);
    let draws = Array1::from_elem(3, Draw::default());
    let error = sample(x.view(), 2, &Options::default(), draws.view()).unwrap_err();
    let expected = "no token of row 2 can be drawn: all are masked or -inf, or one is NaN";
    assert_eq!(error.to_string(), expected);
    x[[0, 7]] = f32::NAN;
    let greatest = Options { nan: NanPolicy::Greatest, ..Options::default() };
    let error = sample(x.view(), 2, &greatest, draws.view()).unwrap_err();
    assert_eq!(error, Error::NothingToDraw { row: 0 });
    let draws = Array1::from_elem(2, Draw::default());
    let error = sample(x.view(), 2, &greatest, draws.view()).unwrap_err();
    assert_eq!(error.to_string(), "`draws` has shape [2], expected [3]");
}

#[test]
fn workspaces_are_large_enough() {
    let x = logits();
    for (rows, vocabulary, k) in [(2, 70, 5), (3, 69, 5), (3, 70, 4)] {
        let mut workspace = Workspace::new(rows, vocabulary, k, &Tiling::default()).unwrap();
        let inputs = Inputs::<f32>::new(Features::new(3, 70, 5));
        let mut top = inputs.blank();
        let before = top.clone();
        let error =
            softmax_topk_into(top.view_mut(), x.view(), &Options::default(), &mut workspace)
                .unwrap_err();
        let expected = format!(
            "the workspace was made for {rows} rows of {vocabulary} tokens and k {k}, \
             the call has 3 rows of 70 and k 5: make it with `Workspace::new(3, 70, 5, ..)`"
        );
        assert_eq!(error.to_string(), expected);
        assert_eq!(top, before);
    }
    let huge = Workspace::<f32>::new(1, usize::MAX, 1, &Tiling::default()).unwrap_err();
    assert!(huge.to_string().starts_with("there is no memory for `workspace`"), "{huge}");
    for isa in Isa::ALL.into_iter().filter(|isa| !isa.is_available()) {
        let tiling = Tiling { isa: Some(isa), ..Tiling::default() };
        let error = Workspace::<f32>::new(1, 1, 1, &tiling).unwrap_err();
        assert_eq!(error, Error::Isa(IsaError::Unavailable(isa)));
    }
}

#[test]
fn outputs_have_the_shape_of_the_call() {
    let x = logits();
    let mut workspace = Workspace::new(3, 70, 5, &Tiling::default()).unwrap();
    let mut run = |change: fn(&mut softmax_topk::TopK<f32>), tokens: bool| {
        let mut top = Inputs::<f32>::new(Features { tokens: 2, ..Features::new(3, 70, 5) }).blank();
        change(&mut top);
        let before = top.clone();
        let given = Array2::zeros((3, 2));
        let options = Options { tokens: tokens.then(|| given.view()), ..Options::default() };
        let error = softmax_topk_into(top.view_mut(), x.view(), &options, &mut workspace);
        assert_eq!(top, before);
        error.unwrap_err().to_string()
    };
    let cases: [(fn(&mut softmax_topk::TopK<f32>), bool, &str); 6] = [
        (
            |top| top.indices = Array2::zeros((2, 5)),
            true,
            "`indices` has shape [2, 5], expected [3, 5]",
        ),
        (
            |top| top.probs = Array2::zeros((3, 4)),
            true,
            "`probs` has shape [3, 4], expected [3, 5]",
        ),
        (|top| top.lse = Array1::zeros(4), true, "`lse` has shape [4], expected [3]"),
        (|top| top.kept = Array1::zeros(4), true, "`kept` has shape [4], expected [3]"),
        (
            |top| top.tokens = None,
            true,
            "the result has no `tokens`, expected room for the 2 of each row that option `tokens` names",
        ),
        (|_| {}, false, "the result has `tokens`, expected none: option `tokens` names none"),
    ];
    for (change, tokens, expected) in cases {
        assert_eq!(run(change, tokens), expected);
    }
}

#[test]
fn gradients_fit_the_results() {
    let x = logits();
    let options = Options::default();
    let top = softmax_topk(x.view(), 5, &options).unwrap();
    let backward = |gradients: &TopKGradients<'_, f32>| {
        softmax_topk_backward(gradients, x.view(), top.view(), &options).unwrap_err().to_string()
    };
    let wrong = Array2::zeros((3, 4));
    let gradients = TopKGradients { probs: Some(wrong.view()), ..Default::default() };
    assert_eq!(backward(&gradients), "`gradients.probs` has shape [3, 4], expected [3, 5]");
    let gradients = TopKGradients { token_logprobs: Some(wrong.view()), ..Default::default() };
    assert_eq!(
        backward(&gradients),
        "`gradients.token_logprobs` has shape [3, 4], expected [3, 0]"
    );
    let wrong = Array1::zeros(2);
    let gradients = TopKGradients { lse: Some(wrong.view()), ..Default::default() };
    assert_eq!(backward(&gradients), "`gradients.lse` has shape [2], expected [3]");

    let mut wrong = top.clone();
    wrong.indices[[2, 1]] = 70;
    let none = TopKGradients::default();
    let error = softmax_topk_backward(&none, x.view(), wrong.view(), &options).unwrap_err();
    assert_eq!(error.to_string(), "`top.indices` has token 70 in row 2, expected less than 70");
    let other = Array2::<f32>::zeros((4, 70));
    let error = softmax_topk_backward(&none, other.view(), top.view(), &options).unwrap_err();
    assert_eq!(error.to_string(), "`top.indices` has shape [3, 5], expected [4, 5]");
}

#[test]
fn axes_that_do_not_merge_are_named() {
    let x = Array3::<f32>::zeros((2, 3, 4));
    assert_eq!(rows("logits", x.view()).unwrap().dim(), (6, 4));
    let error = rows("logits", x.view().permuted_axes([1, 0, 2])).unwrap_err();
    assert!(error.to_string().starts_with("`logits` with shape [3, 2, 4]"), "{error}");
}

#[test]
fn no_rows_are_fine() {
    let x = Array2::<f32>::zeros((0, 9));
    let top = softmax_topk(x.view(), 4, &Options::default()).unwrap();
    assert_eq!((top.indices.dim(), top.lse.len()), ((0, 4), 0));
    let none = TopKGradients::default();
    let d = softmax_topk_backward(&none, x.view(), top.view(), &Options::default()).unwrap();
    assert_eq!(d.dim(), (0, 9));
    let drawn = sample(x.view(), 4, &Options::default(), Array1::from_vec(vec![]).view()).unwrap();
    assert_eq!(drawn.tokens.len(), 0);
}
