//! Laws that hold for any model and any options.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use beam::{Constraint, Logit};
use beam::{EarlyStopping, Follow, Groups, Item, Options, Rule, Search, Stop, Trie, beam_search};
use common::{Random, search_one};
use proptest::prelude::*;
use tensor_utils::bf16;
use tensor_utils::testing::{in_pool, property_cases};

fn rules() -> impl Strategy<Value = Rule> {
    prop_oneof![
        3 => Just(Rule::Pool),
        1 => Just(Rule::Transformers { early_stopping: EarlyStopping::Heuristic }),
        1 => Just(Rule::Transformers { early_stopping: EarlyStopping::Immediate }),
        1 => Just(Rule::Transformers { early_stopping: EarlyStopping::Never }),
        1 => (0.3..3.0).prop_map(|patience| Rule::Patience { patience }),
    ]
}

#[derive(Debug, Clone)]
struct Call {
    vocabulary: usize,
    seed: u64,
    spread: f64,
    prompts: Vec<Vec<u32>>,
    eos: Vec<u32>,
    words: Vec<Vec<u32>>,
    options: Options<'static>,
}

impl Call {
    fn options(&self) -> Options<'_> {
        Options { eos: &self.eos, bad_words: &self.words, ..self.options.clone() }
    }

    fn model<T: Logit>(&self) -> Random<T> {
        let mut model = Random::new(self.vocabulary, self.seed);
        model.spread = self.spread;
        model
    }

    fn run<T: Logit>(&self) -> Vec<Item> {
        beam_search(&mut self.model::<T>(), &self.prompts, &self.options()).unwrap().items
    }
}

fn calls() -> impl Strategy<Value = Call> {
    let sizes = (2_usize..60, any::<u64>(), 0.2..2.5, 1_usize..6, 1_usize..4, 1_usize..9);
    sizes.prop_flat_map(|(vocabulary, seed, spread, beams, groups, length)| {
        let token = 0..vocabulary as u32;
        let tokens = |size| prop::collection::vec(token.clone(), size);
        let restrictions = (0_usize..4, 0_usize..4, prop::collection::vec(tokens(1..3), 0..3));
        let parts = (
            prop::collection::vec(tokens(1..9), 1..5),
            tokens(0..3),
            rules(),
            prop_oneof![Just(0.0), Just(0.6), Just(1.0), -2.0..3.0],
            restrictions,
            0.0..3.0,
            any::<bool>(),
        );
        parts.prop_map(move |(prompts, eos, rule, alpha, restrictions, penalty, exact_stop)| {
            let (min_new_tokens, no_repeat_ngram, words) = restrictions;
            let options = Options {
                num_beams: beams * groups,
                num_return: exact_stop.then_some(1 + beams / 2),
                max_new_tokens: length,
                alpha,
                rule,
                exact_stop,
                min_new_tokens,
                no_repeat_ngram,
                groups: Groups { count: groups, penalty },
                ..Options::default()
            };
            Call { vocabulary, seed, spread, prompts, eos, words, options }
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(property_cases(256)))]

    /// A prompt in a batch has the bits it has alone, and the order of the prompts is that of the result.
    #[test]
    fn prompts_do_not_know_of_each_other(call in calls()) {
        let together = call.run::<f32>();
        let mut model = call.model::<f32>();
        for (prompt, item) in call.prompts.iter().zip(&together) {
            prop_assert_eq!(&search_one(&mut model, prompt, &call.options()).unwrap(), item);
        }
        let mut reversed = call.clone();
        reversed.prompts.reverse();
        let mut backwards = reversed.run::<f32>();
        backwards.reverse();
        prop_assert_eq!(backwards, together);
    }

    #[test]
    fn threads_change_nothing(call in calls()) {
        let run = |threads| in_pool(threads, || call.run::<bf16>());
        prop_assert_eq!(run(1), run(3));
    }

    /// Scores and sums are those of the tokens, by another way through the model.
    #[test]
    fn scores_can_be_recomputed(call in calls()) {
        let model = call.model::<f64>();
        for (prompt, item) in call.prompts.iter().zip(call.run::<f64>()) {
            for hypothesis in &item.hypotheses {
                let mut sequence = prompt.clone();
                let mut sum = 0.0;
                for (&token, &logprob) in hypothesis.tokens.iter().zip(&hypothesis.token_logprobs) {
                    let row = model.after(&sequence);
                    let lse = row.iter().map(|x| x.exp()).sum::<f64>().ln();
                    prop_assert!((row[token as usize] - lse - logprob).abs() < 1e-12);
                    sum += logprob;
                    sequence.push(token);
                }
                prop_assert_eq!(sum, hypothesis.logprob, "a plain sum in order");
                let length = hypothesis.tokens.len() as f64;
                let score = if sum == 0.0 { 0.0 } else { sum / length.powf(call.options.alpha) };
                prop_assert_eq!(score, hypothesis.score);
                prop_assert_eq!(hypothesis.tokens.len(), hypothesis.beam_indices.len());
            }
        }
    }

    /// Sorted, not too many, not too long, with an end token at the end alone; distinct within a group.
    #[test]
    fn results_are_well_formed(call in calls()) {
        let options = call.options();
        for item in call.run::<f32>() {
            let found = &item.hypotheses;
            prop_assert!(found.len() <= options.num_return.unwrap_or(options.num_beams));
            prop_assert!(found.is_sorted_by(|a, b| a.score >= b.score));
            for (index, hypothesis) in found.iter().enumerate() {
                let tokens = &hypothesis.tokens;
                let is_end = |token: &u32| options.eos.contains(token);
                prop_assert!((1..=options.max_new_tokens).contains(&tokens.len()));
                let ends = tokens.iter().position(is_end);
                prop_assert_eq!(ends, hypothesis.finished.then(|| tokens.len() - 1));
                prop_assert!(hypothesis.finished || tokens.len() == options.max_new_tokens);
                prop_assert!(ends.is_none_or(|at| at >= options.min_new_tokens));
                let twin = |other: &beam::Hypothesis| {
                    other.group == hypothesis.group && other.tokens == *tokens
                };
                prop_assert!(!found[..index].iter().any(twin));
            }
            prop_assert!(item.report.steps <= options.max_new_tokens);
        }
    }

    /// Nothing that was forbidden comes out.
    #[test]
    fn restrictions_hold(call in calls()) {
        let options = call.options();
        for (prompt, item) in call.prompts.iter().zip(call.run::<f32>()) {
            for hypothesis in &item.hypotheses {
                let all = [prompt.as_slice(), &hypothesis.tokens].concat();
                for end in prompt.len() + 1..=all.len() {
                    for word in &call.words {
                        let only_an_end = word.len() == 1 && options.eos.contains(&word[0]);
                        prop_assert!(only_an_end || !all[..end].ends_with(word));
                    }
                    let n = options.no_repeat_ngram;
                    if n > 0 && end > n {
                        let last = &all[end - n..end];
                        prop_assert!(!all[..end - 1].windows(n).any(|window| window == last));
                    }
                }
            }
        }
    }

    /// Only sequences of the trie come out, and with beams enough all that fit.
    #[test]
    fn a_trie_is_kept_to(
        sequences in prop::collection::btree_set(prop::collection::vec(1_u32..30, 1..5), 1..20),
        seed in any::<u64>(),
        beams in 1_usize..40,
    ) {
        let trie = Trie::new(&sequences);
        let options = Options {
            num_beams: beams,
            eos: &[0],
            max_new_tokens: 6,
            constraint: Some(&trie),
            ..Options::default()
        };
        let found = search_one(&mut Random::<f32>::new(30, seed), &[1], &options).unwrap();
        for hypothesis in &found.hypotheses {
            let (end, tokens) = hypothesis.tokens.split_last().unwrap();
            prop_assert!(*end == 0 && sequences.contains(tokens));
            let mut allowed = Vec::new();
            prop_assert_eq!(trie.follow(0, tokens, &mut allowed), Follow::ListedOrEnd);
        }
        if beams >= 20 {
            prop_assert_eq!(found.hypotheses.len(), sequences.len());
            prop_assert!(found.is_optimal());
        }
    }

    /// What the pool shows on the way is what a shorter search would return.
    #[test]
    fn what_is_shown_is_what_a_shorter_search_returns(call in calls()) {
        let options = Options { rule: Rule::Pool, exact_stop: false, ..call.options() };
        let mut model = call.model::<f32>();
        let mut search = Search::new(&call.prompts, call.vocabulary, &options).unwrap();
        let mut length = 0;
        loop {
            let goes_on = search.step(&mut model).unwrap();
            length += 1;
            let shorter = Options { max_new_tokens: length, ..options.clone() };
            let wanted = beam_search(&mut model, &call.prompts, &shorter).unwrap();
            for (item, wanted) in wanted.items.iter().enumerate() {
                let best = search.best(item);
                prop_assert_eq!(best.as_ref(), wanted.hypotheses.first());
            }
            if !goes_on {
                break;
            }
        }
        let output = search.finish();
        prop_assert!(output.items.iter().all(|item| item.report.stop != Stop::Unfinished));
    }
}
