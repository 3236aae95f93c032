//! Matrix multiplication against plain loops in f64.

use ndarray::{Array2, ArrayView2, array, s};
use proptest::prelude::*;
use tensor_utils::testing::{Seeded, check_same_bits, property_cases};
use tensor_utils::{Gemm, ShapeError, gemm};

/// Checks `got = alpha A B + beta C` in every element against Higham's bound for a sum of `K`
/// products, to which scaling by alpha and adding beta C bring three more roundings.
fn assert_within_bound<T: Gemm>(
    got: &Array2<T>,
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    c: ArrayView2<'_, T>,
    alpha: f64,
    beta: f64,
) {
    let ku = (a.ncols() + 3) as f64 * T::EPSILON / 2.0;
    let gamma = ku / (1.0 - ku);
    for ((i, j), got) in got.indexed_iter() {
        let (mut want, mut magnitude) = (0.0, 0.0);
        for p in 0..a.ncols() {
            let product = alpha * a[[i, p]].to_f64() * b[[p, j]].to_f64();
            want += product;
            magnitude += product.abs();
        }
        if beta != 0.0 {
            want += beta * c[[i, j]].to_f64();
            magnitude += (beta * c[[i, j]].to_f64()).abs();
        }
        let error = (got.to_f64() - want).abs();
        // The loops above have an error of their own when T is f64.
        assert!(error <= 2.0 * gamma * magnitude, "[{i}, {j}]: got {got:?}, want {want}");
        if T::NAME == "f32" {
            assert!(error <= gamma * magnitude, "[{i}, {j}]: got {got:?}, want {want}");
        }
    }
}

/// The ways to cut a `[rows, columns]` matrix out of a larger array: as it is, transposed, reversed
/// in both axes, and with steps.
const LAYOUTS: usize = 4;

macro_rules! cut {
    ($storage:expr, $slice:ident, $rows:expr, $columns:expr, $layout:expr) => {
        match $layout {
            0 => $storage.$slice(s![..$rows, ..$columns]),
            1 => $storage.$slice(s![..$columns, ..$rows]).reversed_axes(),
            2 => $storage.$slice(s![..$rows;-1, ..$columns;-1]),
            _ => $storage.$slice(s![..2 * $rows;2, ..3 * $columns;3]),
        }
    };
}

/// One product of random matrices, checked for its values and for what it leaves alone.
fn check<T: Gemm>([m, k, n]: [usize; 3], layouts: [usize; 3], alpha: f64, beta: f64, seed: u64) {
    let mut seeded = Seeded::new(seed);
    let mut storage = |rows: usize, columns: usize| -> Array2<T> {
        seeded.normal((columns.max(2 * rows), rows.max(3 * columns)))
    };
    let (a, b, mut c) = (storage(m, k), storage(k, n), storage(m, n));
    let a = cut!(a, slice, m, k, layouts[0]);
    let b = cut!(b, slice, k, n, layouts[1]);
    if beta == 0.0 {
        c.fill(T::from_f64(f64::NAN));
    }
    let before = c.clone();
    let (alpha_t, beta_t) = (T::from_f64(alpha), T::from_f64(beta));
    gemm(&mut cut!(c, slice_mut, m, n, layouts[2]), &a, &b, alpha_t, beta_t).expect("shapes fit");

    let got = cut!(c, slice, m, n, layouts[2]).to_owned();
    let c_before = cut!(before, slice, m, n, layouts[2]);
    assert_within_bound(&got, a, b, c_before, alpha_t.to_f64(), beta_t.to_f64());

    cut!(c, slice_mut, m, n, layouts[2]).assign(&c_before);
    check_same_bits(&c, &before).expect("elements around c are untouched");
}

fn size() -> impl Strategy<Value = usize> {
    // Around the edges of the register tiles, and past the packed blocks of 64 and 256.
    prop_oneof![24 => 0_usize..=20, 2 => Just(31), 2 => Just(65), 1 => Just(257)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(property_cases(128)))]

    #[test]
    fn agrees_with_loops_within_highams_bound(
        sizes in [size(), size(), size()],
        layouts in [0..LAYOUTS, 0..LAYOUTS, 0..LAYOUTS],
        alpha in prop_oneof![Just(1.0), Just(0.0), -2.0..2.0],
        beta in prop_oneof![Just(0.0), Just(1.0), -2.0..2.0],
        seed: u64,
    ) {
        check::<f32>(sizes, layouts, alpha, beta, seed);
        check::<f64>(sizes, layouts, alpha, beta, seed);
    }
}

#[test]
fn whole_numbers_are_exact() {
    let mut seeded = Seeded::new(1);
    let a: Array2<f32> = seeded.integers((113, 203), -8..=8);
    let b: Array2<f32> = seeded.integers((203, 97), -8..=8);
    let mut c = Array2::zeros((113, 97));
    gemm(&mut c, &a, &b, 1.0, 0.0).unwrap();
    for ((i, j), got) in c.indexed_iter() {
        let want: f32 = (0..203).map(|p| a[[i, p]] * b[[p, j]]).sum();
        assert_eq!(*got, want);
    }
}

#[test]
fn broadcast_operands_are_read_in_place() {
    let (a, b) = (array![1.0, 2.0, 3.0], array![[1.0], [10.0], [100.0]]);
    let (a, b) = (a.broadcast((2, 3)).unwrap(), b.broadcast((3, 4)).unwrap());
    let mut c = Array2::zeros((2, 4));
    gemm(&mut c, &a, &b, 1.0_f64, 0.0).unwrap();
    assert_eq!(c, Array2::from_elem((2, 4), 321.0));
}

#[test]
fn empty_sum_is_zero_and_empty_output_is_fine() {
    let (a, b) = (Array2::<f32>::zeros((2, 0)), Array2::zeros((0, 3)));
    let mut c = Array2::from_elem((2, 3), f32::NAN);
    gemm(&mut c, &a, &b, 1.0, 0.0).unwrap();
    assert_eq!(c, Array2::<f32>::zeros((2, 3)));
    c.fill(3.0);
    gemm(&mut c, &a, &b, 1.0, 0.5).unwrap();
    assert_eq!(c, Array2::from_elem((2, 3), 1.5));
    gemm(&mut Array2::zeros((0, 2)), &b, &Array2::zeros((3, 2)), 1.0, 0.0).unwrap();
}

#[test]
fn nan_shows_in_its_row_alone() {
    let mut a = Array2::<f32>::ones((40, 40));
    a[[7, 3]] = f32::NAN;
    let mut c = Array2::zeros((40, 40));
    gemm(&mut c, &a, &Array2::zeros((40, 40)), 1.0, 0.0).unwrap();
    for ((i, _), x) in c.indexed_iter() {
        assert_eq!(x.is_nan(), i == 7);
    }
}

#[test]
fn row_has_the_same_bits_alone_and_among_others() {
    let mut seeded = Seeded::new(2);
    let (a, b): (Array2<f32>, Array2<f32>) = (seeded.normal((70, 300)), seeded.normal((300, 50)));
    let mut all = Array2::zeros((70, 50));
    gemm(&mut all, &a, &b, 1.0, 0.0).unwrap();
    for i in 0..70 {
        let mut row = Array2::zeros((1, 50));
        gemm(&mut row, &a.slice(s![i..=i, ..]), &b, 1.0, 0.0).unwrap();
        check_same_bits(&row, &all.slice(s![i..=i, ..])).unwrap();
    }
}

#[test]
fn shapes_must_fit() {
    let product = |c: [usize; 2], a: [usize; 2], b: [usize; 2]| {
        gemm(&mut Array2::<f64>::zeros(c), &Array2::zeros(a), &Array2::zeros(b), 1.0, 0.0)
    };
    let mismatch = |arg, expected: [usize; 2], got: [usize; 2]| {
        Err(ShapeError::Mismatch { arg, expected: expected.into(), got: got.into() })
    };
    assert_eq!(product([2, 4], [2, 3], [4, 4]), mismatch("b", [3, 4], [4, 4]));
    assert_eq!(product([2, 3], [2, 3], [3, 4]), mismatch("c", [2, 4], [2, 3]));
    assert_eq!(product([4, 2], [2, 3], [3, 4]), mismatch("c", [2, 4], [4, 2]));
}
