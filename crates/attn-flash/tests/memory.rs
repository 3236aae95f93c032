//! Memory: nothing quadratic in the lengths, and no allocation in the `_into` forms. One test, so
//! that no other allocates meanwhile; on the instruction set of `KERNELS_ISA`, or the widest.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::{
    Options, Tiling, Workspace, attention, attention_into, attention_varlen_into, merge_states_into,
};
use common::{Broadcast, Features, Inputs, Setting, Sizes};
use ndarray::{Array2, Array3, Array4};
use tensor_utils::testing::{PeakAlloc, started_pool};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

const MEGABYTE: usize = 1_000_000;

#[test]
fn memory() {
    let tiling = Tiling { query_block: 128, key_block: 128, isa: None };
    let short = peak(4096, &tiling);
    let long = peak(8192, &tiling);
    println!("peak beyond inputs and outputs: {short} bytes at 4096 queries, {long} at 8192");
    assert!(short < 5 * MEGABYTE, "{short} bytes");
    assert!(long <= 2 * short, "{long} bytes after {short}");
    documented_size(&tiling);
    allocating_form();
    no_allocation(&tiling);
}

/// Peak of a causal call at [2, 8, n, 64], its workspace included.
fn peak(n: usize, tiling: &Tiling) -> usize {
    let x = Array4::from_shape_fn((2, 8, n, 64), |(b, h, i, d)| ((b + 3 * h + i + d) % 7) as f32);
    let (mut o, mut lse) = (Array4::zeros(x.dim()), Array3::zeros((2, 8, n)));
    let options = Options { causal: true, ..Options::default() };
    ALLOC.reset_peak();
    let mut workspace = Workspace::new(64, 64, tiling).unwrap();
    let (o, lse) = (o.view_mut(), lse.view_mut());
    attention_into(o, lse, x.view(), x.view(), x.view(), &options, &mut workspace).unwrap();
    let peak = ALLOC.peak_above_baseline();
    assert!(peak >= workspace.bytes(), "a peak of {peak} bytes misses the workspace");
    peak
}

/// The allocating form with default tiles: outputs, workspace and little else.
fn allocating_form() {
    let x = Array4::from_shape_fn((1, 2, 2048, 64), |(_, h, i, d)| ((3 * h + i + d) % 7) as f32);
    let workspace = Workspace::<f32>::new(64, 64, &Tiling::default()).unwrap().bytes();
    ALLOC.reset_peak();
    let result = attention(x.view(), x.view(), x.view(), &Options::default()).unwrap();
    let outputs = size_of::<f32>() * (result.o.len() + result.lse.len());
    // Less than nothing, if another thread has freed something meanwhile.
    let beyond = ALLOC.peak_above_baseline().saturating_sub(outputs + workspace);
    assert!(beyond < 100_000, "{beyond} bytes beyond outputs and workspace");
}

/// The formula in the documentation of [`Workspace`].
fn documented_size(tiling: &Tiling) {
    for (d, e) in [(64, 64), (1, 40), (257, 16)] {
        let workspace = Workspace::<f32>::new(d, e, tiling).unwrap();
        let (d, e) = (d.next_multiple_of(16), e.next_multiple_of(16));
        let (r, c) = (tiling.query_block, tiling.key_block.next_multiple_of(32));
        let slot = 4
            * (r * (d + e) + c * (d + e) + 24 * c + 16 * d.max(e).next_multiple_of(32) + 2 * r)
            + 16 * r;
        assert_eq!(workspace.bytes(), slot * rayon::current_num_threads());
    }
}

/// Counts the allocations of the `_into` forms after a first call, on one thread: rayon's queues
/// allocate now and then when a pool is entered.
fn no_allocation(tiling: &Tiling) {
    let sizes = Sizes { batch: 2, key_heads: 2, group: 2, n: 70, m: 300, d: 24, e: 40 };
    let inputs = Inputs::<f32>::normal(sizes, 1);
    let features = Features {
        causal: true,
        softcap: Some(10.0),
        bias: Some(Broadcast::BatchAndHeads),
        mask: Some(Broadcast::Batch),
        key_lengths: true,
        alibi_slopes: Some(true),
        sinks: true,
        tree: true,
        ..Features::default()
    };
    let setting = Setting::new(&features, sizes, 1);
    let packed = |heads, size| Array3::from_elem((100, heads, size), 0.5_f32);
    let (packed_q, packed_k, packed_v) = (packed(4, 24), packed(2, 24), packed(2, 40));
    let offsets = [0, 13, 13, 100];
    let pool = started_pool(1);
    pool.install(|| {
        let mut workspace = Workspace::new(24, 40, tiling).unwrap();
        let (mut o, mut lse) = (Array4::zeros((2, 4, 70, 40)), Array3::zeros((2, 4, 70)));
        let (other_o, other_lse) = (o.clone(), lse.clone());
        let (mut packed_o, mut packed_lse) = (Array3::zeros((100, 4, 40)), Array2::zeros((100, 4)));
        let (q, k, v) = inputs.views();
        let options = setting.options();
        let plain = Options::default();
        let mut run = || {
            for _ in 0..3 {
                let (o, lse) = (o.view_mut(), lse.view_mut());
                attention_into(o, lse, q, k, v, &options, &mut workspace).unwrap();
            }
            let (o, lse) = (o.view_mut(), lse.view_mut());
            merge_states_into(o, lse, other_o.view(), other_lse.view()).unwrap();
            attention_varlen_into(
                packed_o.view_mut(),
                packed_lse.view_mut(),
                packed_q.view(),
                packed_k.view(),
                packed_v.view(),
                &offsets,
                &offsets,
                &plain,
                &mut workspace,
            )
            .unwrap();
        };
        run();
        ALLOC.reset_peak();
        run();
        let allocations = ALLOC.allocations_since_reset();
        assert_eq!(allocations, 0);
    });
}
