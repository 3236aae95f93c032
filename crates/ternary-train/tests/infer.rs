//! Inference: the same bits however a text is cut, and the same tokens however they are found.

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use dflash::{BoxError, DecodeOptions, Draft, Drafter, TokenTree};
use kvcache::Cache;
use ndarray::{Array2, Axis};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tensor_utils::testing::in_pool;
use ternary_train::generate::{
    Choice, GenerateOptions, Sampling, generate, generate_beams, generate_speculatively,
    generate_with,
};
use ternary_train::infer::{Chunk, LogitRows, Model};
use ternary_train::{Config, Error, Preset, Projection, Weights};

const VOCABULARY: usize = 40;

/// Ternary weights. Untied, because a random model with a tied head repeats its last token for ever.
fn weights() -> (Config, Weights) {
    let config = Config {
        num_hidden_layers: 2,
        ternary: Some(Projection::default()),
        tie_word_embeddings: false,
        ..Preset::Nano.config(VOCABULARY)
    };
    let mut weights = Weights::random(&config, 3).unwrap();
    weights.project(Projection::default()).unwrap();
    (config, weights)
}

/// The same weights as a float and as a packed model.
fn models() -> [Model; 2] {
    let (config, weights) = weights();
    let float = Model::float(config.clone(), weights.clone()).unwrap();
    [float, Model::packed(config, weights).unwrap()]
}

fn prompt(length: usize, seed: u64) -> Vec<u32> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    (0..length).map(|_| rng.random_range(0..VOCABULARY as u32)).collect()
}

fn logits(model: &Model, tokens: &[u32]) -> Array2<f32> {
    let mut cache = model.cache(tokens.len()).unwrap();
    let seq = cache.create().unwrap();
    model.forward(&mut cache, &[Chunk::line(seq, tokens)], LogitRows::All).unwrap()
}

#[test]
fn logits_have_the_same_bits_however_the_text_is_cut() {
    let tokens = prompt(150, 1);
    for model in models() {
        let whole = logits(&model, &tokens);
        for size in [1, 7, 64, 149] {
            let mut cache = model.cache(200).unwrap();
            let seq = cache.create().unwrap();
            let mut row = 0;
            for part in tokens.chunks(size) {
                let chunk = [Chunk::line(seq, part)];
                let got = model.forward(&mut cache, &chunk, LogitRows::All).unwrap();
                assert_eq!(got, whole.slice_axis(Axis(0), (row..row + part.len()).into()));
                row += part.len();
            }
        }
    }
}

#[test]
fn logits_do_not_depend_on_neighbours_and_threads() {
    let prompts = [prompt(30, 2), prompt(1, 3), prompt(77, 4)];
    for model in models() {
        let alone: Vec<_> = prompts.iter().map(|tokens| logits(&model, tokens)).collect();
        for threads in [1, 3] {
            in_pool(threads, || {
                let mut cache = model.cache(400).unwrap();
                let seqs = prompts.each_ref().map(|_| cache.create().unwrap());
                let chunks: Vec<_> =
                    seqs.iter().zip(&prompts).map(|(&seq, p)| Chunk::line(seq, p)).collect();
                let got = model.forward(&mut cache, &chunks, LogitRows::Last).unwrap();
                for (row, alone) in got.outer_iter().zip(&alone) {
                    assert_eq!(row, alone.row(alone.nrows() - 1));
                }
            });
        }
    }
}

#[test]
fn a_branch_of_a_tree_has_the_bits_of_its_text() {
    let text = prompt(20, 5);
    let (tokens, parents) = ([3, 4, 5, 6, 7], [-1, 0, 0, 2, -1]);
    for model in models() {
        let mut cache = model.cache(64).unwrap();
        let seq = cache.create().unwrap();
        let none = model.forward(&mut cache, &[Chunk::line(seq, &text)], LogitRows::None);
        assert_eq!(none.unwrap().dim(), (0, VOCABULARY));
        let chunk = [Chunk::tree(seq, &tokens, &parents)];
        let got = model.forward(&mut cache, &chunk, LogitRows::All).unwrap();
        for (node, path) in [(1, vec![3, 4]), (3, vec![3, 5, 6]), (4, vec![7])] {
            let whole = logits(&model, &[text.clone(), path].concat());
            assert_eq!(got.row(node), whole.row(whole.nrows() - 1), "node {node}");
        }
    }
}

/// Relative, in the 2-norm.
fn distance(got: &Array2<f32>, exact: &Array2<f32>) -> f64 {
    let norm = |x: &Array2<f32>| x.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
    norm(&(got - exact)) / norm(exact)
}

/// In llama.cpp's order float weights give the same logits but for rounding, ternary ones but for
/// activations in 8 bits, and cutting a text or branching changes no more than that.
#[test]
fn the_order_of_llama_cpp_changes_rounding_alone() {
    let (config, weights) = weights();
    let float = Config { ternary: None, ..config.clone() };
    for (config, bound) in [(float, 1e-5), (config, 0.03)] {
        let exact = Model::float(config.clone(), weights.clone()).unwrap();
        let model = Model::like_llama_cpp(config, weights.clone()).unwrap();
        let (text, branch) = (prompt(300, 8), [9, 10]);
        let whole = [&text[..], &branch].concat();
        let got = logits(&model, &whole);
        let error = distance(&got, &logits(&exact, &whole));
        assert!(error > 0.0 && error < bound, "{error}");
        let mut cache = model.cache(700).unwrap();
        let seqs = [cache.create().unwrap(), cache.create().unwrap()];
        for (seq, from, rows) in [(0, 0, 1), (1, 0, 200), (0, 1, 299), (1, 200, 100)] {
            let chunk = [Chunk::line(seqs[seq], &text[from..from + rows])];
            model.forward(&mut cache, &chunk, LogitRows::None).unwrap();
        }
        cache.free(seqs[0]).unwrap();
        let tokens = [11, branch[0], 12, branch[1]];
        let tree = [Chunk::tree(seqs[1], &tokens, &[-1, -1, 0, 1])];
        let nodes = model.forward(&mut cache, &tree, LogitRows::All).unwrap();
        let error = distance(
            &nodes.select(Axis(0), &[1, 3]),
            &got.slice_axis(Axis(0), (300..).into()).to_owned(),
        );
        assert!(error < bound, "{error}");
    }
}

/// A block of 64 weights of the file has one scale.
#[test]
fn the_order_of_llama_cpp_is_for_what_has_a_file() {
    let with = |group, intermediate_size| {
        let projection = Projection { group, ..Projection::default() };
        let (config, _) = weights();
        let config = Config { intermediate_size, ternary: Some(projection), ..config };
        let mut weights = Weights::random(&config, 3).unwrap();
        weights.project(projection).unwrap();
        Model::like_llama_cpp(config, weights)
    };
    for (group, columns) in [(32, 128), (96, 192), (160, 320), (224, 448), (128, 96)] {
        let error = with(group, columns).unwrap_err();
        let message = error.to_string();
        assert!(
            matches!(error, Error::Config(_)) && message.contains("multiples of 64"),
            "{message}"
        );
    }
    for group in [64, 128, 192, 256] {
        with(group, 192).unwrap();
    }
}

#[test]
fn the_packed_model_is_the_float_model_but_for_its_activations() {
    let [float, packed] = models();
    let tokens = prompt(40, 6);
    let (exact, got) = (logits(&float, &tokens), logits(&packed, &tokens));
    let error = distance(&got, &exact);
    assert!(error > 0.0 && error < 0.05, "{error}");
    let ratio = packed.bytes() as f64 / (float.bytes() as f64 / 32.0 * 2.125);
    // 40 rows fill up to 48.
    assert!((1.0..1.01).contains(&ratio), "{ratio}");
}

/// Trees of random shape, some of whose branches are right.
struct Guess<'a> {
    answer: &'a [u32],
    prompt: usize,
    rng: ChaCha8Rng,
}

impl Drafter for Guess<'_> {
    fn draft(&mut self, _: usize, text: &[u32], budget: usize) -> Result<Draft, BoxError> {
        let (mut tokens, mut parents) = (Vec::new(), Vec::new());
        let done = text.len() - self.prompt;
        let mut depths: Vec<usize> = Vec::new();
        for node in 0..budget {
            let parent = self.rng.random_range(-1..node as i64);
            let depth = usize::try_from(parent).map_or(0, |parent| depths[parent] + 1);
            let right = self.answer.get(done + depth).copied().unwrap_or(0);
            let wrong = self.rng.random_range(0..VOCABULARY as u32);
            let token = if self.rng.random_bool(0.6) { right } else { wrong };
            if parents.iter().zip(&tokens).any(|sibling| sibling == (&parent, &token)) {
                break;
            }
            tokens.push(token);
            parents.push(parent);
            depths.push(depth);
        }
        Ok(Draft::Tree(TokenTree::new(&tokens, &parents)?))
    }
}

#[test]
fn speculation_gives_the_greedy_tokens_with_any_tree() {
    let prompt = [prompt(12, 7)];
    for model in models() {
        let options = GenerateOptions { max_new_tokens: 60, ..GenerateOptions::default() };
        let greedy = generate(&model, &prompt, &options, |_, _| {}).unwrap();
        for budget in [0, 1, 5, 16] {
            let options = DecodeOptions { max_new_tokens: 60, budget, ..DecodeOptions::default() };
            let got = generate_speculatively(&model, &prompt, &options).unwrap();
            assert_eq!(got[0].tokens, greedy[0]);
            for seed in 0..4 {
                let rng = ChaCha8Rng::seed_from_u64(seed);
                let mut drafter = Guess { answer: &greedy[0], prompt: 12, rng };
                let got = generate_with(&model, &prompt, &options, &mut drafter).unwrap();
                assert_eq!(got[0].tokens, greedy[0], "budget {budget}, seed {seed}");
                assert!(budget < 5 || got[0].accepted > 5, "{}", got[0].accepted);
            }
        }
    }
}

#[test]
fn greedy_takes_the_best_of_the_whole_text_and_ends_at_eos() {
    let prompts = [prompt(5, 8), prompt(9, 9)];
    for model in models() {
        let options = GenerateOptions { max_new_tokens: 12, ..GenerateOptions::default() };
        let mut streamed = vec![Vec::new(); 2];
        let got = generate(&model, &prompts, &options, |i, token| streamed[i].push(token)).unwrap();
        assert_eq!(got, streamed);
        for (prompt, got) in prompts.iter().zip(&got) {
            let mut text = prompt.clone();
            for &token in got {
                let all = logits(&model, &text);
                let last = all.row(all.nrows() - 1);
                assert!(last.iter().all(|&x| x <= last[token as usize]));
                text.push(token);
            }
        }
        let end = got[0][4];
        let options = GenerateOptions { eos: vec![end], ..options };
        let short = generate(&model, &prompts[..1], &options, |_, _| {}).unwrap();
        let first = got[0].iter().position(|&token| token == end).unwrap();
        assert_eq!(short[0], got[0][..=first]);
    }
}

#[test]
fn sampling_repeats_itself_and_cools_down_to_greedy() {
    let prompts = [prompt(5, 10), prompt(5, 11)];
    let [_, model] = models();
    let sampled = |sampling| {
        let choice = Choice::Sampled(sampling);
        let options = GenerateOptions { max_new_tokens: 20, choice, ..GenerateOptions::default() };
        generate(&model, &prompts, &options, |_, _| {})
    };
    let some = sampled(Sampling { seed: 1, ..Sampling::default() }).unwrap();
    assert_eq!(some, sampled(Sampling { seed: 1, ..Sampling::default() }).unwrap());
    assert_ne!(some, sampled(Sampling { seed: 2, ..Sampling::default() }).unwrap());
    let greedy = GenerateOptions { max_new_tokens: 20, ..GenerateOptions::default() };
    let greedy = generate(&model, &prompts, &greedy, |_, _| {}).unwrap();
    assert_eq!(sampled(Sampling { top_k: Some(1), ..Sampling::default() }).unwrap(), greedy);
    assert_eq!(sampled(Sampling { temperature: 1e-4, ..Sampling::default() }).unwrap(), greedy);
    let error = sampled(Sampling { temperature: 0.0, ..Sampling::default() }).unwrap_err();
    assert!(error.to_string().contains("temperature"), "{error}");
}

#[test]
fn one_beam_is_greedy_and_scores_are_those_of_the_text() {
    let prompts = [prompt(6, 12), prompt(3, 13)];
    for model in models() {
        let options = GenerateOptions { max_new_tokens: 10, ..GenerateOptions::default() };
        let greedy = generate(&model, &prompts, &options, |_, _| {}).unwrap();
        for num_beams in [1, 3] {
            let options = beam::Options { num_beams, max_new_tokens: 10, ..Default::default() };
            let output = generate_beams(&model, &prompts, &options).unwrap();
            for ((item, prompt), greedy) in output.items.iter().zip(&prompts).zip(&greedy) {
                let best = &item.hypotheses[0];
                if num_beams == 1 {
                    assert_eq!(&best.tokens, greedy);
                }
                let text = [prompt.clone(), best.tokens.clone()].concat();
                let all = logits(&model, &text);
                let logprob: f64 = best
                    .tokens
                    .iter()
                    .enumerate()
                    .map(|(i, &token)| {
                        let row = all.row(prompt.len() - 1 + i).mapv(f64::from);
                        row[token as usize] - row.mapv(f64::exp).sum().ln()
                    })
                    .sum();
                assert!((best.logprob - logprob).abs() < 1e-4, "{} {logprob}", best.logprob);
            }
        }
    }
}

#[test]
fn more_tokens_than_can_be_counted_are_refused() {
    let [_, model] = models();
    let prompts = [prompt(5, 15), prompt(70, 16)];
    for max_new_tokens in [usize::MAX, usize::MAX - 70, usize::MAX / 2 + 1, usize::MAX / 4] {
        let options = GenerateOptions { max_new_tokens, ..GenerateOptions::default() };
        let plain = generate(&model, &prompts, &options, |_, _| {}).unwrap_err();
        let options = DecodeOptions { max_new_tokens, ..DecodeOptions::default() };
        let speculative = generate_speculatively(&model, &prompts, &options).unwrap_err();
        let options = beam::Options { max_new_tokens, num_beams: 2, ..Default::default() };
        let beams = generate_beams(&model, &prompts, &options).unwrap_err();
        for error in [plain, speculative, beams] {
            let message = error.to_string();
            // What can be counted is too much for the cache.
            let named = message.contains("`max_new_tokens`") || matches!(error, Error::Cache(_));
            assert!(named, "{message}");
        }
    }
    let options = DecodeOptions { budget: usize::MAX, ..DecodeOptions::default() };
    assert!(generate_speculatively(&model, &prompts, &options).is_err());
    let options = beam::Options { num_beams: usize::MAX, ..Default::default() };
    let error = generate_beams(&model, &prompts, &options).unwrap_err().to_string();
    assert!(error.contains("`num_beams`"), "{error}");
}

#[test]
fn a_step_that_fails_leaves_the_cache_as_it_was() {
    let [float, packed] = models();
    let mut cache = float.cache(64).unwrap();
    let (a, b) = (cache.create().unwrap(), cache.create().unwrap());
    let text = prompt(60, 14);
    float.forward(&mut cache, &[Chunk::line(a, &text)], LogitRows::Last).unwrap();
    let fails = |cache: &mut Cache, chunks: &[Chunk<'_>], what: &str| {
        let error = float.forward(cache, chunks, LogitRows::Last).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    fails(&mut cache, &[Chunk::line(a, &text)], "page");
    fails(&mut cache, &[Chunk::line(b, &text)], "page");
    fails(&mut cache, &[Chunk::line(a, &[1]), Chunk::line(a, &[1])], "twice");
    fails(&mut cache, &[Chunk::line(a, &[VOCABULARY as u32])], "`tokens` is 40");
    fails(&mut cache, &[Chunk::line(a, &[])], "at least one token");
    fails(&mut cache, &[Chunk::tree(a, &[1, 2], &[-1])], "`parents` is 1");
    fails(&mut cache, &[Chunk::tree(a, &[1, 2], &[1, -1])], "`parents` is 1");
    fails(&mut cache, &[Chunk::tree(a, &[1, 2], &[-2, -1])], "`parents` is -2");
    let other = Model::float(
        Preset::Nano.config(VOCABULARY),
        Weights::random(&Preset::Nano.config(VOCABULARY), 1).unwrap(),
    );
    let error = other.unwrap().forward(&mut cache, &[Chunk::line(a, &[1])], LogitRows::Last);
    assert!(matches!(error, Err(Error::Cache(_))));
    // The cache goes on as if nothing had happened.
    let got = float.forward(&mut cache, &[Chunk::line(a, &[1])], LogitRows::Last).unwrap();
    let whole = logits(&float, &[text, vec![1]].concat());
    assert_eq!(got.row(0), whole.row(60));
    assert!(generate(&packed, &[Vec::new()], &GenerateOptions::default(), |_, _| {}).is_err());
}
