//! Packed products: exact integers, the same bits on every path.

use ndarray::{Array2, s};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tensor_utils::testing::in_pool;
use tensor_utils::{Isa, f16};
use ternary_train::{
    Activations, PackedMatrix, Ternary, Tiling, activations_reference, matmul_reference,
};

fn ternary(rows: usize, columns: usize, group: usize, seed: u64) -> Ternary {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let groups = columns.div_ceil(group);
    Ternary {
        codes: Array2::from_shape_simple_fn((rows, columns), || rng.random_range(-1..=1)),
        scales: Array2::from_shape_simple_fn((rows, groups), || {
            f16::from_f32(rng.random::<f32>()).to_f32()
        }),
        group,
    }
}

fn random(tokens: usize, columns: usize, seed: u64) -> Array2<f32> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((tokens, columns), || 4.0 * rng.random::<f32>() - 2.0)
}

const SIZES: &[(usize, usize, usize)] = &[
    (1, 1, 32),
    (16, 16, 32),
    (17, 31, 32),
    (33, 130, 128),
    (40, 256, 256),
    (64, 700, 256),
    (31, 384, 96),
    (100, 1024, 128),
    (700, 500, 64),
    (3, 0, 64),
    (0, 3, 64),
];

#[test]
fn packing_loses_nothing() {
    for &(rows, columns, group) in SIZES {
        let ternary = ternary(rows, columns, group, 1);
        let packed = PackedMatrix::new(&ternary).unwrap();
        assert_eq!(packed.unpack().unwrap(), ternary);
        let w = ternary.dequantize().unwrap();
        let mut row = vec![0.0; columns];
        for i in 0..rows {
            packed.row_into(&mut row, i).unwrap();
            assert_eq!(row, w.row(i).to_vec());
        }
    }
    let packed = PackedMatrix::new(&ternary(4096, 1024, 128, 1)).unwrap();
    assert_eq!(packed.bytes() * 8, 4096 * 1024 * 17 / 8);
}

#[test]
fn activations_are_those_of_the_formula() {
    for (tokens, columns) in [(1, 1), (3, 130), (2, 700), (40, 1000)] {
        let x = random(tokens, columns, 2);
        let (q, scales) = activations_reference(x.view());
        // A matrix that picks single columns shows the integers.
        let identity = Ternary {
            codes: Array2::from_diag_elem(columns, 1),
            scales: Array2::ones((columns, columns.div_ceil(32))),
            group: 32,
        };
        let got = PackedMatrix::new(&identity)
            .unwrap()
            .product(&Activations::new(&x, 32).unwrap(), &Tiling::default())
            .unwrap();
        for ((t, j), &got) in got.indexed_iter() {
            assert_eq!(got, f32::from(q[[t, j]]) * scales[t], "token {t}, column {j}");
        }
    }
}

/// Products as the documentation defines them: exact sums, then rounded operations in order.
fn product(ternary: &Ternary, x: &Array2<f32>) -> Array2<f32> {
    let (q, scales) = activations_reference(x.view());
    let (rows, columns) = ternary.codes.dim();
    Array2::from_shape_fn((x.nrows(), rows), |(t, i)| {
        let mut total = 0.0_f32;
        for first in (0..columns).step_by(ternary.group) {
            let group = first..columns.min(first + ternary.group);
            let product = |j| i32::from(q[[t, j]]) * i32::from(ternary.codes[[i, j]]);
            let sum: i32 = group.map(product).sum();
            total += ternary.scales[[i, first / ternary.group]] * sum as f32;
        }
        total * scales[t]
    })
}

#[test]
fn products_have_the_bits_of_their_definition_on_every_path() {
    for &(rows, columns, group) in SIZES {
        let ternary = ternary(rows, columns, group, 3);
        let packed = PackedMatrix::new(&ternary).unwrap();
        for tokens in [0, 1, 2, 3, 5, 8, 9, 64, 65, 77] {
            let x = random(tokens, columns, 4);
            let wanted = product(&ternary, &x);
            let activations = Activations::new(&x, group).unwrap();
            for isa in Isa::available() {
                let got = packed.product(&activations, &Tiling { isa: Some(isa) }).unwrap();
                assert_eq!(got, wanted, "{rows} x {columns} by {group}, {tokens} on {isa}");
            }
        }
    }
}

#[test]
fn sums_fit_at_the_extremes() {
    for code in [-1, 1] {
        let ternary = Ternary {
            codes: Array2::from_elem((17, 512), code),
            scales: Array2::ones((17, 2)),
            group: 256,
        };
        let packed = PackedMatrix::new(&ternary).unwrap();
        for x in [-3.0, 3.0] {
            let x = Array2::from_elem((6, 512), x);
            let wanted = product(&ternary, &x);
            let activations = Activations::new(&x, 256).unwrap();
            for isa in Isa::available() {
                let got = packed.product(&activations, &Tiling { isa: Some(isa) }).unwrap();
                assert_eq!(got, wanted, "{isa}");
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_among_others_on_any_number_of_threads() {
    let packed = PackedMatrix::new(&ternary(900, 1300, 128, 5)).unwrap();
    let x = random(70, 1300, 6);
    let all = packed.product(&Activations::new(&x, 128).unwrap(), &Tiling::default()).unwrap();
    for threads in [1, 2, 3, 8] {
        in_pool(threads, || {
            for t in [0, 1, 33, 69] {
                let one = Activations::new(&x.slice(s![t..=t, ..]).to_owned(), 128).unwrap();
                let got = packed.product(&one, &Tiling::default()).unwrap();
                assert_eq!(got.row(0), all.row(t));
            }
            let again = Activations::new(&x, 128).unwrap();
            assert_eq!(packed.product(&again, &Tiling::default()).unwrap(), all);
        });
    }
}

#[test]
fn the_error_is_that_of_eight_bits() {
    let ternary = ternary(64, 1024, 128, 7);
    let x = random(5, 1024, 8);
    let packed = PackedMatrix::new(&ternary).unwrap();
    let got = packed.product(&Activations::new(&x, 128).unwrap(), &Tiling::default()).unwrap();
    let x64 = x.mapv(f64::from);
    let exact = matmul_reference(ternary.codes.view(), ternary.scales.view(), 128, x64.view());
    // Each x is off by at most half a step of 2 / 127, and the steps are independent.
    let bound = 4.0 * 0.3 * 2.0 / 127.0 * (1024.0_f64 * 0.22).sqrt();
    for (got, exact) in got.iter().zip(&exact) {
        assert!((f64::from(*got) - exact).abs() < bound, "{got} {exact}");
    }
}

#[test]
fn other_layouts_of_the_output_and_special_values() {
    let packed = PackedMatrix::new(&ternary(20, 100, 64, 9)).unwrap();
    let mut x = random(4, 100, 10);
    x.row_mut(1).fill(0.0);
    x[[2, 7]] = f32::NAN;
    x.row_mut(3).fill(1e-39);
    let activations = Activations::new(&x, 64).unwrap();
    let got = packed.product(&activations, &Tiling::default()).unwrap();
    assert!(got.row(0).iter().all(|y| y.is_finite() && *y != 0.0));
    assert!(got.row(1).iter().all(|&y| y == 0.0));
    assert!(got.row(2).iter().all(|y| y.is_nan()));
    assert!(got.row(3).iter().all(|&y| y == 0.0));
    let mut turned = Array2::zeros((20, 4)).reversed_axes();
    packed.product_into(turned.view_mut(), &activations, &Tiling::default()).unwrap();
    assert_eq!(turned.row(0), got.row(0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let good = ternary(4, 64, 32, 11);
    let packed = PackedMatrix::new(&good).unwrap();
    let tiling = &Tiling::default();
    let error = packed.product(&Activations::zeros(1, 65, 32).unwrap(), tiling).unwrap_err();
    assert!(error.to_string().contains("`x` has shape [1, 65]"), "{error}");
    let error = packed.product(&Activations::zeros(1, 64, 64).unwrap(), tiling).unwrap_err();
    assert!(error.to_string().contains("option `group` is 64"), "{error}");
    let x = Activations::zeros(1, 64, 32).unwrap();
    assert!(packed.product_into(Array2::zeros((2, 4)).view_mut(), &x, tiling).is_err());
    assert!(packed.row_into(&mut [0.0; 64], 4).is_err());
    assert!(packed.row_into(&mut [0.0; 63], 3).is_err());
    let mut bad = good.clone();
    bad.codes[[1, 1]] = 2;
    assert!(PackedMatrix::new(&bad).unwrap_err().to_string().contains("`codes` is 2"));
    let mut bad = good.clone();
    bad.scales[[1, 1]] = 0.1;
    assert!(PackedMatrix::new(&bad).unwrap_err().to_string().contains("`scales` is 0.1"));
    assert!(PackedMatrix::new(&Ternary { group: 64, ..good }).is_err());
}
