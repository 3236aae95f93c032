//! The `_into` functions allocate nothing, and a workspace is as large as its documentation says.
//!
//! One test: the counters are those of the whole process.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use layernorm_bwd::{
    GradientsMut, Options, Saved, StatisticsMut, Tiling, Workspace, layer_norm_backward_into,
    layer_norm_in_place, layer_norm_into,
};
use ndarray::{Array1, Array2, ArrayView2};
use rayon::ThreadPool;
use tensor_utils::testing::{PeakAlloc, Seeded, started_pool};
use tensor_utils::{Element, Float, bf16};

#[global_allocator]
static ALLOC: PeakAlloc = PeakAlloc::new();

fn check<T: Element>(rows: usize, d: usize, segments: usize, pool: &ThreadPool) {
    let threads = pool.current_num_threads();
    let mut seeded = Seeded::new(1);
    let (x, dy): (Array2<T>, Array2<T>) = (seeded.normal((rows, d)), seeded.normal((rows, d)));
    let (gamma, beta): (Array1<T>, Array1<T>) = (seeded.normal(d), seeded.normal(d));
    let options =
        Options { gamma: Some(gamma.view()), beta: Some(beta.view()), ..Options::default() };
    let (mut y, mut dx) = (x.clone(), Array2::default((rows, d)));
    let (mut mean, mut rstd) = (Array1::<T::Acc>::default(rows), Array1::default(rows));
    let (mut dgamma, mut dbeta) = (Array1::<T>::default(d), Array1::<T>::default(d));
    // Every other column of wider rows: read by way of the workspace.
    let wide = Array2::<T>::from_elem((rows, 2 * d), T::from_acc(T::Acc::ONE));
    let mut strided = wide.view();
    strided.slice_axis_inplace(ndarray::Axis(1), ndarray::Slice::new(0, None, 2));

    let mut workspace = pool.install(|| {
        ALLOC.reset_peak();
        let workspace = Workspace::new(rows, d, &Tiling::default()).unwrap();
        let padded = d.next_multiple_of(16);
        let formula =
            size_of::<T::Acc>() * (6 * threads * d + (2 + 2 * threads + 4 * segments) * padded);
        assert_eq!(workspace.bytes(), formula, "{rows} x {d}, {threads} threads");
        let peak = ALLOC.peak_above_baseline();
        // The threads' own, and six rows each that begin at a line of the caches.
        let more = (1000 + 6 * 80) * threads;
        assert!((formula..formula + more).contains(&peak), "{peak} for {formula}");
        workspace
    });
    let mut run = |x: ArrayView2<'_, T>, dres: Option<ArrayView2<'_, T>>| {
        pool.install(|| {
            let statistics = StatisticsMut { mean: mean.view_mut(), rstd: rstd.view_mut() };
            layer_norm_into(y.view_mut(), Some(statistics), x, &options, &mut workspace).unwrap();
            layer_norm_in_place(dx.view_mut(), None, &options, &mut workspace).unwrap();
            for saved in [
                Saved::Statistics { x, mean: mean.view(), rstd: rstd.view() },
                Saved::Input { x },
                Saved::Output { y: y.view(), rstd: rstd.view() },
            ] {
                let gradients = GradientsMut {
                    dx: Some(dx.view_mut()),
                    dgamma: Some(dgamma.view_mut()),
                    dbeta: Some(dbeta.view_mut()),
                    accumulate: true,
                    dres,
                };
                let dy = dy.view();
                layer_norm_backward_into(gradients, dy, saved, &options, &mut workspace).unwrap();
            }
        });
    };
    // The first entry into a pool makes rayon's queues.
    run(x.view(), None);
    ALLOC.reset_peak();
    run(x.view(), None);
    run(strided, Some(strided));
    let (allocations, bytes) = (ALLOC.allocations_since_reset(), ALLOC.peak_above_baseline());
    // Not one for a row, a chunk, a segment: now and then rayon makes its queues longer.
    assert!(allocations <= 16 && bytes < 20_000, "{allocations} allocations, {bytes} bytes");
}

#[test]
fn workspace_is_all_there_is() {
    // Threads that start or end take or free memory of their own: they all live through the test.
    let [one, two, three] = [1, 2, 3].map(started_pool);
    check::<f32>(5000, 100, 31, &three);
    check::<f32>(1000, 1030, 32, &two);
    check::<f64>(64, 50, 1, &one);
    check::<bf16>(3000, 700, 32, &two);
}
