//! Memory: decoding steps allocate nothing once everything has grown, and what was allocated keeps to
//! the formulas.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Mutex;

use kvcache::{Cache, Config, Layout, Options, Queries, Storage, Workspace, memory};
use ndarray::{Array2, Array3};
use tensor_utils::testing::{PeakAlloc, Seeded, started_pool};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

/// Held by each test, so that no other allocates meanwhile.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn a_thousand_steps_allocate_nothing() {
    let _alone = ALONE.lock();
    // On one thread: rayon's queues allocate now and then when a pool is entered.
    let pool = started_pool(1);
    for storage in Storage::ALL {
        let config = Config::new(2, 2, 32).stored_as(storage);
        let mut cache = Cache::new(&config).unwrap();
        let seqs = [cache.create().unwrap(), cache.create().unwrap()];
        let mut seeded = Seeded::new(1);
        let rows: Array3<f32> = seeded.normal((2, 2, 32));
        let q: Array3<f32> = seeded.normal((2, 8, 32));
        let (mut o, mut lse) = (Array3::zeros((2, 8, 32)), Array2::zeros((2, 8)));
        let mut workspace = Workspace::new();
        let mut step = || {
            for layer in 0..2 {
                cache.append_batch(layer, &seqs, &[1, 1], rows.view(), rows.view()).unwrap();
                let batch = seqs.map(|seq| Queries::last(seq, 1));
                let (o, lse) = (o.view_mut(), lse.view_mut());
                let options = Options::default();
                cache
                    .attend_into(o, lse, layer, q.view(), &batch, &options, &mut workspace)
                    .unwrap();
            }
        };
        pool.install(|| {
            // Past the first pages, so that full precision has been dropped once.
            for _ in 0..2100 {
                step();
            }
            // What steps allocate, each thousand of them does. The test harness allocates too, once,
            // when a test has run for a minute.
            let allocations = [(); 2].map(|()| {
                ALLOC.reset_peak();
                for _ in 0..1000 {
                    step();
                }
                ALLOC.allocations_since_reset()
            });
            assert!(allocations.contains(&0), "{storage:?}: {allocations:?}");
        });
        let stats = cache.stats();
        assert!(stats.wasted_rows < 2 * config.page_size, "{stats:?}");
    }
}

/// docs/derivation.md, sections 4 and 5.
#[test]
fn memory_keeps_to_its_formulas() {
    let _alone = ALONE.lock();
    let pool = started_pool(1);
    let (heads, size) = (8, 128);
    for storage in Storage::ALL {
        for (batch, len, queries) in [(8, 3000_usize, 1), (1, 2000, 200), (1, 10_000, 1)] {
            let pages = batch * len.div_ceil(64);
            let config =
                Config::new(1, 2, size).stored_as(storage).with_layout(Layout::Paged { pages });
            let mut cache = Cache::new(&config).unwrap();
            let mut seeded = Seeded::new(1);
            let rows: Array3<f32> = seeded.normal((len, 2, size));
            let seqs: Vec<_> = (0..batch).map(|_| cache.create().unwrap()).collect();
            for &seq in &seqs {
                cache.append(0, seq, rows.view(), rows.view()).unwrap();
            }
            if !storage.is_quantised() {
                let bytes = memory::cache_bytes(&config, pages * 64).unwrap();
                let held = cache.stats().bytes;
                // A vector may be read past the end of either side.
                assert!((bytes..bytes + 2 * 4 * 64 + 1).contains(&held), "{held} for {bytes}");
            }

            let units = batch * queries;
            let q: Array3<f32> = seeded.normal((units, heads, size));
            let (mut o, mut lse) =
                (Array3::zeros((units, heads, size)), Array2::zeros((units, heads)));
            let batch: Vec<_> = seqs.iter().map(|&seq| Queries::last(seq, queries)).collect();
            let mut workspace = Workspace::new();
            let peak = pool.install(|| {
                ALLOC.reset_peak();
                let (o, lse) = (o.view_mut(), lse.view_mut());
                let options = Options::default();
                cache.attend_into(o, lse, 0, q.view(), &batch, &options, &mut workspace).unwrap();
                ALLOC.peak_above_baseline()
            });
            let chunks = len.div_ceil(1024);
            let results = 4 * units * heads * (size + 2) * (chunks + 1);
            let thread = 256 * 4 * (144 + 16 + 2) + 256 * 4 * size / 2 + (32 << 10);
            let plan = 256 * units * (chunks + 1);
            let formula = 4 * units * heads * size + results + thread + plan;
            assert!(
                peak <= formula,
                "{storage:?}, {units} queries, {len} rows: {peak} > {formula}"
            );
            assert!(workspace.bytes() <= formula && 2 * peak >= workspace.bytes());
        }
    }
}
