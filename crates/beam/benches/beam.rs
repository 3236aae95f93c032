//! A search outside the model: `search/<rule>/<shape>`. The model's logits are there already.

use std::hint::black_box;

use beam::{
    Beams, EarlyStopping, Model, ModelError, Options, Rule, beam_search, beam_search_reference,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::{Array2, ArrayView2, Axis};
use tensor_utils::testing::Seeded;

/// Prompts, beams, tokens, steps.
const SHAPES: [(usize, usize, usize, usize); 3] =
    [(16, 8, 50257, 4), (1, 4, 50257, 16), (1, 64, 32000, 4)];
/// Beams and tokens up to which the reference is timed too.
const REFERENCE: usize = 4 * 1000;

const RULES: [(&str, Rule); 3] = [
    ("pool", Rule::Pool),
    ("transformers", Rule::Transformers { early_stopping: EarlyStopping::Heuristic }),
    ("patience", Rule::Patience { patience: 1.0 }),
];

/// Has the same logits for every step; a row each.
struct Still {
    logits: Array2<f32>,
}

impl Model for Still {
    type Element = f32;

    fn vocabulary(&self) -> usize {
        self.logits.ncols()
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, f32>, ModelError> {
        Ok(self.logits.view().split_at(Axis(0), beams.len()).0)
    }
}

fn search(c: &mut Criterion) {
    let mut group = c.benchmark_group("search");
    for (prompts, beams, vocabulary, steps) in SHAPES.into_iter().chain([(1, 4, 1000, 8)]) {
        let label = format!("f32_b{prompts}_k{beams}_v{vocabulary}_t{steps}");
        let logits: Array2<f32> = Seeded::new(1).normal((prompts * beams, vocabulary));
        let mut model = Still { logits };
        let options = |rule| Options {
            rule,
            num_beams: beams,
            eos: &[0],
            max_new_tokens: steps,
            exact_stop: false,
            ..Options::default()
        };
        let tokens: Vec<_> = (0..prompts).map(|prompt| [prompt as u32]).collect();
        let rows = prompts * (1 + beams * (steps - 1));
        group.throughput(Throughput::Bytes((rows * vocabulary * size_of::<f32>()) as u64));
        for (name, rule) in RULES {
            let options = options(rule);
            group.bench_function(BenchmarkId::new(name, &label), |bencher| {
                bencher.iter(|| black_box(beam_search(&mut model, &tokens, &options)));
            });
        }
        if beams * vocabulary <= REFERENCE {
            let options = options(Rule::default());
            let row = model.logits.row(0).mapv(f64::from).to_vec();
            group.bench_function(BenchmarkId::new("reference", &label), |bencher| {
                let mut next = |_: &[u32]| Ok(row.clone());
                bencher.iter(|| beam_search_reference(&mut next, vocabulary, &[0], &options));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, search);
criterion_main!(benches);
