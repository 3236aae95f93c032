//! Laws that hold for all arguments.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Values, tilings};
use ndarray::{Array1, Axis};
use proptest::prelude::*;
use softmax_topk::{
    Draw, Error, NanPolicy, Options, Tiling, sample, softmax_topk, softmax_topk_backward,
    softmax_topk_reference,
};
use tensor_utils::testing::{in_pool, property_config};

fn features() -> impl Strategy<Value = Features> {
    let shape = (1_usize..4, prop_oneof![1_usize..300, 1_usize..20_000]);
    let values = prop_oneof![
        3 => Just(Values::Normal),
        1 => prop::sample::select(Values::ALL.to_vec()),
    ];
    let nan = prop::sample::select(vec![NanPolicy::Error, NanPolicy::Greatest, NanPolicy::Ignore]);
    let flags = any::<[bool; 5]>();
    let mask = (prop::sample::select(vec![0_usize, 0, 32, 64]), 0.0..1.0);
    let cuts = (prop_oneof![Just(1.0), 0.01..1.0], prop_oneof![Just(0.0), 0.0..1.0]);
    (shape, 0.0..1.0, values, nan, flags, mask, cuts, (0_usize..4, any::<u16>())).prop_map(
        |((rows, vocabulary), share, values, nan, flags, mask, (top_p, min_p), (tokens, seed))| {
            let share: f64 = share;
            // Small k more often than large.
            let k = 1 + ((vocabulary - 1) as f64 * share.powi(6)) as usize;
            Features {
                values,
                nan,
                seed: seed.into(),
                temperatures: flags[0],
                mask_bits: mask.0,
                allowed: mask.1,
                bias: flags[1],
                shared: flags[2],
                log: flags[3],
                renormalise: flags[4],
                top_p,
                min_p,
                tokens,
                ..Features::new(rows, vocabulary, k)
            }
        },
    )
}

proptest! {
    #![proptest_config(property_config(64, "proptest-regressions/properties.txt"))]

    /// The tokens are those of the reference, whatever is in the rows.
    #[test]
    fn tokens_are_the_best_in_order(features in features()) {
        let inputs = Inputs::<f32>::new(features);
        let want = softmax_topk_reference(inputs.logits.view(), features.k, &inputs.options());
        for tiling in tilings() {
            match (&want, inputs.forward(&tiling)) {
                (Ok(want), Ok(got)) => {
                    prop_assert_eq!(&got.indices, &want.indices, "{:?}", tiling);
                    let ranks = |ranks: Option<&ndarray::Array2<u32>>| ranks.cloned();
                    prop_assert_eq!(
                        ranks(got.tokens.as_ref().map(|tokens| &tokens.ranks)),
                        ranks(want.tokens.as_ref().map(|tokens| &tokens.ranks))
                    );
                }
                (Err(want), Err(got)) => prop_assert_eq!(want, &got),
                (want, got) => prop_assert!(false, "{:?} for {:?}", got, want),
            }
        }
    }

    /// Probabilities descend, add up to 1 at most, and are 0 where nothing was kept.
    #[test]
    fn probabilities_are_probabilities(features in features()) {
        let inputs = Inputs::<f32>::new(Features { log: false, ..features });
        let Ok(top) = inputs.forward(&Tiling::default()) else { return Ok(()) };
        for (row, probs) in top.probs.axis_iter(Axis(0)).enumerate() {
            let kept = top.kept[row] as usize;
            if top.lse[row].is_nan() {
                prop_assert!(kept == 0 && probs.iter().all(|p| p.is_nan()));
                continue;
            }
            // Or the lse is out of range, where scores of f32::MIN are divided by less than 1.
            let is_infinite = top.lse[row] == f32::NEG_INFINITY;
            let is_possible = features.temperatures && inputs.temperature[row] < 1.0;
            prop_assert!((kept == 0) == is_infinite || is_infinite && is_possible);
            prop_assert!(probs.iter().all(|p| (0.0..=1.0 + 1e-6).contains(p)));
            prop_assert!(probs.iter().skip(kept).all(|&p| p == 0.0));
            let pairs = probs.iter().zip(probs.iter().skip(1));
            prop_assert!(pairs.into_iter().all(|(p, next)| p >= next));
            let sum: f64 = probs.iter().map(|&p| f64::from(p)).sum();
            prop_assert!(sum <= 1.0 + 1e-5);
            if features.renormalise && kept > 0 {
                prop_assert!((sum - 1.0).abs() < 1e-5);
            }
        }
    }

    /// A row alone, in another place of the batch, on any number of threads: the same bits.
    #[test]
    fn a_row_does_not_depend_on_its_neighbours(features in features(), threads in 1_usize..5) {
        let inputs = Inputs::<f32>::new(Features { tokens: 0, ..features });
        for tiling in tilings() {
            let Ok(all) = in_pool(threads, || inputs.forward(&tiling)) else { continue };
            for row in 0..features.rows {
                let mut alone = inputs.clone();
                alone.features.rows = 1;
                alone.logits = inputs.logits.slice_axis(Axis(0), (row..row + 1).into()).to_owned();
                alone.temperature = Array1::from_elem(1, inputs.temperature[row]);
                let own = if features.shared { 0 } else { row };
                let mask = own..own + 1;
                alone.bias = inputs.bias.slice_axis(Axis(0), mask.clone().into()).to_owned();
                alone.mask_32 = inputs.mask_32.slice_axis(Axis(0), mask.clone().into()).to_owned();
                alone.mask_64 = inputs.mask_64.slice_axis(Axis(0), mask.into()).to_owned();
                let alone = alone.forward(&tiling).unwrap();
                let bits = |x: &ndarray::ArrayView1<'_, f32>| {
                    x.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                prop_assert_eq!(alone.indices.row(0), all.indices.row(row));
                prop_assert_eq!(bits(&alone.probs.row(0)), bits(&all.probs.row(row)));
                prop_assert_eq!(alone.lse[0].to_bits(), all.lse[row].to_bits());
                prop_assert_eq!(alone.kept[0], all.kept[row]);
            }
        }
    }

    /// Moving all logits by a number moves the lse alone.
    #[test]
    fn a_shift_moves_the_lse(seed in any::<u16>(), vocabulary in 1_usize..3000, shift in -64_i16..64) {
        let features = Features { values: Values::Whole, seed: seed.into(), ..Features::new(2, vocabulary, 1) };
        let inputs = Inputs::<f32>::new(features);
        let shift = f32::from(shift);
        let moved = inputs.logits.mapv(|x| x + shift);
        for tiling in tilings() {
            let (top, other) = (
                inputs.forward(&tiling).unwrap(),
                inputs.forward_of(moved.view(), &tiling).unwrap(),
            );
            prop_assert_eq!(&top.indices, &other.indices);
            prop_assert_eq!(&top.probs, &other.probs);
            prop_assert!((&other.lse - &top.lse - shift).iter().all(|d| d.abs() < 2e-5));
        }
    }

    /// Draws are tokens that were kept, and the same for the same seed and step.
    #[test]
    fn draws_are_repeatable_and_kept(features in features(), seed in any::<u64>(), step in 0_u64..9) {
        let inputs = Inputs::<f32>::new(features);
        let draws = Array1::from_elem(features.rows, Draw { seed, step });
        let run = || sample(inputs.logits.view(), features.k, &inputs.options(), draws.view());
        match run() {
            Ok(drawn) => {
                for row in 0..features.rows {
                    let column = drawn.columns[row];
                    prop_assert!(column < drawn.top.kept[row]);
                    prop_assert_eq!(drawn.tokens[row], drawn.top.indices[[row, column as usize]]);
                }
                prop_assert_eq!(run().unwrap(), drawn);
            }
            Err(Error::Nan { .. }) => prop_assert_eq!(features.nan, NanPolicy::Error),
            Err(Error::NothingToDraw { row }) => {
                let top = inputs.forward(&Tiling::default()).unwrap();
                prop_assert_eq!(top.kept[row], 0);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    /// Probabilities do not change when all logits move, so their gradient adds up to 0; the lse moves
    /// with them, so its gradient adds up to itself.
    #[test]
    fn gradients_add_up(features in features()) {
        let features = Features { values: Values::Normal, temperatures: false, ..features };
        let inputs = Inputs::<f64>::new(features);
        let options = inputs.options();
        let top = softmax_topk(inputs.logits.view(), features.k, &options).unwrap();
        let gradients = inputs.gradients();
        let d = softmax_topk_backward(&gradients, inputs.logits.view(), top.view(), &options).unwrap();
        for row in 0..features.rows {
            let sum: f64 = d.row(row).sum();
            let nothing = top.lse[row] == f64::NEG_INFINITY;
            let masked = inputs.tokens.row(row).iter().any(|&token| {
                features.mask_bits == 32 && inputs.mask_32[[if features.shared { 0 } else { row }, token as usize / 32]] >> (token % 32) & 1 == 0
                    || features.mask_bits == 64 && inputs.mask_64[[if features.shared { 0 } else { row }, token as usize / 64]] >> (token % 64) & 1 == 0
            });
            // Of a given token that is not allowed, [i = j] in eq. 8 is left out: its logit moves nothing.
            if !masked {
                let want = if nothing { 0.0 } else { inputs.d_lse[row] };
                prop_assert!((sum - want).abs() < 1e-9, "row {}: {} for {}", row, sum, want);
            }
        }
    }
}

#[test]
fn draws_have_the_distribution() {
    let logits = ndarray::array![[0.0_f64, 1.0, 2.0, 0.5]];
    let options = Options::default();
    let top = softmax_topk(logits.view(), 4, &options).unwrap();
    let count = 20_000;
    let mut counts = [0.0; 4];
    for step in 0..count {
        let draws = ndarray::array![Draw { seed: 11, step }];
        let drawn = sample(logits.view(), 4, &options, draws.view()).unwrap();
        counts[drawn.columns[0] as usize] += 1.0;
    }
    // Pearson's chi-squared; with three degrees of freedom 16.3 is exceeded once in a thousand.
    let chi_squared: f64 = (0..4)
        .map(|j| {
            let expected = top.probs[[0, j]] * count as f64;
            (counts[j] - expected) * (counts[j] - expected) / expected
        })
        .sum();
    assert!(chi_squared < 16.3, "{counts:?}: {chi_squared}");
}
