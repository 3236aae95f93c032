//! Bookkeeping of a verification: `<what>/<case>`.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use dflash::{TokenTree, accept_greedy, argmax, best_first};
use ndarray::{Array1, Array2};
use tensor_utils::testing::Seeded;

const VOCABULARY: usize = 50257;

fn bookkeeping(c: &mut Criterion) {
    let row: Array1<f32> = Seeded::new(1).normal(VOCABULARY);
    c.bench_function("argmax/50257", |bencher| bencher.iter(|| argmax(black_box(row.view()), 0)));

    let binary: Vec<i64> = (0..64).map(|node| if node < 2 { -1 } else { node / 2 - 1 }).collect();
    let chain: Vec<i64> = (-1..63).collect();
    for (name, parents) in [("binary", &binary), ("chain", &chain)] {
        let tokens: Vec<u32> = (0..64).collect();
        c.bench_function(&format!("tree/{name}"), |bencher| {
            bencher.iter(|| {
                let tree = TokenTree::new(black_box(&tokens), parents).expect("a tree");
                (tree.ancestors().expect("a tree"), tree.positions(4095), tree)
            });
        });
        // Everything that can be accepted is: the longest walk.
        let tree = TokenTree::new(&tokens, parents).expect("a tree");
        let mut logits: Array2<f32> = Seeded::new(2).normal((tree.rows(), VOCABULARY));
        for node in 0..tree.len() {
            logits[[(parents[node] + 1) as usize, tokens[node] as usize]] = 100.0 + node as f32;
        }
        c.bench_function(&format!("accept/{name}"), |bencher| {
            bencher.iter(|| accept_greedy(&tree, black_box(logits.view())).expect("logits fit"));
        });
    }
    let log_probabilities: Array2<f32> = Seeded::new(3).uniform((16, VOCABULARY), -20.0..-1.0);
    c.bench_function("best_first/64", |bencher| {
        bencher.iter(|| best_first(black_box(log_probabilities.view()), 64).expect("a tree"));
    });
}

criterion_group!(benches, bookkeeping);
criterion_main!(benches);
