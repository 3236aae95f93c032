//! Gradients against finite differences, against the chain rule step by step, and differentiated
//! once more.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Wanted, all_features};
use layernorm_bwd::{Kind, Options, Saved, layer_norm, layer_norm_backward};
use ndarray::{Array1, Array2, Axis, Zip};
use tensor_utils::Isa;
use tensor_utils::testing::{GradCheck, GradStats, Seeded, Tolerance, check_close, isas};

type Case = Inputs<f64, f64>;

/// A scalar of the forward pass whose gradients are those that the backward pass is given `dy` for:
/// `sum(y dy)`, and the residual connection `sum(x dres)`.
fn loss(case: &Case) -> f64 {
    let y = layer_norm(case.x.view(), &case.options()).unwrap().y;
    let residual = if case.features.dres { (&case.x * &case.dres).sum() } else { 0.0 };
    (y * &case.dy).sum() + residual
}

/// Every gradient of `case` against differences of [`loss`].
fn check(case: &Case, isa: Isa) {
    let what = format!("{:?} {:?} {isa}", case.x.dim(), case.features);
    let mut got = case.backward_wanted(Wanted::ALL, isa);
    if case.features.accumulate {
        // The gradients of what was there before are not the loss's.
        *got.dgamma.as_mut().unwrap() -= &case.before[0];
        *got.dbeta.as_mut().unwrap() -= &case.before[1];
    }
    let check = GradCheck::default();
    let mut with = case.clone();
    // Without gamma or beta their gradients are those at 1 and 0.
    with.features.gamma = true;
    with.features.beta = true;
    if !case.features.gamma {
        with.gamma.fill(if case.features.one_plus_gamma { 0.0 } else { 1.0 });
    }
    if !case.features.beta {
        with.beta.fill(0.0);
    }
    let passed = |name: &str, result: Result<GradStats, _>| {
        result.unwrap_or_else(|error| panic!("{name}: {error}\n{what}"));
    };
    let of_x = |x: &Array2<f64>| loss(&Case { x: x.clone(), ..with.clone() });
    passed("dx", check.check(of_x, &with.x, &got.dx.unwrap()));
    let of_gamma = |gamma: &Array1<f64>| loss(&Case { gamma: gamma.clone(), ..with.clone() });
    passed("dgamma", check.check(of_gamma, &with.gamma, &got.dgamma.unwrap()));
    let of_beta = |beta: &Array1<f64>| loss(&Case { beta: beta.clone(), ..with.clone() });
    passed("dbeta", check.check(of_beta, &with.beta, &got.dbeta.unwrap()));
}

#[test]
fn every_input_and_option() {
    for (seed, features) in all_features().into_iter().enumerate() {
        for isa in isas() {
            check(&Case::new(features, 4, 23, seed as u64), isa);
        }
    }
}

#[test]
fn sizes() {
    for (rows, d) in [(1, 1), (1, 2), (5, 1), (3, 16), (40, 3), (2, 65)] {
        for kind in [Kind::LayerNorm, Kind::RmsNorm] {
            let features = Features { kind, ..Features::default() };
            check(&Case::new(features, rows, d, 7), Isa::active().unwrap());
        }
    }
}

/// Some elements one by one, and all of them along a random direction.
#[test]
fn large_tensors() {
    for kind in [Kind::LayerNorm, Kind::RmsNorm] {
        let features = Features { kind, ..Features::default() };
        check(&Case::new(features, 300, 257, 1), Isa::active().unwrap());
    }
}

/// Section 3 of the derivation: the backward pass as the forward pass, one operation at a time.
fn chain_rule(case: &Case) -> (Array2<f64>, Array1<f64>, Array1<f64>) {
    let Features { kind, eps, .. } = case.features;
    let options = case.options();
    let columns = case.x.ncols();
    let gamma = options.gamma.map_or(Array1::ones(columns), |gamma| {
        if options.one_plus_gamma { 1.0 + &gamma } else { gamma.to_owned() }
    });
    let len = columns as f64;
    let mut dx = Array2::zeros(case.x.dim());
    let (mut dgamma, mut dbeta) = (Array1::zeros(columns), Array1::zeros(columns));
    for ((x, dy), mut dx) in case.x.rows().into_iter().zip(case.dy.rows()).zip(dx.rows_mut()) {
        let mu = if kind == Kind::LayerNorm { x.sum() / len } else { 0.0 };
        let d = x.mapv(|x| x - mu);
        let s = &d * &d;
        let var = s.sum() / len;
        let rstd = (var + eps).powf(-0.5);
        let x_hat = &d * rstd;

        dbeta += &dy;
        dgamma += &(&dy * &x_hat);
        let x_hat_bar = &gamma * &dy;
        let rstd_bar = (&x_hat_bar * &d).sum(); // (b1)
        let var_bar = -0.5 * rstd.powi(3) * rstd_bar; // (b2)
        let s_bar = Array1::from_elem(columns, var_bar / len); // (b3)
        let d_bar = &x_hat_bar * rstd + 2.0 * &d * &s_bar; // (b4)
        let mu_bar = if kind == Kind::LayerNorm { -d_bar.sum() } else { 0.0 }; // (b5)
        dx.assign(&(&d_bar + mu_bar / len)); // (b6)
    }
    (dx, dgamma, dbeta)
}

/// Two derivations, two programs, one result.
#[test]
fn chain_rule_agrees() {
    for (seed, features) in all_features().into_iter().enumerate() {
        let features = Features { dres: false, accumulate: false, ..features };
        for (rows, d) in [(1, 1), (6, 17), (50, 100)] {
            let case = Case::new(features, rows, d, seed as u64);
            let (dx, dgamma, dbeta) = chain_rule(&case);
            let reference = case.reference();
            let tight = Tolerance { abs: 1e-13, rel: 1e-13 };
            // Short rows may have a small deviation, which multiplies errors.
            let loose = Tolerance { abs: 1e-11, rel: 1e-11 };
            check_close(&reference.dx, &dx, loose).unwrap();
            check_close(&reference.dgamma, &dgamma, loose).unwrap();
            check_close(&reference.dbeta, &dbeta, tight).unwrap();
            for isa in isas() {
                let got = case.backward(isa);
                check_close(&got.dx, &dx, loose).unwrap();
                check_close(&got.dgamma, &dgamma, loose).unwrap();
                check_close(&got.dbeta, &dbeta, tight).unwrap();
            }
        }
    }
}

/// The fast path's `dx` as a function of its inputs.
fn dx(x: &Array2<f64>, dy: &Array2<f64>, gamma: &Array1<f64>, kind: Kind) -> Array2<f64> {
    let options = Options { kind, eps: 1e-3, gamma: Some(gamma.view()), ..Options::default() };
    layer_norm_backward(dy.view(), Saved::Input { x: x.view() }, &options).unwrap().dx
}

/// The gradients of `sum(v dx)` with respect to x, dy and gamma, by hand.
///
/// `dx = rstd P g` with the symmetric `P = I - [1 1'/D] - x_hat x_hat'/D` is linear in `g`. `x`
/// enters by `x_hat`, twice, and by the factor rstd.
fn double_backward(
    x: &Array2<f64>,
    dy: &Array2<f64>,
    gamma: &Array1<f64>,
    v: &Array2<f64>,
    kind: Kind,
) -> (Array2<f64>, Array2<f64>, Array1<f64>) {
    let len = x.ncols() as f64;
    let mean = |a: &Array1<f64>| a.sum() / len;
    let centre = |a: &Array1<f64>| if kind == Kind::LayerNorm { mean(a) } else { 0.0 };
    let (mut of_x, mut of_dy) = (Array2::zeros(x.dim()), Array2::zeros(x.dim()));
    let mut of_gamma = Array1::zeros(x.ncols());
    for row in 0..x.nrows() {
        let (x, dy, v) = (x.row(row).to_owned(), dy.row(row), v.row(row).to_owned());
        let d = &x - centre(&x);
        let rstd = 1.0 / (mean(&(&d * &d)) + 1e-3).sqrt();
        let x_hat = &d * rstd;
        let g = gamma * &dy;
        let project = |a: &Array1<f64>| a - centre(a) - &x_hat * mean(&(a * &x_hat));
        let of_g = project(&v) * rstd;
        let value = (&of_g * &g).sum();
        let of_x_hat = -rstd * (&v * mean(&(&g * &x_hat)) + &g * mean(&(&v * &x_hat)));
        of_x.row_mut(row).assign(&(project(&of_x_hat) * rstd - &x_hat * (value * rstd / len)));
        of_dy.row_mut(row).assign(&(gamma * &of_g));
        of_gamma += &(&of_g * &dy);
    }
    (of_x, of_dy, of_gamma)
}

/// Backward of the backward: finite differences of the fast path's dx.
#[test]
fn second_derivative() {
    for kind in [Kind::LayerNorm, Kind::RmsNorm] {
        let mut seeded = Seeded::new(5);
        let shape = (3, 19);
        let [x, dy, v]: [Array2<f64>; 3] = std::array::from_fn(|_| seeded.normal(shape));
        let gamma: Array1<f64> = seeded.uniform(19, 0.5..1.5);
        let (of_x, of_dy, of_gamma) = double_backward(&x, &dy, &gamma, &v, kind);
        let check = GradCheck::default();
        check.check(|x| (&dx(x, &dy, &gamma, kind) * &v).sum(), &x, &of_x).unwrap();
        check.check(|dy| (&dx(&x, dy, &gamma, kind) * &v).sum(), &dy, &of_dy).unwrap();
        check.check(|gamma| (&dx(&x, &dy, gamma, kind) * &v).sum(), &gamma, &of_gamma).unwrap();
    }
}

/// The second derivative of `sum(dy y)` with respect to x does not depend on the order:
/// `u' H v = v' H u`, with `H v` from differences of dx.
#[test]
fn hessian_is_symmetric() {
    for kind in [Kind::LayerNorm, Kind::RmsNorm] {
        let mut seeded = Seeded::new(6);
        let shape = (2, 33);
        let [x, dy, u, v]: [Array2<f64>; 4] = std::array::from_fn(|_| seeded.normal(shape));
        let gamma: Array1<f64> = seeded.uniform(33, 0.5..1.5);
        let hessian_times = |direction: &Array2<f64>| {
            let at = |eps: f64| dx(&(&x + &(direction * eps)), &dy, &gamma, kind);
            (at(1e-5) - at(-1e-5)) / 2e-5
        };
        let (left, right) = ((&u * &hessian_times(&v)).sum(), (&v * &hessian_times(&u)).sum());
        assert!((left - right).abs() < 1e-7 * left.abs().max(1.0), "{left} {right}");
    }
}

/// A row shifted, or stretched, has the same norm: the gradient has no such component.
#[test]
fn gradient_is_orthogonal_to_what_changes_nothing() {
    let features = Features { eps: 0.0, ..Features::default() };
    let case = Case::new(features, 20, 50, 3);
    for isa in isas() {
        let got = case.backward(isa);
        Zip::from(got.dx.rows()).and(case.x.rows()).for_each(|dx, x| {
            let centred = &x - x.sum() / 50.0;
            assert!(dx.sum().abs() < 1e-12);
            assert!(dx.dot(&centred).abs() < 1e-12);
        });
    }
    let rms = Case::new(Features { kind: Kind::RmsNorm, ..features }, 20, 50, 3);
    let got = rms.backward(Isa::active().unwrap());
    for (dx, x) in got.dx.axis_iter(Axis(0)).zip(rms.x.rows()) {
        assert!(dx.dot(&x).abs() < 1e-12);
        assert!(dx.sum().abs() > 1e-3, "a shift does change it");
    }
}

/// What the derivation calls wrong is wrong by far more than the tolerances here.
#[test]
fn wrong_formulas_are_rejected() {
    let case = Case::new(Features::default(), 6, 40, 9);
    let right = case.reference().dx;
    let len = 40.0;
    let formula = |wrong: &dyn Fn(&Array1<f64>, &Array1<f64>, f64) -> Array1<f64>, freedom: f64| {
        let mut dx = Array2::zeros((6, 40));
        for row in 0..6 {
            let x = case.x.row(row);
            let d = &x - x.sum() / len;
            let rstd = 1.0 / ((&d * &d).sum() / freedom + 1e-5).sqrt();
            let g = &case.gamma * &case.dy.row(row);
            dx.row_mut(row).assign(&wrong(&g, &(&d * rstd), rstd));
        }
        dx
    };
    let mean = |a: &Array1<f64>| a.sum() / len;
    let centred = |g: &Array1<f64>, x_hat: &Array1<f64>, rstd: f64| {
        rstd * (g - mean(g) - x_hat * mean(&(g * x_hat)))
    };
    let difference =
        |dx: Array2<f64>| (dx - &right).iter().fold(0.0_f64, |most, e| most.max(e.abs()));
    assert!(difference(formula(&centred, len)) < 1e-13, "the right formula");
    let wrong: [(&str, Array2<f64>); 4] = [
        ("divided by D - 1", formula(&centred, len - 1.0)),
        ("mean(g) left out", formula(&|g, x, r| r * (g - x * mean(&(g * x))), len)),
        ("c2 left out", formula(&|g, _, r| r * (g - mean(g)), len)),
        ("rstd left out", formula(&|g, x, _| g - mean(g) - x * mean(&(g * x)), len)),
    ];
    for (what, dx) in wrong {
        assert!(difference(dx) > 1e-3, "{what} would pass");
    }
}
