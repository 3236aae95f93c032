//! The search against both oracles, and against results worked out by hand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use beam::{
    Bigram, Constraint, EarlyStopping, Follow, Groups, Hypothesis, Logit, Model, ModelOutput,
    Options, Rule, Search, Stop, Trie, beam_search, beam_search_reference, brute_force,
};
use common::{Random, Table, assert_same, search_one, tokens_and_scores};
use ndarray::Array2;
use tensor_utils::testing::Seeded;
use tensor_utils::{bf16, f16};

const RULES: [Rule; 6] = [
    Rule::Pool,
    Rule::Transformers { early_stopping: EarlyStopping::Heuristic },
    Rule::Transformers { early_stopping: EarlyStopping::Immediate },
    Rule::Transformers { early_stopping: EarlyStopping::Never },
    Rule::Patience { patience: 1.0 },
    Rule::Patience { patience: 2.5 },
];

/// A generator of small choices.
struct Choices(Seeded);

impl Choices {
    fn below(&mut self, end: usize) -> usize {
        self.0.integers::<f64, _>(1, 0..=end as i32 - 1)[0] as usize
    }

    fn of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }
}

fn check<T: Logit>(seed: u64, choices: &mut Choices) {
    let vocabulary = choices.of(&[1, 2, 3, 5, 8, 13, 30, 100]);
    let eos_count = choices.below(4).min(vocabulary);
    let eos: Vec<_> = (0..eos_count as u32).collect();
    let word = |choices: &mut Choices, length: usize| -> Vec<u32> {
        (0..length).map(|_| choices.below(vocabulary) as u32).collect()
    };
    let prompt_length = 1 + choices.below(6);
    let prompt = word(choices, prompt_length);
    let bad_words: Vec<_> = (0..choices.of(&[0, 0, 1, 4]))
        .map(|_| {
            let length = 1 + choices.below(2);
            word(choices, length)
        })
        .collect();
    let sequences: Vec<_> = (0..40)
        .map(|_| {
            let length = 1 + choices.below(5);
            word(choices, length)
        })
        .collect();
    let trie = Trie::new(&sequences);
    let groups = choices.of(&[1, 1, 2, 3]);
    let num_beams = groups * (1 + choices.below(5));
    let num_return = choices.of(&[None, Some(1), Some(num_beams.div_ceil(2))]);
    let mut model = Random::<T>::new(vocabulary, seed);
    model.spread = choices.of(&[0.3, 1.0, 2.0]);
    model.impossible = choices.of(&[0, 0, 0, 3]);
    // Sums of coarse log-probabilities are exact: ties are ties on both sides.
    model.negative = choices.below(3) == 0;
    model.grain = if model.negative { 0.5 } else { 0.0 };
    let output = if model.negative { ModelOutput::LogProbabilities } else { ModelOutput::Logits };
    let options = Options {
        num_beams,
        num_return,
        max_new_tokens: 1 + choices.below(9),
        eos: &eos,
        alpha: choices.of(&[0.0, 0.6, 1.0, 2.0, -0.5]),
        rule: choices.of(&RULES),
        exact_stop: choices.below(4) > 0,
        model_output: output,
        min_new_tokens: choices.of(&[0, 0, 0, 3]),
        min_length: choices.of(&[0, 0, 0, 7]),
        no_repeat_ngram: choices.of(&[0, 0, 0, 1, 2, 3]),
        bad_words: &bad_words,
        constraint: if choices.below(4) == 0 { Some(&trie) } else { None },
        groups: Groups { count: groups, penalty: choices.of(&[0.0, 0.25, 2.0]) },
    };
    let what = format!("seed {seed}, {}, {model:?}, {options:?}, {prompt:?}", T::NAME);
    let got = match search_one(&mut model, &prompt, &options) {
        Ok(got) => got,
        Err(error) => {
            // Coarse and impossible tokens can leave a row without any.
            assert!(model.impossible > 0, "{error} {what}");
            return;
        }
    };
    let next = model.next();
    let want = beam_search_reference(next, vocabulary, &prompt, &options).unwrap();
    let tolerance = if T::NAME == "f64" { 1e-13 } else { 3e-6 };
    assert_same(&got.hypotheses, &want, tolerance, &what);
}

#[test]
fn random_models_with_all_options() {
    for seed in 0..3000 {
        let mut choices = Choices(Seeded::new(seed));
        match seed % 8 {
            0..4 => check::<f64>(seed, &mut choices),
            4..6 => check::<f32>(seed, &mut choices),
            6 => check::<f16>(seed, &mut choices),
            _ => check::<bf16>(seed, &mut choices),
        }
    }
}

/// With as many beams as there are sequences, the pool drops nothing: it is brute force.
#[test]
fn enough_beams_find_what_brute_force_finds() {
    for seed in 0..300 {
        let mut choices = Choices(Seeded::new(seed));
        // Every case with a vocabulary of at most 8 and a length of at most 6 now and then.
        let (vocabulary, length) =
            if seed == 0 { (8, 6) } else { (1 + choices.below(6), 1 + choices.below(4)) };
        let mut model = Random::<f64>::new(vocabulary, seed);
        model.spread = choices.of(&[0.3, 1.0]);
        let eos = [0];
        let beams = vocabulary.pow(length as u32);
        let options = Options {
            num_beams: beams,
            num_return: Some(beams.min(20)),
            max_new_tokens: length,
            eos: &eos[..choices.below(2)],
            alpha: choices.of(&[0.0, 0.6, 1.0, 2.0, -0.5]),
            exact_stop: choices.below(2) == 0,
            ..Options::default()
        };
        let got = search_one(&mut model, &[0], &options).unwrap();
        let want = brute_force(model.next(), vocabulary, &[0], &options).unwrap();
        let tokens = |all: &[Hypothesis]| all.iter().map(|h| h.tokens.clone()).collect::<Vec<_>>();
        assert_eq!(tokens(&got.hypotheses), tokens(&want), "{seed} {options:?}");
        assert!(got.is_optimal(), "nothing was dropped: {seed} {options:?}");
    }
}

/// What is certified as the optimum is the optimum, and the bounds hold; and often enough it is.
#[test]
fn certificates_are_right() {
    let mut certified = 0;
    for seed in 0..1500 {
        let mut choices = Choices(Seeded::new(seed));
        let (vocabulary, length) = (2 + choices.below(5), 1 + choices.below(5));
        let mut model = Random::<f64>::new(vocabulary, seed);
        model.spread = choices.of(&[0.3, 1.0, 3.0]);
        let num_beams = 1 + choices.below(4);
        let options = Options {
            num_beams,
            num_return: choices.of(&[None, Some(1)]),
            max_new_tokens: length,
            eos: &[0],
            alpha: choices.of(&[0.0, 0.6, 1.0, 2.0, -0.5]),
            rule: choices.of(&RULES),
            ..Options::default()
        };
        let got = search_one(&mut model, &[1], &options).unwrap();
        let best = &brute_force(model.next(), vocabulary, &[1], &options).unwrap()[0];
        let found = got.hypotheses.first().map_or(f64::NEG_INFINITY, |h| h.score);
        let bound = found.max(got.report.live_bound).max(got.report.pruned_bound);
        assert!(best.score <= bound + 1e-12, "{seed}: {best:?} above {got:?}");
        if got.is_optimal() {
            certified += 1;
            assert!((found - best.score).abs() < 1e-12, "{seed}: {best:?} {got:?} {options:?}");
        }
    }
    assert!(certified > 300, "only {certified} of 1500");
}

/// The early stop saves steps and changes nothing.
#[test]
fn the_exact_stop_changes_nothing() {
    let mut saved = 0;
    for seed in 0..600 {
        let mut choices = Choices(Seeded::new(seed));
        let mut model = Random::<f64>::new(7, seed);
        model.spread = choices.of(&[0.3, 1.0, 2.0]);
        let options = Options {
            num_beams: 1 + choices.below(5),
            num_return: Some(1),
            max_new_tokens: 15,
            eos: &[0, 3],
            alpha: choices.of(&[0.0, 0.6, 1.0, 2.0, -0.5]),
            rule: choices.of(&RULES),
            ..Options::default()
        };
        let stopping = search_one(&mut model, &[1], &options).unwrap();
        let going_on = Options { exact_stop: false, ..options.clone() };
        let going_on = search_one(&mut model, &[1], &going_on).unwrap();
        assert_eq!(stopping.hypotheses, going_on.hypotheses, "{seed} {options:?}");
        assert!(stopping.report.steps <= going_on.report.steps);
        if stopping.report.stop == Stop::Decided {
            saved += going_on.report.steps - stopping.report.steps;
            assert!(stopping.hypotheses[0].score > stopping.report.live_bound);
        }
        assert_ne!(going_on.report.stop, Stop::Decided);
    }
    assert!(saved > 500, "only {saved} steps saved");
}

#[test]
fn one_beam_without_penalty_is_greedy() {
    // More patience waits for other ends than the greedy one.
    for rule in RULES.into_iter().filter(|rule| *rule != (Rule::Patience { patience: 2.5 })) {
        for seed in 0..100 {
            let mut model = Random::<f32>::new(50, seed);
            let options = Options {
                num_beams: 1,
                alpha: 0.0,
                max_new_tokens: 12,
                eos: &[0, 7, 9],
                rule,
                ..Options::default()
            };
            let mut greedy = vec![1];
            for _ in 0..12 {
                let row = model.after(&greedy);
                let best = (0..50).reduce(|best, t| if row[t] > row[best] { t } else { best });
                greedy.push(best.unwrap() as u32);
                if matches!(greedy.last(), Some(0 | 7 | 9)) {
                    break;
                }
            }
            let got = search_one(&mut model, &[1], &options).unwrap();
            assert_eq!(got.hypotheses[0].tokens, greedy[1..], "{rule:?} {seed}");
        }
    }
}

// By hand. Token 0 ends a sequence.

fn exact(num_beams: usize, alpha: f64, max_new_tokens: usize) -> Options<'static> {
    Options {
        num_beams,
        alpha,
        max_new_tokens,
        eos: &[0],
        model_output: ModelOutput::LogProbabilities,
        ..Options::default()
    }
}

/// The end at step 1 with -3 beats the continuation that has -4 there and -5 in the end.
#[test]
fn a_finished_beam_stays_in_the_pool() {
    let mut model = Table::new(
        3,
        &[(&[], &[(0, -3.0), (1, -4.0)]), (&[1], &[(0, -1.0), (1, -7.0)]), (&[1, 1], &[(0, 0.0)])],
    );
    let got = search_one(&mut model, &[2], &exact(2, 0.0, 5)).unwrap();
    assert_eq!(tokens_and_scores(&got), [(vec![0], -3.0), (vec![1, 0], -5.0)]);
    assert_eq!(got.hypotheses.iter().map(|h| h.logprob).collect::<Vec<_>>(), [-3.0, -5.0]);
    assert_eq!((got.report.steps, got.report.stop), (2, Stop::Rule));
}

/// [-1.5 finished, -2.0, -2.5] at alpha 0.6: -2.0 ranks first (-1.32), and a beam of length 5 at -2.3
/// overtakes it (-0.88).
#[test]
fn a_longer_beam_overtakes_a_finished_one() {
    // At step 1 the finished one has -1.5 at length 1; the others reach -2.0 and -2.5 at length 2.
    let mut model = Table::new(
        4,
        &[
            (&[], &[(0, -1.5), (1, -1.75), (2, -2.25)]),
            (&[1], &[(1, -0.25)]),
            (&[2], &[(2, -0.25)]),
            (&[1, 1], &[(1, -0.125)]),
            (&[2, 2], &[(2, -1.0)]),
            (&[1, 1, 1], &[(1, -0.125)]),
            (&[2, 2, 2], &[(2, -1.0)]),
            (&[1, 1, 1, 1], &[(0, -0.05)]),
            (&[2, 2, 2, 2], &[(0, -1.0)]),
        ],
    );
    let after_two = search_one(&mut model, &[3], &exact(3, 0.6, 2)).unwrap();
    let scores = tokens_and_scores(&after_two);
    assert_eq!(scores[0].0, [1, 1]);
    assert!((scores[0].1 - -1.32).abs() < 5e-3 && scores[0].1 == -2.0 / 2_f64.powf(0.6));
    assert_eq!(scores[1], (vec![0], -1.5), "the end at step 1 comes second");
    assert!(scores[2].0 == [2, 2] && (scores[2].1 - -2.5 / 2_f64.powf(0.6)).abs() < 1e-15);

    let at_last = search_one(&mut model, &[3], &exact(3, 0.6, 5)).unwrap();
    let scores = tokens_and_scores(&at_last);
    assert_eq!(scores[0].0, [1, 1, 1, 1, 0]);
    assert!((scores[0].1 - -0.88).abs() < 5e-3, "{scores:?}");
    assert!((at_last.hypotheses[0].logprob - -2.3).abs() < 1e-12);
    assert_eq!(scores[1], (vec![0], -1.5));
}

/// -1.0 at length 2 comes before -2.0 at length 1, alpha 0.6.
#[test]
fn two_finished_beams_rank_by_normalised_score() {
    let mut model = Table::new(3, &[(&[], &[(0, -2.0), (1, -0.5)]), (&[1], &[(0, -0.5)])]);
    let got = search_one(&mut model, &[2], &exact(2, 0.6, 3)).unwrap();
    assert_eq!(tokens_and_scores(&got), [(vec![1, 0], -1.0 / 2_f64.powf(0.6)), (vec![0], -2.0)]);
}

/// Negative log-probabilities: alpha 2 prefers -2.5 at length 50 (-0.001) to -0.5 at length 5 (-0.02),
/// alpha 0 the other way round.
#[test]
fn a_large_alpha_favours_long_sequences() {
    let path = |token: u32, length: usize| vec![token; length];
    let mut rows: Vec<(Vec<u32>, Vec<(u32, f64)>)> = vec![(vec![], vec![(1, -0.5), (2, -2.5)])];
    for length in 1..50 {
        let next = |token: u32, last: usize| vec![(if length == last { 0 } else { token }, 0.0)];
        rows.push((path(1, length), next(1, 4)));
        rows.push((path(2, length), next(2, 49)));
    }
    let rows: Vec<_> = rows.iter().map(|(a, b)| (a.as_slice(), b.as_slice())).collect();
    let best = |alpha: f64| {
        let got = search_one(&mut Table::new(4, &rows), &[3], &exact(2, alpha, 50)).unwrap();
        (got.hypotheses[0].tokens.len(), got.hypotheses[0].score)
    };
    assert_eq!(best(2.0), (50, -0.001));
    assert_eq!(best(0.0), (5, -0.5));
}

/// All K beams want to end: with their top K alone, K = 2, no other would be left to live on.
#[test]
fn beams_do_not_collapse() {
    let rows: &[(&[u32], &[(u32, f64)])] = &[
        (&[], &[(1, -0.7), (2, -0.8)]),
        (&[1], &[(0, -0.1), (1, -3.0), (2, -4.0)]),
        (&[2], &[(0, -0.1), (1, -3.5), (2, -4.5)]),
        (&[1, 1], &[(0, -0.1)]),
        (&[2, 1], &[(0, -0.1)]),
        (&[1, 2], &[(0, -0.1)]),
    ];
    let options = Options {
        rule: Rule::Transformers { early_stopping: EarlyStopping::Never },
        exact_stop: false,
        ..exact(2, 5.0, 3)
    };
    let got = search_one(&mut Table::new(4, rows), &[3], &options).unwrap();
    // The four best candidates of step 2 are the two ends, [1, 1] and [2, 1].
    let tokens: Vec<_> = got.hypotheses.iter().map(|h| h.tokens.clone()).collect();
    assert_eq!(tokens, [vec![1, 1, 0], vec![2, 1, 0]]);
    assert_eq!(got.report.steps, 3);
}

/// With `alpha < 0` the shortest sequence scores best, so `Never` looks at the present length: after two
/// steps the beam could still reach -0.45 * 2, not only -0.45 * 5, and it finds -1.35, better than -2.
#[test]
fn never_with_a_negative_alpha_looks_at_the_present_length() {
    let rows: &[(&[u32], &[(u32, f64)])] =
        &[(&[], &[(1, -0.4), (0, -0.9)]), (&[1], &[(1, -0.05), (0, -0.6)]), (&[1, 1], &[(0, 0.0)])];
    let rule = Rule::Transformers { early_stopping: EarlyStopping::Never };
    let options = Options { rule, exact_stop: false, ..exact(2, -1.0, 5) };
    let mut model = Table::new(3, rows);
    let got = search_one(&mut model, &[2], &options).unwrap();
    let oracle = beam_search_reference(model.next(), 3, &[2], &options).unwrap();
    for found in [&got.hypotheses, &oracle] {
        let scores: Vec<_> = found.iter().map(|h| (h.tokens.as_slice(), h.score)).collect();
        assert_eq!(scores[0], (&[0][..], -0.9));
        assert_eq!(scores[1].0, [1, 1, 0]);
        assert!((scores[1].1 + 1.35).abs() < 1e-12);
    }
}

/// In the second group, whose beams come in the order of their merits, the second live beam has the higher
/// log-probability: it is the one that can still beat what is stored.
#[test]
fn the_stop_looks_at_the_best_of_the_live_beams() {
    let rows: &[(&[u32], &[(u32, f64)])] = &[
        (&[], &[(0, -1.0), (1, -1.2), (2, -1.5), (3, -4.0)]),
        (&[1], &[(1, -0.1), (2, -0.2)]),
        (&[2], &[(1, -9.0)]),
        (&[3], &[(0, -0.1), (4, -0.5)]),
        (&[1, 1], &[(0, -0.1)]),
        (&[1, 2], &[(0, -0.1)]),
        (&[3, 4], &[(4, -9.0)]),
    ];
    let groups = Groups { count: 2, penalty: 5.0 };
    let mut model = Table::new(5, rows);
    for early_stopping in [EarlyStopping::Never, EarlyStopping::Heuristic] {
        let rule = Rule::Transformers { early_stopping };
        let options = Options { rule, groups, ..exact(4, 0.0, 4) };
        let got = search_one(&mut model, &[2], &options).unwrap();
        let oracle = beam_search_reference(model.next(), 5, &[2], &options).unwrap();
        for found in [&got.hypotheses, &oracle] {
            let of_second: Vec<_> = found.iter().filter(|h| h.group == 1).collect();
            assert_eq!(of_second.len(), 2, "{found:?}");
            assert_eq!(of_second[0].tokens, [0]);
            assert_eq!(of_second[1].tokens, [1, 1, 0]);
            assert!((of_second[1].score + 1.4).abs() < 1e-12);
        }
    }
}

/// `generate` runs greedy search for one beam: the first end is the end, whatever `alpha` promises.
#[test]
fn one_beam_by_the_rule_of_transformers_is_greedy() {
    let rows: &[(&[u32], &[(u32, f64)])] = &[(&[], &[(0, -0.5), (1, -1.0)]), (&[1], &[(0, 0.0)])];
    let mut model = Table::new(3, rows);
    for early_stopping in [EarlyStopping::Heuristic, EarlyStopping::Immediate, EarlyStopping::Never]
    {
        let rule = Rule::Transformers { early_stopping };
        let options = Options { rule, exact_stop: false, ..exact(1, 2.0, 4) };
        let got = search_one(&mut model, &[2], &options).unwrap();
        let oracle = beam_search_reference(model.next(), 3, &[2], &options).unwrap();
        assert_eq!(tokens_and_scores(&got), [(vec![0], -0.5)], "{early_stopping:?}");
        assert_eq!(oracle[0].tokens, [0], "{early_stopping:?}");
    }
}

/// As in `generate`, `min_new_tokens` takes the place of `min_length`; by the other rules both hold.
#[test]
fn least_lengths() {
    let mut table = Array2::from_elem((3, 3), -9.0);
    table.column_mut(0).fill(0.0);
    let length = |rule, min_new_tokens| {
        let options = Options {
            num_beams: 2,
            eos: &[0],
            alpha: 0.0,
            rule,
            min_new_tokens,
            min_length: 9,
            ..Options::default()
        };
        let got = search_one(&mut Bigram::new(table.clone()).unwrap(), &[1], &options).unwrap();
        let next = |sequence: &[u32]| Ok(table.row(*sequence.last().unwrap() as usize).to_vec());
        let oracle = beam_search_reference(next, 3, &[1], &options).unwrap();
        let tokens = &got.hypotheses[0].tokens;
        assert_eq!((tokens.last(), tokens), (Some(&0), &oracle[0].tokens), "{rule:?}");
        tokens.len()
    };
    for rule in RULES {
        // Nine tokens with the prompt, then the end.
        assert_eq!(length(rule, 0), 9, "{rule:?}");
        let is_replaced = matches!(rule, Rule::Transformers { .. });
        assert_eq!(length(rule, 2), if is_replaced { 3 } else { 9 }, "{rule:?}");
    }
}

#[test]
fn the_greatest_length_is_reported_by_every_rule() {
    for rule in RULES {
        let options = Options { num_beams: 3, max_new_tokens: 4, rule, ..Options::default() };
        let got = search_one(&mut Random::<f64>::new(5, 1), &[1], &options).unwrap();
        assert_eq!((got.report.steps, got.report.stop), (4, Stop::Length), "{rule:?}");
    }
}

/// With `alpha` -1 a sequence only gets worse as it goes on, so that the unfinished one scores above the
/// bound of its own continuations.
#[test]
fn an_unfinished_sequence_is_not_the_optimum() {
    let model = &mut Table::new(3, &[(&[], &[(1, -0.1), (2, -3.0), (0, -4.0)])]);
    let options = exact(2, -1.0, 5);
    let mut search = Search::new(&[[1]], 3, &options).unwrap();
    search.step(model).unwrap();
    let item = search.finish().items.remove(0);
    assert_eq!((&item.hypotheses[0].tokens[..], item.report.stop), (&[1][..], Stop::Unfinished));
    assert!(!item.is_optimal(), "{item:?}");
}

/// Most of a vocabulary is forbidden, the likeliest tokens first: what is left is found, and has the probability that
/// it has among all.
#[test]
fn many_bad_words() {
    for (seed, rule) in (0..).zip(RULES) {
        let mut model = Random::<f64>::new(500, seed);
        let mut all: Vec<(f64, u32)> = model.after(&[3]).into_iter().zip(0..).collect();
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (banned, pairs) in [(0, 490), (250, 200), (496, 0), (499, 0), (500, 0)] {
            let one = all[..banned].iter().map(|&(_, token)| vec![token]);
            let two = all[all.len() - pairs..].iter().map(|&(_, token)| vec![3, token]);
            // Repetitions count once, and a word that is only an end token not at all.
            let words: Vec<_> = one.chain(two).chain([vec![all[0].1], vec![7]]).collect();
            let options = Options {
                eos: &[7],
                max_new_tokens: 4,
                bad_words: &words,
                no_repeat_ngram: 1,
                rule,
                ..Options::default()
            };
            let got = search_one(&mut model, &[3], &options).unwrap();
            let want = beam_search_reference(model.next(), 500, &[3], &options).unwrap();
            assert_same(&got.hypotheses, &want, 1e-13, &format!("{rule:?}, {banned}, {pairs}"));
            assert!(!want.is_empty());
        }
    }
}

/// What a restriction takes from another prompt leaves the bounds alone.
#[test]
fn bounds_do_not_depend_on_the_batch() {
    let mut table = Array2::zeros((3, 3));
    table[[0, 2]] = f64::NEG_INFINITY;
    let words = [vec![2, 1]];
    let options = Options {
        num_beams: 1,
        eos: &[0],
        bad_words: &words,
        rule: Rule::Transformers { early_stopping: EarlyStopping::Immediate },
        ..Options::default()
    };
    let mut model = Bigram::new(table).unwrap();
    let alone = search_one(&mut model, &[0], &options).unwrap();
    let together = beam_search(&mut model, &[[0], [2]], &options).unwrap();
    assert_eq!(alone, together.items[0]);
}

/// The second step drops -6 and -7 for two ends and two beams.
#[test]
fn the_best_that_was_dropped_is_the_bound() {
    let rows: &[(&[u32], &[(u32, f64)])] = &[
        (&[], &[(1, -1.0), (2, -2.0), (0, -9.0)]),
        (&[1], &[(0, -0.5), (1, -3.0), (2, -6.0)]),
        (&[2], &[(0, -0.5), (1, -3.0), (2, -4.0)]),
    ];
    let rule = Rule::Transformers { early_stopping: EarlyStopping::Immediate };
    let options = Options { rule, ..exact(2, 0.0, 3) };
    let got = search_one(&mut Table::new(3, rows), &[1], &options).unwrap();
    assert_eq!(tokens_and_scores(&got), [(vec![1, 0], -1.5), (vec![2, 0], -2.5)]);
    assert!((got.report.pruned_bound + 6.0).abs() < 1e-12, "{:?}", got.report);
}

#[test]
fn constraints_know_the_prompt() {
    #[derive(Debug)]
    struct Own;
    impl Constraint for Own {
        fn follow(&self, item: usize, _: &[u32], allowed: &mut Vec<u32>) -> Follow {
            allowed.push(item as u32 + 1);
            Follow::Listed
        }
    }
    let options = Options { constraint: Some(&Own), max_new_tokens: 3, ..Options::default() };
    let mut model = Random::<f64>::new(5, 1);
    let got = beam_search(&mut model, &[[1], [1], [4]], &options).unwrap();
    let tokens: Vec<_> = got.items.iter().map(|item| item.hypotheses[0].tokens.clone()).collect();
    assert_eq!(tokens, [[1; 3], [2; 3], [3; 3]]);
}

#[test]
fn an_end_on_the_last_step_is_an_end() {
    let mut model =
        Table::new(3, &[(&[], &[(1, -0.5)]), (&[1], &[(0, -0.25), (1, -1.0), (2, -2.0)])]);
    let got = search_one(&mut model, &[2], &exact(3, 1.0, 2)).unwrap();
    let finished: Vec<_> =
        got.hypotheses.iter().map(|h| (h.tokens.as_slice(), h.finished)).collect();
    assert_eq!(finished, [(&[1, 0][..], true), (&[1, 1][..], false), (&[1, 2][..], false)]);
    assert_eq!(got.report.stop, Stop::Length);
}

#[test]
fn only_the_end_is_likely() {
    let mut table = Array2::from_elem((5, 5), -30.0);
    table.column_mut(0).fill(0.0);
    let mut model = Bigram::new(table).unwrap();
    for rule in RULES {
        let options =
            Options { num_beams: 3, eos: &[0], max_new_tokens: 10, rule, ..Options::default() };
        let got = search_one(&mut model, &[1], &options).unwrap();
        assert_eq!(got.hypotheses[0].tokens, [0], "{rule:?}");
        assert!(got.hypotheses.iter().all(|h| h.finished && h.tokens.len() <= 2), "{rule:?}");
    }
    // Nothing else is possible at all: one sequence.
    let mut model = Table::new(3, &[(&[], &[(0, 0.0)])]);
    for rule in RULES {
        let got = search_one(&mut model, &[1], &Options { rule, ..exact(4, 1.0, 6) }).unwrap();
        assert_eq!(tokens_and_scores(&got), [(vec![0], 0.0)], "{rule:?}");
    }
}

/// Fewer sequences than beams, by vocabulary and length.
#[test]
fn there_may_be_fewer_than_k() {
    let mut model = Random::<f64>::new(2, 3);
    let options =
        |length| Options { num_beams: 16, eos: &[0], max_new_tokens: length, ..Options::default() };
    for length in 1..=6 {
        let got = search_one(&mut model, &[1], &options(length)).unwrap();
        // 0, 10, 110, .., and the one without an end.
        assert_eq!(got.hypotheses.len(), length + 1);
    }
    let nothing: &[Vec<u32>] = &[];
    let trie = Trie::new(nothing);
    let constrained = Options { constraint: Some(&trie), ..options(3) };
    let got = search_one(&mut model, &[1], &constrained).unwrap();
    assert!(got.hypotheses.is_empty());
    assert_eq!(got.report.stop, Stop::Exhausted);
    assert_eq!(got.report.live_bound, f64::NEG_INFINITY);
}

/// Equal scores and log-probabilities: tokens in order, whatever the order of the beams.
#[test]
fn ties_go_by_token_ids() {
    let rows: &[(&[u32], &[(u32, f64)])] = &[
        (&[], &[(1, -2.0), (2, -1.0), (3, -2.0)]),
        (&[1], &[(0, -1.0)]),
        (&[2], &[(3, -2.0), (1, -2.0), (0, -2.0)]),
        (&[3], &[(0, -1.0), (1, -1.0)]),
    ];
    let got = search_one(&mut Table::new(5, rows), &[4], &exact(6, 1.0, 2)).unwrap();
    let tokens: Vec<_> = got.hypotheses.iter().map(|h| h.tokens.clone()).collect();
    assert_eq!(tokens, [[1, 0], [2, 0], [2, 1], [2, 3], [3, 0], [3, 1]]);
    assert!(got.hypotheses.iter().all(|h| h.logprob == -3.0));
}

/// Kasai et al.: with patience 2 twice as many sequences are waited for, and a better one is found.
#[test]
fn patience_waits_for_more() {
    let rows: &[(&[u32], &[(u32, f64)])] = &[
        (&[], &[(0, -1.0), (1, -1.5)]),
        (&[1], &[(1, -0.05), (0, -4.0)]),
        (&[1, 1], &[(0, -0.05), (1, -4.0)]),
        (&[1, 1, 1], &[(0, 0.0)]),
    ];
    let search = |patience| {
        let options = Options { rule: Rule::Patience { patience }, ..exact(1, 1.0, 4) };
        search_one(&mut Table::new(3, rows), &[2], &options).unwrap()
    };
    assert_eq!(search(1.0).hypotheses[0].tokens, [0]);
    assert_eq!(search(2.0).hypotheses[0].tokens, [1, 1, 0]);
    assert_eq!(search(2.0).report.steps, 3);
}

/// The second group keeps away from the first token of the first one.
#[test]
fn groups_differ() {
    let rows: &[(&[u32], &[(u32, f64)])] =
        &[(&[], &[(1, -0.5), (2, -1.0)]), (&[1], &[(0, 0.0)]), (&[2], &[(0, 0.0)])];
    let search = |penalty| {
        let options = Options { groups: Groups { count: 2, penalty }, ..exact(2, 0.0, 3) };
        search_one(&mut Table::new(4, rows), &[3], &options).unwrap()
    };
    let alike: Vec<_> = search(0.25).hypotheses.iter().map(|h| (h.tokens[0], h.group)).collect();
    assert_eq!(alike, [(1, 0), (1, 1)]);
    let different = search(1.0);
    assert_eq!(tokens_and_scores(&different), [(vec![1, 0], -0.5), (vec![2, 0], -1.0)]);
    assert_eq!(different.hypotheses[1].group, 1);
    assert_eq!(different.hypotheses[1].logprob, -1.0, "the penalty is not part of it");
}

/// Two beams that chose a token cost more than any number: the token comes last, and is not lost.
#[test]
fn a_penalty_may_overflow() {
    let rows: &[(&[u32], &[(u32, f64)])] =
        &[(&[], &[(1, -1.0), (2, -1.25)]), (&[1], &[(3, -0.5)]), (&[2], &[(3, -0.5)])];
    let groups = Groups { count: 2, penalty: f64::MAX };
    for rule in RULES {
        let options = Options { groups, rule, ..exact(4, 0.0, 2) };
        let mut model = Table::new(4, rows);
        let got = search_one(&mut model, &[3], &options).unwrap();
        let oracle = beam_search_reference(model.next(), 4, &[3], &options).unwrap();
        for found in [&got.hypotheses, &oracle] {
            let all: Vec<_> = found.iter().map(|h| (&h.tokens[..], h.score, h.group)).collect();
            let (first, second): (&[u32], &[u32]) = (&[1, 3], &[2, 3]);
            let wanted = [(first, -1.5), (first, -1.5), (second, -1.75), (second, -1.75)];
            assert_eq!(all.iter().map(|h| (h.0, h.1)).collect::<Vec<_>>(), wanted, "{rule:?}");
            assert_eq!(all.iter().filter(|h| h.2 == 1).count(), 2, "{rule:?}");
        }
    }
}

/// What the model is told fits together: parents in range, in order, one row for each.
#[test]
fn the_model_is_told_which_beams_survive() {
    for rule in RULES {
        let mut model = Random::<f32>::new(20, 5);
        let options =
            Options { num_beams: 4, eos: &[0], max_new_tokens: 8, rule, ..Options::default() };
        beam_search(&mut model, &[vec![1], vec![2, 3], vec![4]], &options).unwrap();
        assert_eq!(model.calls[0], 3, "prompts are read once, not K times");
        assert_eq!(model.calls.len(), model.kept.len());
        for (call, kept) in model.kept.iter().enumerate() {
            assert_eq!(kept.len(), model.calls.get(call + 1).copied().unwrap_or(0));
            assert!(kept.iter().all(|&parent| parent < model.calls[call]));
        }
        assert!(model.kept.last().unwrap().is_empty());
        assert_eq!(model.vocabulary(), 20);
    }
}
