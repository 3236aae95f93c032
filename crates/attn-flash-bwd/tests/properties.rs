//! What holds for any shape, any combination of options and any values.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/planting.rs"]
#[macro_use]
mod planting;
#[path = "common/strategies.rs"]
mod strategies;

use attn_flash::Window;
use attn_flash_bwd::{Gradients, Strategy as Delta, Tiling};
use common::{
    Broadcast, ByName, Call, Features, Setting, Sizes, UserMask, check_gradients, check_same,
};
use ndarray::{Array3, Array4, ArrayD, Axis};
use planting::{Seen, row_mut, source_index};
use proptest::prelude::*;
use proptest::sample::select;
use rand::RngExt;
use strategies::{features, sizes};
use tensor_utils::testing::{Poison, Seeded, isas, property_config};
use tensor_utils::{Element, bf16, f16};

/// One of the instruction sets, block sizes and strategies.
fn tilings() -> impl Strategy<Value = Tiling> {
    let blocks = (select(&[1, 7, 13, 768][..]), select(&[32, 64, 256][..]));
    let strategy = select(&[Delta::SavedOutput, Delta::TwoPass][..]);
    (blocks, strategy, select(isas()))
        .prop_map(|(blocks, strategy, isa)| common::tiling(blocks, strategy, isa))
}

proptest! {
    #![proptest_config(property_config(64, "proptest-regressions/properties.txt"))]

    #[test]
    fn agrees_with_reference(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
    ) {
        with_type!(kind, agrees(sizes, &features, &tiling, seed))?;
    }

    /// The same bits come out whatever is planted where nobody looks.
    #[test]
    fn invisible_values_have_no_effect(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
    ) {
        with_type!(kind, ignores_invisible(sizes, &features, &tiling, seed))?;
    }

    /// A NaN or infinity shows as the formula has it in what it takes part in, and nowhere else.
    #[test]
    fn visible_values_show(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
        target in 0..5, value in select(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY][..]),
    ) {
        with_type!(kind, shows_visible(sizes, &features, &tiling, seed, target, value))?;
    }

    /// Queries that saw nothing and keys that nobody saw have gradients of exactly 0.
    #[test]
    fn gradients_of_the_unseen_are_zero(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
    ) {
        with_type!(kind, zero_if_unseen(sizes, &features, &tiling, seed))?;
    }

    /// The gradients are linear in those that come in: twice those, bit by bit.
    #[test]
    fn twice_the_loss_has_twice_the_gradients(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..2,
    ) {
        let kind = kind * 4; // f64 or f32: the 16-bit types lose bits of small numbers.
        with_type!(kind, doubles(sizes, &features, &tiling, seed))?;
    }

    /// The scores of a row add up to the same gradient as its lse: `sum_j dS_ij = P_i d_lse_i`.
    #[test]
    fn a_shift_of_all_scores_moves_the_lse_alone(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64,
    ) {
        let features = Features {
            sinks: false, bias: Some(Broadcast::Columns), bias_masks: false, ..features
        };
        let mut call = Call::<f64>::new(sizes, &features, seed);
        call.d_lse = Some(Seeded::new(seed).normal(call.lse.dim()));
        let got = call.run(&tiling);
        // A bias that all keys share: its gradient is that of the lse, summed over the batch.
        let lse = call.d_lse.as_ref().unwrap();
        let seeing = call.lse.mapv(|lse| if lse.is_finite() { 1.0 } else { 0.0 });
        let want = (lse * &seeing).sum_axis(Axis(0)).insert_axis(Axis(2)).into_dyn();
        let got = got.dbias.unwrap();
        prop_assert_eq!(got.shape(), want.shape());
        for (got, want) in got.iter().zip(&want) {
            prop_assert!((got - want).abs() < 1e-10, "{} {}", got, want);
        }
    }
}

fn fail(error: String) -> TestCaseError {
    TestCaseError::fail(error)
}

fn agrees<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let call = Call::<T>::new(sizes, features, seed);
    check_gradients::<T>(&call.run(tiling), &call.reference()).map_err(fail)
}

fn ignores_invisible<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let mut call = Call::<T>::new(sizes, features, seed);
    let clean = call.run(tiling);
    let visible = call.setting.visible(sizes);
    let visible_without_bias = Setting { bias: None, ..call.setting.clone() }.visible(sizes);
    let mut seeded = Seeded::new(seed);
    let mut junk = || {
        let junk = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e4];
        T::from_f64(junk[seeded.rng().random_range(0..junk.len())])
    };

    let seen = Seen::new(sizes, &visible, |_| true);
    for (index, _) in seen.keys.indexed_iter().filter(|(_, seen)| !**seen) {
        row_mut(&mut call.k, index).for_each(|x| *x = junk());
        row_mut(&mut call.v, index).for_each(|x| *x = junk());
    }
    for (index, _) in seen.queries.indexed_iter().filter(|(_, seeing)| !**seeing) {
        row_mut(&mut call.q, index).for_each(|x| *x = junk());
        row_mut(&mut call.d_o, index).for_each(|x| *x = junk());
        // With a sink there is an lse to differentiate though nothing is seen.
        if let (Some(d_lse), None) = (&mut call.d_lse, &call.setting.sinks) {
            d_lse[index] = T::Acc::from_f64(junk().to_f64());
        }
    }
    if let Some(bias) = &mut call.setting.bias {
        let mut used = ArrayD::from_elem(bias.shape(), false);
        for ((b, h, i, j), _) in visible_without_bias.indexed_iter().filter(|(_, seen)| **seen) {
            used[&source_index(bias.shape(), [b, h, i, j])[..]] = true;
        }
        bias.zip_mut_with(&used, |x, &used| *x = if used { *x } else { junk() });
    }
    check_same(&call.run(tiling), &clean).map_err(fail)?;
    let check = |got: &Gradients<f64>| check_gradients::<T>(&clean, got).map_err(fail);
    check(&call.reference())
}

fn shows_visible<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
    target: i32,
    value: f64,
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let mut call = Call::<T>::new(sizes, features, seed);
    let clean = call.run(tiling);
    let visible = call.setting.visible(sizes);
    let pairs = visible.indexed_iter().filter(|(_, visible)| **visible);
    let pairs: Vec<_> = pairs.map(|(pair, _)| pair).collect();
    if pairs.is_empty() {
        return Ok(());
    }
    let mut seeded = Seeded::new(seed);
    let mut below = |end: usize| seeded.rng().random_range(0..end);
    let (b, h, i, j) = pairs[below(pairs.len())];
    let g = h / sizes.group;
    let value = T::from_f64(value);
    // Rows that the planted value takes part in.
    let row_is_affected = |[b2, h2, i2, _]: [usize; 4]| match target {
        0..=2 => [b2, h2, i2] == [b, h, i],
        _ => (b2, h2 / sizes.group) == (b, g) && visible[[b2, h2, i2, j]],
    };
    match (target, &mut call.d_lse) {
        (0, _) => call.q[[b, h, i, below(sizes.d)]] = value,
        (1, Some(d_lse)) => d_lse[[b, h, i]] = T::Acc::from_f64(value.to_f64()),
        (1 | 2, _) => call.d_o[[b, h, i, below(sizes.e)]] = value,
        (3, _) => call.k[[b, g, j, below(sizes.d)]] = value,
        _ => call.v[[b, g, j, below(sizes.e)]] = value,
    }
    call.forward();
    let mut got = call.run(tiling);
    check_where_finite::<T>(&got, &call.reference())?;

    let affected = Seen::new(sizes, &visible, row_is_affected);
    let keep_rows = |got: &mut Array4<T>, clean: &Array4<T>, affected: &Array3<bool>| {
        for (index, _) in affected.indexed_iter().filter(|(_, affected)| **affected) {
            let clean: Vec<T> = row_mut(&mut clean.clone(), index).map(|x| *x).collect();
            row_mut(got, index).zip(clean).for_each(|(got, clean)| *got = clean);
        }
    };
    keep_rows(&mut got.dq, &clean.dq, &affected.queries);
    keep_rows(&mut got.dk, &clean.dk, &affected.keys);
    keep_rows(&mut got.dv, &clean.dv, &affected.keys);
    for (index, _) in affected.queries.indexed_iter().filter(|(_, affected)| **affected) {
        got.delta[index] = clean.delta[index];
        if let (Some(got), Some(clean)) = (&mut got.dsinks, &clean.dsinks) {
            got[index.1] = clean[index.1];
        }
    }
    if let (Some(got), Some(clean)) = (&mut got.dbias, &clean.dbias) {
        for ((b, h, i, j), _) in visible.indexed_iter().filter(|(_, visible)| **visible) {
            if row_is_affected([b, h, i, j]) {
                let at = source_index(clean.shape(), [b, h, i, j]);
                got[&at[..]] = clean[&at[..]];
            }
        }
    }
    check_same(&got, &clean).map_err(fail)
}

/// The same elements are finite. Which of NaN and an infinity the others are depends on the order
/// of the sums.
fn check_where_finite<T: Element>(
    got: &Gradients<T>,
    want: &Gradients<f64>,
) -> Result<(), TestCaseError> {
    for ((name, got), (_, want)) in got.by_name().iter().zip(want.by_name()) {
        for ((index, got), want) in got.indexed_iter().zip(&want) {
            prop_assert_eq!(
                got.is_finite(),
                want.is_finite(),
                "{} {:?}: {} {}",
                name,
                index,
                got,
                want
            );
        }
    }
    Ok(())
}

fn zero_if_unseen<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let call = Call::<T>::new(sizes, features, seed);
    let mut got = call.run(tiling);
    let seen = Seen::new(sizes, &call.setting.visible(sizes), |_| true);
    for (index, _) in seen.queries.indexed_iter().filter(|(_, seen)| !**seen) {
        prop_assert!(row_mut(&mut got.dq, index).all(|x| x.bits() == 0), "dq {:?}", index);
        prop_assert!(got.delta[index].bits() == 0, "delta {:?}", index);
    }
    for (index, _) in seen.keys.indexed_iter().filter(|(_, seen)| !**seen) {
        prop_assert!(row_mut(&mut got.dk, index).all(|x| x.bits() == 0), "dk {:?}", index);
        prop_assert!(row_mut(&mut got.dv, index).all(|x| x.bits() == 0), "dv {:?}", index);
    }
    Ok(())
}

fn doubles<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let mut call = Call::<T>::new(sizes, features, seed);
    let once = call.run(tiling);
    let twice = |x: T| T::from_acc(x.to_acc() + x.to_acc());
    call.d_o.mapv_inplace(twice);
    if let Some(d_lse) = &mut call.d_lse {
        d_lse.mapv_inplace(|x| x + x);
    }
    let want = Gradients {
        dq: once.dq.mapv(twice),
        dk: once.dk.mapv(twice),
        dv: once.dv.mapv(twice),
        delta: once.delta.mapv(|x| x + x),
        dbias: once.dbias.map(|dbias| dbias.mapv(twice)),
        dsinks: once.dsinks.map(|dsinks| dsinks.mapv(|x| x + x)),
    };
    check_same(&call.run(tiling), &want).map_err(fail)
}

/// A row that sees nothing, for each of the ways not to see, in every type.
#[test]
fn nothing_visible() {
    fn check<T: Element + Poison>()
    where
        T::Acc: Poison,
    {
        let sizes = Sizes { batch: 1, key_heads: 1, group: 2, n: 14, m: 40, d: 8, e: 5 };
        let plain = Features::default;
        let far = Window { left: None, right: Some(0) };
        for features in [
            Features { causal: true, query_offset: Some(-14), ..plain() },
            Features { window: far, query_offset: Some(-14), ..plain() },
            Features { user_mask: UserMask::Prefix(0), ..plain() },
            Features { mask: Some(Broadcast::Everything), ..plain() },
            Features { bias: Some(Broadcast::Everything), ..plain() },
            Features { key_lengths: true, ..plain() },
        ] {
            for (sinks, seed) in [(false, 1), (true, 1), (true, 2)] {
                let features = Features { sinks, ..features.clone() };
                let mut call = Call::<T>::new(sizes, &features, seed);
                if let Some(mask) = &mut call.setting.mask {
                    mask.fill(false);
                }
                if let Some(bias) = &mut call.setting.bias {
                    bias.fill(T::from_f64(f64::NEG_INFINITY));
                }
                if let Some(lengths) = &mut call.setting.key_lengths {
                    lengths.fill(0);
                }
                call.forward();
                for nan in [false, true] {
                    if nan {
                        call.d_o.fill(T::from_f64(f64::NAN));
                    }
                    for tiling in common::tilings() {
                        let got = call.run(&tiling);
                        for (name, gradient) in got.by_name() {
                            if name != "dsinks" {
                                let zero = gradient.iter().all(|x| x.to_bits() == 0);
                                assert!(zero, "{name} {features:?} {tiling:?}");
                            }
                        }
                        check_gradients::<T>(&got, &call.reference()).unwrap();
                    }
                }
            }
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
    check::<f16>();
}
