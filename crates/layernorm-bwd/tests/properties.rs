//! What holds for any shape, any combination of options and any values.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Layout, Source, Wanted};
use layernorm_bwd::{Kind, layer_norm_reference};
use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;
use proptest::sample::select;
use tensor_utils::testing::{
    Poison, Tolerance, check_close, check_same_bits, in_pool, property_config,
};
use tensor_utils::{Element, Isa, bf16, f16};

fn features() -> impl Strategy<Value = Features> {
    let kinds = select(&[Kind::LayerNorm, Kind::RmsNorm][..]);
    let sources = select(&[Source::Statistics, Source::Input, Source::Output][..]);
    let flags = prop::array::uniform5(any::<bool>());
    (kinds, sources, flags, 1e-3..1.0_f64, -3.0..3.0_f64).prop_map(
        |(kind, source, [gamma, one_plus_gamma, beta, dres, accumulate], eps, mean)| Features {
            kind,
            eps,
            gamma,
            one_plus_gamma,
            beta,
            dres,
            accumulate,
            source,
            mean,
        },
    )
}

/// Rows and their length.
fn sizes() -> impl Strategy<Value = (usize, usize)> {
    let rows = prop_oneof![0..4_usize, 4..40_usize, 40..400_usize];
    let lengths = prop_oneof![1..20_usize, 20..200_usize];
    (rows, lengths)
}

fn isas() -> impl Strategy<Value = Isa> {
    select(tensor_utils::testing::isas())
}

fn agrees<T>(features: Features, (rows, d): (usize, usize), seed: u64, isa: Isa)
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let inputs = Inputs::<T, T>::new(features, rows, d, seed);
    let want = inputs.reference();
    let got = inputs.backward(isa);
    // x_hat from y is as precise as y.
    let recovered = if features.source == Source::Output { 16.0 * T::EPSILON } else { 0.0 };
    let Tolerance { abs, rel } = common::tolerance::<T>();
    // Deviations of at least sqrt(eps) multiply errors by at most 32.
    let of_row = Tolerance { abs: 32.0 * (abs + recovered), rel: rel + recovered };
    let sum = (1 + rows) as f64;
    let of_sum = Tolerance { abs: sum * (abs + recovered), rel: rel + recovered };
    check_close(&got.dx, &want.dx, of_row).unwrap();
    check_close(&got.dgamma, &want.dgamma, of_sum).unwrap();
    check_close(&got.dbeta, &want.dbeta, of_sum).unwrap();
}

proptest! {
    #![proptest_config(property_config(64, "proptest-regressions/properties.txt"))]

    #[test]
    fn agrees_with_the_reference(
        features in features(), sizes in sizes(), seed in any::<u64>(), isa in isas(), kind in 0..4,
    ) {
        match kind {
            0 => agrees::<f64>(features, sizes, seed, isa),
            1 => agrees::<bf16>(features, sizes, seed, isa),
            2 => agrees::<f16>(features, sizes, seed, isa),
            _ => agrees::<f32>(features, sizes, seed, isa),
        }
    }

    /// In any layout, alone or with the others, on any number of threads: the same bits.
    #[test]
    fn layout_and_company_change_nothing(
        features in features(),
        sizes in sizes(),
        seed in any::<u64>(),
        isa in isas(),
        layouts in prop::array::uniform3(select(&Layout::ALL[..])),
        wanted in prop::array::uniform3(any::<bool>()),
        threads in 1..5_usize,
    ) {
        let inputs = Inputs::<f32, f32>::new(features, sizes.0, sizes.1, seed);
        let [dx, dgamma, dbeta] = wanted;
        let wanted = Wanted { dx, dgamma, dbeta };
        let all = inputs.backward(isa);
        let got = in_pool(threads, || inputs.backward_laid_out(layouts, wanted, isa));
        prop_assert_eq!((got.dx.is_some(), got.dgamma.is_some()), (dx, dgamma));
        if let Some(dx) = got.dx {
            check_same_bits(&dx, &all.dx).unwrap();
        }
        if let Some(dgamma) = got.dgamma {
            check_same_bits(&dgamma, &all.dgamma).unwrap();
        }
        if let Some(dbeta) = got.dbeta {
            check_same_bits(&dbeta, &all.dbeta).unwrap();
        }
    }

    /// The gradients are linear in dy: twice dy gives twice their bits.
    #[test]
    fn gradients_are_linear_in_dy(
        features in features(), sizes in sizes(), seed in any::<u64>(), isa in isas(),
    ) {
        let features = Features { dres: false, accumulate: false, ..features };
        let once = Inputs::<f32, f32>::new(features, sizes.0, sizes.1, seed);
        let twice = Inputs { dy: &once.dy * 2.0, ..once.clone() };
        let (once, twice) = (once.backward(isa), twice.backward(isa));
        check_same_bits(&twice.dx, &(once.dx * 2.0)).unwrap();
        check_same_bits(&twice.dgamma, &(once.dgamma * 2.0)).unwrap();
        check_same_bits(&twice.dbeta, &(once.dbeta * 2.0)).unwrap();
    }

    /// A row that is stretched by a power of 2, with eps stretched as well, has the same norm, bit
    /// by bit; its gradient shrinks as much.
    #[test]
    fn scale_of_the_row_cancels(
        kind in select(&[Kind::LayerNorm, Kind::RmsNorm][..]),
        sizes in sizes(),
        seed in any::<u64>(),
        isa in isas(),
    ) {
        let features = Features { kind, eps: 0.25, ..Features::default() };
        let small = Inputs::<f32, f32>::new(features, sizes.0, sizes.1, seed);
        let features = Features { eps: 4.0, ..features };
        let large = Inputs { features, x: &small.x * 4.0, ..small.clone() };
        check_same_bits(&large.forward(isa).y, &small.forward(isa).y).unwrap();
        let (small, large) = (small.backward(isa), large.backward(isa));
        check_same_bits(&large.dx, &(small.dx / 4.0)).unwrap();
        check_same_bits(&large.dgamma, &small.dgamma).unwrap();
    }

    /// Rows in another order: dx in that order, and the same sums.
    #[test]
    fn order_of_the_rows_does_not_matter(
        features in features(), sizes in sizes(), seed in any::<u64>(), isa in isas(),
    ) {
        let inputs = Inputs::<f64, f64>::new(features, sizes.0, sizes.1, seed);
        let reversed = |x: &Array2<f64>| {
            let mut x = x.clone();
            x.invert_axis(Axis(0));
            x.as_standard_layout().to_owned()
        };
        let backwards = Inputs {
            x: reversed(&inputs.x),
            dy: reversed(&inputs.dy),
            dres: reversed(&inputs.dres),
            ..inputs.clone()
        };
        let (want, got) = (inputs.backward(isa), backwards.backward(isa));
        check_same_bits(&reversed(&got.dx), &want.dx).unwrap();
        let tolerance = Tolerance { abs: 1e-12 * (1 + sizes.0) as f64, rel: 1e-12 };
        check_close(&got.dgamma, &want.dgamma, tolerance).unwrap();
        check_close(&got.dbeta, &want.dbeta, tolerance).unwrap();
    }

    /// Each row of x_hat has mean 0 (layer norm) and mean square var / (var + eps), at most 1.
    #[test]
    fn rows_are_normalised(
        features in features(), sizes in sizes(), seed in any::<u64>(), isa in isas(),
    ) {
        let features = Features { gamma: false, beta: false, ..features };
        let inputs = Inputs::<f64, f64>::new(features, sizes.0, sizes.1, seed);
        let got = inputs.forward(isa);
        let want = layer_norm_reference(inputs.x.view(), &inputs.options()).unwrap();
        for (row, y) in got.y.rows().into_iter().enumerate() {
            let len = y.len() as f64;
            if features.kind == Kind::LayerNorm {
                prop_assert!((y.sum() / len).abs() < 1e-13);
            }
            let square = y.dot(&y) / len;
            let variance = want.rstd[row].powi(-2) - features.eps;
            prop_assert!((square - variance / (variance + features.eps)).abs() < 1e-12);
        }
    }

    /// Two batches accumulated into the same gradients are one batch.
    #[test]
    fn accumulating_joins_batches(
        features in features(), sizes in sizes(), seed in any::<u64>(), isa in isas(),
    ) {
        let plain = Features { accumulate: false, ..features };
        let [a, b] = [seed, !seed].map(|seed| {
            let mut inputs = Inputs::<f64, f64>::new(plain, sizes.0, sizes.1, seed);
            // The weights are the same in both.
            let Inputs { gamma, beta, .. } = Inputs::<f64, f64>::new(plain, 0, sizes.1, 1);
            (inputs.gamma, inputs.beta) = (gamma, beta);
            inputs
        });
        let both = Inputs {
            x: ndarray::concatenate![Axis(0), a.x, b.x],
            dy: ndarray::concatenate![Axis(0), a.dy, b.dy],
            dres: ndarray::concatenate![Axis(0), a.dres, b.dres],
            ..a.clone()
        };
        let want = both.backward(isa);
        let first = a.backward(isa);
        let features = Features { accumulate: true, ..plain };
        let second = Inputs { features, before: [first.dgamma, first.dbeta], ..b };
        let got = second.backward(isa);
        let tolerance = Tolerance { abs: 1e-12 * (1 + sizes.0) as f64, rel: 1e-12 };
        check_close(&got.dgamma, &want.dgamma, tolerance).unwrap();
        check_close(&got.dbeta, &want.dbeta, tolerance).unwrap();
    }

    /// Constant rows add exactly nothing to dgamma, in any company.
    #[test]
    fn constant_rows_add_nothing(
        value in -1e6..1e6_f32, d in 1..300_usize, seed in any::<u64>(), isa in isas(),
    ) {
        let mut inputs = Inputs::<f32, f32>::new(Features::default(), 9, d, seed);
        inputs.x.fill(value);
        prop_assert_eq!(inputs.backward(isa).dgamma, Array1::<f32>::zeros(d));
        let beta = inputs.beta.broadcast((9, d)).unwrap().to_owned();
        prop_assert_eq!(inputs.forward(isa).y, beta);
    }
}
