//! The fast paths against the oracle.

use ndarray::{Array2, array};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use ternary_train::{Projection, Rule, Ternary, project_reference};

fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, columns), || rng.random::<f32>() - 0.5)
}

#[test]
fn projection_is_that_of_the_formula() {
    for (rows, columns) in [(1, 1), (3, 31), (2, 32), (5, 127), (4, 129), (2, 700), (0, 8), (3, 0)]
    {
        for group in [32, 64, 128, 256] {
            let w = random(rows, columns, 7);
            let (codes, scales) = project_reference(w.view(), group);
            let projection = Projection { group, ..Projection::default() };
            let got = projection.project(&w).unwrap();
            assert_eq!(got, Ternary { codes, scales, group }, "{rows} x {columns} by {group}");
        }
    }
}

/// On every machine: libraries round from `f64` once or twice by what instructions there are.
#[test]
fn scales_are_rounded_as_pytorch_rounds_them() {
    // The mean is 1 + 2^-11 + 2^-31, nearest to 1 + 2^-10; in f32 it is 1 + 2^-11, and the even neighbour is 1.
    let w = array![[2.0, 2.0_f32.powi(-10) + 2.0_f32.powi(-30)]];
    assert_eq!(Projection::default().project(&w).unwrap().scales, array![[1.0]]);
    assert_eq!(project_reference(w.view(), 128).1, array![[1.0]]);
}

#[test]
fn weights_at_the_edge_of_the_band_become_zero() {
    // The scale is 1: mean of 0.5, 1.5, 0.5, 1.5.
    let w = Array2::from_shape_fn((1, 128), |(_, j)| [0.5, -1.5, -0.5, 1.5][j % 4]);
    let got = Projection::default().project(&w).unwrap();
    assert_eq!(got.codes.row(0).as_slice().unwrap()[..4], [0, -1, 0, 1]);
    let above = w.mapv(|x| x * (1.0 + f32::EPSILON));
    let got = Projection::default().project(&above).unwrap();
    assert_eq!(got.codes.row(0).as_slice().unwrap()[..4], [1, -1, -1, 1]);
}

#[test]
fn in_place_projection_has_the_same_bits_and_counts() {
    let (w, old) = (random(90, 300, 1), random(90, 300, 2));
    for rule in Rule::ALL {
        let projection = Projection { rule, group: 64 };
        let ternary = projection.project(&w).unwrap();
        let mut out = old.clone();
        let counts = projection.project_into(&mut out, &w).unwrap();
        assert_eq!(out, ternary.dequantize().unwrap());
        let zeros = ternary.codes.iter().filter(|&&code| code == 0).count();
        let flipped = ternary.codes.iter().zip(&old).filter(|&(&code, &old)| {
            let before = i8::from(old > 0.0) - i8::from(old < 0.0);
            code != before
        });
        assert_eq!((counts.weights, counts.zeros), (w.len(), zeros));
        assert_eq!(counts.flipped, flipped.count());
    }
}

#[test]
fn optimal_loses_least() {
    let w = random(8, 256, 3);
    let loss = |rule| {
        let ternary = Projection { rule, ..Projection::default() }.project(&w).unwrap();
        let d = &w - &ternary.dequantize().unwrap();
        (&d * &d).sum()
    };
    let [absmean, twn, optimal] = Rule::ALL.map(loss);
    assert!(optimal <= absmean && optimal <= twn, "{optimal} {absmean} {twn}");
    // A search over all scales finds no better one for a single group.
    let one = random(1, 128, 4);
    let ternary =
        Projection { rule: Rule::Optimal, ..Projection::default() }.project(&one).unwrap();
    let of = |s: f32| -> f32 {
        one.iter().map(|&x| (x - s * (x / s).round_ties_even().clamp(-1.0, 1.0)).powi(2)).sum()
    };
    let best = (1..1000).map(|i| of(i as f32 * 1e-3)).fold(f32::INFINITY, f32::min);
    assert!(of(ternary.scales[[0, 0]]) <= best * 1.0005);
}

#[test]
fn a_ternary_matrix_is_recognised_without_loss() {
    let w = random(9, 300, 5);
    for rule in Rule::ALL {
        let ternary = Projection { rule, group: 128 }.project(&w).unwrap();
        let again = Ternary::of_ternary(&ternary.dequantize().unwrap(), 128).unwrap();
        assert_eq!(again, ternary);
    }
    assert!(Ternary::of_ternary(&w, 128).is_err());
}
