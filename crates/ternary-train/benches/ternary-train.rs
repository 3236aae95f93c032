//! Speed of single operations; ids are `operation/implementation/shape`.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ternary_train::{Preset, Projection, Rule, Weights};

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

criterion_group!(benches, projection);
criterion_main!(benches);
