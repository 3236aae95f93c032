//! Bad arguments give an error that names them, in every form of the call, and never a panic.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use attn_flash::{
    AncestorMask, Error, Options, Tiling, Window, Workspace, attention, attention_into,
    attention_naive, attention_reference, attention_varlen, attention_varlen_into,
    attention_varlen_reference, merge_states, merge_states_into,
};
use ndarray::{Array2, Array3, Array4, ArrayD, ArrayView3, ArrayView4, IxDyn};
use proptest::prelude::*;
use tensor_utils::testing::property_config;
use tensor_utils::{Isa, IsaError, ShapeError};

/// Shapes of `q`, `k` and `v`.
type Shapes = [[usize; 4]; 3];

const GOOD: Shapes = [[2, 4, 5, 8], [2, 2, 6, 8], [2, 2, 6, 3]];

/// Runs the call in every form and returns their results without the values.
fn all_forms(shapes: Shapes, options: &Options<'_, f32>) -> [Result<(), Error>; 4] {
    // One element stands for all: no memory, whatever the shape.
    let one = ndarray::arr0(1.0_f32);
    let [q, k, v] = shapes.map(|shape| one.broadcast(shape).unwrap());
    let form = |run: &dyn Fn() -> Result<(), Error>| {
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| panic!("{shapes:?} {options:?}"))
    };
    [
        form(&|| attention(q, k, v, options).map(drop)),
        form(&|| into(q, k, v, options)),
        form(&|| attention_reference(q, k, v, options).map(drop)),
        form(&|| attention_naive(q, k, v, options).map(drop)),
    ]
}

fn into(
    q: ArrayView4<'_, f32>,
    k: ArrayView4<'_, f32>,
    v: ArrayView4<'_, f32>,
    options: &Options<'_, f32>,
) -> Result<(), Error> {
    let (b, h, n, d) = q.dim();
    let e = v.dim().3;
    let mut workspace = Workspace::new(d, e, &Tiling::default())?;
    let (mut o, mut lse) =
        (Array4::from_elem((b, h, n, e), 7.0), Array3::from_elem((b, h, n), 7.0));
    let result = attention_into(o.view_mut(), lse.view_mut(), q, k, v, options, &mut workspace);
    if result.is_err() {
        assert!(o.iter().chain(&lse).all(|&x| x == 7.0), "outputs of a failed call were touched");
    }
    result
}

/// Checks that all forms reject the call and name the argument.
fn rejects(argument: &str, shapes: Shapes, options: &Options<'_, f32>) -> Vec<Error> {
    let errors = all_forms(shapes, options).map(|result| {
        let error = result.expect_err(&format!("{argument} {shapes:?} {options:?}"));
        let message = error.to_string();
        assert!(message.contains(&format!("`{argument}`")), "{argument}: {message}");
        error
    });
    errors.to_vec()
}

fn change(argument: usize, axis: usize, length: usize) -> Shapes {
    let mut shapes = GOOD;
    shapes[argument][axis] = length;
    shapes
}

#[test]
fn good_call() {
    for result in all_forms(GOOD, &Options::default()) {
        result.unwrap();
    }
}

#[test]
fn mismatched_shapes() {
    let options = Options::default();
    for axis in [0, 3] {
        for error in rejects("k", change(0, axis, 7), &options) {
            assert!(matches!(error, Error::Shape(ShapeError::Mismatch { .. })), "{error:?}");
        }
        rejects("k", change(1, axis, 7), &options);
    }
    for axis in [0, 1, 2] {
        for error in rejects("v", change(2, axis, 7), &options) {
            assert!(matches!(error, Error::Shape(ShapeError::Mismatch { .. })), "{error:?}");
        }
    }
    for length in [5, 7] {
        rejects("v", change(1, 2, length), &options);
    }
}

#[test]
fn heads_not_divisible() {
    for (heads, key_heads) in [(4, 3), (3, 2), (2, 4), (1, 0)] {
        let shapes = [[2, heads, 5, 8], [2, key_heads, 6, 8], [2, key_heads, 6, 3]];
        for argument in ["q", "k"] {
            for error in rejects(argument, shapes, &Options::default()) {
                assert_eq!(error, Error::HeadsNotDivisible { query_heads: heads, key_heads });
            }
        }
    }
}

#[test]
fn zero_head_sizes() {
    let options = Options::default();
    for error in rejects("q", [[2, 4, 5, 0], [2, 2, 6, 0], [2, 2, 6, 3]], &options) {
        assert!(matches!(error, Error::Shape(ShapeError::EmptyAxis { arg: "q", .. })));
    }
    for error in rejects("v", change(2, 3, 0), &options) {
        assert!(matches!(error, Error::Shape(ShapeError::EmptyAxis { arg: "v", .. })));
    }
}

fn assert_option(errors: Vec<Error>, name: &str) {
    for error in errors {
        assert!(matches!(error, Error::Option { option, .. } if option == name), "{error:?}");
    }
}

#[test]
fn numbers_out_of_range() {
    // The last ones are numbers in f64 only.
    for scale in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e39, -1e39] {
        let options = Options { scale: Some(scale), ..Options::default() };
        assert_option(rejects("scale", GOOD, &options), "scale");
    }
    for cap in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, 1e39, 1e-46] {
        let options = Options { softcap: Some(cap), ..Options::default() };
        assert_option(rejects("softcap", GOOD, &options), "softcap");
    }
    // Not with all their digits.
    let finite = "expected a finite number";
    for (scale, softcap, text) in [
        (Some(1e300), None, format!("option `scale` is 1e300, {finite} in f32")),
        (Some(f64::NAN), None, format!("option `scale` is NaN, {finite} in f32")),
        (None, Some(1e300), format!("option `softcap` is 1e300, {finite} above 0 in f32")),
        (None, Some(-1e-300), format!("option `softcap` is -1e-300, {finite} above 0 in f32")),
    ] {
        let options = Options { scale, softcap, ..Options::default() };
        let [allocating, into, ..] = all_forms(GOOD, &options);
        for result in [allocating, into] {
            assert_eq!(result.unwrap_err().to_string(), text);
        }
    }
    let one = Array4::<f64>::ones((1, 1, 1, 1));
    let options = Options { scale: Some(1e39), softcap: Some(1e39), ..Options::default() };
    let got = attention(one.view(), one.view(), one.view(), &options).unwrap();
    assert_eq!(got.o, one);
}

#[test]
fn arrays_that_do_not_broadcast() {
    let shapes: [&[usize]; 8] = [
        &[6, 5],
        &[5, 7],
        &[0],
        &[2, 5, 6],
        &[3, 4, 5, 6],
        &[1, 2, 4, 5, 6],
        &[0, 6],
        &[2, 4, 1, 1, 1],
    ];
    for shape in shapes {
        let (bias, mask) = (ArrayD::zeros(IxDyn(shape)), ArrayD::from_elem(IxDyn(shape), true));
        let options = Options { bias: Some(bias.view()), ..Options::default() };
        for error in rejects("bias", GOOD, &options) {
            assert!(matches!(error, Error::Shape(ShapeError::NotBroadcastable { .. })));
        }
        let options = Options { mask: Some(mask.view()), ..Options::default() };
        for error in rejects("mask", GOOD, &options) {
            assert!(matches!(error, Error::Shape(ShapeError::NotBroadcastable { .. })));
        }
    }
}

#[test]
fn wrong_numbers_per_entry_or_head() {
    for lengths in [&[][..], &[1], &[1, 2, 3]] {
        let options = Options { key_lengths: Some(lengths), ..Options::default() };
        for error in rejects("key_lengths", GOOD, &options) {
            assert!(matches!(error, Error::Shape(ShapeError::Mismatch { .. })));
        }
    }
    for lengths in [[7, 1], [1, 7], [usize::MAX, 0]] {
        let options = Options { key_lengths: Some(&lengths), ..Options::default() };
        assert_option(rejects("key_lengths", GOOD, &options), "key_lengths");
    }
    for sinks in [&[][..], &[1.0], &[1.0; 5]] {
        let options = Options { sinks: Some(sinks), ..Options::default() };
        rejects("sinks", GOOD, &options);
    }
    for shape in [(0, 4), (2, 3), (3, 4), (2, 0), (4, 2)] {
        let slopes = Array2::zeros(shape);
        let options = Options { alibi_slopes: Some(slopes.view()), ..Options::default() };
        rejects("alibi_slopes", GOOD, &options);
    }
}

#[test]
fn trees_that_do_not_fit() {
    for nodes in [0, 4, 6] {
        let tree = AncestorMask::from_parents(&vec![-1; nodes]).unwrap();
        let options = Options { tree: Some(&tree), ..Options::default() };
        assert_option(rejects("tree", GOOD, &options), "tree");
    }
    let tree = AncestorMask::from_parents(&[-1; 5]).unwrap();
    let options = Options { tree: Some(&tree), ..Options::default() };
    let few_keys = [[2, 4, 5, 8], [2, 2, 4, 8], [2, 2, 4, 3]];
    assert_option(rejects("tree", few_keys, &options), "tree");
}

#[test]
fn parents_that_are_no_earlier_nodes() {
    for parents in [&[0][..], &[1, -1], &[-1, -2], &[-1, 1], &[-1, 0, 3], &[i64::MIN], &[i64::MAX]]
    {
        let error = AncestorMask::from_parents(parents).unwrap_err();
        assert!(matches!(error, Error::Option { option: "tree", .. }));
    }
    let tree = AncestorMask::from_parents(&[-1, 0, 0, 2]).unwrap();
    assert!(!tree.contains(4, 0) && !tree.contains(0, 4) && !tree.contains(usize::MAX, 0));
}

#[test]
fn outputs_of_the_wrong_shape() {
    let (q, k) = (Array4::<f32>::zeros((2, 4, 5, 8)), Array4::zeros((2, 2, 6, 8)));
    let mut workspace = Workspace::new(8, 8, &Tiling::default()).unwrap();
    let mut run = |o: [usize; 4], lse: [usize; 3]| {
        let (mut o, mut lse) = (Array4::zeros(o), Array3::zeros(lse));
        let (q, k) = (q.view(), k.view());
        let options = Options::default();
        attention_into(o.view_mut(), lse.view_mut(), q, k, k, &options, &mut workspace)
    };
    let (good_o, good_lse) = ([2, 4, 5, 8], [2, 4, 5]);
    run(good_o, good_lse).unwrap();
    for axis in 0..4 {
        for length in [0, 1, 9] {
            let mut bad = good_o;
            bad[axis] = length;
            let error = run(bad, good_lse).unwrap_err();
            assert!(matches!(error, Error::Shape(ShapeError::Mismatch { arg: "o", .. })));
            if axis < 3 {
                let mut bad = good_lse;
                bad[axis] = length;
                let error = run(good_o, bad).unwrap_err();
                assert!(matches!(error, Error::Shape(ShapeError::Mismatch { arg: "lse", .. })));
            }
        }
    }
}

#[test]
fn tilings_and_workspaces() {
    for (query_block, key_block, name) in [(0, 32, "query_block"), (32, 0, "key_block")] {
        let tiling = Tiling { query_block, key_block, isa: None };
        let error = Workspace::<f32>::new(8, 8, &tiling).unwrap_err();
        assert!(matches!(error, Error::Option { option, .. } if option == name), "{error:?}");
        assert!(error.to_string().contains(name));
    }
    for isa in Isa::ALL {
        let tiling = Tiling { isa: Some(isa), ..Tiling::default() };
        match Workspace::<f32>::new(8, 8, &tiling) {
            Ok(_) => assert!(isa.is_available()),
            Err(error) => assert_eq!(error, Error::Isa(IsaError::Unavailable(isa))),
        }
    }
    let (q, k) = (Array4::<f32>::zeros((1, 1, 2, 9)), Array4::zeros((1, 1, 3, 9)));
    let v = Array4::zeros((1, 1, 3, 7));
    for (d, e) in [(8, 7), (9, 6), (0, 0)] {
        let mut workspace = Workspace::new(d, e, &Tiling::default()).unwrap();
        let (mut o, mut lse) = (Array4::zeros((1, 1, 2, 7)), Array3::zeros((1, 1, 2)));
        let (o, lse) = (o.view_mut(), lse.view_mut());
        let (q, k, v) = (q.view(), k.view(), v.view());
        let error =
            attention_into(o, lse, q, k, v, &Options::default(), &mut workspace).unwrap_err();
        let expected = Error::WorkspaceTooSmall {
            head_size: 9,
            value_size: 7,
            workspace_head_size: d,
            workspace_value_size: e,
        };
        assert_eq!(error, expected);
        assert!(error.to_string().contains("Workspace::new(9, 7, ..)"));
    }
}

#[test]
fn states_that_do_not_match() {
    let (o, lse) = (Array4::<f32>::zeros((1, 2, 3, 4)), Array3::zeros((1, 2, 3)));
    merge_states(o.view(), lse.view(), o.view(), lse.view()).unwrap();
    let bad_o = Array4::zeros((1, 2, 4, 4));
    let bad_lse = Array3::zeros((1, 2, 4));
    let (o, lse) = (o.view(), lse.view());
    for (arg, result) in [
        ("lse_a", merge_states(o, bad_lse.view(), o, lse)),
        ("o_b", merge_states(o, lse, bad_o.view(), lse)),
        ("lse_b", merge_states(o, lse, o, bad_lse.view())),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Shape(ShapeError::Mismatch { arg: got, .. }) if got == arg));
        assert!(error.to_string().contains(&format!("`{arg}`")));
    }
    let (mut o_a, mut lse_a) = (o.to_owned(), lse.to_owned());
    let error = merge_states_into(o_a.view_mut(), lse_a.view_mut(), bad_o.view(), lse).unwrap_err();
    assert!(matches!(error, Error::Shape(ShapeError::Mismatch { arg: "o_b", .. })));
    // Before there is room for the result.
    let one = ndarray::arr0(1.0_f32);
    let huge = one.broadcast((1 << 20, 1 << 20, 1 << 20, 1)).unwrap();
    let error = merge_states(huge, lse, huge, lse).unwrap_err();
    assert!(matches!(error, Error::Shape(ShapeError::Mismatch { arg: "lse_a", .. })));
}

/// Shapes and offsets of a packed call; heads 4 on 2.
struct Packed {
    q: [usize; 3],
    k: [usize; 3],
    v: [usize; 3],
    query_offsets: Vec<usize>,
    key_offsets: Vec<usize>,
}

impl Packed {
    fn good() -> Self {
        Self {
            q: [9, 4, 8],
            k: [11, 2, 8],
            v: [11, 2, 3],
            query_offsets: vec![0, 4, 4, 9],
            key_offsets: vec![0, 5, 6, 11],
        }
    }

    fn all_forms(&self, options: &Options<'_, f32>) -> [Result<(), Error>; 3] {
        let one = ndarray::arr0(1.0_f32);
        let view = |shape: [usize; 3]| -> ArrayView3<'_, f32> { one.broadcast(shape).unwrap() };
        let (q, k, v) = (view(self.q), view(self.k), view(self.v));
        let (queries, keys) = (&self.query_offsets[..], &self.key_offsets[..]);
        let into = || {
            let mut workspace = Workspace::new(q.dim().2, v.dim().2, &Tiling::default())?;
            let mut o = Array3::zeros((q.dim().0, q.dim().1, v.dim().2));
            let mut lse = Array2::zeros((q.dim().0, q.dim().1));
            let (o, lse) = (o.view_mut(), lse.view_mut());
            attention_varlen_into(o, lse, q, k, v, queries, keys, options, &mut workspace)
        };
        let form = |run: &dyn Fn() -> Result<(), Error>| {
            catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| panic!("{queries:?} {keys:?}"))
        };
        [
            form(&|| attention_varlen(q, k, v, queries, keys, options).map(drop)),
            form(&into),
            form(&|| attention_varlen_reference(q, k, v, queries, keys, options).map(drop)),
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
fn packed_good_call() {
    for result in Packed::good().all_forms(&Options::default()) {
        result.unwrap();
    }
}

#[test]
fn cumulative_lengths() {
    let bad: [&[usize]; 8] = [
        &[],
        &[0],
        &[1, 4, 4, 9],
        &[0, 4, 4, 8],
        &[0, 4, 4, 10],
        &[0, 5, 4, 9],
        &[0, usize::MAX, 4, 9],
        &[0, 10, 10, 9],
    ];
    for offsets in bad {
        let mut call = Packed::good();
        call.query_offsets = offsets.to_vec();
        // Offsets of different lengths are reported as either's fault, but for none at all.
        if offsets.is_empty() || offsets.len() == call.key_offsets.len() {
            call.rejected_for("query_offsets", &Options::default());
        } else {
            assert!(call.all_forms(&Options::default()).iter().all(Result::is_err));
        }
        let mut call = Packed::good();
        call.key_offsets = offsets.iter().map(|&offset| offset.saturating_add(2)).collect();
        if offsets.first() == Some(&0) {
            call.key_offsets[0] = 0;
        }
        if call.key_offsets != [0, 6, 6, 11] {
            call.rejected_for("key_offsets", &Options::default());
        }
    }
    let mut both_empty = Packed::good();
    (both_empty.query_offsets, both_empty.key_offsets) = (vec![], vec![]);
    both_empty.rejected_for("query_offsets", &Options::default());
}

#[test]
fn packed_shapes_and_options() {
    let plain = Options::default();
    Packed { q: [8, 4, 8], ..Packed::good() }.rejected_for("query_offsets", &plain);
    Packed { k: [12, 2, 8], v: [12, 2, 3], ..Packed::good() }.rejected_for("key_offsets", &plain);
    Packed { k: [11, 2, 7], ..Packed::good() }.rejected_for("k", &plain);
    Packed { v: [11, 1, 3], ..Packed::good() }.rejected_for("v", &plain);
    Packed { v: [10, 2, 3], ..Packed::good() }.rejected_for("v", &plain);
    Packed { q: [9, 3, 8], ..Packed::good() }.rejected_for("q", &plain);
    Packed { q: [9, 4, 0], k: [11, 2, 0], ..Packed::good() }.rejected_for("q", &plain);
    Packed { v: [11, 2, 0], ..Packed::good() }.rejected_for("v", &plain);

    let good = Packed::good();
    // The second sequence has one key, the longest five.
    let options = Options { key_lengths: Some(&[5, 2, 5]), ..plain.clone() };
    good.rejected_for("key_lengths", &options);
    let options = Options { key_lengths: Some(&[5, 1]), ..plain.clone() };
    good.rejected_for("key_lengths", &options);
    let options = Options { key_lengths: Some(&[0, 1, 6]), ..plain.clone() };
    good.rejected_for("key_lengths", &options);
    let bias = ArrayD::zeros(IxDyn(&[9, 11]));
    let options = Options { bias: Some(bias.view()), ..plain.clone() };
    good.rejected_for("bias", &options);
    let mask = ArrayD::from_elem(IxDyn(&[2, 1, 1, 1]), true);
    let options = Options { mask: Some(mask.view()), ..plain.clone() };
    good.rejected_for("mask", &options);
    let slopes = Array2::zeros((2, 4));
    let options = Options { alibi_slopes: Some(slopes.view()), ..plain.clone() };
    good.rejected_for("alibi_slopes", &options);
    let options = Options { sinks: Some(&[0.0; 3]), ..plain.clone() };
    good.rejected_for("sinks", &options);
    let tree = AncestorMask::from_parents(&[-1; 5]).unwrap();
    let options = Options { tree: Some(&tree), ..plain };
    good.rejected_for("tree", &options);
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
        let results = all_forms([q, k, v], &options);
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

/// A call without a row has nothing to do, whatever the other lengths are.
#[test]
fn huge_but_empty() {
    let huge = 1 << 40;
    for [b, h, n, m] in
        [[0, huge, 3, 3], [huge, 0, 3, 3], [2, 0, huge, 3], [0, 2, huge, 1], [2, 0, 3, huge]]
    {
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let one = ndarray::arr0(1.0_f32);
            let [q, k, v] = [[b, h, n, 8], [b, h, m, 8], [b, h, m, 3]]
                .map(|shape| one.broadcast(shape).unwrap());
            let options = Options { causal: true, ..Options::default() };
            sender.send(into(q, k, v, &options)).unwrap();
        });
        let result = receiver.recv_timeout(Duration::from_secs(10));
        result.unwrap_or_else(|_| panic!("no answer for {:?}", [b, h, n, m])).unwrap();
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
    let q = one.broadcast((rows, rows, rows, 1)).unwrap();
    let k = one.broadcast((rows, rows, 1, 1)).unwrap();
    let v = one.broadcast((rows, rows, 1, 1 << 10)).unwrap();
    must_fail("attention", &|| attention(q, k, v, &options).map(drop));
    let q = one.broadcast((rows, rows, 1)).unwrap();
    let k = one.broadcast((rows, 1, 1)).unwrap();
    let v = one.broadcast((rows, 1, 1 << 30)).unwrap();
    let offsets = [0, rows];
    must_fail("attention_varlen", &|| {
        attention_varlen(q, k, v, &offsets, &offsets, &options).map(drop)
    });
    let (o, lse) = (one.broadcast((rows, rows, rows, 1)), one.broadcast((rows, rows, rows)));
    let (o, lse) = (o.unwrap(), lse.unwrap());
    must_fail("merge_states", &|| merge_states(o, lse, o, lse).map(drop));
    let error = AncestorMask::from_parents(&vec![0; 1 << 25]).unwrap_err();
    assert!(matches!(error, Error::Shape(ShapeError::TooLarge { arg: "tree", .. })), "{error:?}");
    for (d, e) in [(usize::MAX, 8), (8, usize::MAX), (isize::MAX as usize, 8)] {
        let tiling = Tiling::default();
        must_fail("head size", &|| Workspace::<f32>::new(d, e, &tiling).map(drop));
    }
    for (query_block, key_block) in [(usize::MAX, 32), (32, usize::MAX), (usize::MAX / 8, 32)] {
        let tiling = Tiling { query_block, key_block, isa: None };
        must_fail("blocks", &|| Workspace::<f32>::new(8, 8, &tiling).map(drop));
    }
}
