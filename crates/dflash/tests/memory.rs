//! Memory beyond the logits of a pass does not grow with the vocabulary, nor with the cache. One test,
//! so that no other allocates meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use dflash::{
    BoxError, DecodeOptions, Decoder, Draft, NoDraft, Pass, Scripted, Target, TokenTree,
    accept_greedy, best_first,
};
use kvcache::{Cache, Config, Layout};
use ndarray::{Array2, Array3, ArrayViewMut2};
use tensor_utils::testing::PeakAlloc;

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

/// Appends rows of ones and wants token 1 after everything.
struct Ones(usize);

impl Target for Ones {
    fn vocabulary(&self) -> usize {
        self.0
    }

    fn forward(
        &mut self,
        cache: &mut Cache,
        batch: &[Pass<'_>],
        logits: Option<ArrayViewMut2<'_, f32>>,
    ) -> Result<(), BoxError> {
        for pass in batch {
            let rows = Array3::<f32>::ones((pass.tokens.len(), 1, 1));
            cache.append(0, pass.seq, rows.view(), rows.view())?;
        }
        if let Some(mut logits) = logits {
            logits.column_mut(1).fill(1.0);
        }
        Ok(())
    }
}

/// Peak of one step with a tree of `nodes` nodes, a chain that is accepted whole.
fn peak(vocabulary: usize, nodes: usize, prompt: usize) -> usize {
    let config = Config::new(1, 1, 1).with_layout(Layout::Paged { pages: 200 });
    let mut cache = Cache::new(&config).unwrap();
    let mut model = Ones(vocabulary);
    let options = DecodeOptions { max_new_tokens: 1000, budget: nodes, ..DecodeOptions::default() };
    let mut decoder = Decoder::new(&mut model, &mut cache, options).unwrap();
    decoder.add(&vec![1; prompt]).unwrap();
    let mut drafter = Scripted(|_: usize, _: &[u32], budget: usize| {
        Ok(Draft::Tree(TokenTree::chain(&vec![1; budget])?))
    });
    decoder.step(&mut drafter).unwrap();
    ALLOC.reset_peak();
    decoder.step(&mut drafter).unwrap();
    let peak = ALLOC.peak_above_baseline();
    assert_eq!(decoder.generation(0).unwrap().accepted, 2 * nodes);
    peak
}

/// What a decoder still has of 1000 sequences that came and went, one of them unfinished.
fn left_of_released() -> usize {
    let mut cache = Cache::new(&Config::new(1, 1, 1)).unwrap();
    let mut model = Ones(10);
    let mut decoder = Decoder::new(&mut model, &mut cache, DecodeOptions::default()).unwrap();
    let mut come_and_go = |times: usize| {
        for _ in 0..times {
            let index = decoder.add(&[1; 20]).unwrap();
            decoder.step(&mut NoDraft).unwrap();
            assert_eq!(decoder.release(index, &mut NoDraft).unwrap().unwrap().tokens, [1]);
        }
    };
    come_and_go(10);
    ALLOC.reset_peak();
    let before = ALLOC.bytes_in_use();
    come_and_go(1000);
    ALLOC.bytes_in_use().saturating_sub(before)
}

#[test]
fn memory() {
    let left = left_of_released();
    assert!(left < 1024, "{left} bytes");

    // The documented formula: 4 bytes a logit, and at most 300 bytes a row for the rest.
    for (vocabulary, nodes) in [(50_257, 63), (1000, 63), (1000, 255), (50_257, 0)] {
        let rows = nodes + 1;
        let (logits, rest) = (4 * rows * vocabulary, 300 * rows + 4096);
        for prompt in [10, 4000] {
            let peak = peak(vocabulary, nodes, prompt);
            println!(
                "V {vocabulary}, {nodes} nodes, prompt {prompt}: {peak} bytes, logits {logits}"
            );
            assert!(peak >= logits && peak <= logits + rest, "{peak} bytes, logits {logits}");
        }
    }

    // A deep tree: no copies of paths, which would be 512 MiB.
    let nodes = 1 << 14;
    let certain = Array2::<f32>::zeros((nodes, 1));
    ALLOC.reset_peak();
    assert_eq!(best_first(certain.view(), nodes).unwrap().tree.max_depth(), nodes);
    let peak = ALLOC.peak_above_baseline();
    assert!(peak < 400 * nodes, "{peak} bytes");

    // Acceptance alone: the path, no copy of a row.
    let tree = TokenTree::chain(&[1; 63]).unwrap();
    let mut logits = Array2::<f32>::zeros((64, 50_257));
    logits.column_mut(1).fill(1.0);
    ALLOC.reset_peak();
    let accepted = accept_greedy(&tree, logits.view()).unwrap();
    assert!(ALLOC.peak_above_baseline() < 2048);
    assert_eq!(accepted.nodes.len(), 63);
}
