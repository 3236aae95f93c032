//! The counting allocator, in a binary of its own and without the harness: what that allocates would be
//! counted too.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::thread;

use tensor_utils::testing::PeakAlloc;

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

fn main() {
    let before = vec![1_u8; 1 << 20];

    ALLOC.reset_peak();
    let first = vec![1_u8; 3000];
    drop(vec![0_u8; 5000]);
    drop(vec![1_u8; 4000]);
    assert_eq!(ALLOC.peak_above_baseline(), 8000);
    assert_eq!(ALLOC.allocations_since_reset(), 3);

    // Memory from before the reset lowers the level, but not below the baseline.
    drop(first);
    drop(before);
    assert_eq!(ALLOC.peak_above_baseline(), 8000);
    ALLOC.reset_peak();
    assert_eq!((ALLOC.peak_above_baseline(), ALLOC.allocations_since_reset()), (0, 0));

    // A growing vector holds the old and the new block while it copies.
    let mut grown = vec![1_u8; 1000];
    grown.reserve_exact(1000);
    assert_eq!(ALLOC.peak_above_baseline(), 3000);
    assert_eq!(ALLOC.allocations_since_reset(), 2);
    drop(grown);

    ALLOC.reset_peak();
    thread::spawn(|| drop(vec![1_u8; 1 << 20])).join().unwrap();
    let peak = ALLOC.peak_above_baseline();
    assert!((1 << 20..(1 << 20) + 100_000).contains(&peak), "{peak}");
}
