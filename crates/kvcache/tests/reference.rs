//! Attention over the cache against the oracle, for sizes around the edges of pages and blocks.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::check_outputs;
use kvcache::{
    Cache, Config, Layout, Options, Queries, Rows, SeqId, Storage, Window, attend_reference,
};
use ndarray::{Array3, Axis, concatenate, s};
use tensor_utils::testing::{Seeded, isas};
use tensor_utils::{Element, bf16, f16};

/// A sequence of `len` random rows.
fn filled(config: &Config, len: usize, seeded: &mut Seeded) -> (Cache, SeqId) {
    let mut cache = Cache::new(config).unwrap();
    let seq = cache.create().unwrap();
    let k: Array3<f32> = seeded.normal((len, config.key_heads, config.head_size));
    let v: Array3<f32> = seeded.normal((len, config.key_heads, config.value_size));
    for layer in 0..config.layers {
        cache.append(layer, seq, k.view(), v.view()).unwrap();
    }
    (cache, seq)
}

/// Compares calls with the oracle on what the cache holds, for each type of queries and on every
/// instruction set.
fn check(
    cache: &Cache,
    seq: SeqId,
    rows: Rows<'_>,
    group: usize,
    options: &Options,
    seeded: &mut Seeded,
) {
    let config = cache.config();
    let queries = Queries { seq, rows };
    let q: Array3<f32> = seeded.normal((queries.len(), group * config.key_heads, config.head_size));
    check_queries(cache, &q, queries, options);
    check_queries(cache, &q.mapv(bf16::from_f32), queries, options);
    check_queries(cache, &q.mapv(f16::from_f32), queries, options);
}

fn check_queries<T: Element<Acc = f32>>(
    cache: &Cache,
    q: &Array3<T>,
    queries: Queries<'_>,
    options: &Options,
) {
    let Queries { seq, rows } = queries;
    let config = cache.config();
    let (k, v) = cache.read(0, seq, 0, cache.len(seq).unwrap()).unwrap();
    let (o, lse) =
        attend_reference(q.view(), k.view(), v.view(), rows, options, config.window).unwrap();
    for isa in isas() {
        let options = Options { isa: Some(isa), ..*options };
        let got = cache.attend(0, q.view(), &[queries], &options).unwrap();
        check_outputs(config, &got.o, &got.lse, &o, &lse);
    }
}

fn pool(pages: usize) -> Layout {
    Layout::Paged { pages }
}

#[test]
fn lengths_around_pages_and_blocks() {
    let seeded = &mut Seeded::new(1);
    for storage in Storage::ALL {
        for page_size in [5, 16, 64, 80] {
            for len in [1, 15, 16, 17, 63, 64, 65, 129, 200, 1025] {
                let config =
                    Config { page_size, residual: 0, layout: pool(300), ..Config::new(1, 2, 24) };
                let (cache, seq) = filled(&config.stored_as(storage), len, seeded);
                check(&cache, seq, Rows::Last(1), 3, &Options::default(), seeded);
            }
        }
    }
}

/// The last record of a pool, and each in full precision, ends its memory: nothing is read behind it, of the
/// last row alone either (a window of one row, the leaf of a flat tree).
#[test]
fn pools_that_are_full() {
    let seeded = &mut Seeded::new(7);
    let last_row = Options { window: Some(Window { size: 1, sinks: 0 }), ..Options::default() };
    for storage in Storage::ALL {
        for page_size in [1, 2, 7, 129] {
            for (d, e) in [(3, 129), (129, 3), (128, 128), (65, 200)] {
                for rows in [1_usize, 4 * page_size] {
                    let pages = rows.div_ceil(page_size);
                    let config = Config { page_size, value_size: e, ..Config::new(1, 1, d) };
                    let config = config.with_layout(pool(pages)).stored_as(storage);
                    let (cache, seq) = filled(&config, rows, seeded);
                    check(&cache, seq, Rows::Last(1), 1, &Options::default(), seeded);
                    check(&cache, seq, Rows::Last(rows.min(3)), 3, &Options::default(), seeded);
                    check(&cache, seq, Rows::Last(1), 1, &last_row, seeded);
                    let leaves = &[-1, -1][..rows.min(2)];
                    check(&cache, seq, Rows::Tree(leaves), 3, &Options::default(), seeded);
                }
            }
        }
    }
}

#[test]
fn head_sizes_and_groups() {
    let seeded = &mut Seeded::new(2);
    for storage in Storage::ALL {
        for (d, e) in [(1, 1), (3, 17), (16, 16), (80, 96), (128, 128), (192, 128), (257, 5)] {
            for group in [1, 2, 3, 4, 5, 7, 8] {
                let config = Config { value_size: e, ..Config::new(1, 1, d) };
                let (cache, seq) = filled(&config.stored_as(storage), 150, seeded);
                check(&cache, seq, Rows::Last(1), group, &Options::default(), seeded);
            }
        }
    }
}

#[test]
fn options_have_their_effect() {
    let seeded = &mut Seeded::new(3);
    let options = [
        Options { scale: Some(0.7), ..Options::default() },
        Options { scale: Some(-1.0), ..Options::default() },
        Options { softcap: Some(0.8), ..Options::default() },
        Options { window: Some(Window { size: 1, sinks: 0 }), ..Options::default() },
        Options { window: Some(Window { size: 70, sinks: 0 }), ..Options::default() },
        Options { window: Some(Window { size: 70, sinks: 5 }), ..Options::default() },
        Options { window: Some(Window { size: 5, sinks: 100 }), ..Options::default() },
        Options { window: Some(Window { size: 1000, sinks: 1 }), ..Options::default() },
    ];
    for storage in [Storage::F32, Storage::Bf16, Storage::Int8] {
        for options in &options {
            let config = Config::new(1, 2, 32).stored_as(storage);
            let (cache, seq) = filled(&config, 300, seeded);
            check(&cache, seq, Rows::Last(1), 2, options, seeded);
            if !storage.is_quantised() {
                check(&cache, seq, Rows::Last(150), 2, options, seeded);
                let parents = [-1, 0, 0, 1, 1, -1, 5, 3];
                check(&cache, seq, Rows::Tree(&parents), 2, options, seeded);
            }
        }
    }
}

/// Queries may be strided in any way.
#[test]
fn strided_queries() {
    let seeded = &mut Seeded::new(8);
    let config = Config::new(1, 2, 33).stored_as(Storage::Bf16);
    let (cache, seq) = filled(&config, 100, seeded);
    let wide = seeded.normal::<f32, _>((6, 4, 66)).mapv(bf16::from_f32);
    let strided = wide.slice(s![..;-2, .., ..;2]);
    for isa in isas() {
        let options = Options { isa: Some(isa), ..Options::default() };
        let attend = |q| cache.attend(0, q, &[Queries::last(seq, 3)], &options).unwrap();
        assert_eq!(attend(strided), attend(strided.to_owned().view()), "{isa:?}");
    }
}

/// A window may be larger than any sequence, and have as many sinks.
#[test]
fn windows_without_end() {
    let seeded = &mut Seeded::new(5);
    for (size, sinks) in [(3, usize::MAX), (usize::MAX, 2), (usize::MAX, usize::MAX)] {
        let window = Some(Window { size, sinks });
        let config = Config { page_size: 4, residual: 0, window, ..Config::new(1, 1, 8) };
        let (mut cache, seq) = filled(&config, 30, seeded);
        check(&cache, seq, Rows::Last(9), 2, &Options::default(), seeded);
        check(&cache, seq, Rows::Last(9), 2, &Options { window, ..Options::default() }, seeded);
        cache.truncate(seq, 7).unwrap();
        check(&cache, seq, Rows::Last(2), 2, &Options::default(), seeded);
        cache.check_invariants().unwrap();
    }
}

#[test]
fn many_queries_and_trees() {
    let seeded = &mut Seeded::new(4);
    for (storage, page_size) in
        [(Storage::F32, 64), (Storage::F32, 7), (Storage::Bf16, 16), (Storage::F16, 64)]
    {
        let config = Config { page_size, ..Config::new(1, 2, 20) }.stored_as(storage);
        let (cache, seq) = filled(&config, 200, seeded);
        for n in [1, 2, 7, 63, 64, 65, 100, 200] {
            check(&cache, seq, Rows::Last(n), 3, &Options::default(), seeded);
        }
        let chain: Vec<i64> = (0..100).map(|i| i - 1).collect();
        let bush: Vec<i64> =
            (0..70).map(|i| i64::from(i > 0) * (i / 3) - i64::from(i == 0)).collect();
        let bush: Vec<i64> = bush.iter().enumerate().map(|(i, &p)| p.min(i as i64 - 1)).collect();
        let forest = [-1_i64; 9];
        for parents in [&chain[..], &bush, &forest, &[]] {
            check(&cache, seq, Rows::Tree(parents), 3, &Options::default(), seeded);
        }
        let whole: Vec<i64> = (0..200).map(|i| (i - 1) / 2 - i64::from(i == 0)).collect();
        check(&cache, seq, Rows::Tree(&whole), 3, &Options::default(), seeded);
    }
}

/// Decoding row by row, ragged lengths in one batch, gives full attention at every step.
#[test]
fn incremental_decoding_is_full_attention() {
    let seeded = &mut Seeded::new(5);
    for lens in [&[8, 5, 10, 3][..], &[5, 12, 3]] {
        let config = Config { page_size: 4, ..Config::new(1, 2, 16) };
        let mut cache = Cache::new(&config).unwrap();
        let seqs: Vec<_> = lens.iter().map(|_| cache.create().unwrap()).collect();
        let draw = |seeded: &mut Seeded, heads| -> Vec<Array3<f32>> {
            lens.iter().map(|&len| seeded.normal((len, heads, 16))).collect()
        };
        let (q, k, v) = (draw(seeded, 4), draw(seeded, 2), draw(seeded, 2));
        let longest = lens.iter().copied().max().unwrap();
        for step in 0..longest {
            let live: Vec<_> = (0..lens.len()).filter(|&b| step < lens[b]).collect();
            let rows = |x: &[Array3<f32>]| {
                let rows: Vec<_> =
                    live.iter().map(|&b| x[b].slice_axis(Axis(0), (step..=step).into())).collect();
                concatenate(Axis(0), &rows).unwrap()
            };
            let live_seqs: Vec<_> = live.iter().map(|&b| seqs[b]).collect();
            let counts = vec![1; live.len()];
            cache.append_batch(0, &live_seqs, &counts, rows(&k).view(), rows(&v).view()).unwrap();
            let batch: Vec<_> = live_seqs.iter().map(|&seq| Queries::last(seq, 1)).collect();
            let options = Options::default();
            let got = cache.attend(0, rows(&q).view(), &batch, &options).unwrap();
            for (i, &b) in live.iter().enumerate() {
                let (q, k, v) = (q[b].view(), k[b].view(), v[b].view());
                let all = Rows::Last(lens[b]);
                let (o, _) = attend_reference(q, k, v, all, &options, None).unwrap();
                for ((h, c), &want) in o.index_axis(Axis(0), step).indexed_iter() {
                    assert!((f64::from(got.o[[i, h, c]]) - want).abs() < 1e-5);
                }
            }
        }
    }
}
