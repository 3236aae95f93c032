//! Speed of single operations; ids are `operation/implementation/shape`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use tensor_utils::Isa;
use ternary_train::{
    Activations, PackedMatrix, Preset, Projection, Rule, Ternary, Tiling, Weights,
};

fn projection(c: &mut Criterion) {
    let config = Preset::PathB.config(256);
    let weights = Weights::random(&config, 1).expect("the preset is valid");
    let w = &weights.layers[0].gate;
    let mut out = w.clone();
    let mut group = c.benchmark_group("projection");
    group.throughput(Throughput::Elements(w.len() as u64));
    for rule in Rule::ALL {
        let projection = Projection { rule, ..Projection::default() };
        group.bench_function(format!("{}/1536x512", rule.name()), |b| {
            b.iter(|| projection.project_into(&mut out, w).expect("the weights are finite"));
        });
    }
}

/// Packed products on each instruction set. The matrix is in the third-level cache: `ternary-train bench`
/// measures against the memory.
fn product(c: &mut Criterion) {
    const SHAPE: (usize, usize) = (4096, 14336);
    let packed = PackedMatrix::new(&Ternary {
        codes: Array2::from_shape_fn(SHAPE, |(i, j)| ((i * 7 + j * 3) % 3) as i8 - 1),
        scales: Array2::from_elem((SHAPE.0, SHAPE.1 / 128), 0.03125),
        group: 128,
    })
    .expect("the codes are ternary");
    let mut group = c.benchmark_group("product");
    group.sample_size(10);
    for tokens in [1, 8, 64, 512] {
        let x = Array2::from_shape_fn((tokens, SHAPE.1), |(t, j)| ((t * 31 + j) % 255) as f32);
        let x = Activations::new(&x, 128).expect("there is memory");
        let mut y = Array2::zeros((tokens, SHAPE.0));
        group.throughput(Throughput::Elements((2 * tokens * SHAPE.0 * SHAPE.1) as u64));
        for isa in Isa::available() {
            let tiling = Tiling { isa: Some(isa) };
            let id = BenchmarkId::new(isa.to_string(), format!("{tokens}x4096x14336"));
            group.bench_function(id, |b| {
                b.iter(|| packed.product_into(y.view_mut(), &x, &tiling).expect("the shapes fit"));
            });
        }
    }
}

criterion_group!(benches, projection, product);
criterion_main!(benches);
