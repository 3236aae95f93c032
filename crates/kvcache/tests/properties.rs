//! Random operations on a cache and on a plain model of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Pair, config, op};
use kvcache::{Cache, Config, Layout, Options, Window};
use ndarray::Array3;
use proptest::prelude::*;
use tensor_utils::testing::{isas, property_config};

const REGRESSIONS: &str = "proptest-regressions/properties.txt";

fn run(config: &Config, ops: &[common::Op], seed: u64) {
    let mut pair = Pair::new(config, seed);
    for op in ops {
        pair.apply(op);
        pair.check();
    }
    for isa in isas() {
        pair.check_attention(&Options { isa: Some(isa), ..Options::default() });
    }
}

proptest! {
    #![proptest_config(property_config(200, REGRESSIONS))]

    #[test]
    fn cache_agrees_with_a_plain_model(
        config in config(),
        ops in prop::collection::vec(op(), 1..40),
        seed in 0..1000_u64,
    ) {
        run(&config, &ops, seed);
    }
}

proptest! {
    #![proptest_config(property_config(10_000, REGRESSIONS))]

    #[test]
    #[ignore = "10,000 sequences of up to 80 operations"]
    fn cache_agrees_with_a_plain_model_for_long(
        config in config(),
        ops in prop::collection::vec(op(), 1..80),
        seed in 0..1_000_000_u64,
    ) {
        run(&config, &ops, seed);
    }
}

/// A prefix is found after its sequence is gone, until its page holds something else.
#[test]
fn reclaimed_pages_are_not_found() {
    let layout = Layout::Paged { pages: 1 };
    let mut cache = Cache::new(&Config { layout, page_size: 2, ..Config::new(1, 1, 4) }).unwrap();
    let rows = Array3::<f32>::ones((2, 1, 4));
    let first = cache.create().unwrap();
    cache.append(0, first, rows.view(), rows.view()).unwrap();
    assert_eq!(cache.register_prefix(first, 0, &[1, 2]), Ok(1));
    cache.free(first).unwrap();
    let (found, len) = cache.match_prefix(0, &[1, 2, 3]).unwrap();
    assert_eq!(len, 2);
    cache.free(found).unwrap();

    let second = cache.create().unwrap();
    cache.append(0, second, rows.view(), rows.view()).unwrap();
    assert_eq!(cache.match_prefix(0, &[1, 2, 3]).unwrap().1, 0);
}

/// What was registered is counted as found, though the window has released the sequence's own pages since.
#[test]
fn released_pages_are_found_if_they_are_known() {
    let window = Some(Window { size: 2, sinks: 1 });
    let mut cache = Cache::new(&Config { window, page_size: 1, ..Config::new(1, 1, 4) }).unwrap();
    let seq = cache.create().unwrap();
    let tokens: Vec<u32> = (1..=8).collect();
    let row = Array3::<f32>::ones((1, 1, 4));
    let append = |cache: &mut Cache, rows: usize| {
        for _ in 0..rows {
            cache.append(0, seq, row.view(), row.view()).unwrap();
        }
    };
    append(&mut cache, 2);
    assert_eq!(cache.register_prefix(seq, 0, &tokens[..2]), Ok(2));
    append(&mut cache, 1);
    assert_eq!(cache.register_prefix(seq, 0, &tokens[..3]), Ok(3));
    append(&mut cache, 1);
    assert_eq!(cache.register_prefix(seq, 0, &tokens[..4]), Ok(4));
    append(&mut cache, 4);
    // Pages 4 and 5 were never registered, and are gone.
    let found = cache.register_prefix(seq, 0, &tokens).unwrap();
    let (matched, len) = cache.match_prefix(0, &[1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
    assert_eq!((found, len), (4, 4));
    cache.free(matched).unwrap();
    cache.check_invariants().unwrap();
}
