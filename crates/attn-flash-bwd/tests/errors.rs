//! Bad arguments give an error that names them, in every form of the call, and never a panic.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use attn_flash::{AncestorMask, Options, Window};
use attn_flash_bwd::{
    Error, GradientsMut, Inputs, Tiling, VarlenGradientsMut, VarlenInputs, Workspace,
    attention_backward, attention_backward_into, attention_backward_naive,
    attention_backward_reference, attention_varlen_backward, attention_varlen_backward_into,
    attention_varlen_backward_reference,
};
use ndarray::{
    Array1, Array2, Array3, Array4, ArrayD, ArrayView2, ArrayView3, ArrayView4, Dimension, IxDyn,
};
use proptest::prelude::*;
use tensor_utils::testing::property_config;
use tensor_utils::{Isa, IsaError, ShapeError};

/// Shapes of a call.
#[derive(Debug, Clone, Copy)]
struct Shapes {
    q: [usize; 4],
    k: [usize; 4],
    v: [usize; 4],
    o: [usize; 4],
    lse: [usize; 3],
    d_o: [usize; 4],
    d_lse: Option<[usize; 3]>,
}

const GOOD: Shapes = Shapes {
    q: [2, 4, 5, 8],
    k: [2, 2, 6, 8],
    v: [2, 2, 6, 3],
    o: [2, 4, 5, 3],
    lse: [2, 4, 5],
    d_o: [2, 4, 5, 3],
    d_lse: Some([2, 4, 5]),
};

impl Shapes {
    /// The other shapes follow from these.
    fn of(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Self {
        let [b, h, n, _] = q;
        let (o, lse) = ([b, h, n, v[3]], [b, h, n]);
        Self { q, k, v, o, lse, d_o: o, d_lse: Some(lse) }
    }

    /// Views of one element that stands for all: no memory, whatever the shape.
    fn inputs<'a>(&self, one: &'a ndarray::Array0<f32>) -> Inputs<'a, f32> {
        let four = |shape: [usize; 4]| -> ArrayView4<'a, f32> { one.broadcast(shape).unwrap() };
        let three = |shape: [usize; 3]| -> ArrayView3<'a, f32> { one.broadcast(shape).unwrap() };
        Inputs {
            q: four(self.q),
            k: four(self.k),
            v: four(self.v),
            o: four(self.o),
            lse: three(self.lse),
            d_o: four(self.d_o),
            d_lse: self.d_lse.map(three),
        }
    }

    /// Runs the call in every form and returns their results without the values.
    fn all_forms(&self, options: &Options<'_, f32>) -> [Result<(), Error>; 4] {
        let one = ndarray::arr0(1.0_f32);
        let inputs = &self.inputs(&one);
        let form = |run: &dyn Fn() -> Result<(), Error>| {
            catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| panic!("{self:?} {options:?}"))
        };
        [
            form(&|| attention_backward(inputs, options).map(drop)),
            form(&|| into(inputs, options)),
            form(&|| attention_backward_reference(inputs, options).map(drop)),
            form(&|| attention_backward_naive(inputs, options).map(drop)),
        ]
    }

    /// Checks that all forms reject the call and name the argument.
    fn rejected_for(&self, argument: &str, options: &Options<'_, f32>) -> [Error; 4] {
        self.all_forms(options).map(|result| {
            let error = result.expect_err(&format!("{argument} {self:?} {options:?}"));
            let message = error.to_string();
            assert!(message.contains(&format!("`{argument}`")), "{argument}: {message}");
            error
        })
    }
}

/// Gradients that remember whether they were touched.
struct Filled {
    dq: Array4<f32>,
    dk: Array4<f32>,
    dv: Array4<f32>,
    delta: Array3<f32>,
    dbias: Option<ArrayD<f32>>,
    dsinks: Option<Array1<f32>>,
}

impl Filled {
    fn new(inputs: &Inputs<'_, f32>, options: &Options<'_, f32>) -> Self {
        fn filled<D: Dimension>(shape: D) -> ndarray::Array<f32, D> {
            ndarray::Array::from_elem(shape, 7.0)
        }
        Self {
            dq: filled(inputs.q.raw_dim()),
            dk: filled(inputs.k.raw_dim()),
            dv: filled(inputs.v.raw_dim()),
            delta: filled(inputs.lse.raw_dim()),
            dbias: options.bias.as_ref().map(|bias| filled(bias.raw_dim())),
            dsinks: options.sinks.map(|sinks| filled(ndarray::Ix1(sinks.len()))),
        }
    }

    fn view_mut(&mut self) -> GradientsMut<'_, f32> {
        GradientsMut {
            dq: self.dq.view_mut(),
            dk: self.dk.view_mut(),
            dv: self.dv.view_mut(),
            delta: Some(self.delta.view_mut()),
            dbias: self.dbias.as_mut().map(|dbias| dbias.view_mut()),
            dsinks: self.dsinks.as_mut().map(|dsinks| dsinks.view_mut()),
        }
    }

    fn is_untouched(&self) -> bool {
        let all = self.dq.iter().chain(&self.dk).chain(&self.dv).chain(&self.delta);
        let all = all.chain(self.dbias.iter().flatten()).chain(self.dsinks.iter().flatten());
        all.copied().all(|x| x == 7.0)
    }
}

fn into(inputs: &Inputs<'_, f32>, options: &Options<'_, f32>) -> Result<(), Error> {
    into_with(inputs, options, &mut Workspace::new(inputs, &Tiling::default())?)
}

fn into_with(
    inputs: &Inputs<'_, f32>,
    options: &Options<'_, f32>,
    workspace: &mut Workspace<f32>,
) -> Result<(), Error> {
    let mut gradients = Filled::new(inputs, options);
    let result = attention_backward_into(gradients.view_mut(), inputs, options, workspace);
    assert!(result.is_ok() || gradients.is_untouched(), "gradients of a failed call were touched");
    result
}

#[test]
fn good_call() {
    for d_lse in [GOOD.d_lse, None] {
        for result in (Shapes { d_lse, ..GOOD }).all_forms(&Options::default()) {
            result.unwrap();
        }
    }
}

#[test]
fn mismatched_shapes() {
    let rejected = |argument: &str, shapes: Shapes| {
        for error in shapes.rejected_for(argument, &Options::default()) {
            let shape = match &error {
                Error::Shape(error) | Error::Forward(attn_flash::Error::Shape(error)) => error,
                other => panic!("{other:?}"),
            };
            assert!(matches!(shape, ShapeError::Mismatch { arg, .. } if *arg == argument));
        }
    };
    for length in [1, 7, 9] {
        let changed = |mut shape: [usize; 4], axis: usize| {
            shape[axis] = length;
            shape
        };
        rejected("k", Shapes { k: changed(GOOD.k, 0), ..GOOD });
        rejected("k", Shapes { k: changed(GOOD.k, 3), ..GOOD });
        for axis in 0..3 {
            rejected("v", Shapes { v: changed(GOOD.v, axis), ..GOOD });
        }
        for axis in 0..4 {
            rejected("o", Shapes { o: changed(GOOD.o, axis), ..GOOD });
            rejected("d_o", Shapes { d_o: changed(GOOD.d_o, axis), ..GOOD });
        }
        for axis in 0..3 {
            let mut lse = GOOD.lse;
            lse[axis] = length;
            rejected("lse", Shapes { lse, ..GOOD });
            rejected("d_lse", Shapes { d_lse: Some(lse), ..GOOD });
        }
    }
}

#[test]
fn what_the_forward_pass_refuses() {
    for (heads, key_heads) in [(4, 3), (3, 2), (2, 4), (1, 0)] {
        let shapes = Shapes::of([2, heads, 5, 8], [2, key_heads, 6, 8], [2, key_heads, 6, 3]);
        let expected = attn_flash::Error::HeadsNotDivisible { query_heads: heads, key_heads };
        for error in shapes.rejected_for("q", &Options::default()) {
            assert_eq!(error, Error::Forward(expected.clone()));
        }
    }
    let no_columns = Shapes::of([2, 4, 5, 0], [2, 2, 6, 0], [2, 2, 6, 3]);
    no_columns.rejected_for("q", &Options::default());
    Shapes::of([2, 4, 5, 8], [2, 2, 6, 8], [2, 2, 6, 0]).rejected_for("v", &Options::default());

    let refused = |option: &str, options: &Options<'_, f32>| {
        for error in GOOD.rejected_for(option, options) {
            assert!(matches!(error, Error::Forward(_)), "{error:?}");
        }
    };
    // The last ones are numbers in f64 only.
    for scale in [f64::NAN, f64::INFINITY, 1e39] {
        refused("scale", &Options { scale: Some(scale), ..Options::default() });
    }
    for cap in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e39, 1e-46] {
        refused("softcap", &Options { softcap: Some(cap), ..Options::default() });
    }
    for lengths in [&[1][..], &[1, 2, 3], &[7, 1]] {
        refused("key_lengths", &Options { key_lengths: Some(lengths), ..Options::default() });
    }
    for sinks in [&[][..], &[1.0; 5]] {
        refused("sinks", &Options { sinks: Some(sinks), ..Options::default() });
    }
    for shape in [&[6, 5][..], &[5, 7], &[0], &[3, 4, 5, 6], &[1, 2, 4, 5, 6]] {
        let (bias, mask) = (ArrayD::zeros(IxDyn(shape)), ArrayD::from_elem(IxDyn(shape), true));
        refused("bias", &Options { bias: Some(bias.view()), ..Options::default() });
        refused("mask", &Options { mask: Some(mask.view()), ..Options::default() });
    }
    let slopes = Array2::zeros((3, 4));
    refused("alibi_slopes", &Options { alibi_slopes: Some(slopes.view()), ..Options::default() });
    for nodes in [4, 6] {
        let tree = AncestorMask::from_parents(&vec![-1; nodes]).unwrap();
        refused("tree", &Options { tree: Some(&tree), ..Options::default() });
    }
}

#[test]
fn gradients_of_the_wrong_shape() {
    let one = ndarray::arr0(1.0_f32);
    let inputs = GOOD.inputs(&one);
    let bias = ArrayD::zeros(IxDyn(&[4, 1, 6]));
    let options = Options { bias: Some(bias.view()), sinks: Some(&[0.0; 4]), ..Options::default() };
    let rejected = |argument: &str, spoil: &dyn Fn(&mut Filled)| {
        let mut gradients = Filled::new(&inputs, &options);
        spoil(&mut gradients);
        let mut workspace = Workspace::new(&inputs, &Tiling::default()).unwrap();
        let error =
            attention_backward_into(gradients.view_mut(), &inputs, &options, &mut workspace)
                .unwrap_err();
        let Error::Shape(ShapeError::Mismatch { arg, .. }) = error else { panic!("{error:?}") };
        assert_eq!(arg, argument);
        assert!(gradients.is_untouched());
    };
    let four = |axis: usize, length: usize, shape: [usize; 4]| {
        let mut shape = shape;
        shape[axis] = length;
        Array4::from_elem(shape, 7.0)
    };
    for length in [0, 1, 9] {
        for axis in 0..4 {
            rejected("dq", &|gradients| gradients.dq = four(axis, length, GOOD.q));
            rejected("dk", &|gradients| gradients.dk = four(axis, length, GOOD.k));
            rejected("dv", &|gradients| gradients.dv = four(axis, length, GOOD.v));
        }
        for axis in 0..3 {
            let mut shape = GOOD.lse;
            shape[axis] = length;
            rejected("delta", &|gradients| gradients.delta = Array3::from_elem(shape, 7.0));
        }
        rejected("dsinks", &|gradients| gradients.dsinks = Some(Array1::from_elem(length, 7.0)));
    }
    // Of the bias's own shape, not of one that it broadcasts to.
    for shape in [&[4, 5, 6][..], &[1, 4, 1, 6], &[4, 6], &[]] {
        rejected("dbias", &|gradients| {
            gradients.dbias = Some(ArrayD::from_elem(IxDyn(shape), 7.0));
        });
    }
}

#[test]
fn gradients_of_nothing() {
    let one = ndarray::arr0(1.0_f32);
    let inputs = GOOD.inputs(&one);
    let options = Options::default();
    let mut workspace = Workspace::new(&inputs, &Tiling::default()).unwrap();
    for (gradient, option) in [("dbias", "bias"), ("dsinks", "sinks")] {
        let mut gradients = Filled::new(&inputs, &options);
        if gradient == "dbias" {
            gradients.dbias = Some(ArrayD::from_elem(IxDyn(&[5, 6]), 7.0));
        } else {
            gradients.dsinks = Some(Array1::from_elem(4, 7.0));
        }
        let error =
            attention_backward_into(gradients.view_mut(), &inputs, &options, &mut workspace)
                .unwrap_err();
        assert_eq!(error, Error::NoInput { gradient, option });
        let message = error.to_string();
        assert!(message.contains(&format!("`{gradient}`")) && message.contains(option));
        assert!(gradients.is_untouched());
    }
}

#[test]
fn tilings() {
    let one = ndarray::arr0(1.0_f32);
    let inputs = GOOD.inputs(&one);
    for block in ["query_block", "key_block"] {
        let mut tiling = Tiling::default();
        if block == "query_block" {
            tiling.query_block = 0;
        } else {
            tiling.key_block = 0;
        }
        let error = Workspace::new(&inputs, &tiling).unwrap_err();
        assert_eq!(error, Error::EmptyBlock { block });
        assert!(error.to_string().contains(block));
    }
    for isa in Isa::ALL {
        let tiling = Tiling { isa: Some(isa), ..Tiling::default() };
        match Workspace::new(&inputs, &tiling) {
            Ok(_) => assert!(isa.is_available()),
            Err(error) => assert_eq!(error, Error::Isa(IsaError::Unavailable(isa))),
        }
    }
}

#[test]
fn workspaces_that_are_too_small() {
    let one = ndarray::arr0(1.0_f32);
    let options = Options::default();
    let inputs = GOOD.inputs(&one);
    let smaller = [
        Shapes::of([2, 4, 5, 7], [2, 2, 6, 7], [2, 2, 6, 3]),
        Shapes::of([2, 4, 5, 8], [2, 2, 6, 8], [2, 2, 6, 2]),
        Shapes::of([2, 4, 4, 8], [2, 2, 6, 8], [2, 2, 6, 3]),
        Shapes::of([2, 2, 5, 8], [2, 2, 6, 8], [2, 2, 6, 3]),
        Shapes::of([0, 2, 5, 8], [0, 2, 6, 8], [0, 2, 6, 3]),
    ];
    for shapes in smaller {
        let mut workspace = Workspace::new(&shapes.inputs(&one), &Tiling::default()).unwrap();
        let mut gradients = Filled::new(&inputs, &options);
        let error =
            attention_backward_into(gradients.view_mut(), &inputs, &options, &mut workspace)
                .unwrap_err();
        let Error::WorkspaceTooSmall { what, needed, room } = error else { panic!("{error:?}") };
        assert!(needed > room && !what.is_empty(), "{what} {needed} {room}");
        assert!(gradients.is_untouched());
    }
    let larger = Shapes::of([3, 4, 9, 16], [3, 2, 20, 16], [3, 2, 20, 5]);
    let mut workspace = Workspace::new(&larger.inputs(&one), &Tiling::default()).unwrap();
    let mut gradients = Filled::new(&inputs, &options);
    attention_backward_into(gradients.view_mut(), &inputs, &options, &mut workspace).unwrap();
}

/// Shapes and offsets of a packed call; heads 4 on 2.
#[derive(Debug, Clone)]
struct Packed {
    q: [usize; 3],
    k: [usize; 3],
    v: [usize; 3],
    o: [usize; 3],
    lse: [usize; 2],
    d_o: [usize; 3],
    d_lse: [usize; 2],
    query_offsets: Vec<usize>,
    key_offsets: Vec<usize>,
}

impl Packed {
    fn good() -> Self {
        Self {
            q: [9, 4, 8],
            k: [11, 2, 8],
            v: [11, 2, 3],
            o: [9, 4, 3],
            lse: [9, 4],
            d_o: [9, 4, 3],
            d_lse: [9, 4],
            query_offsets: vec![0, 4, 4, 9],
            key_offsets: vec![0, 5, 6, 11],
        }
    }

    fn all_forms(&self, options: &Options<'_, f32>) -> [Result<(), Error>; 3] {
        let one = ndarray::arr0(1.0_f32);
        let three = |shape: [usize; 3]| -> ArrayView3<'_, f32> { one.broadcast(shape).unwrap() };
        let two = |shape: [usize; 2]| -> ArrayView2<'_, f32> { one.broadcast(shape).unwrap() };
        let inputs = &VarlenInputs {
            q: three(self.q),
            k: three(self.k),
            v: three(self.v),
            query_offsets: &self.query_offsets,
            key_offsets: &self.key_offsets,
            o: three(self.o),
            lse: two(self.lse),
            d_o: three(self.d_o),
            d_lse: Some(two(self.d_lse)),
        };
        let into = || {
            let mut workspace = Workspace::new_varlen(inputs, &Tiling::default())?;
            let [mut dq, mut dk, mut dv] = [self.q, self.k, self.v].map(Array3::zeros);
            let gradients = VarlenGradientsMut {
                dq: dq.view_mut(),
                dk: dk.view_mut(),
                dv: dv.view_mut(),
                delta: None,
                dbias: None,
                dsinks: None,
            };
            attention_varlen_backward_into(gradients, inputs, options, &mut workspace)
        };
        let form = |run: &dyn Fn() -> Result<(), Error>| {
            catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| panic!("{self:?}"))
        };
        [
            form(&|| attention_varlen_backward(inputs, options).map(drop)),
            form(&into),
            form(&|| attention_varlen_backward_reference(inputs, options).map(drop)),
        ]
    }

    fn rejected_for(&self, argument: &str, options: &Options<'_, f32>) {
        for result in self.all_forms(options) {
            let message = result.expect_err(argument).to_string();
            assert!(message.contains(&format!("`{argument}`")), "{argument}: {message}");
        }
    }
}

#[test]
fn packed_calls() {
    let plain = Options::default();
    for result in Packed::good().all_forms(&plain) {
        result.unwrap();
    }
    let good = Packed::good;
    Packed { q: [8, 4, 8], ..good() }.rejected_for("query_offsets", &plain);
    Packed { k: [12, 2, 8], v: [12, 2, 3], ..good() }.rejected_for("key_offsets", &plain);
    Packed { k: [11, 2, 7], ..good() }.rejected_for("k", &plain);
    Packed { v: [11, 1, 3], ..good() }.rejected_for("v", &plain);
    Packed { q: [9, 3, 8], ..good() }.rejected_for("q", &plain);
    Packed { o: [9, 4, 4], ..good() }.rejected_for("o", &plain);
    Packed { o: [8, 4, 3], ..good() }.rejected_for("o", &plain);
    Packed { lse: [9, 3], ..good() }.rejected_for("lse", &plain);
    Packed { d_o: [9, 4, 2], ..good() }.rejected_for("d_o", &plain);
    Packed { d_lse: [8, 4], ..good() }.rejected_for("d_lse", &plain);
    for offsets in [&[1, 4, 4, 9][..], &[0, 4, 4, 8], &[0, 5, 4, 9], &[0, usize::MAX, 4, 9]] {
        let call = Packed { query_offsets: offsets.to_vec(), ..good() };
        call.rejected_for("query_offsets", &plain);
    }
    for offsets in [&[0, 5, 6, 10][..], &[0, 7, 6, 11]] {
        Packed { key_offsets: offsets.to_vec(), ..good() }.rejected_for("key_offsets", &plain);
    }
    for result in (Packed { key_offsets: vec![0, 11], ..good() }).all_forms(&plain) {
        result.unwrap_err();
    }
    // The second sequence has one key, the longest five.
    let options = Options { key_lengths: Some(&[5, 2, 5]), ..plain.clone() };
    good().rejected_for("key_lengths", &options);
    let bias = ArrayD::zeros(IxDyn(&[9, 11]));
    good().rejected_for("bias", &Options { bias: Some(bias.view()), ..plain.clone() });
    good().rejected_for("sinks", &Options { sinks: Some(&[0.0; 3]), ..plain.clone() });
    let tree = AncestorMask::from_parents(&[-1; 5]).unwrap();
    good().rejected_for("tree", &Options { tree: Some(&tree), ..plain });
}

proptest! {
    #![proptest_config(property_config(64, "proptest-regressions/errors.txt"))]

    /// Whatever the shapes and numbers: all forms agree whether the call is good, and none panics.
    #[test]
    fn forms_agree_on_what_is_good(
        q in prop::array::uniform4(0..4_usize),
        k in prop::array::uniform4(0..4_usize),
        v in prop::array::uniform4(0..4_usize),
        agree in prop::array::uniform5(prop::bool::weighted(0.9)),
        causal: bool,
        query_offset in prop::option::of(select_extreme()),
        left in prop::option::of(select_extreme()),
        right in prop::option::of(select_extreme()),
        scale in prop::option::weighted(0.2, any::<f64>()),
        softcap in prop::option::weighted(0.2, any::<f64>()),
        bias in prop::option::weighted(0.2, prop::collection::vec(0..4_usize, 0..5)),
        key_lengths in prop::option::weighted(0.2, prop::collection::vec(0..4_usize, 0..4)),
        slopes in prop::option::weighted(0.2, prop::array::uniform2(0..4_usize)),
        sinks in prop::option::weighted(0.2, prop::collection::vec(any::<f32>(), 0..4)),
        nodes in prop::option::weighted(0.2, 0..4_usize),
    ) {
        let (mut k, mut v) = (k, v);
        // Mostly shapes that fit, so that the options are looked at.
        (0..2).filter(|&i| agree[i]).for_each(|i| k[3 * i] = q[3 * i]);
        (0..3).filter(|&axis| agree[2 + axis]).for_each(|axis| v[axis] = k[axis]);
        let bias = bias.map(|shape| ArrayD::<f32>::zeros(IxDyn(&shape)));
        let slopes = slopes.map(|[b, h]| Array2::<f32>::zeros((b, h)));
        let tree = nodes.map(|nodes| AncestorMask::from_parents(&vec![-1; nodes]).unwrap());
        let options = Options {
            scale,
            causal,
            query_offset,
            window: Window {
                left: left.map(|x| x as usize),
                right: right.map(|x| x as usize),
            },
            softcap,
            bias: bias.as_ref().map(|bias| bias.view()),
            key_lengths: key_lengths.as_deref(),
            alibi_slopes: slopes.as_ref().map(|slopes| slopes.view()),
            sinks: sinks.as_deref(),
            tree: tree.as_ref(),
            ..Options::default()
        };
        let results = Shapes::of(q, k, v).all_forms(&options);
        let good = results.each_ref().map(Result::is_ok);
        prop_assert!(good == [true; 4] || good == [false; 4], "{results:?}");
    }
}

/// Small numbers and the largest there are.
fn select_extreme() -> impl Strategy<Value = isize> {
    prop::sample::select(
        &[isize::MIN, isize::MIN + 1, -3, -1, 0, 1, 3, isize::MAX - 1, isize::MAX][..],
    )
}

/// Whether `run` returns in a time that is none for a machine.
fn returns(what: &str, run: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        run();
        sender.send(()).unwrap();
    });
    receiver.recv_timeout(Duration::from_secs(10)).unwrap_or_else(|_| panic!("no answer: {what}"));
}

/// A call without queries and keys has nothing to do, whatever the other lengths are, and however large
/// the workspace is.
#[test]
fn huge_but_empty() {
    let huge = 1 << 40;
    for [b, h, n, m] in
        [[0, huge, 3, 3], [huge, 0, 3, 3], [0, 2, huge, huge], [2, 0, huge, huge], [huge, 2, 0, 0]]
    {
        returns(&format!("{:?}", [b, h, n, m]), move || {
            let one = ndarray::arr0(1.0_f32);
            let shapes = Shapes::of([b, h, n, 8], [b, h, m, 8], [b, h, m, 3]);
            let options = Options { causal: true, ..Options::default() };
            into(&shapes.inputs(&one), &options).unwrap();
            let mut larger = Workspace::new(&GOOD.inputs(&one), &Tiling::default()).unwrap();
            into_with(&shapes.inputs(&one), &options, &mut larger).unwrap();
        });
    }
    returns("packed", move || {
        let one = ndarray::arr0(1.0_f32);
        let three = || one.broadcast((0, huge, 3)).unwrap();
        let inputs = VarlenInputs {
            q: three(),
            k: three(),
            v: three(),
            query_offsets: &[0, 0],
            key_offsets: &[0, 0],
            o: three(),
            lse: one.broadcast((0, huge)).unwrap(),
            d_o: three(),
            d_lse: None,
        };
        attention_varlen_backward(&inputs, &Options::default()).unwrap();
    });
}

/// A bias that does not fit is refused before there is room for its gradient.
#[test]
fn huge_bias_that_does_not_fit() {
    let one = ndarray::arr0(1.0_f32);
    let bias = one.broadcast(IxDyn(&[1 << 20, 1 << 20, 1 << 15])).unwrap();
    let options = Options { bias: Some(bias), ..Options::default() };
    let error = attention_backward(&GOOD.inputs(&one), &options).unwrap_err();
    let varlen = Packed::good().all_forms(&options).map(Result::unwrap_err);
    for error in varlen.into_iter().chain([error]) {
        assert!(error.to_string().contains("`bias`"), "{error}");
    }
}

/// Sizes that no memory can hold.
#[test]
fn too_large_to_exist() {
    let one = ndarray::arr0(1.0_f32);
    let options = Options::default();
    let must_fail = |what: &str, run: &dyn Fn() -> Result<(), Error>| {
        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| panic!("{what}"));
        result.expect_err(what);
    };
    let rows = 1 << 20;
    let many_queries = Shapes::of([rows, rows, rows, 1], [rows, rows, 1, 1], [rows, rows, 1, 1]);
    let many_columns = Shapes::of([1, 1, 1, 1 << 50], [1, 1, 1, 1 << 50], [1, 1, 1, 1]);
    for shapes in [many_queries, many_columns] {
        let inputs = shapes.inputs(&one);
        must_fail("attention_backward", &|| attention_backward(&inputs, &options).map(drop));
        must_fail("workspace", &|| Workspace::new(&inputs, &Tiling::default()).map(drop));
    }
    let inputs = GOOD.inputs(&one);
    for key_block in [usize::MAX, usize::MAX / 8] {
        let tiling = Tiling { key_block, ..Tiling::default() };
        must_fail("blocks", &|| Workspace::new(&inputs, &tiling).map(drop));
    }
}
