//! Memory of a step beyond the model's, as documented. One test, so that no other allocates meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use beam::{Beams, EarlyStopping, Model, ModelError, Options, Rule, Search};
use ndarray::{Array2, ArrayView2, s};
use tensor_utils::testing::{PeakAlloc, Seeded};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

/// Says the same after everything, without allocating.
struct Same(Array2<f32>);

impl Model for Same {
    type Element = f32;

    fn vocabulary(&self) -> usize {
        self.0.ncols()
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f32>, ModelError> {
        Ok(self.0.slice(s![..beams.len(), ..]))
    }
}

/// Peak of the fourth step, when all beams live.
fn peak(prompts: usize, beams: usize, vocabulary: usize, rule: Rule) -> usize {
    let options = Options { num_beams: beams, eos: &[0], rule, ..Options::default() };
    let mut logits = Seeded::new(1).normal::<f32, _>((prompts * beams, vocabulary));
    logits.column_mut(0).fill(-30.0);
    let mut model = Same(logits);
    let mut search = Search::new(&vec![[1]; prompts], vocabulary, &options).unwrap();
    for _ in 0..3 {
        assert!(search.step(&mut model).unwrap());
    }
    ALLOC.reset_peak();
    assert!(search.step(&mut model).unwrap());
    ALLOC.peak_above_baseline()
}

#[test]
fn memory() {
    let rules = [
        (Rule::Pool, 128),
        (Rule::Transformers { early_stopping: EarlyStopping::Never }, 40),
        (Rule::Patience { patience: 1.0 }, 40),
    ];
    for (rule, bytes_of_candidate) in rules {
        for (prompts, beams, vocabulary) in
            [(1, 32, 50_257), (1, 64, 2000), (8, 16, 2000), (32, 8, 2000), (1, 1, 200_000)]
        {
            // One end token: each beam offers 2 K.
            let offered = prompts * beams * 2 * beams;
            let candidates = 2 * beams * beams;
            let larger = ((4 + size_of::<f32>()) * offered).max(bytes_of_candidate * candidates);
            let formula = 16 * offered + larger;
            let threads = rayon::current_num_threads().min(prompts * beams);
            let workspace = threads * size_of::<f32>() * vocabulary / 8;
            let rest = 300 * prompts * beams + (16 << 10) + workspace;
            let peak = peak(prompts, beams, vocabulary, rule);
            println!("{rule:?}, B {prompts}, K {beams}, V {vocabulary}: {peak} of {formula}");
            assert!(peak >= formula && peak <= formula + rest, "{peak} bytes, not {formula}");
        }
    }
}
