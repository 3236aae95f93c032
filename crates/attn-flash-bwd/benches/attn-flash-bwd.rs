//! The tiled backward pass, both ways to delta, beside the naive algorithm:
//! `backward/<impl>/<shape>`.

use std::hint::black_box;

use attn_flash::{Options, attention};
use attn_flash_bwd::{
    GradientsMut, Inputs, Strategy, Tiling, Workspace, attention_backward_into,
    attention_backward_naive,
};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array4;
use tensor_utils::testing::Seeded;
use tensor_utils::{Element, Isa, bf16};

/// `[B, H, N, D]` of queries, keys and values, and whether causal.
struct Shape {
    dim: (usize, usize, usize, usize),
    causal: bool,
}

fn backward(c: &mut Criterion) {
    for shape in [
        Shape { dim: (1, 2, 256, 64), causal: true },
        Shape { dim: (2, 8, 1024, 64), causal: false },
        Shape { dim: (2, 8, 1024, 64), causal: true },
        Shape { dim: (1, 16, 1024, 128), causal: true },
        Shape { dim: (1, 1, 4096, 64), causal: true },
    ] {
        bench_shape::<f32>(c, &shape);
    }
    bench_shape::<bf16>(c, &Shape { dim: (2, 8, 1024, 64), causal: true });
}

fn bench_shape<T: Element>(c: &mut Criterion, shape: &Shape) {
    let (b, h, n, d) = shape.dim;
    let mut seeded = Seeded::new(1);
    let [q, k, v, d_o]: [Array4<T>; 4] = std::array::from_fn(|_| seeded.normal(shape.dim));
    let options = Options { causal: shape.causal, ..Options::default() };
    let forward = attention(q.view(), k.view(), v.view(), &options).expect("shapes fit");
    let inputs = Inputs {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        o: forward.o.view(),
        lse: forward.lse.view(),
        d_o: d_o.view(),
        d_lse: None,
    };
    let mask = if shape.causal { "causal" } else { "full" };
    let label = format!("{}_{b}x{h}x{n}x{d}_{mask}", T::NAME);
    let pairs = if shape.causal { n * (n + 1) / 2 } else { n * n };

    let mut group = c.benchmark_group("backward");
    group.sample_size(10);
    group.throughput(Throughput::Elements((10 * b * h * pairs * d) as u64));
    let naive = n <= 256;
    let expected = naive.then(|| attention_backward_naive(&inputs, &options).expect("shapes fit"));
    let [mut dq, mut dk, mut dv] = std::array::from_fn(|_| Array4::<T>::default(shape.dim));

    for isa in Isa::available() {
        for (strategy, suffix) in [(Strategy::SavedOutput, ""), (Strategy::TwoPass, "-two-pass")] {
            let tiling = Tiling { strategy, isa: Some(isa), ..Tiling::default() };
            let mut workspace = Workspace::new(&inputs, &tiling).expect("the tiling is valid");
            let mut run = || {
                let gradients = GradientsMut {
                    dq: dq.view_mut(),
                    dk: dk.view_mut(),
                    dv: dv.view_mut(),
                    delta: None,
                    dbias: None,
                    dsinks: None,
                };
                attention_backward_into(gradients, &inputs, &options, &mut workspace)
                    .expect("shapes fit");
            };
            run();
            let id = BenchmarkId::new(format!("{isa}{suffix}"), &label);
            group.bench_function(id, |bencher| bencher.iter(&mut run));
            if let Some(expected) = &expected {
                let got = dq.iter().chain(&dk).chain(&dv);
                let want = expected.dq.iter().chain(&expected.dk).chain(&expected.dv);
                for (got, want) in got.zip(want) {
                    let error = (got.to_f64() - want.to_f64()).abs();
                    assert!(error < 1e-2, "{isa} and the naive algorithm disagree by {error}");
                }
            }
        }
    }
    if naive {
        group.bench_function(BenchmarkId::new("naive", &label), |bencher| {
            bencher.iter(|| black_box(attention_backward_naive(&inputs, &options)));
        });
    }
    group.finish();
}

criterion_group!(benches, backward);
criterion_main!(benches);
