//! The tiled forward pass beside the naive algorithm: `forward/<impl>/<shape>`.

use std::hint::black_box;

use attn_flash::{Options, Tiling, Workspace, attention_into, attention_naive};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::{Array3, Array4};
use tensor_utils::testing::Seeded;
use tensor_utils::{Element, Isa, bf16};

/// `[B, H, N, D]` of queries, keys and values, and whether causal.
struct Shape {
    dim: (usize, usize, usize, usize),
    causal: bool,
}

fn forward(c: &mut Criterion) {
    for shape in [
        Shape { dim: (1, 2, 256, 64), causal: true },
        Shape { dim: (2, 8, 1024, 64), causal: false },
        Shape { dim: (2, 8, 1024, 64), causal: true },
        Shape { dim: (1, 16, 1024, 128), causal: true },
    ] {
        bench_shape::<f32>(c, &shape);
    }
    bench_shape::<bf16>(c, &Shape { dim: (2, 8, 1024, 64), causal: true });
}

fn bench_shape<T: Element>(c: &mut Criterion, shape: &Shape) {
    let (b, h, n, d) = shape.dim;
    let mut seeded = Seeded::new(1);
    let [q, k, v]: [Array4<T>; 3] = std::array::from_fn(|_| seeded.normal(shape.dim));
    let options = Options { causal: shape.causal, ..Options::default() };
    let mask = if shape.causal { "causal" } else { "full" };
    let label = format!("{}_{b}x{h}x{n}x{d}_{mask}", T::NAME);
    let pairs = if shape.causal { n * (n + 1) / 2 } else { n * n };

    let mut group = c.benchmark_group("forward");
    group.sample_size(10);
    group.throughput(Throughput::Elements((4 * b * h * pairs * d) as u64));
    let mut o = Array4::<T>::default(shape.dim);
    let mut lse = Array3::default((b, h, n));
    let naive = n <= 256;
    let expected = naive.then(|| attention_naive(q.view(), k.view(), v.view(), &options));

    for isa in Isa::available() {
        let tiling = Tiling { isa: Some(isa), ..Tiling::default() };
        let mut workspace = Workspace::new(d, d, &tiling).expect("the tiling is valid");
        let mut run = || {
            let (o, lse) = (o.view_mut(), lse.view_mut());
            let (q, k, v) = (q.view(), k.view(), v.view());
            attention_into(o, lse, q, k, v, &options, &mut workspace).expect("shapes fit");
        };
        run();
        group
            .bench_function(BenchmarkId::new(isa.name(), &label), |bencher| bencher.iter(&mut run));
        if let Some(expected) = &expected {
            let expected = expected.as_ref().expect("shapes fit");
            for (got, want) in o.iter().zip(&expected.o) {
                let error = (got.to_f64() - want.to_f64()).abs();
                assert!(error < 1e-2, "{isa} and the naive algorithm disagree by {error}");
            }
        }
    }
    if naive {
        group.bench_function(BenchmarkId::new("naive", &label), |bencher| {
            bencher.iter(|| black_box(attention_naive(q.view(), k.view(), v.view(), &options)));
        });
    }
    group.finish();
}

criterion_group!(benches, forward);
criterion_main!(benches);
