//! The same bits for any number of threads, in any company and on every run.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Source};
use layernorm_bwd::{Gradients, Kind, Tiling, Workspace, layer_norm_into};
use ndarray::{Array2, Axis, Slice};
use tensor_utils::testing::{
    Poison, batch_sizes, check_same_bits, in_pool, isas, repeats, thread_counts,
};
use tensor_utils::{Element, Isa, bf16, f16};

/// Many segments, rows that do not fill the last, one segment, few long rows, short rows.
const SIZES: [(usize, usize); 6] =
    [(3000, 40), (333, 300), (31, 1000), (70, 5000), (9000, 3), (1, 70_000)];

fn features() -> Vec<Features> {
    let plain = Features::default;
    vec![
        plain(),
        Features { source: Source::Input, ..plain() },
        Features { source: Source::Output, ..plain() },
        Features { kind: Kind::RmsNorm, dres: true, accumulate: true, ..plain() },
    ]
}

/// Every size with every feature, in a type that changes.
macro_rules! for_all_calls {
    ($check:ident) => {
        for (i, features) in features().into_iter().enumerate() {
            for (j, (rows, d)) in SIZES.into_iter().enumerate() {
                match (i + j) % 5 {
                    0 => $check::<bf16>(features, rows, d),
                    1 => $check::<f16>(features, rows, d),
                    2 => $check::<f64>(features, rows, d),
                    _ => $check::<f32>(features, rows, d),
                }
            }
        }
    };
}

fn assert_same<T: Element>(got: &Gradients<T, T>, want: &Gradients<T, T>, what: &str) {
    check_same_bits(&got.dx, &want.dx).unwrap_or_else(|error| panic!("{what}: dx: {error}"));
    for (name, got, want) in
        [("dgamma", &got.dgamma, &want.dgamma), ("dbeta", &got.dbeta, &want.dbeta)]
    {
        check_same_bits(got, want).unwrap_or_else(|error| panic!("{what}: {name}: {error}"));
    }
}

#[test]
fn any_number_of_threads() {
    fn check<T>(features: Features, rows: usize, d: usize)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T, T>::new(features, rows, d, 1);
        for isa in isas() {
            let (want, want_forward) = in_pool(1, || (inputs.backward(isa), inputs.forward(isa)));
            for threads in thread_counts() {
                let what = format!("{threads} threads, {isa}, {rows} x {d}, {features:?}");
                let (got, got_forward) =
                    in_pool(threads, || (inputs.backward(isa), inputs.forward(isa)));
                assert_same(&got, &want, &what);
                check_same_bits(&got_forward.y, &want_forward.y).unwrap();
                check_same_bits(&got_forward.mean, &want_forward.mean).unwrap();
                check_same_bits(&got_forward.rstd, &want_forward.rstd).unwrap();
            }
        }
    }
    for_all_calls!(check);
}

#[test]
fn every_run() {
    fn check<T>(features: Features, rows: usize, d: usize)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T, T>::new(features, rows, d, 2);
        let isa = Isa::active().unwrap();
        in_pool(4, || {
            let want = inputs.backward(isa);
            for run in 0..repeats() {
                assert_same(&inputs.backward(isa), &want, &format!("run {run} {rows} x {d}"));
            }
        });
    }
    check::<f32>(Features::default(), 3000, 40);
    check::<f32>(Features { source: Source::Input, ..Features::default() }, 70, 1111);
    check::<bf16>(Features::default(), 500, 64);
}

/// A row of y and dx has the same bits alone, among some others and in the whole batch.
#[test]
fn rows_do_not_know_each_other() {
    fn check<T>(features: Features, rows: usize, d: usize)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let whole = Inputs::<T, T>::new(features, rows, d, 3);
        for isa in isas() {
            let (want, want_forward) = (whole.backward(isa), whole.forward(isa));
            for range in [0..1, 1..2, 7..12, rows / 2..rows / 2 + 1, rows - 1..rows, 2..rows] {
                if range.is_empty() || range.end > rows {
                    continue;
                }
                let part =
                    |x: &Array2<T>| x.slice_axis(Axis(0), Slice::from(range.clone())).to_owned();
                let some = Inputs {
                    x: part(&whole.x),
                    dy: part(&whole.dy),
                    dres: part(&whole.dres),
                    ..whole.clone()
                };
                let what = format!("rows {range:?} of {rows} x {d} {features:?} {isa}");
                let context = |error| panic!("{what}: {error}");
                check_same_bits(&some.backward(isa).dx, &part(&want.dx)).unwrap_or_else(context);
                check_same_bits(&some.forward(isa).y, &part(&want_forward.y))
                    .unwrap_or_else(context);
            }
        }
    }
    for_all_calls!(check);
}

/// A `dx` so large that it is written past the caches has the bits of a small one. Rows of odd length
/// begin anywhere in a cache line.
#[test]
fn large_results_are_those_of_small_ones() {
    fn check<T>(features: Features, rows: usize, d: usize)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let whole = Inputs::<T, T>::new(features, rows, d, 4);
        let middle = Slice::from(rows / 2 - 20..rows / 2 + 20);
        let part = |x: &Array2<T>| x.slice_axis(Axis(0), middle).to_owned();
        let some = Inputs {
            x: part(&whole.x),
            dy: part(&whole.dy),
            dres: part(&whole.dres),
            ..whole.clone()
        };
        for isa in isas() {
            let want = in_pool(1, || whole.backward(isa));
            check_same_bits(&some.backward(isa).dx, &part(&want.dx)).unwrap();
            assert_same(&in_pool(3, || whole.backward(isa)), &want, "3 threads");
        }
    }
    check::<f32>(Features::default(), 4100, 1027);
    check::<f64>(Features { dres: true, ..Features::default() }, 2600, 1003);
}

/// The first row of a batch, and the last, whatever stands beside them.
#[test]
fn any_batch_size() {
    for isa in isas() {
        for rows in batch_sizes() {
            let all = Inputs::<f32, f32>::new(Features::default(), rows, 133, 5);
            let (want_dx, want_y) = (all.backward(isa).dx, all.forward(isa).y);
            for row in [0, rows - 1] {
                let part =
                    |x: &Array2<f32>| x.slice_axis(Axis(0), Slice::from(row..=row)).to_owned();
                let alone = Inputs {
                    x: part(&all.x),
                    dy: part(&all.dy),
                    dres: part(&all.dres),
                    ..all.clone()
                };
                let context = |error| panic!("row {row} of {rows}, {isa}: {error}");
                check_same_bits(&alone.backward(isa).dx, &part(&want_dx)).unwrap_or_else(context);
                check_same_bits(&alone.forward(isa).y, &part(&want_y)).unwrap_or_else(context);
            }
        }
    }
}

/// Neither its size nor what a call has left in it shows in the next.
#[test]
fn workspaces_can_be_used_again() {
    let isa = Isa::active().unwrap();
    let inputs = Inputs::<f32, f32>::new(Features::default(), 90, 50, 4);
    let want = inputs.forward(isa).y;
    let mut workspace = Workspace::new(500, 300, &Tiling::default()).unwrap();
    let spoilt = Array2::from_elem((400, 300), f32::NAN);
    let mut y = Array2::default((400, 300));
    let no_options = layernorm_bwd::Options::<f32>::default();
    layer_norm_into(y.view_mut(), None, spoilt.view(), &no_options, &mut workspace).unwrap();
    let weights = || layernorm_bwd::GradientsMut::<f32, f32>::default();
    let mut dgamma = ndarray::Array1::default(300);
    let gradients = layernorm_bwd::GradientsMut { dgamma: Some(dgamma.view_mut()), ..weights() };
    let saved = layernorm_bwd::Saved::Input { x: spoilt.view() };
    layernorm_bwd::layer_norm_backward_into(
        gradients,
        spoilt.view(),
        saved,
        &no_options,
        &mut workspace,
    )
    .unwrap();

    let mut y = Array2::default((90, 50));
    layer_norm_into(y.view_mut(), None, inputs.x.view(), &inputs.options(), &mut workspace)
        .unwrap();
    check_same_bits(&y, &want).unwrap();
    let want = inputs.backward(isa);
    let mut dx = Array2::default((90, 50));
    let mut dgamma = ndarray::Array1::default(50);
    let gradients = layernorm_bwd::GradientsMut {
        dx: Some(dx.view_mut()),
        dgamma: Some(dgamma.view_mut()),
        ..weights()
    };
    let forward = inputs.forward(isa);
    let saved = layernorm_bwd::Saved::Statistics {
        x: inputs.x.view(),
        mean: forward.mean.view(),
        rstd: forward.rstd.view(),
    };
    layernorm_bwd::layer_norm_backward_into(
        gradients,
        inputs.dy.view(),
        saved,
        &inputs.options(),
        &mut workspace,
    )
    .unwrap();
    check_same_bits(&dx, &want.dx).unwrap();
    check_same_bits(&dgamma, &want.dgamma).unwrap();
}
