//! A whole language model, end to end: one transformer block with random weights, its keys and values in
//! the pages of `kvcache`, forked as the search says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use beam::{Beams, EarlyStopping, Model, ModelError, Options, Rule, beam_search};
use beam::{Hypothesis, Item, beam_search_reference};
use kvcache::{Cache, Config, Layout, Queries, SeqId};
use ndarray::{Array1, Array2, Array3, ArrayView2, Axis};
use tensor_utils::testing::Seeded;

const VOCABULARY: usize = 1000;
const WIDTH: usize = 64;
const HEADS: usize = 4;
const HEAD: usize = WIDTH / HEADS;
const PAGE: usize = 16;

/// Embedding, attention with a residual, a layer of `tanh` with a residual, and logits from the embedding.
#[derive(Clone)]
struct Weights {
    embedding: Array2<f32>,
    /// Of queries, keys, values, the output of the attention, and the layer after it.
    maps: [Array2<f32>; 5],
}

impl Weights {
    fn new(seed: u64) -> Self {
        let mut seeded = Seeded::new(seed);
        let scale = 2.0 / (WIDTH as f32).sqrt();
        let mut map = || seeded.normal::<f32, _>((WIDTH, WIDTH)) * scale;
        let maps = [map(), map(), map(), map(), map()];
        Self { embedding: seeded.normal((VOCABULARY, WIDTH)), maps }
    }

    /// A token at a position: embedding and a rotation of the position.
    fn embed(&self, token: u32, position: usize) -> Array1<f32> {
        let turn = |i: usize| (position as f32 / 50_f32.powf(i as f32 / WIDTH as f32)).sin();
        let mut x = self.embedding.row(token as usize).to_owned();
        x.iter_mut().enumerate().for_each(|(i, x)| *x += turn(i));
        x
    }

    fn map(&self, which: usize, x: &Array1<f32>) -> Array1<f32> {
        x.dot(&self.maps[which])
    }

    /// Logits of the last position from its input and the result of its attention.
    fn logits(&self, x: &Array1<f32>, attended: &Array1<f32>) -> Array1<f32> {
        let x = x + &self.map(3, attended);
        let x = &x + &self.map(4, &x).mapv(f32::tanh);
        self.embedding.dot(&x) * 0.15
    }

    /// Everything from the tokens, without a cache.
    fn after(&self, sequence: &[u32]) -> Vec<f64> {
        let inputs: Vec<_> = sequence.iter().enumerate().map(|(i, &t)| self.embed(t, i)).collect();
        let last = inputs.last().unwrap();
        let (q, mut attended) = (self.map(0, last), Array1::zeros(WIDTH));
        let [keys, values] =
            [1, 2].map(|w| inputs.iter().map(|x| self.map(w, x)).collect::<Vec<_>>());
        for head in 0..HEADS {
            let part = |x: &Array1<f32>| {
                x.slice_axis(Axis(0), ndarray::Slice::from(head * HEAD..(head + 1) * HEAD))
                    .to_owned()
            };
            let scores: Vec<_> =
                keys.iter().map(|k| part(&q).dot(&part(k)) / (HEAD as f32).sqrt()).collect();
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<_> = scores.iter().map(|s| (s - largest).exp()).collect();
            let sum: f32 = weights.iter().sum();
            for (weight, value) in weights.iter().zip(&values) {
                for i in head * HEAD..(head + 1) * HEAD {
                    attended[i] += weight / sum * value[i];
                }
            }
        }
        self.logits(last, &attended).iter().map(|&x| x.into()).collect()
    }
}

/// The same with a cache: a sequence of pages for each live beam.
struct Cached {
    weights: Weights,
    cache: Cache,
    beams: Vec<SeqId>,
    logits: Array2<f32>,
    most_pages: usize,
}

impl Cached {
    fn new(weights: &Weights, pages: usize) -> Self {
        let mut config = Config::new(1, HEADS, HEAD).with_layout(Layout::Paged { pages });
        config.page_size = PAGE;
        Self {
            weights: weights.clone(),
            cache: Cache::new(&config).unwrap(),
            beams: Vec::new(),
            logits: Array2::zeros((0, VOCABULARY)),
            most_pages: 0,
        }
    }
}

impl Model for Cached {
    type Element = f32;

    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f32>, ModelError> {
        if self.beams.is_empty() {
            for _ in 0..beams.len() {
                self.beams.push(self.cache.create()?);
            }
        }
        self.logits = Array2::zeros((beams.len(), VOCABULARY));
        let weights = &self.weights;
        for (row, &sequence) in self.beams.iter().enumerate() {
            let before = self.cache.len(sequence)?;
            let last = [beams.last_token(row)];
            let new = if beams.generated_len(row) == 0 { beams.prompt(row) } else { &last };
            let inputs: Vec<_> = new
                .iter()
                .enumerate()
                .map(|(i, &token)| weights.embed(token, before + i))
                .collect();
            let rows = |which: usize| -> Array3<f32> {
                let all: Vec<f32> = inputs.iter().flat_map(|x| weights.map(which, x)).collect();
                Array3::from_shape_vec((new.len(), HEADS, HEAD), all).unwrap()
            };
            self.cache.append(0, sequence, rows(1).view(), rows(2).view())?;
            let x = inputs.last().unwrap();
            let q = weights.map(0, x).into_shape_with_order((1, HEADS, HEAD))?;
            let batch = [Queries::last(sequence, 1)];
            let attended = self.cache.attend(0, q.view(), &batch, &kvcache::Options::default())?.o;
            let attended = attended.into_shape_with_order(WIDTH)?;
            self.logits.row_mut(row).assign(&weights.logits(x, &attended));
        }
        self.most_pages = self.most_pages.max(self.cache.stats().live);
        Ok(self.logits.view())
    }

    fn keep(&mut self, parents: &[usize]) -> Result<(), ModelError> {
        let before = std::mem::take(&mut self.beams);
        let mut inherited = vec![false; before.len()];
        for &parent in parents {
            // The first child takes the pages over, the others share them.
            let is_first = !std::mem::replace(&mut inherited[parent], true);
            let beam = if is_first { before[parent] } else { self.cache.fork(before[parent])? };
            self.beams.push(beam);
        }
        for (sequence, inherited) in before.into_iter().zip(inherited) {
            if !inherited {
                self.cache.free(sequence)?;
            }
        }
        self.cache.check_invariants()?;
        Ok(())
    }
}

fn tokens(found: &[Hypothesis]) -> Vec<Vec<u32>> {
    found.iter().map(|hypothesis| hypothesis.tokens.clone()).collect()
}

fn check(weights: &Weights, options: &Options<'_>, prompts: &[Vec<u32>]) {
    let mut model = Cached::new(weights, 400);
    let together = beam_search(&mut model, prompts, options).unwrap().items;
    assert_eq!(model.cache.stats().live, 0, "no page is left behind");
    for (prompt, item) in prompts.iter().zip(&together) {
        let alone: Item = beam_search(&mut model, &[prompt], options).unwrap().items.remove(0);
        assert_eq!(&alone, item, "the same bits alone");
        // The other oracle computes each beam from its tokens, without a cache.
        let next = |sequence: &[u32]| Ok(weights.after(sequence));
        let wanted = beam_search_reference(next, VOCABULARY, prompt, options).unwrap();
        assert_eq!(tokens(&item.hypotheses), tokens(&wanted));
        for (got, wanted) in item.hypotheses.iter().zip(&wanted) {
            assert!((got.logprob - wanted.logprob).abs() < 1e-3, "{got:?} {wanted:?}");
        }
    }
}

#[test]
fn a_transformer_with_forked_pages() {
    let weights = Weights::new(7);
    let eos: Vec<u32> = (0..150).collect();
    let prompts = [vec![3, 500, 20], vec![999], (100..137).collect()];
    for rule in [
        Rule::Pool,
        Rule::Transformers { early_stopping: EarlyStopping::Heuristic },
        Rule::Patience { patience: 1.0 },
    ] {
        let options = Options {
            num_beams: 4,
            eos: &eos[..20],
            max_new_tokens: 10,
            rule,
            ..Options::default()
        };
        check(&weights, &options, &prompts);
    }
}

/// K beams over a prompt of 2048 tokens share its pages: under 1 + K/8 times those of one sequence.
#[test]
fn beams_share_the_pages_of_the_prompt() {
    let weights = Weights::new(8);
    let prompt: Vec<u32> = (0..2048).map(|i| (i * 7 % 1000) as u32).collect();
    let pages = |num_beams: usize| {
        let mut model = Cached::new(&weights, 2000);
        let options = Options { num_beams, max_new_tokens: 32, ..Options::default() };
        let found = beam_search(&mut model, &[&prompt], &options).unwrap();
        assert_eq!(found.items[0].hypotheses.len(), num_beams);
        model.most_pages
    };
    let one = pages(1);
    assert_eq!(one, (2048 + 31_usize).div_ceil(PAGE));
    for beams in [2, 4, 8] {
        let most = pages(beams);
        println!("{beams} beams: {most} pages, {:.3} times those of one", most as f64 / one as f64);
        assert!(most as f64 <= one as f64 * (1.0 + beams as f64 / 8.0));
    }
}
