//! Decoding steps allocate nothing once everything has grown. One test, so that no other allocates
//! meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use kvcache::{Cache, Config, Options, Queries, Storage, Workspace};
use ndarray::{Array2, Array3};
use rayon::ThreadPoolBuilder;
use tensor_utils::testing::{PeakAlloc, Seeded};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

#[test]
fn a_thousand_steps_allocate_nothing() {
    // On one thread: rayon's queues allocate now and then when a pool is entered.
    let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
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
            ALLOC.reset_peak();
            for _ in 0..1000 {
                step();
            }
        });
        assert_eq!(ALLOC.allocations_since_reset(), 0, "{storage:?}");
        let stats = cache.stats();
        assert!(stats.wasted_rows < 2 * config.page_size, "{stats:?}");
    }
}
