//! Bad input gives an error that names it, never a panic.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use beam::{
    Beams, Bigram, Constraint, Error, Follow, Groups, Logit, Model, ModelError, ModelOutput,
    Options, Rule, Search, beam_search, beam_search_reference, brute_force,
};
use common::{Random, search_one};
use ndarray::{Array2, ArrayView2};
use tensor_utils::{bf16, f16};

fn options() -> Options<'static> {
    Options { num_beams: 2, eos: &[0], max_new_tokens: 3, ..Options::default() }
}

/// The message, which must contain all `parts`.
fn expect(options: &Options<'_>, parts: &[&str]) {
    let error = search_one(&mut Random::<f32>::new(5, 1), &[1], options).unwrap_err();
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
    // The oracles check the same.
    let mut next = |_: &[u32]| Ok(vec![0.0; 5]);
    let by_reference = beam_search_reference(&mut next, 5, &[1], options).unwrap_err();
    assert_eq!(by_reference.to_string(), message);
    assert_eq!(brute_force(&mut next, 5, &[1], options).unwrap_err().to_string(), message);
}

#[test]
fn options_out_of_range() {
    expect(&Options { num_beams: 0, ..options() }, &["`num_beams` is 0", "at least 1"]);
    expect(&Options { max_new_tokens: 0, ..options() }, &["`max_new_tokens` is 0"]);
    expect(&Options { num_return: Some(0), ..options() }, &["`num_return` is 0", "1 to 2"]);
    expect(&Options { num_return: Some(3), ..options() }, &["`num_return` is 3", "1 to 2"]);
    for alpha in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        expect(&Options { alpha, ..options() }, &["`alpha`", "finite"]);
    }
    for patience in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
        expect(&Options { rule: Rule::Patience { patience }, ..options() }, &["`rule.patience`"]);
    }
    for count in [0, 3, 4] {
        let groups = Groups { count, penalty: 0.0 };
        expect(&Options { groups, ..options() }, &["`groups.count`", "divisor of 2"]);
    }
    for count in [usize::MAX, 1 << 20] {
        let groups = Groups { count, penalty: 0.0 };
        let error = Options { num_beams: count, groups, ..options() };
        expect(&error, &["`groups.count`", "at most 65536", &count.to_string()]);
    }
    for penalty in [f64::NAN, f64::INFINITY, -0.5] {
        let groups = Groups { count: 2, penalty };
        expect(&Options { groups, ..options() }, &["`groups.penalty`"]);
    }
}

#[test]
fn tokens_out_of_range() {
    expect(&Options { eos: &[0, 5], ..options() }, &["`eos`", "token 5", "5 tokens"]);
    let words = [vec![1, 2], vec![3, u32::MAX]];
    expect(&Options { bad_words: &words, ..options() }, &["`bad_words`", "4294967295"]);
    let words = [vec![1], vec![]];
    expect(&Options { bad_words: &words, ..options() }, &["`bad_words`", "empty"]);

    let mut model = Random::<f32>::new(5, 1);
    let search = |model: &mut Random<f32>, prompts: &[&[u32]]| {
        beam_search(model, prompts, &options()).unwrap_err().to_string()
    };
    assert!(search(&mut model, &[&[1], &[]]).contains("prompt 1 is empty"));
    assert!(search(&mut model, &[&[1], &[2, 5]]).contains("`prompts` has the token 5"));
    assert!(Search::new(&[[1]], 0, &options()).is_err());
    let none: &[[u32; 1]] = &[];
    assert!(beam_search(&mut model, none, &options()).unwrap().items.is_empty());
    assert!(Bigram::new(Array2::<f32>::zeros((3, 4))).is_err());

    #[derive(Debug)]
    struct Elsewhere;
    impl Constraint for Elsewhere {
        fn follow(&self, _: usize, _: &[u32], allowed: &mut Vec<u32>) -> Follow {
            allowed.push(17);
            Follow::Listed
        }
    }
    let constrained = Options { constraint: Some(&Elsewhere), ..options() };
    let error = search_one(&mut model, &[1], &constrained).unwrap_err();
    assert!(error.to_string().contains("`constraint` has the token 17"), "{error}");
}

/// Gives what it is made of, whatever is asked.
struct Fixed<T> {
    vocabulary: usize,
    logits: Array2<T>,
}

impl<T: Logit> Model for Fixed<T> {
    type Element = T;

    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn score(&mut self, _: &Beams<'_>) -> Result<ArrayView2<'_, T>, ModelError> {
        Ok(self.logits.view())
    }
}

fn of_logits<T: Logit>(rows: &[[f64; 4]], options: &Options<'_>) -> Error {
    let logits = Array2::from_shape_fn((rows.len(), 4), |(i, j)| T::from_f64(rows[i][j]));
    let prompts = vec![[1]; rows.len()];
    beam_search(&mut Fixed { vocabulary: 4, logits }, &prompts, options).unwrap_err()
}

#[test]
fn logits_that_are_no_distribution() {
    const GOOD: [f64; 4] = [0.0, -1.0, -2.0, -3.0];
    let last = [GOOD, GOOD, [0.0, f64::NAN, 0.0, 0.0]];
    let forbidden = [vec![1]];
    // NaN shows even where a token is forbidden: the other probabilities would be anything.
    for options in [options(), Options { bad_words: &forbidden, ..options() }] {
        for error in [
            of_logits::<f32>(&last, &options),
            of_logits::<f64>(&last, &options),
            of_logits::<f16>(&last, &options),
            of_logits::<bf16>(&last, &options),
        ] {
            assert!(matches!(error, Error::Logits { row: 2, item: 2, .. }), "{error:?}");
            assert!(error.to_string().contains("NaN"), "{error}");
        }
    }
    let error = of_logits::<f32>(&[[0.0, f64::INFINITY, 0.0, 0.0]], &options());
    assert!(error.to_string().contains("+inf"), "{error}");
    let error = of_logits::<f32>(&[GOOD, [f64::NEG_INFINITY; 4]], &options());
    assert!(matches!(error, Error::Logits { row: 1, item: 1, .. }), "{error:?}");
    assert!(error.to_string().contains("-inf for every token"), "{error}");
    let exact = Options { model_output: ModelOutput::LogProbabilities, ..options() };
    let error = of_logits::<f32>(&[[-1.0, 0.5, -1.0, -1.0]], &exact);
    assert!(error.to_string().contains("above 0"), "{error}");
}

#[test]
fn a_model_that_breaks_its_contract() {
    for shape in [(0, 4), (2, 4), (1, 3), (1, 5)] {
        let mut model = Fixed { vocabulary: 4, logits: Array2::<f32>::zeros(shape) };
        let error = search_one(&mut model, &[1], &options()).unwrap_err();
        assert!(matches!(error, Error::Shape(_)), "{error:?}");
        assert!(error.to_string().contains("logits"), "{error}");
    }

    /// Fails in the given call.
    struct Failing {
        calls: usize,
        in_keep: bool,
        logits: Array2<f32>,
    }
    impl Model for Failing {
        type Element = f32;
        fn vocabulary(&self) -> usize {
            3
        }
        fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f32>, ModelError> {
            self.calls += 1;
            if self.calls == 2 && !self.in_keep {
                return Err("no pages left".into());
            }
            self.logits = Array2::zeros((beams.len(), 3));
            Ok(self.logits.view())
        }
        fn keep(&mut self, _: &[usize]) -> Result<(), ModelError> {
            if self.in_keep { Err("no pages left".into()) } else { Ok(()) }
        }
    }
    for in_keep in [false, true] {
        let mut model = Failing { calls: 0, in_keep, logits: Array2::zeros((0, 3)) };
        let error = search_one(&mut model, &[1], &options()).unwrap_err();
        assert_eq!(error.to_string(), "the model failed: no pages left");
        assert!(std::error::Error::source(&error).is_some());
    }

    // Another model in the middle of a search.
    let options = options();
    let mut search = Search::new(&[[1]], 5, &options).unwrap();
    assert!(search.step(&mut Random::<f32>::new(5, 1)).unwrap());
    let error = search.step(&mut Random::<f32>::new(6, 1)).unwrap_err();
    assert!(error.to_string().contains("model.vocabulary"), "{error}");
}

/// The largest numbers neither overflow nor allocate.
#[test]
fn huge_options() {
    let huge = Options {
        num_beams: usize::MAX,
        max_new_tokens: usize::MAX,
        min_new_tokens: 2,
        no_repeat_ngram: usize::MAX,
        eos: &[0, 1, 2, 3, 4],
        alpha: 1e308,
        ..Options::default()
    };
    for rule in [Rule::Pool, Rule::Patience { patience: 1e300 }] {
        let mut model = Random::<f64>::new(5, 1);
        let got = search_one(&mut model, &[1], &Options { rule, ..huge.clone() });
        // All tokens end a sequence, and none may before the second step.
        assert!(got.unwrap().hypotheses.is_empty());
    }
    // The oracle, too, ends when all beams have.
    let only_the_end = |_: &[u32]| Ok(vec![0.0, f64::NEG_INFINITY]);
    let long = Options { max_new_tokens: usize::MAX, ..options() };
    let got = beam_search_reference(only_the_end, 2, &[1], &long).unwrap();
    assert_eq!(got[0].tokens, [0]);
    let error = brute_force(|_| Ok(vec![0.0; 5]), 5, &[1], &huge).unwrap_err();
    assert!(matches!(error, Error::TooManySequences { .. }), "{error:?}");
}

/// More beams than there is memory for: said before the step that has no room.
#[test]
fn beams_that_fit_no_memory() {
    let vocabulary = 1 << 20;
    let logits = Array2::from_shape_fn((1, vocabulary), |(_, token)| -(token as f32));
    for num_beams in [i64::MAX as usize, usize::MAX] {
        let options = Options { num_beams, ..Options::default() };
        let mut model = Fixed { vocabulary, logits: logits.clone() };
        let error = search_one(&mut model, &[1], &options).unwrap_err().to_string();
        let (live, got) = ("1048576 live beams", num_beams.to_string());
        for part in ["`num_beams` is ", &got, "step 2", live, "bytes"] {
            assert!(error.contains(part), "`{error}` does not say `{part}`");
        }
    }
}

/// Steps before the first, after the last, and results in between.
#[test]
fn a_search_may_be_stopped_at_any_time() {
    let options = Options { num_beams: 3, eos: &[0], max_new_tokens: 6, ..Options::default() };
    let new = || Search::new(&[[1], [2]], 8, &options).unwrap();
    assert!(new().finish().items.iter().all(|item| item.hypotheses.is_empty()));
    assert!(new().best(0).is_none() && new().best(7).is_none());
    let mut model = Random::<f32>::new(8, 3);
    let mut search = new();
    let mut steps = 0;
    while search.step(&mut model).unwrap() {
        steps += 1;
        let so_far = search.clone().finish();
        for (item, found) in so_far.items.iter().enumerate() {
            assert_eq!(search.best(item).as_ref(), found.hypotheses.first());
            assert_eq!(found.report.steps.min(steps), found.report.steps);
        }
    }
    assert!(search.is_done());
    let calls = model.calls.len();
    assert!(!search.step(&mut model).unwrap());
    assert_eq!(model.calls.len(), calls, "nothing is left to be scored");
}
