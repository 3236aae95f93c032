//! Memory: nothing quadratic in the lengths, and no allocation in the `_into` forms. One test, so
//! that no other allocates meanwhile; on the instruction set of `KERNELS_ISA`, or the widest.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::{Options, attention, attention_varlen};
use attn_flash_bwd::{
    Gradients, GradientsMut, Inputs, Strategy, Tiling, VarlenGradients, VarlenGradientsMut,
    VarlenInputs, Workspace, attention_backward, attention_backward_into,
    attention_varlen_backward, attention_varlen_backward_into,
};
use common::{Broadcast, Call, Features, Sizes};
use ndarray::{Array3, Array4};
use tensor_utils::testing::{PeakAlloc, in_pool};
use tensor_utils::{Element, Isa, bf16};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

const MEGABYTE: usize = 1_000_000;

#[test]
fn memory() {
    for strategy in [Strategy::SavedOutput, Strategy::TwoPass] {
        let tiling = Tiling { query_block: 128, key_block: 128, strategy, isa: None };
        let short = in_pool(2, || peak(4096, &tiling));
        let long = in_pool(2, || peak(8192, &tiling));
        println!("{strategy:?}: {short} bytes beyond inputs and outputs at 4096, {long} at 8192");
        assert!(short < 2 * MEGABYTE, "{short} bytes");
        // Linear in the lengths: delta.
        assert!(long < short + 4096 * 8, "{long} bytes after {short}");
        no_allocation(&tiling);
    }
    documented_size::<f32>();
    documented_size::<f64>();
    documented_size::<bf16>();
    allocating_form();
}

/// Peak of a causal call at [1, 1, n, 64], its workspace included.
fn peak(n: usize, tiling: &Tiling) -> usize {
    let x = Array4::from_shape_fn((1, 1, n, 64), |(_, _, i, d)| ((i + d) % 7) as f32);
    let options = Options { causal: true, ..Options::default() };
    let forward = attention(x.view(), x.view(), x.view(), &options).unwrap();
    let inputs = inputs(&x, &forward);
    let mut out = attention_backward(&inputs, &options).unwrap();
    ALLOC.reset_peak();
    let mut workspace = Workspace::new(&inputs, tiling).unwrap();
    attention_backward_into(all_of(&mut out), &inputs, &options, &mut workspace).unwrap();
    let peak = ALLOC.peak_above_baseline();
    assert!(peak >= workspace.bytes(), "a peak of {peak} bytes misses the workspace");
    peak
}

/// `x` in the place of q, k, v and do.
fn inputs<'a>(x: &'a Array4<f32>, forward: &'a attn_flash::Attention<f32>) -> Inputs<'a, f32> {
    Inputs {
        q: x.view(),
        k: x.view(),
        v: x.view(),
        o: forward.o.view(),
        lse: forward.lse.view(),
        d_o: x.view(),
        d_lse: None,
    }
}

fn all_of<T: Element>(out: &mut Gradients<T>) -> GradientsMut<'_, T> {
    GradientsMut {
        dq: out.dq.view_mut(),
        dk: out.dk.view_mut(),
        dv: out.dv.view_mut(),
        delta: Some(out.delta.view_mut()),
        dbias: out.dbias.as_mut().map(|dbias| dbias.view_mut()),
        dsinks: out.dsinks.as_mut().map(|dsinks| dsinks.view_mut()),
    }
}

/// The allocating form with default tiles: outputs, workspace and little else.
fn allocating_form() {
    let x = Array4::from_shape_fn((1, 2, 2048, 64), |(_, h, i, d)| ((3 * h + i + d) % 7) as f32);
    let options = Options::default();
    let forward = attention(x.view(), x.view(), x.view(), &options).unwrap();
    let inputs = inputs(&x, &forward);
    let workspace = Workspace::new(&inputs, &Tiling::default()).unwrap().bytes();
    ALLOC.reset_peak();
    let out = attention_backward(&inputs, &options).unwrap();
    let outputs = size_of::<f32>() * (3 * out.dq.len() + out.delta.len());
    // Less than nothing, if another thread has freed something meanwhile.
    let beyond = ALLOC.peak_above_baseline().saturating_sub(outputs + workspace);
    assert!(beyond < 100_000, "{beyond} bytes beyond outputs and workspace");
}

/// The formula in the documentation of [`Workspace`].
fn documented_size<T: Element>() {
    for (d, e) in [(64, 64), (1, 40), (257, 16)] {
        for key_block in [1, 100, 256] {
            let tiling = Tiling { key_block, ..Tiling::default() };
            let heads = |count, length, size| Array4::<T>::default((2, count, length, size));
            let (q, o) = (heads(6, 5, d), heads(6, 5, e));
            let (k, v, lse) = (heads(3, 7, d), heads(3, 7, e), Array3::default((2, 6, 5)));
            let inputs = Inputs {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                o: o.view(),
                lse: lse.view(),
                d_o: o.view(),
                d_lse: None,
            };
            let workspace = Workspace::new(&inputs, &tiling).unwrap();
            let w = size_of::<T::Acc>();
            let sums = if size_of::<T>() == 2 { q.len() + k.len() + v.len() } else { 0 };
            let (d, e) = (d.next_multiple_of(16), e.next_multiple_of(16));
            let c = key_block.next_multiple_of(32);
            let in_pairs = T::NAME == "bf16" && workspace.tiling().isa == Some(Isa::Avx512Bf16);
            let slot = if in_pairs {
                let (p, r) = ((d / 2).next_multiple_of(16), (e / 2).next_multiple_of(16));
                let of_keys = 3 * d / 2 + p + e + r + p.max(r) + 433;
                4 * (c * of_keys + 96 * (d + p + r) + 48 * (d + e) + 1536) + 96 * c
            } else {
                w * (3 * c * d + 2 * c * e + 96 * (2 * d + e) + 289 * c + 16 * d.max(e)) + 96 * c
            };
            let want = slot * rayon::current_num_threads() + w * (lse.len() + sums);
            assert_eq!(workspace.bytes(), want, "{} {d} {e} {key_block}", T::NAME);
        }
    }
}

/// Counts the allocations of the `_into` forms after a first call, on one thread: rayon's queues
/// allocate now and then when a pool is entered.
fn no_allocation(tiling: &Tiling) {
    let sizes = Sizes { batch: 2, key_heads: 2, group: 2, n: 70, m: 300, d: 24, e: 40 };
    let features = Features { bias: Some(Broadcast::BatchAndHeads), ..common::everything() };
    let call = Call::<f32>::new(sizes, &features, 1);
    let narrow = Call::<bf16>::new(sizes, &features, 1);
    let packed = |heads, size| Array3::from_elem((100, heads, size), 0.5_f32);
    let (q, k, v, d_o) = (packed(4, 24), packed(2, 24), packed(2, 40), packed(4, 40));
    let offsets = [0, 13, 13, 100];
    let plain = Options::default();
    let forward =
        attention_varlen(q.view(), k.view(), v.view(), &offsets, &offsets, &plain).unwrap();
    let packed = VarlenInputs {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        query_offsets: &offsets,
        key_offsets: &offsets,
        o: forward.o.view(),
        lse: forward.lse.view(),
        d_o: d_o.view(),
        d_lse: Some(forward.lse.view()),
    };
    in_pool(1, || {
        let (inputs, options) = (call.inputs(), call.options());
        let (narrow_inputs, narrow_options) = (narrow.inputs(), narrow.options());
        let mut out = call.run(tiling);
        let mut narrow_out = narrow.run(tiling);
        let mut packed_out = attention_varlen_backward(&packed, &plain).unwrap();
        let mut workspace = Workspace::new(&inputs, tiling).unwrap();
        let mut narrow_workspace = Workspace::new(&narrow_inputs, tiling).unwrap();
        let mut packed_workspace = Workspace::new_varlen(&packed, tiling).unwrap();
        let mut run = || {
            for _ in 0..3 {
                let (out, narrow_out) = (all_of(&mut out), all_of(&mut narrow_out));
                attention_backward_into(out, &inputs, &options, &mut workspace).unwrap();
                let workspace = &mut narrow_workspace;
                attention_backward_into(narrow_out, &narrow_inputs, &narrow_options, workspace)
                    .unwrap();
            }
            let VarlenGradients { dq, dk, dv, delta, .. } = &mut packed_out;
            let out = VarlenGradientsMut {
                dq: dq.view_mut(),
                dk: dk.view_mut(),
                dv: dv.view_mut(),
                delta: Some(delta.view_mut()),
                dbias: None,
                dsinks: None,
            };
            attention_varlen_backward_into(out, &packed, &plain, &mut packed_workspace).unwrap();
        };
        run();
        ALLOC.reset_peak();
        run();
        let allocations = ALLOC.allocations_since_reset();
        assert_eq!(allocations, 0);
    });
}
