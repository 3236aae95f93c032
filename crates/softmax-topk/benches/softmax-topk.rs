//! Softmax and top-k in one and in two passes beside the naive softmax and sort:
//! `softmax_topk/<impl>/<shape>`; and what options add.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use softmax_topk::{
    Logit, Mask, Options, Passes, PerRow, Tiling, TopK, Workspace, softmax_topk, softmax_topk_into,
    softmax_topk_naive,
};
use tensor_utils::testing::Seeded;
use tensor_utils::{Isa, bf16};

/// Rows, tokens and k.
const SHAPES: [(usize, usize, usize); 6] = [
    (64, 1000, 8),
    (64, 50257, 50),
    (64, 50257, 256),
    (1, 151_936, 50),
    (64, 151_936, 50),
    (16, 1_000_000, 50),
];
/// Logits up to which the naive algorithm is timed too.
const NAIVE: usize = 4_000_000;

fn forward(c: &mut Criterion) {
    for shape in SHAPES {
        bench::<f32>(c, shape);
    }
    bench::<bf16>(c, SHAPES[1]);
}

fn bench<T: Logit>(c: &mut Criterion, shape: (usize, usize, usize)) {
    let (rows, vocabulary, k) = shape;
    let logits: Array2<T> = Seeded::new(1).normal((rows, vocabulary));
    let options = Options::default();
    let label = format!("{}_{rows}x{vocabulary}_k{k}", T::NAME);
    let mut group = c.benchmark_group("softmax_topk");
    group.throughput(Throughput::Bytes((logits.len() * size_of::<T>()) as u64));
    let mut top: TopK<T::Acc> = softmax_topk(logits.view(), k, &options).expect("k fits");
    let expected = top.indices.clone();
    for isa in Isa::available() {
        for passes in [Passes::One, Passes::Two] {
            let tiling = Tiling { isa: Some(isa), passes };
            let mut workspace =
                Workspace::new(rows, vocabulary, k, &tiling).expect("it is available");
            let mut run = || {
                softmax_topk_into(top.view_mut(), logits.view(), &options, &mut workspace)
                    .expect("shapes fit");
            };
            let id = BenchmarkId::new(format!("{}_{passes:?}", isa.name()), &label);
            group.bench_function(id, |bencher| bencher.iter(&mut run));
            assert_eq!(top.indices, expected, "{isa} {passes:?}");
        }
    }
    if logits.len() <= NAIVE {
        let run = || softmax_topk_naive(logits.view(), k, &options).expect("k fits");
        assert_eq!(run().indices, expected, "naive");
        group.bench_function(BenchmarkId::new("naive", &label), |bencher| bencher.iter(run));
    }
    group.finish();
}

/// What options add to a call: `softmax_topk_options/<option>`.
fn options(c: &mut Criterion) {
    const SHAPE: (usize, usize) = (16, 50257);
    let (rows, vocabulary) = SHAPE;
    let mut random = Seeded::new(2);
    let logits: Array2<f32> = random.normal(SHAPE);
    let bias: Array2<f32> = random.normal((1, vocabulary));
    let words = Array2::from_elem((1, vocabulary.div_ceil(32)), u32::MAX >> 1);
    let tokens = Array2::from_shape_fn((rows, 4), |(row, i)| (row * 4 + i) as u32 * 700);
    let options: [(&str, Options<'_, f32>); 6] = [
        ("none", Options::default()),
        ("temperature", Options { temperature: PerRow::All(0.7), ..Options::default() }),
        ("bias", Options { bias: Some(bias.view()), ..Options::default() }),
        ("mask", Options { mask: Some(Mask::U32(words.view())), ..Options::default() }),
        ("tokens", Options { tokens: Some(tokens.view()), ..Options::default() }),
        ("top_p", Options { top_p: PerRow::All(0.9), ..Options::default() }),
    ];
    let mut group = c.benchmark_group("softmax_topk_options");
    let mut workspace =
        Workspace::new(rows, vocabulary, 50, &Tiling::default()).expect("it fits memory");
    for (name, options) in &options {
        let mut top = softmax_topk(logits.view(), 50, options).expect("k fits");
        group.bench_function(*name, |bencher| {
            bencher.iter(|| {
                softmax_topk_into(top.view_mut(), logits.view(), options, &mut workspace)
                    .expect("shapes fit");
            });
        });
    }
    group.finish();
}

criterion_group!(benches, forward, options);
criterion_main!(benches);
