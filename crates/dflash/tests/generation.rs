//! Generation over the cache: the text and the cache's bits are those of plain decoding, whatever
//! the drafter proposes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::transformer::{Sizes, Transformer};
use dflash::{
    BoxError, CostCurve, DecodeOptions, Decoder, Decoding, Draft, Drafter, DrawnTree, Error,
    Finish, Generation, Law, ModelDrafter, ModelDrafts, NoDraft, Pass, PromptLookup, Random,
    Sampling, Scripted, Siblings, Target, TokenTree, argmax, best_first_by, generate,
};
use kvcache::{Cache, Layout, Rows, SeqId, Storage};
use ndarray::{Array2, ArrayViewMut2};
use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

const SIZES: Sizes = Sizes::SMALL;

/// A cache for the model.
fn cache_with(storage: Storage, page_size: usize, layout: Layout) -> Cache {
    let config = SIZES.cache().stored_as(storage).with_layout(layout);
    Cache::new(&kvcache::Config { page_size, residual: 40, ..config }).unwrap()
}

fn cache() -> Cache {
    cache_with(Storage::F32, 16, Layout::Paged { pages: 400 })
}

/// Plain greedy decoding without this crate's loop: the text, prompt included, and its cache.
fn plain(
    model: &mut Transformer,
    mut cache: Cache,
    prompt: &[u32],
    new: usize,
) -> (Vec<u32>, Cache, SeqId) {
    let seq = cache.create().unwrap();
    let mut text = prompt.to_vec();
    let mut cached = 0;
    while text.len() < prompt.len() + new {
        // The prompt in one pass, then token by token.
        let pass = Pass {
            seq,
            tokens: text[cached..].to_vec(),
            positions: (cached..text.len()).collect(),
            rows: Rows::Last(text.len() - cached),
        };
        let mut logits = Array2::zeros((pass.tokens.len(), SIZES.vocabulary));
        model.forward(&mut cache, &[pass], Some(logits.view_mut())).unwrap();
        cached = text.len();
        text.push(argmax(logits.row(logits.nrows() - 1), 0).unwrap());
    }
    (text, cache, seq)
}

/// Bits of everything the cache holds of a sequence.
fn bits(cache: &Cache, seq: SeqId) -> Vec<u32> {
    let mut bits = Vec::new();
    for layer in 0..SIZES.layers {
        let (k, v) = cache.read(layer, seq, 0, cache.len(seq).unwrap()).unwrap();
        bits.extend(k.iter().chain(&v).map(|x| x.to_bits()));
    }
    bits
}

/// Trees of every kind around the text that plain decoding will take.
struct Script<'a> {
    /// The whole text of plain decoding.
    truth: &'a [u32],
    rng: ChaCha8Rng,
    max_depth: usize,
    kinds: [usize; 7],
}

impl<'a> Script<'a> {
    fn new(truth: &'a [u32], seed: u64, max_depth: usize) -> Self {
        Self { truth, rng: ChaCha8Rng::seed_from_u64(seed), max_depth, kinds: [0; 7] }
    }

    fn token(&mut self) -> u32 {
        self.rng.random_range(0..SIZES.vocabulary as u32)
    }

    fn wrong(&mut self, right: u32) -> u32 {
        (right + self.rng.random_range(1..SIZES.vocabulary as u32)) % SIZES.vocabulary as u32
    }
}

impl Drafter for Script<'_> {
    fn draft(&mut self, _: usize, text: &[u32], budget: usize) -> Result<Draft, BoxError> {
        assert_eq!(text, &self.truth[..text.len()], "the text differs from plain decoding");
        let future = &self.truth[text.len()..];
        let future = &future[..future.len().min(self.max_depth)];
        let nodes = if self.rng.random_bool(0.2) {
            budget
        } else {
            self.rng.random_range(0..=budget.min(48))
        };
        let kind = self.rng.random_range(0..self.kinds.len());
        self.kinds[kind] += 1;
        let (mut tokens, mut parents) = (Vec::new(), Vec::new());
        match kind {
            // Nothing.
            0 => {}
            // One node, right or wrong.
            1 => {
                let right = self.rng.random_bool(0.5);
                tokens.push(if right { future[0] } else { self.wrong(future[0]) });
                parents.push(-1);
            }
            // Every beginning is wrong; below each the truth goes on, in vain.
            2 => {
                for _ in 0..nodes {
                    let parent = self.rng.random_range(-1..tokens.len() as i64);
                    let depth = depth_of(&parents, parent);
                    if depth < self.max_depth {
                        let right = future[depth.min(future.len() - 1)];
                        tokens.push(if depth == 0 { self.wrong(right) } else { right });
                        parents.push(parent);
                    }
                }
            }
            // Random tokens anywhere.
            3 => {
                for _ in 0..nodes {
                    let parent = self.rng.random_range(-1..tokens.len() as i64);
                    if depth_of(&parents, parent) < self.max_depth {
                        tokens.push(self.token());
                        parents.push(parent);
                    }
                }
            }
            // The truth up to somewhere, and other branches off it.
            _ => {
                let right = future.len().min(nodes);
                let right = if kind == 4 { right } else { self.rng.random_range(0..=right) };
                let mut spine = -1;
                for &token in &future[..right] {
                    tokens.push(token);
                    parents.push(spine);
                    spine = tokens.len() as i64 - 1;
                }
                while tokens.len() < nodes {
                    let parent = self.rng.random_range(-1..tokens.len() as i64);
                    if depth_of(&parents, parent) >= self.max_depth {
                        break;
                    }
                    tokens.push(self.token());
                    parents.push(parent);
                }
            }
        }
        let (tokens, parents) = shuffled(&mut self.rng, &tokens, &parents);
        Ok(Draft::Tree(TokenTree::merged(&tokens, &parents)?.0))
    }
}

fn depth_of(parents: &[i64], mut node: i64) -> usize {
    let mut depth = 0;
    while node >= 0 {
        (node, depth) = (parents[node as usize], depth + 1);
    }
    depth
}

/// The same tree with its nodes in another order, parents before children.
fn shuffled(rng: &mut ChaCha8Rng, tokens: &[u32], parents: &[i64]) -> (Vec<u32>, Vec<i64>) {
    let mut keys: Vec<f64> = Vec::new();
    for &parent in parents {
        let from = if parent < 0 { 0.0 } else { keys[parent as usize] };
        keys.push(from + rng.random::<f64>());
    }
    let mut order: Vec<usize> = (0..tokens.len()).collect();
    order.shuffle(rng);
    order.sort_by(|&a, &b| keys[a].total_cmp(&keys[b]));
    let place = |node: i64| match node {
        -1 => -1,
        node => order.iter().position(|&other| other as i64 == node).unwrap() as i64,
    };
    let new_tokens = order.iter().map(|&node| tokens[node]).collect();
    (new_tokens, order.iter().map(|&node| place(parents[node])).collect())
}

/// 10,000 tokens in all, on every storage and layout.
#[test]
fn greedy_is_plain_decoding_to_the_bit() {
    let mut tokens = 0;
    let mut kinds = [0; 7];
    for (run, (storage, page_size, budget)) in [
        (Storage::F32, 16, 256),
        (Storage::F32, 16, 40),
        (Storage::F32, 1, 256),
        (Storage::F32, 7, 100),
        (Storage::F32, 64, 16),
        (Storage::F32, 64, 256),
        (Storage::F32, 33, 64),
        (Storage::Bf16, 16, 64),
        (Storage::Bf16, 32, 256),
        (Storage::F16, 16, 64),
        (Storage::Int8, 16, 48),
        (Storage::Int8, 32, 256),
        (Storage::Int8, 64, 100),
        (Storage::Int4, 16, 64),
        (Storage::Int4, 32, 48),
        (Storage::F32, 16, 128),
    ]
    .into_iter()
    .enumerate()
    {
        let layout = match run % 3 {
            0 => Layout::Contiguous { sequences: 2, capacity: 1100 },
            _ => Layout::Paged { pages: 1100 },
        };
        let cache = || cache_with(storage, page_size, layout);
        let mut model = Transformer::new(SIZES, run as u64);
        let prompt: Vec<u32> = (0..1 + 5 * run as u32).map(|i| (i * 7 + 3) % 61).collect();
        let new = 640;
        // The last token of a text is in no cache; plain decoding goes one further.
        let (truth, plain_cache, plain_seq) = plain(&mut model, cache(), &prompt, new + 40);

        let mut cache = cache();
        let mut script = Script::new(&truth, run as u64, 30);
        let options = DecodeOptions { max_new_tokens: new, budget, ..DecodeOptions::default() };
        let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
        decoder.add(&prompt).unwrap();
        let mut cycles = 0;
        while decoder.step(&mut script).unwrap() {
            cycles += 1;
            if cycles % 16 < 3 {
                decoder.cache().check_invariants().unwrap();
            }
        }
        let generation = decoder.generation(0).unwrap().clone();
        let seq = decoder.seq(0).unwrap();
        assert_eq!(generation.tokens, truth[prompt.len()..prompt.len() + new], "{storage:?}");
        assert_eq!(generation.finish, Some(Finish::Length));
        assert!(generation.cycles > 3 && generation.accepted > new / 3, "{generation:?}");
        tokens += generation.tokens.len();
        script.kinds.iter().zip(&mut kinds).for_each(|(count, sum)| *sum += count);

        let len = prompt.len() + new - 1;
        assert_eq!(cache.len(seq).unwrap(), len);
        // The plain cache was read by later queries, which may take older rows quantised: compare
        // with one that ends where this one does.
        let (mut same, mut same_seq) = (plain_cache, plain_seq);
        if storage.is_quantised() {
            let cache = cache_with(storage, page_size, layout);
            (_, same, same_seq) = plain(&mut model, cache, &prompt, new);
        } else {
            same.truncate(same_seq, len).unwrap();
        }
        assert_eq!(same.len(same_seq).unwrap(), len);
        assert!(bits(&cache, seq) == bits(&same, same_seq), "run {run}: the caches differ");
    }
    println!("{tokens} tokens, trees of each kind: {kinds:?}");
    assert!(tokens >= 10_000);
    assert!(kinds.iter().all(|&count| count > 50), "{kinds:?}");
}

/// After each of many cycles, not only at the end.
#[test]
fn the_cache_is_plain_after_every_cycle() {
    let mut model = Transformer::new(SIZES, 77);
    let prompt = [5, 6, 7];
    let (truth, _, _) = plain(&mut model, cache(), &prompt, 130);
    let mut script = Script::new(&truth, 1, 30);
    let mut cache = cache();
    let options = DecodeOptions { max_new_tokens: 100, budget: 64, ..DecodeOptions::default() };
    let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
    decoder.add(&prompt).unwrap();
    let mut states = Vec::new();
    loop {
        let more = decoder.step(&mut script).unwrap();
        let seq = decoder.seq(0).unwrap();
        states.push((decoder.generation(0).unwrap().tokens.len(), bits(decoder.cache(), seq)));
        if !more {
            break;
        }
    }
    assert!(states.len() > 10);
    for (new, state) in states {
        let (text, plain_cache, seq) = plain(&mut model, self::cache(), &prompt, new);
        assert_eq!(text, truth[..text.len()]);
        assert!(bits(&plain_cache, seq) == state, "after {new} tokens");
    }
}

/// Each sequence of a ragged batch is what it is alone: text and cache.
#[test]
fn batches_do_not_mix() {
    let prompts: Vec<Vec<u32>> =
        [1, 9, 4, 30].iter().map(|&n| (0..n).map(|i| (i * i + n) % 61).collect()).collect();
    let mut model = Transformer::new(SIZES, 3);
    let truths: Vec<_> =
        prompts.iter().map(|prompt| plain(&mut model, cache(), prompt, 160).0).collect();
    // Ends at different times.
    let eos = [truths[0][40], truths[2][60]];
    let options = DecodeOptions { max_new_tokens: 90, eos: &eos, budget: 32, ..Default::default() };
    let mut scripts: Vec<_> = truths.iter().map(|truth| Script::new(truth, 4, 30)).collect();
    let mut cache = cache();
    let mut decoder = Decoder::new(&mut model, &mut cache, options.clone()).unwrap();
    for (index, prompt) in prompts.iter().enumerate() {
        assert_eq!(decoder.add(prompt).unwrap(), index);
    }
    let mut drafter = Scripted(|sequence: usize, text: &[u32], budget: usize| {
        scripts[sequence].draft(sequence, text, budget)
    });
    while decoder.step(&mut drafter).unwrap() {}
    for (index, prompt) in prompts.iter().enumerate() {
        let together = decoder.generation(index).unwrap().clone();
        let state = bits(decoder.cache(), decoder.seq(index).unwrap());
        let mut model = Transformer::new(SIZES, 3);
        let mut own = self::cache();
        let mut alone = Decoder::new(&mut model, &mut own, options.clone()).unwrap();
        alone.add(prompt).unwrap();
        let mut script = Script::new(&truths[index], 4, 30);
        while alone.step(&mut script).unwrap() {}
        assert_eq!(alone.generation(0), Some(&together));
        assert!(bits(alone.cache(), alone.seq(0).unwrap()) == state);
    }
    let generations = decoder.into_generations(&mut NoDraft).unwrap();
    assert!(generations.values().any(|generation| generation.finish == Some(Finish::Eos)));
    assert_eq!(cache.sequences().count(), 0);
    cache.check_invariants().unwrap();
}

/// An end inside an accepted path truncates the tokens and the cache.
#[test]
fn eos_and_limit_inside_a_path() {
    let mut model = Transformer::new(SIZES, 8);
    let prompt = [1, 2];
    let (truth, _, _) = plain(&mut model, cache(), &prompt, 60);
    let new = &truth[2..];
    // A token that appears first in the middle of the path.
    let at = (3..30).find(|&at| !new[..at].contains(&new[at])).unwrap();
    let whole = |_: usize, text: &[u32], budget: usize| -> Result<Draft, BoxError> {
        Ok(Draft::Tree(TokenTree::chain(&truth[text.len()..][..budget])?))
    };
    for (eos, limit, len, finish) in [
        (vec![new[at]], 50, at + 1, Finish::Eos),
        (vec![], 7, 7, Finish::Length),
        (vec![new[at]], at + 1, at + 1, Finish::Eos),
        (vec![new[at]], at, at, Finish::Length),
        (vec![], 1, 1, Finish::Length),
    ] {
        let options =
            DecodeOptions { max_new_tokens: limit, eos: &eos, budget: 40, ..Default::default() };
        let mut cache = cache();
        let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
        decoder.add(&prompt).unwrap();
        assert!(!decoder.step(&mut Scripted(whole)).unwrap());
        let generation = decoder.generation(0).unwrap().clone();
        let (seq, cycles) = (decoder.seq(0).unwrap(), generation.cycles);
        assert_eq!((generation.tokens.as_slice(), cycles), (&new[..len], 1));
        assert_eq!((generation.finish, generation.accepted), (Some(finish), len - 1));
        // A finished sequence stays as it is.
        assert!(!decoder.step(&mut Scripted(whole)).unwrap());
        assert_eq!(decoder.generation(0).unwrap(), &generation);
        let (_, plain_cache, plain_seq) = plain(&mut model, self::cache(), &prompt, len);
        assert!(bits(&cache, seq) == bits(&plain_cache, plain_seq));
    }
}

fn run(
    drafter: &mut impl Drafter,
    decoding: Decoding,
    budget: usize,
    prompts: &[&[u32]],
) -> Vec<Generation> {
    let mut model = Transformer::new(SIZES, 21);
    let mut cache = cache();
    let options =
        DecodeOptions { decoding, max_new_tokens: 120, budget, ..DecodeOptions::default() };
    let generations = generate(&mut model, &mut cache, drafter, prompts, options).unwrap();
    assert_eq!(cache.sequences().count(), 0);
    generations
}

fn tokens(generations: &[Generation]) -> Vec<&[u32]> {
    generations.iter().map(|generation| &*generation.tokens).collect()
}

fn small_drafter(seed: u64, layers: usize, drafts: ModelDrafts) -> ModelDrafter<Transformer> {
    let sizes = Sizes { layers, ..SIZES };
    let config = kvcache::Config { page_size: 16, ..sizes.cache() };
    ModelDrafter::new(Transformer::new(sizes, seed), Cache::new(&config).unwrap(), drafts)
}

#[test]
fn drafters_change_the_speed_and_nothing_else() {
    let prompts: [&[u32]; 2] = [&[1, 2, 3, 1, 2, 3, 1, 2], &[9]];
    let want = run(&mut NoDraft, Decoding::Greedy, 16, &prompts);
    assert!(want.iter().all(|generation| generation.cycles == 120 && generation.drafted == 0));

    let lookup = run(&mut PromptLookup::default(), Decoding::Greedy, 16, &prompts);
    assert_eq!(tokens(&lookup), tokens(&want));
    assert!(lookup.iter().all(|generation| generation.drafted > 0));

    let best = ModelDrafts::Best { width: 3, depth: 3 };
    let small = run(&mut small_drafter(5, 1, best.clone()), Decoding::Greedy, 12, &prompts);
    assert_eq!(tokens(&small), tokens(&want));

    // The target itself as its drafter is always right: depth + 1 tokens a cycle.
    let mut perfect = small_drafter(21, 2, best);
    let generations = run(&mut perfect, Decoding::Greedy, 12, &prompts);
    assert_eq!(tokens(&generations), tokens(&want));
    assert!(generations.iter().all(|generation| generation.cycles == 30), "{generations:?}");
    assert_eq!(perfect.cache().sequences().count(), 0);
    perfect.cache().check_invariants().unwrap();

    // No budget, no draft.
    let mut never = Scripted(|_: usize, _: &[u32], _: usize| Err("asked without a budget".into()));
    assert_eq!(tokens(&run(&mut never, Decoding::Greedy, 0, &prompts)), tokens(&want));
}

/// With sample and match, the same seed gives the same text under any drafter.
#[test]
fn sampled_text_does_not_depend_on_the_drafter() {
    let prompts: [&[u32]; 3] = [&[1, 2, 3, 1, 2, 3, 1, 2], &[9], &[30, 31]];
    let sampling = Sampling { temperature: 0.7, top_k: Some(20), ..Sampling::default() };
    let decoding = Decoding::Sampled { sampling, seed: 17 };
    let want = run(&mut NoDraft, decoding, 16, &prompts);
    let lookup = run(&mut PromptLookup::default(), decoding, 16, &prompts);
    assert_eq!(tokens(&lookup), tokens(&want));
    let best = ModelDrafts::Best { width: 4, depth: 2 };
    let model = run(&mut small_drafter(21, 2, best), decoding, 16, &prompts);
    assert_eq!(tokens(&model), tokens(&want));
    assert!(model.iter().all(|generation| generation.accepted > 20), "{model:?}");
    let other = run(&mut NoDraft, Decoding::Sampled { sampling, seed: 18 }, 16, &prompts);
    assert_ne!(tokens(&other), tokens(&want));
    // A sequence alone is what it is in the batch, if it has the same number.
    assert_eq!(tokens(&run(&mut NoDraft, decoding, 16, &prompts[..1])), tokens(&want)[..1]);
}

/// A drafter that draws from the target's own law is always accepted.
#[test]
fn drawn_trees_go_through_speculative_sampling() {
    let prompts: [&[u32]; 2] = [&[1, 2, 3], &[9]];
    let sampling = Sampling { temperature: 0.9, ..Sampling::default() };
    let decoding = Decoding::Sampled { sampling, seed: 1 };
    for siblings in [Siblings::Independent, Siblings::Distinct] {
        let drafts =
            |sampling| ModelDrafts::Drawn { widths: vec![2, 2, 1], siblings, sampling, seed: 2 };
        let own = run(&mut small_drafter(21, 2, drafts(sampling)), decoding, 16, &prompts);
        assert!(own.iter().all(|generation| generation.cycles == 30), "{own:?}");
        let hotter = Sampling { temperature: 3.0, ..sampling };
        let other = run(&mut small_drafter(21, 2, drafts(hotter)), decoding, 16, &prompts);
        assert!(other.iter().all(|generation| generation.tokens.len() == 120));
        assert!(other.iter().all(|generation| generation.cycles > 30), "{other:?}");
        // At temperature 0 the tree is one like others.
        let greedy =
            run(&mut small_drafter(21, 2, drafts(sampling)), Decoding::Greedy, 16, &prompts);
        assert_eq!(tokens(&greedy), tokens(&run(&mut NoDraft, Decoding::Greedy, 0, &prompts)));
    }
}

/// Not even random drafts depend on the other sequences.
#[test]
fn a_sequence_alone_is_what_it_is_in_a_batch() {
    let sampling = Sampling::default();
    let decoding = Decoding::Sampled { sampling, seed: 1 };
    let (widths, siblings) = (vec![2, 1, 1], Siblings::Distinct);
    let drafts = ModelDrafts::Drawn { widths, siblings, sampling, seed: 2 };
    let generations =
        |prompts: &[&[u32]]| run(&mut small_drafter(5, 1, drafts.clone()), decoding, 16, prompts);
    let together = generations(&[&[1, 2, 3], &[9], &[30, 31]]);
    assert!(together[0].accepted > 10, "{together:?}");
    assert_eq!(generations(&[&[1, 2, 3]]), together[..1]);
}

/// What can no more be kept is not verified: a cache that is enough for plain decoding is enough, and the
/// last token has no draft.
#[test]
fn drafts_end_with_the_text() {
    let prompt: Vec<u32> = (0..40).map(|i| i % 4).collect();
    let mut model = Transformer::new(SIZES, 21);
    let layout = Layout::Contiguous { sequences: 1, capacity: 64 };
    let mut generated = |drafter: &mut dyn Drafter| {
        let mut cache = cache_with(Storage::F32, 16, layout);
        let options = DecodeOptions { max_new_tokens: 24, ..DecodeOptions::default() };
        let mut drafter = drafter;
        generate(&mut model, &mut cache, &mut drafter, &[&prompt], options).unwrap().remove(0)
    };
    let plain = generated(&mut NoDraft);
    assert_eq!(plain.cycles, 24);
    let lookup = generated(&mut PromptLookup::default());
    assert_eq!(lookup.tokens, plain.tokens);

    let wrong = |_: usize, text: &[u32], budget: usize| -> Result<Draft, BoxError> {
        assert!(text.len() < 63, "asked for the last token");
        Ok(Draft::Tree(TokenTree::chain(&vec![(plain.tokens[text.len() - 40] + 1) % 61; budget])?))
    };
    let in_vain = generated(&mut Scripted(wrong));
    assert_eq!((&in_vain.tokens, in_vain.cycles), (&plain.tokens, 24));
    // Sixteen nodes a cycle, then 15 with 16 tokens left, and so on.
    assert_eq!(in_vain.drafted, 16 * 8 + (0..16).sum::<usize>());
}

/// Trees of all kinds lose what is too deep, and the rest stays as it is.
#[test]
fn drafts_of_every_kind_are_pruned() {
    let law = |path: &[u32]| -> Result<Law, Error> {
        Law::from_probabilities(if path.len() < 2 { &[0.5, 0.5] } else { &[0.25, 0.75] })
    };
    for siblings in [Siblings::Distinct, Siblings::Independent] {
        let mut random = Random(ChaCha8Rng::seed_from_u64(4));
        let drawn = DrawnTree::draw(&[2, 2, 2], siblings, 99, law, &mut random).unwrap();
        let scored = best_first_by(14, |path| {
            Ok(if path.len() < 3 { vec![(0, -0.5), (1, -1.0)] } else { Vec::new() })
        })
        .unwrap();
        let decoding = Decoding::Sampled { sampling: Sampling::default(), seed: 3 };
        for draft in [Draft::Tree(drawn.tree().clone()), Draft::Scored(scored), Draft::Drawn(drawn)]
        {
            let shallow = draft.tree().depths().iter().filter(|&&depth| depth <= 2).count();
            assert!(shallow < draft.tree().len());
            let mut model = Transformer::new(SIZES, 21);
            let mut cache = cache();
            let options = DecodeOptions { decoding, max_new_tokens: 3, ..DecodeOptions::default() };
            let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
            decoder.add(&[1]).unwrap();
            let same = |_: usize, _: &[u32], _: usize| Ok(draft.clone());
            decoder.step(&mut Scripted(same)).unwrap();
            assert_eq!(decoder.generation(0).unwrap().drafted, shallow, "{draft:?}");
        }
    }
}

/// Nothing is moved in plain decoding, so a cache may be quantised to the last row, which is read quantised where
/// it fills a page.
#[test]
fn plain_decoding_needs_no_residual() {
    let small = |storage, page_size| {
        let config = SIZES.cache().stored_as(storage);
        let layout = Layout::Paged { pages: 400 };
        let config = kvcache::Config { page_size, residual: 0, ..config.with_layout(layout) };
        Cache::new(&config).unwrap()
    };
    let options = DecodeOptions { max_new_tokens: 60, ..DecodeOptions::default() };
    let prompts: [&[u32]; 2] = [&[1, 2, 3], &[7]];
    for storage in [Storage::Int8, Storage::Int4] {
        for page_size in [1, 4, 16] {
            for seed in 21..24 {
                let mut model = Transformer::new(SIZES, seed);
                let truth = prompts.map(|prompt| {
                    let (text, cache, seq) =
                        plain(&mut model, small(storage, page_size), prompt, 60);
                    (text, bits(&cache, seq))
                });
                let mut cache = small(storage, page_size);
                let mut decoder = Decoder::new(&mut model, &mut cache, options.clone()).unwrap();
                for prompt in &prompts {
                    decoder.add(prompt).unwrap();
                }
                while decoder.step(&mut NoDraft).unwrap() {}
                for (index, (text, want)) in truth.iter().enumerate() {
                    let what = format!("{storage:?}, pages of {page_size}, seed {seed}, {index}");
                    let got = decoder.generation(index).unwrap();
                    assert_eq!(got.tokens, text[prompts[index].len()..], "{what}");
                    assert!(bits(decoder.cache(), decoder.seq(index).unwrap()) == *want, "{what}");
                }
            }
        }
    }
    let mut one =
        Scripted(|_: usize, _: &[u32], _: usize| Ok(Draft::Tree(TokenTree::chain(&[1])?)));
    let (mut model, mut cache) = (Transformer::new(SIZES, 21), small(Storage::Int8, 16));
    let error = generate(&mut model, &mut cache, &mut one, &prompts, options).unwrap_err();
    assert!(error.to_string().contains("`residual` is 0, expected above 1"), "{error}");
}

/// A sequence that holds the beginning of its prompt goes on as one that was added whole; one that holds too
/// much is left alone.
#[test]
fn prompts_that_are_cached_in_part() {
    let prompt: Vec<u32> = (0..20).map(|i| i * 3 % 11).collect();
    let mut model = Transformer::new(SIZES, 5);
    let (truth, ..) = plain(&mut model, cache(), &prompt, 20);
    let (_, mut cache, seq) = plain(&mut model, cache(), &prompt[..7], 1);
    let options = DecodeOptions { max_new_tokens: 20, ..DecodeOptions::default() };
    let forks = [(); 2].map(|()| cache.fork(seq).unwrap());
    let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
    let error = decoder.add_cached(forks[0], &prompt[..7]).unwrap_err().to_string();
    assert_eq!(
        error,
        "`prompt` is 7 tokens, expected more tokens than the 7 rows that its sequence holds"
    );
    for fork in forks {
        decoder.add_cached(fork, &prompt).unwrap();
        let error = decoder.add_cached(fork, &prompt).unwrap_err().to_string();
        assert!(error.contains("a sequence that the decoder does not have yet"), "{error}");
    }
    decoder.add(&prompt).unwrap();
    while decoder.step(&mut PromptLookup::default()).unwrap() {}
    for index in 0..3 {
        assert_eq!(decoder.generation(index).unwrap().tokens, truth[20..], "{index}");
    }
    decoder.into_generations(&mut NoDraft).unwrap();
    assert_eq!(cache.stats().sequences, 1);
    assert_eq!(cache.len(seq).unwrap(), 7);
}

/// A sequence that is let go gives its pages back at once; the others do not notice.
#[test]
fn sequences_are_released() {
    let prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]];
    let options = DecodeOptions { max_new_tokens: 12, ..DecodeOptions::default() };
    let mut model = Transformer::new(SIZES, 6);
    let truth = prompts.map(|prompt| plain(&mut model, cache(), &prompt, 12).0);
    let mut cache = cache();
    let drafter = &mut PromptLookup::default();
    let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
    for prompt in &prompts {
        decoder.add(prompt).unwrap();
    }
    decoder.step(drafter).unwrap();
    let live = decoder.cache().stats().live;
    let so_far = decoder.generation(1).unwrap().clone();
    let released = decoder.release(1, drafter).unwrap().unwrap();
    assert_eq!(released, Generation { finish: Some(Finish::Released), ..so_far });
    assert_eq!(released.tokens, truth[1][3..][..released.tokens.len()]);
    assert_eq!(decoder.release(1, drafter).unwrap(), None);
    assert_eq!(decoder.release(9, drafter).unwrap(), None);
    assert!(decoder.cache().stats().live < live && decoder.seq(1).is_none());
    assert!(decoder.generation(1).is_none());
    // Its number is not given again.
    assert_eq!(decoder.add(&prompts[1]).unwrap(), 3);
    while decoder.step(drafter).unwrap() {}
    let last = decoder.release(2, drafter).unwrap().unwrap();
    assert_eq!(last.tokens, truth[2][3..]);
    assert_eq!(decoder.cache().stats().sequences, 2);
    let all = decoder.into_generations(drafter).unwrap();
    assert_eq!(all.keys().copied().collect::<Vec<_>>(), [0, 3]);
    for (number, prompt) in [(0, 0), (3, 1)] {
        assert_eq!(all[&number].tokens, truth[prompt][3..]);
        assert_eq!(all[&number].finish, Some(Finish::Length));
    }
    assert_eq!(cache.stats().sequences, 0);
}

/// A drafter over a quantised cache, which cannot go back to what it has quantised.
fn quantised_drafter() -> ModelDrafter<Transformer> {
    let config = SIZES.cache().stored_as(Storage::Int8);
    let config = kvcache::Config { page_size: 4, residual: 8, ..config };
    let drafts = ModelDrafts::Best { width: 2, depth: 2 };
    ModelDrafter::new(Transformer::new(SIZES, 5), Cache::new(&config).unwrap(), drafts)
}

/// A few steps with a prompt that begins like no other.
fn begin<'a>(
    model: &'a mut Transformer,
    cache: &'a mut Cache,
    drafter: &mut impl Drafter,
    round: u32,
) -> Decoder<'a, Transformer> {
    let mut decoder = Decoder::new(model, cache, DecodeOptions::default()).unwrap();
    decoder.add(&Vec::from_iter((0..20).map(|i| (round + i * 7) % 61))).unwrap();
    for _ in 0..3 {
        assert!(decoder.step(drafter).unwrap());
    }
    decoder
}

/// The drafter hears of sequences that the decoder ends before they have.
#[test]
fn drafters_keep_nothing_of_decoders_that_ended() {
    let (mut model, mut cache, mut drafter) =
        (Transformer::new(SIZES, 6), cache(), quantised_drafter());
    for round in 0..4 {
        let decoder = begin(&mut model, &mut cache, &mut drafter, round);
        assert_eq!(drafter.cache().stats().sequences, 1);
        let generations = decoder.into_generations(&mut drafter).unwrap();
        assert!(generations[&0].finish.is_none() && !generations[&0].tokens.is_empty());
        assert_eq!(drafter.cache().stats().sequences, 0);
    }
    assert_eq!(cache.stats().sequences, 0);
}

/// It hears nothing of a decoder that is dropped, and takes its number for another text.
#[test]
fn drafters_start_afresh_where_their_cache_cannot_go_back() {
    let (mut model, mut cache, mut drafter) =
        (Transformer::new(SIZES, 6), cache(), quantised_drafter());
    for round in 0..4 {
        drop(begin(&mut model, &mut cache, &mut drafter, round));
        assert_eq!(drafter.cache().stats().sequences, 1, "round {round}");
        drafter.cache().check_invariants().unwrap();
        // What it drafts is what a new one drafts.
        let text = Vec::from_iter((0..20).map(|i| (i * i + round) % 61));
        let draft = drafter.draft(0, &text, 6).unwrap();
        assert_eq!(draft, quantised_drafter().draft(0, &text, 6).unwrap());
    }
    drafter.finish(0);
    assert_eq!(drafter.cache().stats().sequences, 0);
}

#[test]
fn prompt_lookup_finds_what_followed() {
    let draft = |lookup: &PromptLookup, text: &[u32], budget| {
        let mut lookup = lookup.clone();
        match lookup.draft(0, text, budget).unwrap() {
            Draft::Tree(tree) => (tree.tokens().to_vec(), tree.parents().to_vec()),
            other => panic!("{other:?}"),
        }
    };
    let default = PromptLookup::default();
    // 1 2 stands at 0 (then 3 4) and at 4 (then 5 6); the later one first.
    let text = [1, 2, 3, 4, 1, 2, 5, 6, 1, 2];
    let short = PromptLookup { length: 2, ..default.clone() };
    assert_eq!(draft(&short, &text, 9), (vec![5, 6, 3, 4], vec![-1, 0, -1, 2]));
    assert_eq!(draft(&short, &text, 3).0, [5, 6, 3]);
    let one = PromptLookup { places: 1, ..default.clone() };
    assert_eq!(draft(&one, &text, 99), (vec![5, 6, 1, 2], vec![-1, 0, 1, 2]));
    // Common beginnings are merged.
    let text = [1, 7, 8, 1, 7, 9, 1];
    assert_eq!(draft(&short, &text, 9), (vec![7, 9, 8], vec![-1, 0, 0]));
    // A run continues itself.
    assert_eq!(draft(&default, &[4, 4, 4, 4], 9).0, [4, 4, 4]);
    let any = PromptLookup { longest_match: usize::MAX, ..default.clone() };
    let whole = PromptLookup { longest_match: text.len(), ..default.clone() };
    assert_eq!(draft(&any, &text, 9), draft(&whole, &text, 9));
    for lookup in [
        PromptLookup { longest_match: 0, ..default.clone() },
        PromptLookup { shortest_match: 9, ..default.clone() },
        PromptLookup { places: 0, ..default.clone() },
        PromptLookup { length: 0, ..default.clone() },
    ] {
        assert!(draft(&lookup, &text, 9).0.is_empty());
    }
    assert!(draft(&default, &[1, 2, 3], 9).0.is_empty());
    assert!(draft(&default, &[], 9).0.is_empty());
    assert!(draft(&default, &text, 0).0.is_empty());
}

/// The cost curve decides how much of a scored tree is verified.
#[test]
fn cost_curves_limit_trees() {
    let scored = |_: usize, _: &[u32], budget: usize| -> Result<Draft, BoxError> {
        Ok(Draft::Scored(best_first_by(budget, |_| Ok(vec![(1, -0.1), (2, -2.5)]))?))
    };
    let drafted = |drafter: &mut dyn Drafter, cost: Option<&CostCurve>| {
        let mut drafter = drafter;
        let drafter = &mut drafter;
        let mut model = Transformer::new(SIZES, 21);
        let mut cache = cache();
        let options = DecodeOptions { budget: 16, cost, ..Default::default() };
        let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
        decoder.add(&[1]).unwrap();
        decoder.step(drafter).unwrap();
        decoder.generation(0).unwrap().drafted
    };
    let quick = &mut Scripted(scored);
    assert_eq!(drafted(quick, None), 16);
    let dear = CostCurve::new(&[(1, 1.0), (2, 2.0)]).unwrap();
    assert_eq!(drafted(quick, Some(&dear)), 0);
    let step = CostCurve::new(&[(1, 1.0), (5, 1.0), (6, 9.0)]).unwrap();
    assert_eq!(drafted(quick, Some(&step)), 4);
    // A node that is not worth doubling the pass is worth it if most of the time goes into the draft.
    let slow = &mut Scripted(|sequence: usize, text: &[u32], budget: usize| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        scored(sequence, text, budget)
    });
    let fast_pass = CostCurve::new(&[(1, 1e-4), (2, 2e-4)]).unwrap();
    assert!(drafted(slow, Some(&fast_pass)) > 0);
}

/// Fails in a chosen way at a chosen pass.
struct Faulty {
    model: Transformer,
    fault: Option<Fault>,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Error,
    Nan,
    NoRows,
    TooManyRows,
}

impl Target for Faulty {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary()
    }

    fn forward(
        &mut self,
        cache: &mut Cache,
        batch: &[Pass<'_>],
        logits: Option<ArrayViewMut2<'_, f32>>,
    ) -> Result<(), BoxError> {
        match self.fault {
            None => self.model.forward(cache, batch, logits),
            Some(Fault::NoRows) => Ok(()),
            Some(Fault::Error) => {
                self.model.forward(cache, batch, logits)?;
                Err("out of order".into())
            }
            Some(Fault::TooManyRows) => {
                self.model.forward(cache, batch, None)?;
                self.model.forward(cache, batch, logits)
            }
            Some(Fault::Nan) => {
                let mut logits = logits.ok_or("no logits wanted")?;
                self.model.forward(cache, batch, Some(logits.view_mut()))?;
                // The first row of the last sequence.
                let before = batch.iter().rev().skip(1).map(|pass| pass.tokens.len()).sum();
                logits.row_mut(before)[5] = f32::NAN;
                Ok(())
            }
        }
    }
}

/// An error leaves cache and text as they were, and decoding can go on.
#[test]
fn failures_leave_everything_as_it_was() {
    let want = run(&mut NoDraft, Decoding::Greedy, 0, &[&[1, 2], &[7]]);
    let mut model = Faulty { model: Transformer::new(SIZES, 21), fault: None };
    let mut cache = cache();
    let options = DecodeOptions { max_new_tokens: 120, budget: 8, ..DecodeOptions::default() };
    let faults = [Fault::Error, Fault::Nan, Fault::NoRows, Fault::TooManyRows];
    let messages = [
        "target model failed: out of order",
        "sequence 1: `logits` has NaN in row 0",
        "rows of",
        "rows of",
    ];
    let mut lookup = PromptLookup::default();
    // The decoder borrows the model: one for each stretch of the text.
    let mut texts = [vec![1, 2], vec![7]];
    for round in 0..4 {
        let mut decoder = Decoder::new(&mut model, &mut cache, options.clone()).unwrap();
        for text in &texts {
            decoder.add(text).unwrap();
        }
        for _ in 0..5 {
            decoder.step(&mut lookup).unwrap();
        }
        let state = |decoder: &Decoder<'_, Faulty>| {
            let one = |index: usize| {
                let cache_bits = bits(decoder.cache(), decoder.seq(index).unwrap());
                (decoder.generation(index).unwrap().clone(), cache_bits)
            };
            (one(0), one(1))
        };
        let before = state(&decoder);
        decoder.model_mut().fault = Some(faults[round]);
        let error = decoder.step(&mut lookup).unwrap_err().to_string();
        assert!(error.contains(messages[round]), "{error}");
        assert!(state(&decoder) == before, "{error}");
        let add = decoder.add(&[1, 2, 3]);
        assert!(add.is_err(), "a prompt went through a faulty model");
        decoder.model_mut().fault = None;
        decoder.step(&mut lookup).unwrap();
        for (index, text) in texts.iter_mut().enumerate() {
            text.extend(&decoder.generation(index).unwrap().tokens);
        }
        decoder.cache().check_invariants().unwrap();
        decoder.into_generations(&mut lookup).unwrap();
    }
    for (text, generation) in texts.iter().zip(&want) {
        let prompt = if text[0] == 1 { 2 } else { 1 };
        assert_eq!(text[prompt..], generation.tokens[..text.len() - prompt]);
    }
}

#[test]
fn bad_arguments() {
    let mut model = Transformer::new(SIZES, 21);
    let mut attempt =
        |options: DecodeOptions<'_>, storage, drafter: &mut dyn Drafter, prompt: &[u32]| {
            let mut cache = cache_with(storage, 16, Layout::Paged { pages: 8 });
            let mut drafter = drafter;
            let result = generate(&mut model, &mut cache, &mut drafter, &[&[1], prompt], options);
            cache.check_invariants().unwrap();
            assert_eq!(cache.sequences().count(), 0);
            result.unwrap_err().to_string()
        };
    let base = DecodeOptions { max_new_tokens: 9, ..DecodeOptions::default() };
    let none = &mut NoDraft;
    let f32 = Storage::F32;
    let error = attempt(DecodeOptions { max_new_tokens: 0, ..base.clone() }, f32, none, &[1]);
    assert!(error.contains("`max_new_tokens`"), "{error}");
    let error = attempt(DecodeOptions { budget: 1 << 17, ..base.clone() }, f32, none, &[1]);
    assert!(error.contains("131072"), "{error}");
    let error = attempt(DecodeOptions { eos: &[3, 61], ..base.clone() }, f32, none, &[1]);
    assert!(error.contains("`eos` has token 61"), "{error}");
    let sampling = Sampling { temperature: -1.0, ..Sampling::default() };
    let decoding = Decoding::Sampled { sampling, seed: 0 };
    let error = attempt(DecodeOptions { decoding, ..base.clone() }, f32, none, &[1]);
    assert!(error.contains("`temperature`"), "{error}");
    assert!(attempt(base.clone(), f32, none, &[]).contains("`prompt`"));
    assert!(attempt(base.clone(), f32, none, &[1, 61]).contains("`prompt` has token 61"));
    assert!(attempt(base.clone(), f32, none, &[1; 500]).contains("pages"));

    let mut chain =
        Scripted(|_: usize, _: &[u32], _: usize| Ok(Draft::Tree(TokenTree::chain(&[1; 45])?)));
    let error = attempt(base.clone(), f32, &mut chain, &[1]);
    assert!(error.contains("`draft` is 45, expected at most 16"), "{error}");
    let wide = DecodeOptions { budget: 64, max_new_tokens: 99, ..base.clone() };
    let error = attempt(wide, Storage::Int8, &mut chain, &[1]);
    assert!(error.contains("`residual` is 40, expected above 45"), "{error}");
    let mut outside =
        Scripted(|_: usize, _: &[u32], _: usize| Ok(Draft::Tree(TokenTree::chain(&[99])?)));
    assert!(attempt(base.clone(), f32, &mut outside, &[1]).contains("`draft` has token 99"));
    for (width, depth, name) in [(0, 2, "width"), (2, 0, "depth")] {
        let mut none = small_drafter(5, 1, ModelDrafts::Best { width, depth });
        let error = attempt(base.clone(), f32, &mut none, &[1]);
        assert!(error.contains(&format!("`{name}` is 0, expected at least 1")), "{error}");
    }
    let mut broken = Scripted(|_: usize, _: &[u32], _: usize| Err("no idea".into()));
    assert!(attempt(base, f32, &mut broken, &[1]).contains("drafter failed: no idea"));

    // A tree drawn elsewhere goes through the same checks.
    let mut random = Random(ChaCha8Rng::seed_from_u64(1));
    let law = |_: &[u32]| -> Result<Law, Error> { Law::from_probabilities(&[0.5, 0.5]) };
    let drawn = DrawnTree::draw(&[1, 1], Siblings::Distinct, 2, law, &mut random).unwrap();
    let generation = run(
        &mut Scripted(|_: usize, _: &[u32], _: usize| Ok(Draft::Drawn(drawn.clone()))),
        Decoding::Sampled { sampling: Sampling::default(), seed: 3 },
        2,
        &[&[1]],
    );
    assert_eq!(generation[0].tokens.len(), 120);
}
