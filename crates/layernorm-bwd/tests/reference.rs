//! The fast path against the oracle, on sizes around the edges of vectors and segments and on every
//! option.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Layout, Source, Wanted, all_features};
use layernorm_bwd::{
    Error, Gradients, Kind, Options, Saved, Tiling, Workspace, layer_norm, layer_norm_backward,
    layer_norm_backward_naive, layer_norm_in_place, layer_norm_naive, layer_norm_reference, rows,
};
use ndarray::{Array2, Array3, Axis, array};
use tensor_utils::testing::{
    ErrorRatios, Poison, Seeded, Tolerance, check_close, check_same_bits, error_ratio, isas,
};
use tensor_utils::{Element, Isa, bf16, f16};

const LENGTHS: [usize; 14] = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 255, 1024, 4097];
const ROWS: [usize; 10] = [0, 1, 2, 3, 4, 5, 31, 33, 65, 200];

/// Compares one call on every instruction set with the reference.
fn check<T, W>(features: Features, rows: usize, d: usize, seed: u64)
where
    T: Element + Poison,
    W: Element<Acc = T::Acc> + Poison,
    T::Acc: Poison,
{
    let inputs = Inputs::<T, W>::new(features, rows, d, seed);
    let want = inputs.reference();
    let want_forward = layer_norm_reference(inputs.x.view(), &inputs.options()).unwrap();
    let (t, w) = tolerances::<T, W>(&inputs, &want_forward.rstd);
    for isa in isas() {
        let what = format!("{} {} {rows} x {d} {features:?} {isa}", T::NAME, W::NAME);
        let fail = |name: &str, error| panic!("{name}: {error}\n{what}");
        let got = inputs.forward(isa);
        check_close(&got.y, &want_forward.y, t).unwrap_or_else(|error| fail("y", error));
        let statistics = common::tolerance::<T::Acc>();
        for (name, got, want) in
            [("mean", &got.mean, &want_forward.mean), ("rstd", &got.rstd, &want_forward.rstd)]
        {
            check_close(got, want, statistics).unwrap_or_else(|error| fail(name, error));
        }
        let got = inputs.backward(isa);
        check_close(&got.dx, &want.dx, t).unwrap_or_else(|error| fail("dx", error));
        check_close(&got.dgamma, &want.dgamma, w).unwrap_or_else(|error| fail("dgamma", error));
        check_close(&got.dbeta, &want.dbeta, w).unwrap_or_else(|error| fail("dbeta", error));
    }
}

/// For dx and y, and for sums over the rows. A small deviation multiplies errors, in short rows; so
/// does recovering x_hat from a y of low precision.
fn tolerances<T: Element, W: Element>(
    inputs: &Inputs<T, W>,
    rstd: &ndarray::Array1<f64>,
) -> (Tolerance, Tolerance) {
    let largest = rstd.iter().fold(1.0_f64, |largest, &rstd| largest.max(rstd));
    let recovered = match inputs.features.source {
        Source::Output => 8.0 * T::EPSILON,
        _ => 0.0,
    };
    let base = common::tolerance::<T>();
    let dx = Tolerance { abs: largest * (base.abs + recovered), rel: base.rel + recovered };
    let rows = (inputs.x.nrows() as f64).sqrt().max(1.0);
    let base = common::tolerance::<W>();
    let weights = Tolerance {
        abs: rows * (common::tolerance::<T::Acc>().abs + recovered),
        rel: base.rel + recovered,
    };
    (dx, weights)
}

#[test]
fn sizes_at_edges() {
    let mut seed = 0;
    for d in LENGTHS {
        for rows in ROWS {
            if rows * d > 200_000 {
                continue;
            }
            seed += 1;
            let features = all_features();
            let of_all = features[seed as usize % features.len()];
            match seed % 6 {
                0 => check::<bf16, f32>(of_all, rows, d, seed),
                1 => check::<f16, f16>(of_all, rows, d, seed),
                2 => check::<bf16, bf16>(of_all, rows, d, seed),
                _ => {}
            }
            check::<f32, f32>(Features::default(), rows, d, seed);
            check::<f64, f64>(of_all, rows, d, seed);
            let rms = Features { kind: Kind::RmsNorm, ..Features::default() };
            check::<f32, bf16>(rms, rows, d, seed);
        }
    }
}

#[test]
fn every_option_and_type() {
    for (i, features) in all_features().into_iter().enumerate() {
        for (rows, d) in [(5, 40), (70, 33), (9, 1000)] {
            check::<f32, f32>(features, rows, d, i as u64);
            check::<f64, f64>(features, rows, d, i as u64);
            check::<bf16, f32>(features, rows, d, i as u64);
            check::<bf16, bf16>(features, rows, d, i as u64);
            check::<f16, f32>(features, rows, d, i as u64);
            check::<f16, f16>(features, rows, d, i as u64);
        }
    }
}

/// More rows than one chunk, one segment, 32 segments; long enough to be shared out over threads.
#[test]
fn many_rows() {
    for (rows, d) in [(2048, 48), (2049, 40), (4100, 17), (20_000, 5), (100_000, 1)] {
        check::<f32, f32>(Features::default(), rows, d, rows as u64);
        let rms = Features { kind: Kind::RmsNorm, source: Source::Input, ..Features::default() };
        check::<f64, f64>(rms, rows, d, rows as u64);
    }
}

/// Each subset of the gradients has the bits of all together.
#[test]
fn some_gradients_only() {
    fn check<T>(features: Features)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T, T::Acc>::new(features, 150, 67, 8);
        for isa in isas() {
            let all = inputs.backward(isa);
            for bits in 0..8 {
                let wanted =
                    Wanted { dx: bits & 1 != 0, dgamma: bits & 2 != 0, dbeta: bits & 4 != 0 };
                let got = inputs.backward_wanted(wanted, isa);
                let what = |error| panic!("{error}\n{wanted:?} {features:?} {isa}");
                if let Some(dx) = &got.dx {
                    check_same_bits(dx, &all.dx).unwrap_or_else(what);
                }
                if let Some(dgamma) = &got.dgamma {
                    check_same_bits(dgamma, &all.dgamma).unwrap_or_else(what);
                }
                if let Some(dbeta) = &got.dbeta {
                    check_same_bits(dbeta, &all.dbeta).unwrap_or_else(what);
                }
            }
        }
    }
    for features in all_features() {
        check::<f32>(features);
        check::<bf16>(features);
    }
}

/// Whether rows are contiguous changes no bit.
#[test]
fn strides_do_not_matter() {
    fn check<T>(features: Features)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T, T>::new(features, 21, 37, 9);
        for isa in isas() {
            let want = inputs.backward_wanted(Wanted::ALL, isa);
            let want_forward = inputs.forward(isa);
            for layout in Layout::ALL {
                let x = layout.lay_out(&inputs.x);
                let got = inputs.forward_of(x.view(), isa);
                check_same_bits(&got.y, &want_forward.y).unwrap();
                for layouts in [
                    [layout; 3],
                    [layout, Layout::Standard, Layout::Standard],
                    [Layout::Standard, layout, Layout::Standard],
                    [Layout::Standard, Layout::Standard, layout],
                ] {
                    let got = inputs.backward_laid_out(layouts, Wanted::ALL, isa);
                    let what = |error| panic!("{error}\n{layouts:?} {features:?} {isa}");
                    check_same_bits(&got.dx.unwrap(), want.dx.as_ref().unwrap())
                        .unwrap_or_else(what);
                    check_same_bits(&got.dgamma.unwrap(), want.dgamma.as_ref().unwrap())
                        .unwrap_or_else(what);
                    check_same_bits(&got.dbeta.unwrap(), want.dbeta.as_ref().unwrap())
                        .unwrap_or_else(what);
                }
            }
        }
    }
    for features in all_features() {
        check::<f32>(features);
        check::<bf16>(features);
        check::<f64>(features);
    }
}

/// Outputs of any stride, too.
#[test]
fn outputs_may_be_transposed() {
    let inputs = Inputs::<f32, f32>::new(Features::default(), 13, 40, 3);
    let options = inputs.options();
    let mut workspace = Workspace::new(13, 40, &Tiling::default()).unwrap();
    let want = layer_norm(inputs.x.view(), &options).unwrap();
    let mut y = Array2::default((40, 13));
    layernorm_bwd::layer_norm_into(
        y.view_mut().reversed_axes(),
        None,
        inputs.x.view(),
        &options,
        &mut workspace,
    )
    .unwrap();
    check_same_bits(&y.view().reversed_axes(), &want.y.view()).unwrap();

    let saved = Saved::Input { x: inputs.x.view() };
    let want = layer_norm_backward(inputs.dy.view(), saved.clone(), &options).unwrap();
    let mut dx = Array2::default((40, 13));
    let mut weights = Array2::default((40, 2));
    let (dgamma, dbeta) = weights.view_mut().split_at(Axis(1), 1);
    let gradients = layernorm_bwd::GradientsMut {
        dx: Some(dx.view_mut().reversed_axes()),
        dgamma: Some(dgamma.index_axis_move(Axis(1), 0)),
        dbeta: Some(dbeta.index_axis_move(Axis(1), 0)),
        ..Default::default()
    };
    let dy = inputs.dy.view();
    layernorm_bwd::layer_norm_backward_into(gradients, dy, saved, &options, &mut workspace)
        .unwrap();
    check_same_bits(&dx.view().reversed_axes(), &want.dx.view()).unwrap();
    check_same_bits(&weights.column(0), &want.dgamma.view()).unwrap();
    check_same_bits(&weights.column(1), &want.dbeta.view()).unwrap();
}

#[test]
fn in_place_has_the_bits_of_the_other_form() {
    fn check<T>()
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T, T>::new(Features::default(), 40, 51, 3);
        for isa in isas() {
            let want = inputs.forward(isa);
            for layout in Layout::ALL {
                let mut workspace = Workspace::new(40, 51, &Tiling { isa: Some(isa) }).unwrap();
                let mut x = inputs.x.clone();
                if layout == Layout::Transposed {
                    x = x.reversed_axes().as_standard_layout().to_owned().reversed_axes();
                }
                layer_norm_in_place(x.view_mut(), None, &inputs.options(), &mut workspace).unwrap();
                check_same_bits(&x, &want.y).unwrap();
            }
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
    check::<f16>();
}

/// A row without deviation, and so every row of one element, has exact zeros.
#[test]
fn constant_rows_are_exactly_zero() {
    fn check<T>(value: f64, rows: usize, d: usize)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        for source in [Source::Statistics, Source::Input, Source::Output] {
            let features = Features { source, beta: false, ..Features::default() };
            let mut inputs = Inputs::<T, T>::new(features, rows, d, 1);
            inputs.x.fill(T::from_f64(value));
            for isa in isas() {
                let what = format!("{} {value} {rows} x {d} {source:?} {isa}", T::NAME);
                let forward = inputs.forward(isa);
                assert!(forward.y.iter().all(|y| y.to_f64() == 0.0), "y {what}");
                let mean = T::from_f64(value).to_acc();
                assert!(forward.mean.iter().all(|&got| got == mean), "mean {what}");
                let got = inputs.backward(isa);
                assert!(got.dgamma.iter().all(|x| x.to_f64() == 0.0), "dgamma {what}");
                if d == 1 {
                    assert!(got.dx.iter().all(|x| x.to_f64() == 0.0), "dx {what}");
                }
            }
        }
    }
    for value in [0.0, 1.0, -3.7, 1e-30, 12_345.678, 1e15] {
        for d in [1, 2, 3, 17, 1000, 4097, 10_007] {
            check::<f32>(value, 5, d);
            check::<f64>(value, 3, d);
            check::<bf16>(value, 3, d);
        }
    }
}

/// A mean that another program has saved, off by roundings, does no harm.
#[test]
fn saved_mean_may_be_off_by_roundings() {
    let inputs = Inputs::<f32, f32>::new(Features { mean: 1e5, ..Features::default() }, 30, 300, 4);
    let want = inputs.reference();
    let mut forward = layer_norm(inputs.x.view(), &inputs.options()).unwrap();
    for (row, mean) in forward.mean.iter_mut().enumerate() {
        *mean += 0.01 * (row as f32 - 15.0);
    }
    let saved = Saved::Statistics {
        x: inputs.x.view(),
        mean: forward.mean.view(),
        rstd: forward.rstd.view(),
    };
    let got = layer_norm_backward(inputs.dy.view(), saved, &inputs.options()).unwrap();
    check_close(&got.dx, &want.dx, common::tolerance::<f32>()).unwrap();
    let tolerance = Tolerance { abs: 1e-4, rel: 1e-5 };
    check_close(&got.dgamma, &want.dgamma, tolerance).unwrap();
}

/// NaN and infinity stay in their row of dx, and show in the sums over rows.
#[test]
fn nan_stays_in_its_row() {
    fn check<T>(spoil: impl Fn(&mut Inputs<T, T>), columns: std::ops::Range<usize>, dbeta: bool)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        for source in [Source::Statistics, Source::Input] {
            let features = Features { source, ..Features::default() };
            let clean = Inputs::<T, T>::new(features, 11, 35, 6);
            let mut spoilt = clean.clone();
            spoil(&mut spoilt);
            for isa in isas() {
                let (want, got) = (clean.backward(isa), spoilt.backward(isa));
                for row in 0..11 {
                    if row == 5 {
                        assert!(got.dx.row(5).iter().all(|x| !x.to_f64().is_finite()), "{isa}");
                    } else {
                        check_same_bits(&got.dx.row(row), &want.dx.row(row)).unwrap();
                    }
                }
                for j in 0..35 {
                    let shows = !got.dgamma[j].to_f64().is_finite();
                    assert_eq!(shows, columns.contains(&j), "dgamma {j} {isa}");
                    let shows = !got.dbeta[j].to_f64().is_finite();
                    assert_eq!(shows, dbeta && j == 20, "dbeta {j} {isa}");
                }
            }
        }
    }
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        check::<f32>(|inputs| inputs.x[[5, 20]] = value as f32, 0..35, false);
        check::<bf16>(|inputs| inputs.x[[5, 34]] = bf16::from_f64(value), 0..35, false);
        check::<f64>(|inputs| inputs.dy[[5, 20]] = value, 20..21, true);
        check::<f32>(|inputs| inputs.dy[[5, 20]] = value as f32, 20..21, true);
    }
}

/// An infinite gradient stays infinite in the sums, whose rounding errors are then NaN.
#[test]
fn infinity_survives_the_sums() {
    let mut inputs = Inputs::<f32, f32>::new(Features::default(), 300, 20, 6);
    inputs.dy[[7, 3]] = f32::INFINITY;
    inputs.dy[[7, 4]] = f32::NEG_INFINITY;
    for isa in isas() {
        let got = inputs.backward(isa);
        assert_eq!((got.dbeta[3], got.dbeta[4]), (f32::INFINITY, f32::NEG_INFINITY));
        assert!(got.dbeta[5].is_finite());
    }
}

/// The sums over a million rows are as good as in f64.
#[test]
fn a_million_rows() {
    const ROWS: usize = 1_000_000;
    let mut seeded = Seeded::new(1);
    let x: Array2<f32> = seeded.normal((ROWS, 4));
    // All of one size, so that the roundings of a naive sum all go the same way.
    let dy = Array2::from_elem((ROWS, 4), 0.1_f32);
    let options = Options::<f32>::default();
    let want = layernorm_bwd::layer_norm_backward_reference(dy.view(), x.view(), &options).unwrap();
    let naive = layer_norm_backward_naive(dy.view(), x.view(), &options).unwrap();
    let got = layer_norm_backward(dy.view(), Saved::Input { x: x.view() }, &options).unwrap();
    for j in 0..4 {
        let error = |got: f32| (f64::from(got) - want.dbeta[j]).abs() / want.dbeta[j];
        assert!(error(got.dbeta[j]) <= f64::from(f32::EPSILON), "{j}: {:e}", error(got.dbeta[j]));
        assert!(error(naive.dbeta[j]) > 1e-3, "the test is too easy");
    }
    // Terms of the size of 1 that nearly cancel: some roundings of single terms are left.
    check_close(&got.dgamma, &want.dgamma, Tolerance { abs: 2e-4, rel: 0.0 }).unwrap();

    // In f64, against sums of whole numbers that are exact.
    let dy: Array2<f64> = seeded.integers((ROWS, 4), 1..=1000);
    let got = layer_norm_backward(
        (&dy / 3.0).view(),
        Saved::Input { x: x.mapv(f64::from).view() },
        &Options::<f64>::default(),
    )
    .unwrap();
    for j in 0..4 {
        let third = |x: f64| x / 3.0;
        let exact: i64 = dy.column(j).iter().map(|&x| x as i64).sum();
        let error = (got.dbeta[j] - third(exact as f64)).abs() / third(exact as f64);
        assert!(error < 1e-15, "{j}: {error:e}");
    }
}

/// DESIGN's contract on precision: the error against f64 over that of the plain algorithm in the
/// same type has a median of at most 1.5 for gradients and 1 for the forward pass, and is nowhere
/// above 3 and 2. (Not for f64, which nothing here is more precise than.)
fn error_ratios<T>()
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let sizes = [
        (1, 8),
        (3, 17),
        (7, 64),
        (33, 100),
        (64, 255),
        (100, 40),
        (16, 1024),
        (10, 4097),
        (500, 33),
        (2100, 16),
        (40, 768),
        (5, 20_000),
    ];
    for isa in isas() {
        let mut all: [(&str, ErrorRatios); 4] =
            ["y", "dx", "dgamma", "dbeta"].map(|name| (name, ErrorRatios::default()));
        for (seed, (rows, d)) in sizes.into_iter().enumerate() {
            for kind in [Kind::LayerNorm, Kind::RmsNorm] {
                for mean in [0.0, 3.0] {
                    for source in [Source::Statistics, Source::Input] {
                        let features = Features { kind, mean, source, ..Features::default() };
                        let inputs = Inputs::<T, T::Acc>::new(features, rows, d, seed as u64);
                        let case = format!("{rows} x {d} {features:?}");
                        let options = inputs.options();
                        let (dy, x) = (inputs.dy.view(), inputs.x.view());
                        let exact = inputs.reference();
                        let naive: Gradients<T, T::Acc> =
                            layer_norm_backward_naive(dy, x, &options).unwrap();
                        let ours = inputs.backward(isa);
                        let exact_y = layer_norm_reference(x, &options).unwrap().y;
                        let naive_y = layer_norm_naive(x, &options).unwrap().y;
                        let ratios = [
                            error_ratio(&inputs.forward(isa).y, &naive_y, &exact_y),
                            error_ratio(&ours.dx, &naive.dx, &exact.dx),
                            error_ratio(&ours.dgamma, &naive.dgamma, &exact.dgamma),
                            error_ratio(&ours.dbeta, &naive.dbeta, &exact.dbeta),
                        ];
                        for ((_, all), ratio) in all.iter_mut().zip(ratios) {
                            all.push(&case, ratio.unwrap());
                        }
                    }
                }
            }
        }
        for (name, ratios) in all {
            let (median, (case, worst)) = (ratios.median(), ratios.worst().unwrap());
            println!(
                "{} {isa}: error of {name} over the naive one's: median {median:.3}, \
                 worst {worst:.3} ({case})",
                T::NAME
            );
            let (median, worst) = if name == "y" { (1.0, 2.0) } else { (1.5, 3.0) };
            ratios.check(median, worst).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

#[test]
fn error_ratio_f32() {
    error_ratios::<f32>();
}

#[test]
fn error_ratio_bf16() {
    error_ratios::<bf16>();
}

#[test]
fn error_ratio_f16() {
    error_ratios::<f16>();
}

/// The convenience functions are the `_into` ones.
#[test]
fn allocating_form_is_the_same() -> Result<(), Error> {
    let isa = Isa::active().unwrap();
    let inputs = Inputs::<f32, f32>::new(Features::default(), 90, 45, 4);
    let forward = layer_norm(inputs.x.view(), &inputs.options())?;
    let want = inputs.forward(isa);
    check_same_bits(&forward.y, &want.y).unwrap();
    check_same_bits(&forward.rstd, &want.rstd).unwrap();
    let saved = Saved::Statistics {
        x: inputs.x.view(),
        mean: forward.mean.view(),
        rstd: forward.rstd.view(),
    };
    let got = layer_norm_backward(inputs.dy.view(), saved, &inputs.options())?;
    let want = inputs.backward(isa);
    check_same_bits(&got.dx, &want.dx).unwrap();
    check_same_bits(&got.dgamma, &want.dgamma).unwrap();
    check_same_bits(&got.dbeta, &want.dbeta).unwrap();
    Ok(())
}

/// A small example worked out by hand: x = (-1, 1), variance 1, eps 0.
#[test]
fn by_hand() {
    let options = Options::<f64> { eps: 0.0, ..Options::default() };
    let x = array![[-1.0, 1.0]];
    let got = layer_norm(x.view(), &options).unwrap();
    assert_eq!((got.y, got.mean, got.rstd), (x.clone(), array![0.0], array![1.0]));
    // g = (1, 0): means 1/2 and -1/2, dx = (1 - 1/2 - 1/2, 0 - 1/2 + 1/2): two elements have
    // no degree of freedom left.
    let dy = array![[1.0, 0.0]];
    let got = layer_norm_backward(dy.view(), Saved::Input { x: x.view() }, &options).unwrap();
    assert_eq!(
        got,
        Gradients { dx: array![[0.0, 0.0]], dgamma: array![-1.0, 0.0], dbeta: array![1.0, 0.0] }
    );
    // RMS norm: dx = g - x_hat mean(g x_hat).
    let options = Options { kind: Kind::RmsNorm, ..options };
    let got = layer_norm_backward(dy.view(), Saved::Input { x: x.view() }, &options).unwrap();
    assert_eq!(got.dx, array![[0.5, 0.5]]);
}

#[test]
fn rows_of_any_array() {
    let x = Array3::from_shape_fn((3, 4, 5), |(i, j, k)| (20 * i + 5 * j + k) as f32);
    let merged = rows("x", x.view()).unwrap();
    assert_eq!(merged.dim(), (12, 5));
    assert!(merged.iter().eq(x.iter()));
    assert_eq!(rows("x", x.index_axis(Axis(0), 1)).unwrap().dim(), (4, 5));
    assert_eq!(rows("x", x.index_axis(Axis(0), 1).row(2)).unwrap().dim(), (1, 5));
    // Some columns of a contiguous array: the row stride is larger than the row.
    let mut part = x.view();
    part.slice_axis_inplace(Axis(2), (1..3).into());
    let merged = rows("x", part).unwrap();
    assert_eq!((merged.dim(), merged.strides()), ((12, 2), &[5, 1][..]));
    assert!(merged.iter().eq(part.iter()));
    // Axes that are no axis.
    for shape in [(1, 4, 5), (4, 1, 5), (0, 3, 5), (3, 0, 5), (3, 4, 0)] {
        let empty = Array3::<f32>::zeros(shape);
        assert_eq!(rows("x", empty.view()).unwrap().dim(), (shape.0 * shape.1, shape.2));
    }
    assert!(matches!(rows("x", x.view().reversed_axes()), Err(Error::NotRows { arg: "x", .. })));
}
