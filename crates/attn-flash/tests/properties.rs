//! What holds for any shape, any combination of options and any values.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/planting.rs"]
#[macro_use]
mod planting;
#[path = "common/strategies.rs"]
mod strategies;

use std::ops::Range;

use attn_flash::{Attention, Options, Tiling, Window, attention_reference, merge_states};
use common::{Broadcast, Features, Inputs, Setting, Sizes, attention_tiled};
use ndarray::{Array3, Array4, ArrayD, ArrayView4, Axis, Slice};
use planting::{Seen, row_mut, source_index};
use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::select;
use rand::RngExt;
use strategies::{features, sizes};
use tensor_utils::testing::{
    Poison, Seeded, Tolerance, check_close, check_same_bits, isas, property_config,
};
use tensor_utils::{Element, bf16, f16};

/// One of the instruction sets and block sizes.
fn tilings() -> impl Strategy<Value = Tiling> {
    let blocks = (select(&[1, 7, 13, 768][..]), select(&[32, 64, 256][..]));
    (blocks, select(isas())).prop_map(|(blocks, isa)| common::tiling(blocks, isa))
}

/// Small numbers and those around the ends of the type.
fn extreme() -> impl Strategy<Value = isize> {
    prop_oneof![
        -8..8_isize,
        (0..12_isize).prop_map(|i| isize::MIN + i),
        (0..12_isize).prop_map(|i| isize::MAX - i),
    ]
}

/// A call with its arguments.
struct Call<T: Element> {
    sizes: Sizes,
    inputs: Inputs<T>,
    setting: Setting<T>,
}

impl<T> Call<T>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    fn new(sizes: Sizes, features: &Features, seed: u64) -> Self {
        let inputs = Inputs::normal(sizes, seed);
        Self { sizes, inputs, setting: Setting::new(features, sizes, seed) }
    }

    fn run(&self, tiling: &Tiling) -> Attention<T> {
        attention_tiled(self.inputs.views(), &self.setting.options(), tiling).unwrap()
    }

    fn reference(&self) -> Attention<f64> {
        let (q, k, v) = self.inputs.views();
        attention_reference(q, k, v, &self.setting.options()).unwrap()
    }

    /// Which pairs are visible if the bias hides none.
    fn visible_without_bias(&self) -> Array4<bool> {
        Setting { bias: None, ..self.setting.clone() }.visible(self.sizes)
    }

    fn key_head(&self, head: usize) -> usize {
        head / self.sizes.group
    }
}

fn check_agrees<T: Element>(
    got: &Attention<T>,
    want: &Attention<f64>,
) -> Result<(), TestCaseError> {
    check_within(got, want, common::tolerance::<T>(), common::lse_tolerance::<T>())
}

fn check_within<T: Element, W: Element>(
    got: &Attention<T>,
    want: &Attention<W>,
    o: Tolerance,
    lse: Tolerance,
) -> Result<(), TestCaseError> {
    let fail = |error| TestCaseError::fail(format!("{error}"));
    check_close(&got.o, &want.o, o).map_err(fail)?;
    check_close(&got.lse, &want.lse, lse).map_err(fail)
}

fn check_same<T: Element>(got: &Attention<T>, want: &Attention<T>) -> Result<(), TestCaseError> {
    let fail = |error| TestCaseError::fail(format!("{error}"));
    check_same_bits(&got.o, &want.o).map_err(fail)?;
    check_same_bits(&got.lse, &want.lse).map_err(fail)
}

proptest! {
    #![proptest_config(property_config(64, "proptest-regressions/properties.txt"))]

    #[test]
    fn agrees_with_reference(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
    ) {
        with_type!(kind, agrees(sizes, &features, &tiling, seed))?;
    }

    /// Positions and windows of any size.
    #[test]
    fn extreme_positions_agree(
        causal: bool,
        query_offset in weighted(0.9, extreme()),
        left in weighted(0.7, extreme()),
        right in weighted(0.7, extreme()),
        tiling in tilings(),
        seed: u64,
    ) {
        let [left, right] = [left, right].map(|reach| reach.map(|reach| reach as usize));
        let window = Window { left, right };
        let features = Features { causal, query_offset, window, ..Features::default() };
        let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n: 7, m: 6, d: 2, e: 2 };
        agrees::<f32>(sizes, &features, &tiling, seed)?;
    }

    /// The same bits come out whatever is planted where nobody looks.
    #[test]
    fn invisible_values_have_no_effect(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
    ) {
        with_type!(kind, ignores_invisible(sizes, &features, &tiling, seed))?;
    }

    /// A NaN or infinity shows as the formula has it in the rows that see it, and in no other.
    #[test]
    fn visible_values_show(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
        target in 0..4, value in select(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY][..]),
    ) {
        with_type!(kind, shows_visible(sizes, &features, &tiling, seed, target, value))?;
    }

    #[test]
    fn parts_merge_to_the_whole(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..8,
        cut in 0.0..1.0_f64,
    ) {
        with_type!(kind, merges(sizes, &features, &tiling, seed, cut))?;
    }

    /// A number added to all scores moves the lse and nothing else.
    #[test]
    fn shift_of_all_scores_moves_the_lse(
        sizes in sizes(), features in features(), tiling in tilings(), seed: u64, kind in 0..3,
        shift in -30.0..30.0_f64,
    ) {
        let kind = kind * 4; // f64 or f32: the sum of bias and shift is rounded to the type.
        with_type!(kind, shifts(sizes, &features, &tiling, seed, shift))?;
    }

    /// Without positions, keys have no order.
    #[test]
    fn order_of_keys_does_not_matter(
        sizes in sizes(), tiling in tilings(), seed: u64, kind in 0..8,
        bias: bool, mask: bool, softcap in weighted(0.3, 0.5..20.0_f64), order in vec(any::<u32>(), 300),
    ) {
        let features = Features {
            softcap,
            bias: bias.then_some(Broadcast::Nothing),
            mask: mask.then_some(Broadcast::Nothing),
            ..Features::default()
        };
        with_type!(kind, permutes(sizes, &features, &tiling, seed, &order))?;
    }
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
    check_agrees(&call.run(tiling), &call.reference())
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
    let visible_without_bias = call.visible_without_bias();
    let mut seeded = Seeded::new(seed);
    let mut junk = || {
        let junk = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e4];
        T::from_f64(junk[seeded.rng().random_range(0..junk.len())])
    };

    let seen = Seen::new(sizes, &visible, |_| true);
    let Inputs { q, k, v } = &mut call.inputs;
    for (index, _) in seen.keys.indexed_iter().filter(|(_, seen)| !**seen) {
        row_mut(k, index).for_each(|x| *x = junk());
        row_mut(v, index).for_each(|x| *x = junk());
    }
    for (index, _) in seen.queries.indexed_iter().filter(|(_, seeing)| !**seeing) {
        row_mut(q, index).for_each(|x| *x = junk());
    }
    if let Some(bias) = &mut call.setting.bias {
        let mut used = ArrayD::from_elem(bias.shape(), false);
        for ((b, h, i, j), _) in visible_without_bias.indexed_iter().filter(|(_, seen)| **seen) {
            used[&source_index(bias.shape(), [b, h, i, j])[..]] = true;
        }
        bias.zip_mut_with(&used, |x, &used| *x = if used { *x } else { junk() });
    }
    check_same(&call.run(tiling), &clean)
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
    let visible_without_bias = call.visible_without_bias();
    let pairs = visible.indexed_iter().filter(|(_, visible)| **visible);
    let pairs: Vec<_> = pairs.map(|(pair, _)| pair).collect();
    if pairs.is_empty() {
        return Ok(());
    }
    let mut seeded = Seeded::new(seed);
    let mut below = |end: usize| seeded.rng().random_range(0..end);
    let (b, h, i, j) = pairs[below(pairs.len())];
    let g = call.key_head(h);
    let value = T::from_f64(value);
    // Rows that see what is planted.
    let mut affected = Array3::from_elem((sizes.batch, sizes.heads(), sizes.n), false);
    match (target, &mut call.setting.bias) {
        (0, _) => {
            call.inputs.q[[b, h, i, below(sizes.d)]] = value;
            affected[[b, h, i]] = true;
        }
        (1, Some(bias)) => {
            let planted = source_index(bias.shape(), [b, h, i, j]);
            bias[&planted[..]] = value;
            for ((b, h, i, j), _) in visible_without_bias.indexed_iter().filter(|(_, seen)| **seen)
            {
                if source_index(bias.shape(), [b, h, i, j]) == planted {
                    affected[[b, h, i]] = true;
                }
            }
        }
        (target, _) => {
            if target == 2 {
                call.inputs.k[[b, g, j, below(sizes.d)]] = value;
            } else {
                call.inputs.v[[b, g, j, below(sizes.e)]] = value;
            }
            for head in g * sizes.group..(g + 1) * sizes.group {
                for query in 0..sizes.n {
                    affected[[b, head, query]] = visible[[b, head, query, j]];
                }
            }
        }
    }
    let mut got = call.run(tiling);
    check_agrees(&got, &call.reference())?;
    for (index, _) in affected.indexed_iter().filter(|(_, affected)| **affected) {
        let clean_row: Vec<T> = row_mut(&mut clean.o.clone(), index).map(|x| *x).collect();
        row_mut(&mut got.o, index).zip(clean_row).for_each(|(got, clean)| *got = clean);
        got.lse[index] = clean.lse[index];
    }
    check_same(&got, &clean)
}

fn merges<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
    cut: f64,
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let call = Call::<T>::new(sizes, features, seed);
    let (options, (q, k, v)) = (call.setting.options(), call.inputs.views());
    // A tree is about the last keys, all of which go to the second part.
    let last = if options.tree.is_some() { sizes.m - sizes.n } else { sizes.m };
    let cut = (cut * (last + 1) as f64) as usize;
    let first_query = options.query_offset.unwrap_or(sizes.m as isize - sizes.n as isize);
    let bias = options.bias.as_ref().map(|bias| bias.broadcast(sizes.scores()).unwrap());
    let mask = options.mask.as_ref().map(|mask| mask.broadcast(sizes.scores()).unwrap());

    let part = |keys: Range<usize>, sinks| {
        let slice = Slice::from(keys.clone());
        let user_mask = features.user_mask.part([0, 0, 0, keys.start]);
        let valid = |&length: &usize| length.clamp(keys.start, keys.end) - keys.start;
        let key_lengths = options.key_lengths.map(|all| all.iter().map(valid).collect::<Vec<_>>());
        let options = Options {
            query_offset: Some(first_query - keys.start as isize),
            bias: bias.as_ref().map(|bias| bias.slice_axis(Axis(3), slice).into_dyn()),
            mask: mask.as_ref().map(|mask| mask.slice_axis(Axis(3), slice).into_dyn()),
            key_lengths: key_lengths.as_deref(),
            sinks,
            tree: options.tree.filter(|_| keys.end == sizes.m),
            user_mask: &user_mask,
            scale: options.scale,
            causal: options.causal,
            window: options.window,
            softcap: options.softcap,
            alibi_slopes: options.alibi_slopes,
        };
        let keys = |x| ArrayView4::slice_axis_move(x, Axis(2), slice);
        attention_tiled((q, keys(k), keys(v)), &options, tiling).unwrap()
    };
    // The sinks count once.
    let (a, b) = (part(0..cut, options.sinks), part(cut..sizes.m, None));
    let merge = |a: &Attention<T>, b: &Attention<T>| {
        merge_states(a.o.view(), a.lse.view(), b.o.view(), b.lse.view()).unwrap()
    };
    // The parts are rounded to the type too.
    let rounding = if T::NAME == T::Acc::NAME { 0.0 } else { 4.0 * T::EPSILON };
    let tolerance = common::tolerance::<T>();
    let o = Tolerance { abs: 2.0 * tolerance.abs + rounding, rel: 2.0 * tolerance.rel };
    let want = call.reference();
    check_within(&merge(&a, &b), &want, o, common::lse_tolerance::<T>())?;
    check_within(&merge(&b, &a), &want, o, common::lse_tolerance::<T>())
}

fn shifts<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
    shift: f64,
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let mut call = Call::<T>::new(sizes, features, seed);
    let mut want = call.run(tiling);
    let bias = call.setting.bias.take().unwrap_or_else(|| ndarray::arr0(T::default()).into_dyn());
    call.setting.bias = Some(bias.mapv(|x| T::from_f64(x.to_f64() + shift)));
    let shift_acc = |x: T::Acc| T::Acc::from_f64(x.to_f64() + shift);
    if let Some(sinks) = &mut call.setting.sinks {
        sinks.iter_mut().for_each(|x| *x = shift_acc(*x));
    }
    want.lse.mapv_inplace(shift_acc);
    let wider = |tolerance: Tolerance| Tolerance { abs: 10.0 * tolerance.abs, ..tolerance };
    let (o, lse) = (wider(common::tolerance::<T>()), wider(common::lse_tolerance::<T>()));
    check_within(&call.run(tiling), &want, o, lse)
}

fn permutes<T>(
    sizes: Sizes,
    features: &Features,
    tiling: &Tiling,
    seed: u64,
    keys: &[u32],
) -> Result<(), TestCaseError>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let mut call = Call::<T>::new(sizes, features, seed);
    let want = call.reference();
    let mut order: Vec<usize> = (0..sizes.m).collect();
    order.sort_by_key(|&key| keys[key]);
    call.inputs.k = call.inputs.k.select(Axis(2), &order);
    call.inputs.v = call.inputs.v.select(Axis(2), &order);
    if let Some(bias) = &mut call.setting.bias {
        *bias = bias.select(Axis(3), &order);
    }
    if let Some(mask) = &mut call.setting.mask {
        *mask = mask.select(Axis(3), &order);
    }
    check_agrees(&call.run(tiling), &want)
}

/// A state and an empty one merge to the state, bit by bit, whatever the outputs of the empty one
/// hold; two empty ones to an empty one.
#[test]
fn merging_with_nothing_changes_nothing() {
    fn check<T: Element + Poison>()
    where
        T::Acc: Poison,
    {
        let sizes = Sizes { batch: 2, key_heads: 2, group: 1, n: 9, m: 33, d: 16, e: 20 };
        let call = Call::<T>::new(sizes, &Features { causal: true, ..Features::default() }, 5);
        let state = call.run(&Tiling::default());
        let nothing_with = |o| Attention {
            o: Array4::from_elem(state.o.dim(), T::from_f64(o)),
            lse: state.lse.mapv(|_| T::Acc::from_f64(f64::NEG_INFINITY)),
        };
        let (nothing, garbage) = (nothing_with(0.0), nothing_with(f64::NAN));
        for (a, b, want) in [
            (&state, &nothing, &state),
            (&garbage, &state, &state),
            (&state, &garbage, &state),
            (&garbage, &garbage, &nothing),
        ] {
            let got = merge_states(a.o.view(), a.lse.view(), b.o.view(), b.lse.view()).unwrap();
            check_same_bits(&got.o, &want.o).unwrap();
            check_same_bits(&got.lse, &want.lse).unwrap();
        }
    }
    check::<f32>();
    check::<f64>();
    check::<bf16>();
    check::<f16>();
}

/// States far apart: the small one vanishes without an overflow of the large.
#[test]
fn merging_states_of_any_size() {
    let state =
        |o: f32, lse: f32| (Array4::from_elem((1, 1, 1, 3), o), Array3::from_elem((1, 1, 1), lse));
    for (a, b, o, lse) in [
        ((1.0, 3e38), (5.0, -3e38), 1.0, 3e38),
        ((1.0, -1e30), (5.0, -3e38), 1.0, -1e30),
        ((1.0, -1e5), (5.0, -1e5), 3.0, -1e5 + 2_f32.ln()),
        ((1.0, 0.0), (5.0, 3_f32.ln()), 4.0, 4_f32.ln()),
    ] {
        for ((o_a, lse_a), (o_b, lse_b)) in
            [(state(a.0, a.1), state(b.0, b.1)), (state(b.0, b.1), state(a.0, a.1))]
        {
            let got = merge_states(o_a.view(), lse_a.view(), o_b.view(), lse_b.view()).unwrap();
            assert!(got.o.iter().all(|x| (x - o).abs() < 1e-6), "{got:?}");
            assert!(got.lse.iter().all(|x| (x - lse).abs() <= 1e-6 * lse.abs()), "{got:?}");
        }
    }
}
