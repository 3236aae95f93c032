//! Ways to get the gradient of the softmax wrong (`docs/derivation.md`): finite differences tell
//! each from the right one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Call, Features, Sizes, check_gradients};
use ndarray::{Array1, Array2, Axis, Ix2};
use tensor_utils::testing::{GradCheck, GradError, Seeded};

/// What `dS` is made of `P` and `dP`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Variant {
    /// `dS_ij = P_ij (dP_ij - delta_i)`, `delta_i = sum_j P_ij dP_ij`.
    Right,
    /// The same, as `delta_i = sum_c do_ic o_ic`.
    RightFromOutput,
    /// `delta_j = sum_i P_ij dP_ij`: the sum over the other axis.
    OtherAxis,
    /// `delta_c = sum_i do_ic o_ic`: the same mistake with the output.
    OtherAxisOfOutput,
    /// `delta_i = sum_j dP_ij`: without the weights.
    WithoutP,
    /// `dS_ij = (dP_ij - delta_i) / P_ij`.
    Division,
    /// `dS_ij = P_ij dP_ij`: without delta.
    WithoutDelta,
}

use Variant::{
    Division, OtherAxis, OtherAxisOfOutput, Right, RightFromOutput, WithoutDelta, WithoutP,
};

/// One head, as many keys as queries and columns, so that every variant has the right shape.
struct Head {
    q: Array2<f64>,
    k: Array2<f64>,
    v: Array2<f64>,
    /// Gradient of the output.
    d_o: Array2<f64>,
}

const SIZE: usize = 6;

impl Head {
    fn new(seed: u64) -> Self {
        let mut seeded = Seeded::new(seed);
        let mut draw = || seeded.normal((SIZE, SIZE));
        Self { q: draw(), k: draw(), v: draw(), d_o: draw() }
    }

    fn scale() -> f64 {
        1.0 / (SIZE as f64).sqrt()
    }

    /// `P = softmax(scale q k^T)`.
    fn weights(q: &Array2<f64>, k: &Array2<f64>) -> Array2<f64> {
        let mut p = (q.dot(&k.t()) * Self::scale()).mapv(f64::exp);
        for mut row in p.rows_mut() {
            let sum = row.sum();
            row /= sum;
        }
        p
    }

    /// `sum(o * do)`.
    fn loss(&self, q: &Array2<f64>, k: &Array2<f64>) -> f64 {
        (Self::weights(q, k).dot(&self.v) * &self.d_o).sum()
    }

    /// `dq` and `dk`.
    fn gradients(&self, variant: Variant) -> (Array2<f64>, Array2<f64>) {
        let p = Self::weights(&self.q, &self.k);
        let dp = self.d_o.dot(&self.v.t());
        let by_output = &self.d_o * &p.dot(&self.v);
        let column = |x: Array1<f64>| x.insert_axis(Axis(1));
        let delta = match variant {
            Right | Division => column((&p * &dp).sum_axis(Axis(1))),
            RightFromOutput => column(by_output.sum_axis(Axis(1))),
            OtherAxis => (&p * &dp).sum_axis(Axis(0)).insert_axis(Axis(0)),
            OtherAxisOfOutput => column(by_output.sum_axis(Axis(0))),
            WithoutP => column(dp.sum_axis(Axis(1))),
            WithoutDelta => Array2::zeros((1, 1)),
        };
        let ds = match variant {
            Division => (dp - delta) / p,
            _ => p * (dp - delta),
        };
        (ds.dot(&self.k) * Self::scale(), ds.t().dot(&self.q) * Self::scale())
    }

    fn check(&self, variant: Variant) -> [Result<(), GradError>; 2] {
        let (dq, dk) = self.gradients(variant);
        let check = GradCheck::default();
        [
            check.check(|q| self.loss(q, &self.k), &self.q, &dq).map(drop),
            check.check(|k| self.loss(&self.q, k), &self.k, &dk).map(drop),
        ]
    }
}

#[test]
fn finite_differences_tell_them_apart() {
    for seed in 0..20 {
        let head = Head::new(seed);
        for variant in [Right, RightFromOutput] {
            for result in head.check(variant) {
                result.unwrap();
            }
        }
        for variant in [OtherAxis, OtherAxisOfOutput, WithoutP, Division, WithoutDelta] {
            for result in head.check(variant) {
                let error = result.expect_err(&format!("{variant:?} passes, seed {seed}"));
                assert!(matches!(error, GradError::Element { .. }), "{variant:?} {error}");
            }
        }
    }
}

/// The kernel computes the right one.
#[test]
fn kernel_is_the_right_variant() {
    let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n: SIZE, m: SIZE, d: SIZE, e: SIZE };
    let call = Call::<f64>::new(sizes, &Features::default(), 0);
    let of_call = |x: &ndarray::Array4<f64>| {
        x.clone().into_shape_with_order((SIZE, SIZE)).unwrap().into_dimensionality::<Ix2>().unwrap()
    };
    let head = Head {
        q: of_call(&call.q),
        k: of_call(&call.k),
        v: of_call(&call.v),
        d_o: of_call(&call.d_o),
    };
    for tiling in common::tilings() {
        let got = call.run(&tiling);
        let mut want = got.clone();
        let to_call = |x: Array2<f64>| x.insert_axis(Axis(0)).insert_axis(Axis(0));
        let (dq, dk) = head.gradients(Right);
        (want.dq, want.dk) = (to_call(dq), to_call(dk));
        check_gradients::<f64>(&got, &want).unwrap();
        let (dq, dk) = head.gradients(WithoutDelta);
        (want.dq, want.dk) = (to_call(dq), to_call(dk));
        check_gradients::<f64>(&got, &want).unwrap_err();
    }
}
