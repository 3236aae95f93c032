//! Decoding over the cache, for each storage, beside the oracle, and what changes the cache; ids
//! `op/storage/shape`.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvcache::{
    Cache, Config, Layout, Options, Queries, SeqId, Storage, Workspace, attend_reference,
};
use ndarray::{Array2, Array3};
use tensor_utils::testing::Seeded;

/// Query heads, key heads, head size.
const HEADS: (usize, usize, usize) = (32, 8, 128);

/// Sequences of `len` rows, or forks of one.
fn filled(storage: Storage, batch: usize, len: usize, shared: bool) -> (Cache, Vec<SeqId>) {
    let (_, key_heads, d) = HEADS;
    let pages = batch * (len + 128).div_ceil(64);
    let config =
        Config::new(1, key_heads, d).stored_as(storage).with_layout(Layout::Paged { pages });
    let mut cache = Cache::new(&config).expect("the configuration is valid");
    let mut seeded = Seeded::new(1);
    let mut seqs = Vec::new();
    for i in 0..batch {
        if shared && i > 0 {
            seqs.push(cache.fork(seqs[0]).expect("there are pages"));
            continue;
        }
        let seq = cache.create().expect("there is room");
        for start in (0..len).step_by(512) {
            let n = 512.min(len - start);
            let k: Array3<f32> = seeded.uniform((n, key_heads, d), -1.7..1.7);
            let v: Array3<f32> = seeded.uniform((n, key_heads, d), -1.7..1.7);
            cache.append(0, seq, k.view(), v.view()).expect("there are pages");
        }
        seqs.push(seq);
    }
    (cache, seqs)
}

fn decode(c: &mut Criterion) {
    let (heads, key_heads, d) = HEADS;
    let mut group = c.benchmark_group("decode");
    for storage in Storage::ALL {
        for (batch, len, shared) in [(8, 4096, false), (8, 4096, true), (1, 32768, false)] {
            let (cache, seqs) = filled(storage, batch, len, shared);
            let q: Array3<f32> = Seeded::new(2).normal((batch, heads, d));
            let queries: Vec<_> = seqs.iter().map(|&seq| Queries::last(seq, 1)).collect();
            let mut o = Array3::<f32>::zeros((batch, heads, d));
            let mut lse = Array2::<f32>::zeros((batch, heads));
            let mut workspace = Workspace::new();
            let options = Options::default();
            let mut run = || {
                let (o, lse) = (o.view_mut(), lse.view_mut());
                let result =
                    cache.attend_into(o, lse, 0, q.view(), &queries, &options, &mut workspace);
                result.expect("the call is valid");
            };
            run();
            let sequences = if shared { 1 } else { batch };
            let bytes = sequences * len * key_heads * d * 2 * storage.bits() / 8;
            group.throughput(Throughput::Bytes(bytes as u64));
            let shape = format!("{batch}x{len}{}", if shared { " shared" } else { "" });
            group.bench_function(BenchmarkId::new(storage.name(), shape), |b| b.iter(&mut run));
        }
    }
    group.finish();
}

/// The tree of a verification, and the oracle on a short sequence.
fn verify(c: &mut Criterion) {
    let (heads, _, d) = HEADS;
    let (mut cache, seqs) = filled(Storage::Bf16, 1, 4096, false);
    let parents: Vec<i64> = (0..64).map(|i| (i + 1) / 2 - 1).collect();
    let rows: Array3<f32> = Seeded::new(3).normal((64, HEADS.1, d));
    cache.append(0, seqs[0], rows.view(), rows.view()).expect("there are pages");
    let q: Array3<f32> = Seeded::new(4).normal((64, heads, d));
    let options = Options::default();
    let queries = [Queries::tree(seqs[0], &parents)];
    c.bench_function("verify/bf16/64 nodes over 4096", |b| {
        b.iter(|| cache.attend(0, q.view(), &queries, &options).expect("the call is valid"));
    });

    let (cache, seqs) = filled(Storage::F32, 1, 256, false);
    let (k, v) = cache.read(0, seqs[0], 0, 256).expect("the rows exist");
    let q: Array3<f32> = Seeded::new(5).normal((1, heads, d));
    let batch = [Queries::last(seqs[0], 1)];
    let ours = cache.attend(0, q.view(), &batch, &options).expect("the call is valid");
    let rows = batch[0].rows;
    let oracle = || attend_reference(q.view(), k.view(), v.view(), rows, &options, None);
    let (o, _) = oracle().expect("the call is valid");
    let differs = ours.o.iter().zip(&o).any(|(a, b)| (f64::from(*a) - b).abs() > 1e-5);
    assert!(!differs, "the results differ");
    c.bench_function("decode/ours/1x256", |b| {
        b.iter(|| cache.attend(0, q.view(), &batch, &options).expect("the call is valid"));
    });
    c.bench_function("decode/oracle/1x256", |b| b.iter(oracle));
}

/// A page of rows behind 4,096, and the path of five nodes that is kept of it.
fn change(c: &mut Criterion) {
    let (_, key_heads, d) = HEADS;
    let (n, len) = (64, 4096);
    let rows: Array3<f32> = Seeded::new(6).normal((n, key_heads, d));
    for storage in Storage::ALL {
        let (mut cache, seqs) = filled(storage, 1, len, false);
        let seq = seqs[0];
        let mut append = || {
            cache.append(0, seq, rows.view(), rows.view()).expect("there are pages");
            cache.truncate(seq, len).expect("rows of the last append");
        };
        let mut group = c.benchmark_group("append");
        group.throughput(Throughput::Elements((2 * n * key_heads * d) as u64));
        let id = BenchmarkId::new(storage.name(), format!("{n} after {len}"));
        group.bench_function(id, |b| b.iter(&mut append));
        group.finish();

        let mut compact = || {
            cache.append(0, seq, rows.view(), rows.view()).expect("there are pages");
            let start = Instant::now();
            cache.compact(seq, len, &[1, 4, 10, 22, 46]).expect("rows of the last append");
            let taken = start.elapsed();
            cache.truncate(seq, len).expect("rows of the last append");
            taken
        };
        let id = BenchmarkId::new(storage.name(), format!("5 of {n} after {len}"));
        c.benchmark_group("compact").bench_function(id, |b| {
            b.iter_custom(|times| (0..times).map(|_| compact()).sum::<Duration>());
        });
    }
}

criterion_group!(benches, decode, verify, change);
criterion_main!(benches);
