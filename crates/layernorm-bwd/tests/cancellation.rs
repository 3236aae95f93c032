//! Large means: what the formulas of this crate are for.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Source};
use layernorm_bwd::{Options, layer_norm, layer_norm_backward_naive};
use ndarray::{Array1, Array2, array};
use tensor_utils::Float;
use tensor_utils::testing::{ErrorStats, Tolerance, check_close, isas};

const MEANS: [f64; 4] = [0.0, 1e2, 1e4, 1e6];

/// The error of dx and dgamma does not exceed that of the plain centred formula, whatever the mean,
/// and in fact does not grow with it.
#[test]
fn gradients_do_not_depend_on_the_mean() {
    for source in [Source::Statistics, Source::Input] {
        for isa in isas() {
            for mean in MEANS {
                let features = Features { mean, source, ..Features::default() };
                let inputs = Inputs::<f32, f32>::new(features, 64, 1024, 1);
                let want = inputs.reference();
                let (dy, x) = (inputs.dy.view(), inputs.x.view());
                let naive: layernorm_bwd::Gradients<f32, f32> =
                    layer_norm_backward_naive(dy, x, &inputs.options()).unwrap();
                let got = inputs.backward(isa);
                let ours = ErrorStats::new(&got.dx, &want.dx).unwrap().max_abs;
                let theirs = ErrorStats::new(&naive.dx, &want.dx).unwrap().max_abs;
                println!(
                    "mean {mean:e} {source:?} {isa}: dx off by {ours:.1e}, naive {theirs:.1e}"
                );
                assert!(ours <= theirs, "mean {mean:e}: {ours:e} against {theirs:e}");
                assert!(ours < 3e-6, "mean {mean:e}: {ours:e}");
                let tolerance = Tolerance { abs: 1e-5, rel: 1e-5 };
                check_close(&got.dgamma, &want.dgamma, tolerance).unwrap();
            }
        }
    }
}

/// The same of the forward pass.
#[test]
fn norm_does_not_depend_on_the_mean() {
    for mean in MEANS {
        let inputs = Inputs::<f32, f32>::new(Features { mean, ..Features::default() }, 64, 1024, 1);
        let want = layernorm_bwd::layer_norm_reference(inputs.x.view(), &inputs.options()).unwrap();
        for isa in isas() {
            let got = inputs.forward(isa);
            let tolerance = Tolerance { abs: 1e-6, rel: 1e-6 };
            check_close(&got.y, &want.y, tolerance).unwrap();
            check_close(&got.rstd, &want.rstd, Tolerance { abs: 0.0, rel: 1e-6 }).unwrap();
        }
    }
}

/// The formula without its centre, as PyTorch's CPU kernel has it, would fail the first test.
#[test]
fn uncentred_formula_loses_the_digits_of_the_mean() {
    let inputs =
        Inputs::<f32, f32>::new(Features { mean: 1e4, ..Features::default() }, 64, 1024, 1);
    let want = inputs.reference().dx;
    let mut dx = Array2::<f32>::zeros((64, 1024));
    let forward = layer_norm(inputs.x.view(), &inputs.options()).unwrap();
    for row in 0..64 {
        let (x, mean, a) = (inputs.x.row(row), forward.mean[row], forward.rstd[row]);
        let g = &inputs.gamma * &inputs.dy.row(row);
        let (ds, db) = ((&g * &x).sum(), g.sum());
        let b = (db * mean - ds) * a * a * a / 1024.0;
        let c = -b * mean - db * a / 1024.0;
        dx.row_mut(row).assign(&(&g * a + &x * b + c));
    }
    let error = ErrorStats::new(&dx, &want).unwrap().max_abs;
    assert!(error > 1e-4, "{error:e}");
}

/// `mean(x^2) - mean(x)^2`, each by a plain sum.
fn naive_variance<A: Float>(x: &Array1<A>) -> A {
    let len = A::from_f64(x.len() as f64);
    let squares = x.iter().map(|&x| x * x).sum::<A>() / len;
    let mean = x.iter().copied().sum::<A>() / len;
    squares - mean * mean
}

/// The variance is 2, which the difference of means of squares takes for 0.
#[test]
fn naive_variance_is_zero_where_the_variance_is_two() {
    let options = Options::<f64>::default();
    // The squares of the deviations are 4, 1, 1, 4 and 0: variance 2.
    let deviations = array![-2.0, -1.0, 0.0, 1.0, 2.0];
    let x = &deviations + 1e10;
    assert_eq!(naive_variance(&x), 0.0);
    let rstd = 1.0 / (2.0_f64 + 1e-5).sqrt();
    let got = layer_norm(x.clone().insert_axis(ndarray::Axis(0)).view(), &options).unwrap();
    assert_eq!((got.mean[0], got.rstd[0]), (1e10, rstd));
    check_close(&got.y.row(0), &(&deviations * rstd).view(), Tolerance { abs: 0.0, rel: 1e-15 })
        .unwrap();

    // The same in f32.
    let offset = 1e5_f32;
    let x = deviations.mapv(|d| d as f32) + offset;
    assert_eq!(naive_variance(&x), 0.0);
    let got = layer_norm(x.insert_axis(ndarray::Axis(0)).view(), &Options::<f32>::default());
    let got = got.unwrap();
    assert_eq!((got.mean[0], got.rstd[0]), (offset, rstd as f32));
}

/// A first element that has nothing to do with the rest of its row: the mean is first taken
/// relative to it.
#[test]
fn first_element_far_off() {
    for first in [1e3_f32, 1e6, -1e7] {
        let inputs = Inputs::<f32, f32>::new(Features::default(), 16, 500, 2);
        let mut x = inputs.x.clone();
        x.column_mut(0).fill(first);
        let inputs = Inputs { x, ..inputs };
        let want = inputs.reference();
        for isa in isas() {
            let got = inputs.backward(isa);
            let scale = want.dx.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
            let tolerance = Tolerance { abs: 3e-6 * scale, rel: 1e-5 };
            check_close(&got.dx, &want.dx, tolerance).unwrap();
        }
    }
}

/// Sums over rows that cancel to a millionth of their terms.
#[test]
fn sums_over_rows_that_cancel() {
    let rows = 20_000;
    let x = Array2::<f32>::from_shape_fn((rows, 8), |(i, j)| ((i * 7 + j * j * 3) % 11) as f32);
    // 1000, then -1000, and a little more: the sum is that of what is more.
    let dy = Array2::<f32>::from_shape_fn((rows, 8), |(i, j)| {
        (if i < rows / 2 { 1000.0 } else { -1000.0 }) + (j as f32) / 8.0
    });
    let saved = layernorm_bwd::Saved::Input { x: x.view() };
    let options = Options::<f32>::default();
    let got = layernorm_bwd::layer_norm_backward(dy.view(), saved, &options).unwrap();
    // Everything is a small multiple of 1/8, so chunks and their sums are exact.
    let want = Array1::from_shape_fn(8, |j| (rows * j) as f32 / 8.0);
    assert_eq!(got.dbeta, want);
}
