//! The `_into` functions allocate nothing, and a workspace is as large as its documentation says.
//!
//! One test: the counters are those of the whole process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ndarray::{Array1, Array2};
use rayon::ThreadPool;
use softmax_topk::{
    Draw, Logit, NanPolicy, Options, PerRow, Tiling, TopKGradients, Workspace, sample, sample_into,
    softmax_topk_backward_into, softmax_topk_into,
};
use tensor_utils::bf16;
use tensor_utils::testing::{PeakAlloc, Seeded, started_pool};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

fn check<T: Logit>(rows: usize, vocabulary: usize, k: usize, pool: &ThreadPool) {
    let threads = pool.current_num_threads();
    let mut logits: Array2<T> = Seeded::new(1).normal((rows, vocabulary));
    let tokens = Array2::zeros((rows, 2));
    let options = Options {
        temperature: PerRow::All(0.8),
        top_p: PerRow::All(0.9),
        nan: NanPolicy::Ignore,
        tokens: Some(tokens.view()),
        ..Options::default()
    };
    let draws = Array1::from_elem(rows, Draw { seed: 1, step: 2 });
    let mut workspace = pool.install(|| {
        ALLOC.reset_peak();
        let workspace = Workspace::<T::Acc>::new(rows, vocabulary, k, &Tiling::default()).unwrap();
        let w = size_of::<T::Acc>();
        let formula = threads.min(rows)
            * (16 * w * vocabulary.div_ceil(128)
                + 16 * vocabulary.div_ceil(16384)
                + 16 * w * (k / 4 + 1).min(vocabulary.div_ceil(128))
                + 2 * w * ((4 * k).max(256).min(vocabulary.next_multiple_of(128)) + 128)
                + 8 * k.min(vocabulary));
        assert_eq!(workspace.bytes(), formula, "{rows} x {vocabulary}, {threads} threads");
        let peak = ALLOC.peak_above_baseline();
        assert!((formula..formula + 1000 * threads).contains(&peak), "{peak} for {formula}");
        workspace
    });
    let mut drawn = sample(logits.view(), k, &options, draws.view()).unwrap();
    let mut d_logits = Array2::<T>::default((rows, vocabulary));
    let mut run = |logits: &Array2<T>| {
        pool.install(|| {
            let top = drawn.top.view_mut();
            softmax_topk_into(top, logits.view(), &options, &mut workspace).unwrap();
            let (tokens, columns) = (drawn.tokens.view_mut(), drawn.columns.view_mut());
            let (top, draws) = (drawn.top.view_mut(), draws.view());
            sample_into(tokens, columns, top, logits.view(), &options, draws, &mut workspace)
                .unwrap();
            let gradients =
                TopKGradients { probs: Some(drawn.top.probs.view()), ..Default::default() };
            let (d, top) = (d_logits.view_mut(), drawn.top.view());
            softmax_topk_backward_into(d, &gradients, logits.view(), top, &options).unwrap();
        });
    };
    // The first entry into a pool makes rayon's queues.
    run(&logits);
    ALLOC.reset_peak();
    run(&logits);
    logits[[0, 0]] = T::from_f64(f64::NAN);
    run(&logits);
    let (allocations, bytes) = (ALLOC.allocations_since_reset(), ALLOC.peak_above_baseline());
    // Not one for a row or a segment: now and then rayon makes its queues longer.
    assert!(allocations <= 16 && bytes < 20_000, "{allocations} allocations, {bytes} bytes");
}

#[test]
fn workspace_is_all_there_is() {
    // Threads that start or end take or free memory of their own: they all live through the test.
    let [two, three, five] = [2, 3, 5].map(started_pool);
    check::<f32>(100, 3000, 50, &two);
    check::<f32>(1, 151_936, 50, &two);
    check::<f32>(3, 2000, 2000, &five);
    check::<bf16>(9, 20_000, 256, &three);
    check::<f64>(20, 10_000, 10, &two);
}
