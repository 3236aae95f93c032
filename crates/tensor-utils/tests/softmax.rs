//! The algebra of the online softmax.

use approx::assert_relative_eq;
use proptest::collection::vec;
use proptest::prelude::*;
use tensor_utils::OnlineSoftmax;
use tensor_utils::testing::property_cases;

/// Scores of a kind that attention sees, masked ones and huge ones among them.
fn score() -> impl Strategy<Value = f64> {
    prop_oneof![
        8 => -30.0..30.0,
        1 => Just(f64::NEG_INFINITY),
        1 => prop_oneof![Just(1e30), Just(-1e30), -700.0..700.0],
    ]
}

fn scores() -> impl Strategy<Value = Vec<f64>> {
    vec(score(), 0..40)
}

/// The definition: the largest score, then the sum.
fn two_pass(scores: &[f64]) -> OnlineSoftmax<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let seen = scores.iter().filter(|score| **score > f64::NEG_INFINITY);
    OnlineSoftmax { max, sum: seen.map(|score| (score - max).exp()).sum() }
}

fn assert_same(got: OnlineSoftmax<f64>, want: OnlineSoftmax<f64>) {
    assert_eq!(got.max, want.max);
    assert_relative_eq!(got.sum, want.sum, max_relative = 40.0 * f64::EPSILON);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(property_cases(256)))]

    #[test]
    fn pushing_one_by_one_is_the_definition(scores in scores()) {
        let mut state = OnlineSoftmax::IDENTITY;
        for &score in &scores {
            state.push(score);
            prop_assert!((0.0..=scores.len() as f64).contains(&state.sum));
        }
        assert_same(state, two_pass(&scores));
    }

    #[test]
    fn any_division_into_blocks_is_one_block(blocks in vec(scores(), 0..8)) {
        let mut state = OnlineSoftmax::IDENTITY;
        for block in &blocks {
            state.push_block(block);
        }
        assert_same(state, OnlineSoftmax::from_scores(&blocks.concat()));
    }

    #[test]
    fn merge_is_one_state_over_all_scores(a in scores(), b in scores()) {
        let merged = OnlineSoftmax::from_scores(&a).merge(OnlineSoftmax::from_scores(&b));
        assert_same(merged, two_pass(&[a, b].concat()));
    }

    #[test]
    fn merge_commutes_and_associates(a in scores(), b in scores(), c in scores()) {
        let [a, b, c] = [a, b, c].map(|scores| OnlineSoftmax::from_scores(&scores));
        prop_assert_eq!(a.merge(b), b.merge(a));
        assert_same(a.merge(b).merge(c), a.merge(b.merge(c)));
    }

    #[test]
    fn identity_is_neutral(a in scores()) {
        let a = OnlineSoftmax::from_scores(&a);
        prop_assert_eq!(a.merge(OnlineSoftmax::IDENTITY), a);
        prop_assert_eq!(OnlineSoftmax::IDENTITY.merge(a), a);
    }

    #[test]
    fn lse_is_the_logarithm_of_the_sum(scores in vec(-30.0..30.0, 1..40)) {
        let want = scores.iter().map(|score: &f64| score.exp()).sum::<f64>().ln();
        let got = OnlineSoftmax::from_scores(&scores).lse();
        assert_relative_eq!(got, want, max_relative = 1e-13, epsilon = 1e-13);
    }

    #[test]
    fn correction_keeps_a_weighted_sum_right(blocks in vec(vec((score(), -1.0..1.0), 0..10), 1..8)) {
        let mean = weighted_mean(&blocks, |state, max| state.rescale_to(max));
        let all = blocks.concat();
        let exact = two_pass(&all.iter().map(|(score, _)| *score).collect::<Vec<_>>());
        if exact.max == f64::NEG_INFINITY {
            prop_assert!(mean.is_nan());
            return Ok(());
        }
        let want = all.iter().map(|(score, value)| (score - exact.max).exp() * value).sum::<f64>();
        assert_relative_eq!(mean, want / exact.sum, epsilon = 1e-14, max_relative = 1e-12);
    }
}

/// The mean of values under softmax weights, as attention computes it: `rescale` raises the maximum
/// and returns the factor for what has been summed.
fn weighted_mean(
    blocks: &[Vec<(f64, f64)>],
    rescale: fn(&mut OnlineSoftmax<f64>, f64) -> f64,
) -> f64 {
    let mut state = OnlineSoftmax::IDENTITY;
    let mut weighted = 0.0;
    for block in blocks {
        let max = block.iter().map(|(score, _)| *score).fold(f64::NEG_INFINITY, f64::max);
        let factor = rescale(&mut state, max);
        assert!((0.0..=1.0).contains(&factor) || state.max > max, "{factor}");
        weighted *= factor;
        if state.max == f64::NEG_INFINITY {
            continue;
        }
        for (score, value) in block {
            let weight = (score - state.max).exp();
            state.sum += weight;
            weighted += weight * value;
        }
    }
    weighted / state.sum
}

/// Some write-ups multiply by the inverse, `e^(m_new - m_old)`, and argue that it cancels between
/// sum and output. It cancels only within one block: the earlier ones get the wrong weight.
#[test]
fn inverted_correction_gives_another_answer() {
    let blocks = [vec![(0.0, 1.0)], vec![(1.0, 0.0)]];
    let right = weighted_mean(&blocks, |state, max| state.rescale_to(max));
    assert_relative_eq!(right, 1.0 / (1.0 + 1.0_f64.exp()), max_relative = 1e-15);
    // The weights of the blocks: 1 and e; inverted, e^2 and e.
    let wrong = (1.0_f64.exp() * 1.0) / (1.0_f64.exp() + 1.0);
    assert!((wrong - right).abs() > 0.4);
}

#[test]
fn nothing_visible_leaves_the_identity() {
    let mut state = OnlineSoftmax::<f32>::default();
    state.push_block(&[]);
    state.push_block(&[f32::NEG_INFINITY; 3]);
    state.push(f32::NEG_INFINITY);
    assert_eq!(state, OnlineSoftmax::IDENTITY);
    assert_eq!(state.lse(), f32::NEG_INFINITY);
    assert_eq!(state.rescale_to(f32::NEG_INFINITY), 1.0);

    // What comes after is not harmed.
    state.push(2.0);
    assert_eq!(state, OnlineSoftmax { max: 2.0, sum: 1.0 });
    state.push(f32::NEG_INFINITY);
    assert_eq!(state, OnlineSoftmax { max: 2.0, sum: 1.0 });
}

#[test]
fn correction_is_at_most_one_and_never_subnormal() {
    let mut state = OnlineSoftmax::from_scores(&[0.0_f32]);
    assert_eq!(state.rescale_to(-5.0), 1.0);
    assert_eq!(state.max, 0.0);
    assert_relative_eq!(state.rescale_to(1.0), (-1.0_f32).exp());
    // e^-88 is subnormal in f32.
    assert_eq!(state.rescale_to(89.0), 0.0);
    assert_eq!(state, OnlineSoftmax { max: 89.0, sum: 0.0 });
    let mut empty = OnlineSoftmax::<f32>::IDENTITY;
    assert_eq!(empty.rescale_to(-3e38), 0.0);
}

#[test]
fn nan_and_infinity_show_and_stay() {
    for bad in [f32::NAN, f32::INFINITY] {
        for scores in [[bad, 1.0, f32::NEG_INFINITY], [1.0, f32::NEG_INFINITY, bad]] {
            let mut one_by_one = OnlineSoftmax::IDENTITY;
            scores.iter().for_each(|&score| one_by_one.push(score));
            let fine = OnlineSoftmax::from_scores(&[3.0_f32]);
            let block = OnlineSoftmax::from_scores(&scores);
            for state in [one_by_one, block, block.merge(fine), fine.merge(block)] {
                assert_eq!(state.max.to_bits(), bad.to_bits());
                assert!(state.sum.is_nan() && state.lse().is_nan(), "{scores:?} {state:?}");
            }
        }
    }
}
