//! The norm and its gradients beside the naive algorithm: `forward/<impl>/<shape>` and
//! `backward/<impl>/<shape>`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use layernorm_bwd::{
    GradientsMut, Options, Saved, StatisticsMut, Tiling, Workspace, layer_norm_backward_into,
    layer_norm_backward_naive, layer_norm_into, layer_norm_naive,
};
use ndarray::{Array1, Array2, ArrayRef, Dimension};
use tensor_utils::testing::Seeded;
use tensor_utils::{Element, Isa, bf16};

/// Rows and their length.
const SHAPES: [(usize, usize); 4] = [(256, 1024), (4096, 768), (8192, 1024), (4096, 4096)];
/// Rows up to which the naive algorithm is timed too.
const NAIVE: usize = 256;

fn forward(c: &mut Criterion) {
    bench_forward::<f32>(c, SHAPES[0]);
    bench_forward::<bf16>(c, SHAPES[0]);
    for shape in &SHAPES[1..] {
        bench_forward::<f32>(c, *shape);
    }
}

fn backward(c: &mut Criterion) {
    bench_backward::<f32>(c, SHAPES[0]);
    bench_backward::<bf16>(c, SHAPES[0]);
    for shape in &SHAPES[1..] {
        bench_backward::<f32>(c, *shape);
    }
}

fn bench_forward<T: Element>(c: &mut Criterion, shape: (usize, usize)) {
    let (rows, d) = shape;
    let mut seeded = Seeded::new(1);
    let x: Array2<T> = seeded.normal(shape);
    let (gamma, beta): (Array1<T::Acc>, _) = (seeded.normal(d), seeded.normal(d));
    let options =
        Options { gamma: Some(gamma.view()), beta: Some(beta.view()), ..Options::default() };
    let label = format!("{}_{rows}x{d}", T::NAME);
    let mut group = c.benchmark_group("forward");
    group.throughput(Throughput::Bytes((2 * rows * d * size_of::<T>()) as u64));
    let mut y = Array2::<T>::default(shape);
    let (mut mean, mut rstd) = (Array1::default(rows), Array1::default(rows));
    let naive = layer_norm_naive(x.view(), &options).expect("shapes fit").y;
    for isa in Isa::available() {
        let mut workspace =
            Workspace::new(rows, d, &Tiling { isa: Some(isa) }).expect("it is available");
        let mut run = || {
            let statistics = StatisticsMut { mean: mean.view_mut(), rstd: rstd.view_mut() };
            layer_norm_into(y.view_mut(), Some(statistics), x.view(), &options, &mut workspace)
                .expect("shapes fit");
        };
        run();
        group
            .bench_function(BenchmarkId::new(isa.name(), &label), |bencher| bencher.iter(&mut run));
        assert_agree(&y, &naive, isa);
    }
    if rows <= NAIVE {
        group.bench_function(BenchmarkId::new("naive", &label), |bencher| {
            bencher.iter(|| black_box(layer_norm_naive(x.view(), &options)));
        });
    }
    group.finish();
}

fn bench_backward<T: Element>(c: &mut Criterion, shape: (usize, usize)) {
    let (rows, d) = shape;
    let mut seeded = Seeded::new(1);
    let (x, dy): (Array2<T>, Array2<T>) = (seeded.normal(shape), seeded.normal(shape));
    let gamma: Array1<T::Acc> = seeded.normal(d);
    let options = Options { gamma: Some(gamma.view()), ..Options::default() };
    let forward = layernorm_bwd::layer_norm(x.view(), &options).expect("shapes fit");
    let label = format!("{}_{rows}x{d}", T::NAME);
    let mut group = c.benchmark_group("backward");
    group.throughput(Throughput::Bytes((3 * rows * d * size_of::<T>()) as u64));
    let mut dx = Array2::<T>::default(shape);
    let mut dgamma = Array1::<T::Acc>::default(d);
    let mut dbeta = Array1::<T::Acc>::default(d);
    let naive = layer_norm_backward_naive(dy.view(), x.view(), &options).expect("shapes fit");
    for isa in Isa::available() {
        let mut workspace =
            Workspace::new(rows, d, &Tiling { isa: Some(isa) }).expect("it is available");
        let mut run = || {
            let gradients = GradientsMut {
                dx: Some(dx.view_mut()),
                dgamma: Some(dgamma.view_mut()),
                dbeta: Some(dbeta.view_mut()),
                ..GradientsMut::default()
            };
            let (mean, rstd) = (forward.mean.view(), forward.rstd.view());
            let saved = Saved::Statistics { x: x.view(), mean, rstd };
            layer_norm_backward_into(gradients, dy.view(), saved, &options, &mut workspace)
                .expect("shapes fit");
        };
        run();
        group
            .bench_function(BenchmarkId::new(isa.name(), &label), |bencher| bencher.iter(&mut run));
        assert_agree(&dx, &naive.dx, isa);
        assert_agree(&dgamma, &naive.dgamma, isa);
        assert_agree(&dbeta, &naive.dbeta, isa);
    }
    if rows <= NAIVE {
        group.bench_function(BenchmarkId::new("naive", &label), |bencher| {
            bencher.iter(|| {
                black_box(layer_norm_backward_naive::<T, T::Acc>(dy.view(), x.view(), &options))
            });
        });
    }
    group.finish();
}

/// Both are right to some roundings; in sums over the rows those of the naive algorithm add up.
fn assert_agree<T: Element, D: Dimension>(got: &ArrayRef<T, D>, want: &ArrayRef<T, D>, isa: Isa) {
    for (got, want) in got.iter().zip(want) {
        let error = (got.to_f64() - want.to_f64()).abs();
        assert!(error < 4e-2, "{isa} and the naive algorithm disagree by {error}");
    }
}

criterion_group!(benches, forward, backward);
criterion_main!(benches);
