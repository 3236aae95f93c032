//! What holds for every input.

use ndarray::Array2;
use proptest::prelude::*;
use tensor_utils::testing::property_cases;
use ternary_train::{Projection, Rule};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(property_cases(256)))]

    #[test]
    fn projecting_keeps_signs_and_is_proportional(
        values in prop::collection::vec(-4.0_f32..4.0, 1..300),
        power in -6_i32..6,
        rule in prop::sample::select(&Rule::ALL[..]),
        group in prop::sample::select(vec![32_usize, 64, 96, 128, 256]),
    ) {
        let w = Array2::from_shape_vec((1, values.len()), values).unwrap();
        let projection = Projection { rule, group };
        let ternary = projection.project(&w).unwrap();
        for (&code, &x) in ternary.codes.iter().zip(&w) {
            prop_assert!(code == 0 || f32::from(code) * x > 0.0);
        }
        let factor = 2_f32.powi(power);
        let scaled = projection.project(&w.mapv(|x| x * factor)).unwrap();
        // Exact unless the scale leaves the normal f16.
        if ternary.scales.iter().chain(&scaled.scales).all(|&s| s > 1e-4) {
            prop_assert_eq!(&scaled.codes, &ternary.codes);
            prop_assert_eq!(scaled.scales, ternary.scales.mapv(|s| s * factor));
        }
    }
}
