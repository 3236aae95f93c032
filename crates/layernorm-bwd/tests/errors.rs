//! Bad arguments give an error that names them, in every form of the call, and never a panic.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use layernorm_bwd::{
    Error, GradientsMut, Options, Saved, StatisticsMut, Tiling, Workspace, layer_norm,
    layer_norm_backward, layer_norm_backward_into, layer_norm_backward_naive,
    layer_norm_backward_reference, layer_norm_in_place, layer_norm_into, layer_norm_naive,
    layer_norm_reference, rows,
};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, arr0, array};
use proptest::prelude::*;
use tensor_utils::testing::property_config;
use tensor_utils::{Isa, IsaError, ShapeError};

/// Runs both passes in every form, with `x` and `dy` of these shapes; without the values.
fn all_forms(x: [usize; 2], dy: [usize; 2], options: &Options<'_, f32>) -> [Result<(), Error>; 8] {
    // One element stands for all: no memory, whatever the shape.
    let one = arr0(1.0_f32);
    let (x, dy) = (one.broadcast(x).unwrap(), one.broadcast(dy).unwrap());
    let vector = one.broadcast(x.nrows()).unwrap();
    let form = |run: &dyn Fn() -> Result<(), Error>| {
        let result = catch_unwind(AssertUnwindSafe(run));
        result.unwrap_or_else(|_| panic!("{:?} {:?} {options:?}", x.dim(), dy.dim()))
    };
    [
        form(&|| layer_norm(x, options).map(drop)),
        form(&|| layer_norm_reference(x, options).map(drop)),
        form(&|| layer_norm_naive(x, options).map(drop)),
        form(&|| layer_norm_backward(dy, Saved::Input { x }, options).map(drop)),
        form(&|| {
            let saved = Saved::Statistics { x, mean: vector, rstd: vector };
            layer_norm_backward(dy, saved, options).map(drop)
        }),
        form(&|| layer_norm_backward(dy, Saved::Output { y: x, rstd: vector }, options).map(drop)),
        form(&|| layer_norm_backward_reference(dy, x, options).map(drop)),
        form(&|| layer_norm_backward_naive::<_, f32>(dy, x, options).map(drop)),
    ]
}

/// Checks that every form rejects the call and names the argument.
fn rejects(arguments: &[&str], x: [usize; 2], dy: [usize; 2], options: &Options<'_, f32>) {
    for (form, result) in all_forms(x, dy, options).into_iter().enumerate() {
        let error = result.expect_err(&format!("form {form} accepts {x:?} {dy:?}"));
        let message = error.to_string();
        let named = arguments.iter().any(|argument| message.contains(&format!("`{argument}`")));
        assert!(named, "form {form}: {message}");
    }
}

#[test]
fn good_calls_pass() {
    for shape in [[3, 4], [0, 4], [1, 1]] {
        for result in all_forms(shape, shape, &Options::default()) {
            assert_eq!(result, Ok(()));
        }
    }
}

#[test]
fn options_are_checked() {
    for eps in [-1e-9, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        rejects(&["eps"], [3, 4], [3, 4], &Options { eps, ..Options::default() });
    }
    let vector = Array1::<f32>::ones(5);
    let gamma = Options { gamma: Some(vector.view()), ..Options::default() };
    rejects(&["gamma"], [3, 4], [3, 4], &gamma);
    let beta = Options { beta: Some(vector.view()), ..Options::default() };
    rejects(&["beta"], [3, 4], [3, 4], &beta);
    let error = layer_norm(Array2::<f32>::ones((3, 4)).view(), &gamma).unwrap_err();
    assert_eq!(error.to_string(), "`gamma` has shape [5], expected [4]");
}

#[test]
fn rows_must_not_be_empty() {
    for rows in [0, 1, 3] {
        rejects(&["x", "dy"], [rows, 0], [rows, 0], &Options::default());
    }
}

#[test]
fn shapes_of_the_backward_pass_must_fit() {
    let options = Options::<f32>::default();
    for x in [[2, 4], [3, 5], [0, 4], [4, 3]] {
        for (form, result) in all_forms(x, [3, 4], &options).into_iter().enumerate().skip(3) {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("`x`") || message.contains("`y`"), "{form}: {message}");
        }
    }
    let (x, one) = (Array2::<f32>::ones((3, 4)), Array1::<f32>::ones(4));
    let (three, four) = (one.slice_axis(ndarray::Axis(0), (..3).into()), one.view());
    let backward = |saved| layer_norm_backward(x.view(), saved, &options).unwrap_err().to_string();
    let x = x.view();
    let mean = backward(Saved::Statistics { x, mean: four, rstd: three });
    assert_eq!(mean, "`mean` has shape [4], expected [3]");
    assert!(backward(Saved::Statistics { x, mean: three, rstd: four }).contains("`rstd`"));
    assert!(backward(Saved::Output { y: x, rstd: four }).contains("`rstd`"));
}

/// What the outputs hold shows that a failed call has not touched them.
struct Outputs {
    matrix: Array2<f32>,
    vectors: [Array1<f32>; 2],
}

impl Outputs {
    fn new(rows: usize, d: usize, lengths: [usize; 2]) -> Self {
        let vectors = lengths.map(|len| Array1::from_elem(len, 7.0));
        Self { matrix: Array2::from_elem((rows, d), 7.0), vectors }
    }

    fn assert_untouched(&self) {
        assert!(self.matrix.iter().chain(self.vectors.iter().flatten()).all(|&x| x == 7.0));
    }
}

fn forward_error(mut outputs: Outputs, workspace: &mut Workspace<f32>) -> Error {
    let x = Array2::<f32>::ones((3, 4));
    let [mean, rstd] = &mut outputs.vectors;
    let statistics = StatisticsMut { mean: mean.view_mut(), rstd: rstd.view_mut() };
    let y = outputs.matrix.view_mut();
    let options = Options::<f32>::default();
    let error = layer_norm_into(y, Some(statistics), x.view(), &options, workspace).unwrap_err();
    outputs.assert_untouched();
    error
}

fn backward_error(
    mut outputs: Outputs,
    dres: Option<ArrayView2<'_, f32>>,
    workspace: &mut Workspace<f32>,
) -> Error {
    let x = Array2::<f32>::ones((3, 4));
    let [dgamma, dbeta] = &mut outputs.vectors;
    let gradients = GradientsMut {
        dx: Some(outputs.matrix.view_mut()),
        dgamma: Some(dgamma.view_mut()),
        dbeta: Some(dbeta.view_mut()),
        dres,
        ..GradientsMut::default()
    };
    let (x, options) = (x.view(), Options::<f32>::default());
    let saved = Saved::Input { x };
    let error = layer_norm_backward_into(gradients, x, saved, &options, workspace).unwrap_err();
    outputs.assert_untouched();
    error
}

#[test]
fn outputs_must_fit_and_stay_untouched() {
    let mut workspace = Workspace::new(3, 5, &Tiling::default()).unwrap();
    for (outputs, argument) in [
        (Outputs::new(3, 5, [3, 3]), "y"),
        (Outputs::new(2, 4, [3, 3]), "y"),
        (Outputs::new(3, 4, [4, 3]), "mean"),
        (Outputs::new(3, 4, [3, 2]), "rstd"),
    ] {
        let message = forward_error(outputs, &mut workspace).to_string();
        assert!(message.contains(&format!("`{argument}`")), "{message}");
    }
    for (outputs, argument) in [
        (Outputs::new(3, 5, [4, 4]), "dx"),
        (Outputs::new(4, 3, [4, 4]), "dx"),
        (Outputs::new(3, 4, [3, 4]), "dgamma"),
        (Outputs::new(3, 4, [4, 5]), "dbeta"),
    ] {
        let message = backward_error(outputs, None, &mut workspace).to_string();
        assert!(message.contains(&format!("`{argument}`")), "{message}");
    }
    let dres = Array2::<f32>::ones((3, 3));
    let error = backward_error(Outputs::new(3, 4, [4, 4]), Some(dres.view()), &mut workspace);
    assert!(error.to_string().contains("`dres`"), "{error}");
}

#[test]
fn workspaces_must_be_large_enough() {
    for (rows, row_length) in [(2, 4), (3, 3), (0, 0)] {
        let mut workspace = Workspace::new(rows, row_length, &Tiling::default()).unwrap();
        let want = Error::WorkspaceTooSmall {
            rows: 3,
            row_length: 4,
            workspace_rows: rows,
            workspace_row_length: row_length,
        };
        assert_eq!(forward_error(Outputs::new(3, 4, [3, 3]), &mut workspace), want);
        assert_eq!(backward_error(Outputs::new(3, 4, [4, 4]), None, &mut workspace), want);
        let mut x = Array2::<f32>::from_elem((3, 4), 7.0);
        let options = Options::<f32>::default();
        let in_place = layer_norm_in_place(x.view_mut(), None, &options, &mut workspace);
        assert_eq!(in_place, Err(want));
        assert!(x.iter().all(|&x| x == 7.0));
    }
}

#[test]
#[cfg_attr(miri, ignore = "asks for more memory than an interpreter has")]
fn what_memory_cannot_hold_is_an_error() {
    for (rows, row_length) in [(1, usize::MAX), (usize::MAX, usize::MAX), (1, 1 << 60)] {
        let error = Workspace::<f32>::new(rows, row_length, &Tiling::default()).unwrap_err();
        assert!(matches!(error, Error::Shape(ShapeError::TooLarge { arg: "workspace", .. })));
    }
    let x = arr0(1.0_f32);
    let x = x.broadcast((1 << 30, 1 << 30)).unwrap();
    let error = layer_norm(x, &Options::<f32>::default()).unwrap_err();
    assert!(matches!(error, Error::Shape(ShapeError::TooLarge { arg: "y", .. })), "{error}");
}

/// x_hat cannot be recovered from y where the factor is 0.
#[test]
fn factor_of_zero_hides_the_input() {
    let y = Array2::<f32>::ones((2, 3));
    let rstd = Array1::ones(2);
    let saved = || Saved::Output { y: y.view(), rstd: rstd.view() };
    let backward = |gamma: ArrayView1<'_, f32>, one_plus_gamma| {
        let options = Options { gamma: Some(gamma), one_plus_gamma, ..Options::default() };
        layer_norm_backward(y.view(), saved(), &options)
    };
    let error = backward(array![1.0, 2.0, 0.0].view(), false).unwrap_err();
    let message = "option `gamma` is 0.0 in column 2, expected a factor other than 0 in every \
                   column, to recover x_hat from y";
    assert_eq!(error.to_string(), message);
    assert!(backward(array![0.5, -0.0, 1.0].view(), false).is_err());
    assert!(backward(array![0.5, 0.0, 1.0].view(), true).is_ok());
    assert!(backward(array![0.5, -1.0, 1.0].view(), true).is_err());
    assert!(layer_norm_backward(y.view(), saved(), &Options::<f32>::default()).is_ok());
    // With x there is nothing to recover.
    let gamma = array![0.0_f32, 0.0, 0.0];
    let options = Options { gamma: Some(gamma.view()), ..Options::default() };
    let got = layer_norm_backward(y.view(), Saved::Input { x: y.view() }, &options).unwrap();
    assert!(got.dx.iter().all(|&x| x == 0.0));
}

#[test]
fn missing_instruction_set_is_an_error() {
    for isa in Isa::ALL {
        let workspace = Workspace::<f32>::new(1, 1, &Tiling { isa: Some(isa) });
        if isa.is_available() {
            assert_eq!(workspace.unwrap().isa(), isa);
        } else {
            assert_eq!(workspace.unwrap_err(), Error::Isa(IsaError::Unavailable(isa)));
        }
    }
}

#[test]
fn nothing_wanted_is_nothing_done() {
    let x = Array2::<f32>::ones((3, 4));
    let mut workspace = Workspace::new(3, 4, &Tiling::default()).unwrap();
    let nothing = GradientsMut::<f32, f32>::default();
    let saved = Saved::Input { x: x.view() };
    let options = Options::default();
    layer_norm_backward_into(nothing, x.view(), saved, &options, &mut workspace).unwrap();
}

#[test]
fn scalars_have_no_rows() {
    let error = rows("x", arr0(1.0_f32).view()).unwrap_err();
    assert!(matches!(error, Error::NotRows { arg: "x", .. }), "{error}");
}

proptest! {
    #![proptest_config(property_config(64, "proptest-regressions/errors.txt"))]

    /// Any shapes, strides and values: a result or an error, no panic.
    #[test]
    fn nothing_panics(
        shapes in prop::array::uniform3((0..6_usize, 0..40_usize)),
        lengths in prop::array::uniform4(0..40_usize),
        fitting in prop::bool::weighted(0.5),
        value in prop_oneof![
            Just(f32::NAN), Just(f32::INFINITY), Just(f32::MAX), Just(0.0), Just(-1e-40), -9.0..9.0_f32
        ],
        eps in prop_oneof![Just(f64::NAN), Just(0.0), Just(1e300), -1.0..1.0],
        source in 0..3,
    ) {
        let [x, mut dy, mut out] = shapes;
        let [mut gamma, mut mean, mut rstd, mut dgamma] = lengths;
        if fitting {
            (dy, out) = (x, x);
            (gamma, dgamma, mean, rstd) = (x.1, x.1, x.0, x.0);
        }
        let x = Array2::from_elem(x, value);
        let dy = Array2::from_elem(dy, value).reversed_axes();
        let dy = if fitting { Array2::from_elem(x.dim(), value) } else { dy };
        let vector = |len| Array1::from_elem(len, value);
        let (gamma, mean, rstd) = (vector(gamma), vector(mean), vector(rstd));
        let options = Options { eps, gamma: Some(gamma.view()), ..Options::default() };
        let saved = match source {
            0 => Saved::Statistics { x: x.view(), mean: mean.view(), rstd: rstd.view() },
            1 => Saved::Input { x: x.view() },
            _ => Saved::Output { y: x.view(), rstd: rstd.view() },
        };
        let mut workspace = Workspace::new(6, 40, &Tiling::default()).unwrap();
        let mut dx = Array2::default(out);
        let mut dgamma = Array1::<f32>::default(dgamma);
        let gradients = GradientsMut {
            dx: Some(dx.view_mut()),
            dgamma: Some(dgamma.view_mut()),
            ..GradientsMut::default()
        };
        let run = || {
            let _ = layer_norm(x.view(), &options);
            let _ = layer_norm_backward_into(gradients, dy.view(), saved, &options, &mut workspace);
        };
        prop_assert!(catch_unwind(AssertUnwindSafe(run)).is_ok());
    }
}
