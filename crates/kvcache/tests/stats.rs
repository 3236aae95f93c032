//! What a cache says of itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kvcache::{Cache, Config, Layout, SeqId, Stats, Storage};
use ndarray::Array3;

fn append(cache: &mut Cache, seq: SeqId, rows: usize) {
    let x = Array3::<f32>::ones((rows, 1, 8));
    cache.append(0, seq, x.view(), x.view()).unwrap();
}

#[test]
fn counts_follow_the_sequences() {
    let pages = Layout::Paged { pages: 8 };
    let config = Config { page_size: 4, ..Config::new(1, 1, 8) }.with_layout(pages);
    let mut cache = Cache::new(&config.stored_as(Storage::F32)).unwrap();
    let bytes = cache.stats().bytes;
    assert!(bytes >= 8 * 4 * 2 * 8 * 4, "{bytes}");
    let empty = Stats { pages: 8, free: 8, bytes, ..Stats::default() };
    assert_eq!(cache.stats(), empty);

    let a = cache.create().unwrap();
    append(&mut cache, a, 10);
    let one = Stats { free: 5, live: 3, sequences: 1, rows: 10, wasted_rows: 2, ..empty };
    assert_eq!(cache.stats(), one);

    // Two full pages and the tail are shared, until one of them writes to the tail.
    let b = cache.fork(a).unwrap();
    let forked = Stats { shared: 3, sequences: 2, rows: 20, wasted_rows: 4, ..one };
    assert_eq!(cache.stats(), forked);
    append(&mut cache, b, 1);
    let apart = Stats { free: 4, live: 4, shared: 2, rows: 21, wasted_rows: 3, ..forked };
    assert_eq!(cache.stats(), apart);

    cache.free(a).unwrap();
    let left = Stats { free: 5, live: 3, sequences: 1, rows: 11, wasted_rows: 1, ..empty };
    assert_eq!(cache.stats(), left);
    cache.free(b).unwrap();
    assert_eq!(cache.stats(), empty);
    cache.check_invariants().unwrap();
}

/// A long prompt takes full precision for all its rows; the next step needs that of the last ones only.
#[test]
fn full_precision_of_a_prompt_is_given_back() {
    let config = Config { page_size: 4, residual: 4, ..Config::new(1, 1, 8) };
    let mut cache = Cache::new(&config.stored_as(Storage::Int8)).unwrap();
    let seq = cache.create().unwrap();
    let empty = cache.stats().bytes;
    append(&mut cache, seq, 400);
    let prompt = cache.stats();
    append(&mut cache, seq, 1);
    let step = cache.stats();
    assert_eq!((prompt.residual, step.residual), (100, 2));
    let raw_page = (prompt.bytes - empty) / 100;
    assert!(step.bytes - empty <= 20 * raw_page, "{} bytes of {}", step.bytes, prompt.bytes);
    cache.check_invariants().unwrap();
    // They come back.
    append(&mut cache, seq, 400);
    assert_eq!(cache.stats().residual, 102);
    cache.check_invariants().unwrap();
}
