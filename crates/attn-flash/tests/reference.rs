//! The fast path against the oracle, on sizes around the edges of tiles and on every option.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;
#[path = "common/ways.rs"]
mod ways;

use std::sync::atomic::{AtomicUsize, Ordering};

use attn_flash::{
    AncestorMask, Attention, Coverage, Error, Mask, Options, Pair, Tile, Tiling, Window, Workspace,
    attention, attention_naive, attention_reference, attention_varlen, attention_varlen_into,
    attention_varlen_reference,
};
use common::{Broadcast, Features, Inputs, Setting, Sizes, UserMask};
use ndarray::{Array3, Array4, ArrayView4, Axis, Slice};
use tensor_utils::testing::{
    ErrorRatios, Guarded, Poison, Seeded, check_close, check_same_bits, error_ratio, isas,
};
use tensor_utils::{Element, bf16, f16};
use ways::{FEW_SIZES, HEAD_SIZES, combine};

/// Compares one call on every tiling and instruction set with the reference.
fn check<T>(sizes: Sizes, features: &Features, seed: u64)
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let inputs = Inputs::<T>::normal(sizes, seed);
    let setting = Setting::new(features, sizes, seed);
    let what = format!("{} {sizes:?} {features:?}", T::NAME);
    check_views(inputs.views(), &setting, &what);
}

fn check_views<T>(
    (q, k, v): (ArrayView4<'_, T>, ArrayView4<'_, T>, ArrayView4<'_, T>),
    setting: &Setting<T>,
    what: &str,
) where
    T: Element + Poison,
    T::Acc: Poison,
{
    let options = setting.options();
    let want = attention_reference(q, k, v, &options).unwrap();
    for tiling in common::tilings() {
        let got = common::attention_tiled((q, k, v), &options, &tiling).unwrap();
        let context = |error| panic!("{error}\n{what}\n{tiling:?}");
        check_close(&got.o, &want.o, common::tolerance::<T>()).unwrap_or_else(context);
        check_close(&got.lse, &want.lse, common::lse_tolerance::<T>()).unwrap_or_else(context);
    }
}

/// [`check`] in a type that changes with the seed.
fn check_some_type(sizes: Sizes, features: &Features, seed: u64) {
    match seed % 8 {
        0 => check::<bf16>(sizes, features, seed),
        1 => check::<f16>(sizes, features, seed),
        2 => check::<f64>(sizes, features, seed),
        _ => check::<f32>(sizes, features, seed),
    }
}

/// Around the heights and widths of register tiles and the default and the small blocks.
const LENGTHS: [usize; 16] = [0, 1, 2, 11, 12, 13, 31, 32, 33, 95, 96, 97, 255, 256, 257, 300];

#[test]
fn lengths_at_tile_edges() {
    let mut seed = 0;
    for n in LENGTHS {
        for m in LENGTHS {
            seed += 1;
            // 7 and 3 have no factor in common with 10, so every size meets every other.
            let d = HEAD_SIZES[seed * 7 % 10];
            let e = HEAD_SIZES[(seed * 3 + seed / 10) % 10];
            let group = if n * m > 10_000 { 1 } else { 1 + seed % 8 };
            let sizes = Sizes { batch: 1, key_heads: 1, group, n, m, d, e };
            let features = Features { causal: seed % 3 == 0, ..Features::default() };
            check_some_type(sizes, &features, seed as u64);
        }
    }
}

#[test]
fn head_sizes() {
    let mut seed = 1000;
    for d in HEAD_SIZES {
        for e in HEAD_SIZES {
            seed += 1;
            let sizes = Sizes { batch: 1, key_heads: 2, group: 1, n: 14, m: 67, d, e };
            check_some_type(sizes, &Features::default(), seed);
        }
    }
}

#[test]
fn heads_share_keys() {
    for group in 1..=8 {
        for key_heads in 1..=3 {
            let sizes = Sizes { batch: 2, key_heads, group, n: 5, m: 40, d: 16, e: 24 };
            let features = Features { causal: true, ..Features::default() };
            check::<f32>(sizes, &features, group as u64);
        }
    }
    let none = Sizes { batch: 2, key_heads: 3, group: 0, n: 5, m: 4, d: 16, e: 24 };
    check::<f32>(none, &Features::default(), 0);
    check::<f32>(Sizes { batch: 0, group: 2, ..none }, &Features::default(), 0);
    check::<f32>(Sizes { key_heads: 0, group: 2, ..none }, &Features::default(), 0);
}

/// The shared list, and options that only these tests try.
fn options() -> Vec<Features> {
    let causal = |query_offset| Features { causal: true, query_offset, ..Features::default() };
    let window = |left, right| Features { window: Window { left, right }, ..Features::default() };
    let user_mask = |user_mask| Features { user_mask, ..Features::default() };
    let more = [
        causal(Some(isize::MAX)),
        window(Some(40), Some(3)),
        window(Some(usize::MAX), Some(usize::MAX)),
        user_mask(UserMask::Documents { length: 64, first_query: 10 }),
        user_mask(UserMask::Growing(20)),
        user_mask(UserMask::Growing(32)),
    ];
    let mut all = ways::options();
    all.extend(more);
    all
}

#[test]
fn each_option_alone() {
    for (seed, features) in options().iter().enumerate() {
        for (i, sizes) in FEW_SIZES.into_iter().enumerate() {
            check_some_type(sizes, features, (10 * seed + i) as u64);
        }
    }
}

#[test]
fn options_in_pairs() {
    let options = options();
    for (i, a) in options.iter().enumerate() {
        for (j, b) in options[..i].iter().enumerate() {
            let sizes = FEW_SIZES[(i + j) % FEW_SIZES.len()];
            check_some_type(sizes, &combine(a, b), (100 * i + j) as u64);
        }
    }
}

#[test]
fn all_options_at_once() {
    let options = options();
    for seed in 0..40 {
        let mut all = Features::default();
        for features in options.iter().skip(seed % 5).step_by(1 + seed / 5) {
            // An offset of the largest size moves all keys out of sight.
            let features = Features { query_offset: None, ..features.clone() };
            all = combine(&all, &features);
        }
        check_some_type(FEW_SIZES[seed % FEW_SIZES.len()], &all, seed as u64);
    }
}

#[test]
fn any_strides() {
    let sizes = Sizes { batch: 2, key_heads: 2, group: 2, n: 21, m: 45, d: 19, e: 22 };
    let features = Features { causal: true, ..Features::default() };
    let setting = Setting::<f32>::new(&features, sizes, 1);
    let Inputs { q, k, v } = Inputs::<f32>::normal(sizes, 1);

    // `[B, N, H, D]` in memory, as projections leave it.
    let heads_inside =
        |x: &Array4<f32>| x.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().to_owned();
    let (qh, kh, vh) = (heads_inside(&q), heads_inside(&k), heads_inside(&v));
    let swap = |x| ArrayView4::permuted_axes(x, [0, 2, 1, 3]);
    let views = (swap(qh.view()), swap(kh.view()), swap(vh.view()));
    check_views(views, &setting, "heads inside");

    // The last axis is not contiguous: `[B, H, D, N]` in memory.
    let columns =
        |x: &Array4<f32>| x.view().permuted_axes([0, 1, 3, 2]).as_standard_layout().to_owned();
    let (qc, kc, vc) = (columns(&q), columns(&k), columns(&v));
    let swap = |x| ArrayView4::permuted_axes(x, [0, 1, 3, 2]);
    check_views((swap(qc.view()), swap(kc.view()), swap(vc.view())), &setting, "columns");

    // Every second element of every axis, backwards.
    let sparse = |x: &Array4<f32>| {
        let mut wide = Array4::from_elem(x.raw_dim() * 2, f32::NAN);
        for axis in 0..4 {
            wide.invert_axis(Axis(axis));
        }
        wide.slice_each_axis_mut(|_| Slice::new(0, None, 2)).assign(x);
        wide
    };
    let (qs, ks, vs) = (sparse(&q), sparse(&k), sparse(&v));
    let every_second = |_| Slice::new(0, None, 2);
    let views = (
        qs.slice_each_axis(every_second),
        ks.slice_each_axis(every_second),
        vs.slice_each_axis(every_second),
    );
    assert!(views.0.strides()[3] < -1);
    check_views(views, &setting, "reversed");

    // Stride 0 on any axis.
    for axis in 0..4 {
        let shared = |x: &Array4<f32>| x.slice_axis(Axis(axis), Slice::from(0..1)).to_owned();
        let (qb, kb, vb) = (shared(&q), shared(&k), shared(&v));
        let views = (
            qb.broadcast(q.dim()).unwrap(),
            kb.broadcast(k.dim()).unwrap(),
            vb.broadcast(v.dim()).unwrap(),
        );
        check_views(views, &setting, "broadcast");
    }
}

#[test]
fn outputs_of_any_strides() {
    let sizes = Sizes { batch: 2, key_heads: 1, group: 3, n: 14, m: 40, d: 8, e: 21 };
    let inputs = Inputs::<f32>::normal(sizes, 3);
    let (q, k, v) = inputs.views();
    let options = Options::default();
    let want = attention(q, k, v, &options).unwrap();
    let mut o = Guarded::<f32, _>::contiguous((21, 14, 2, 3));
    let mut lse = Guarded::<f32, _>::contiguous((14, 3, 2));
    let mut workspace = Workspace::new(8, 21, &Tiling::default()).unwrap();
    let mut o_view = o.view_mut().permuted_axes([2, 3, 1, 0]);
    o_view.invert_axis(Axis(3));
    let mut lse_view = lse.view_mut().permuted_axes([2, 1, 0]);
    lse_view.invert_axis(Axis(2));
    attn_flash::attention_into(o_view, lse_view, q, k, v, &options, &mut workspace).unwrap();
    let mut o = o.finish().unwrap().permuted_axes([2, 3, 1, 0]);
    o.invert_axis(Axis(3));
    let mut lse = lse.finish().unwrap().permuted_axes([2, 1, 0]);
    lse.invert_axis(Axis(2));
    check_same_bits(&o, &want.o).unwrap();
    check_same_bits(&lse, &want.lse).unwrap();
}

/// Packed sequences of these numbers of queries and keys.
fn check_packed<T>(lengths: &[(usize, usize)], features: &Features, seed: u64)
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let (key_heads, group, d, e) = (2, 2, 20, 13);
    let offsets = |length: fn(&(usize, usize)) -> usize| {
        let ends = lengths.iter().map(length).scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect::<Vec<_>>()
    };
    let (query_offsets, key_offsets) = (offsets(|l| l.0), offsets(|l| l.1));
    let (queries, keys) = (*query_offsets.last().unwrap(), *key_offsets.last().unwrap());
    let mut seeded = Seeded::new(seed);
    let q: Array3<T> = seeded.normal((queries, key_heads * group, d));
    let k: Array3<T> = seeded.normal((keys, key_heads, d));
    let v: Array3<T> = seeded.normal((keys, key_heads, e));
    let n = lengths.iter().map(|l| l.0).max().unwrap_or(0);
    let m = lengths.iter().map(|l| l.1).max().unwrap_or(0);
    let batch = lengths.len();
    let mut setting =
        Setting::<T>::new(features, Sizes { batch, key_heads, group, n, m, d, e }, seed);
    if let Some(valid) = &mut setting.key_lengths {
        for (valid, (_, keys)) in valid.iter_mut().zip(lengths) {
            *valid = *valid.min(&mut keys.clone());
        }
    }
    let options = setting.options();
    let (q, k, v) = (q.view(), k.view(), v.view());
    let (query_offsets, key_offsets) = (&query_offsets[..], &key_offsets[..]);
    let want = attention_varlen_reference(q, k, v, query_offsets, key_offsets, &options).unwrap();
    for tiling in common::tilings() {
        let mut o = Guarded::<T, _>::padded((queries, key_heads * group, e));
        let mut lse = Guarded::<T::Acc, _>::padded((queries, key_heads * group));
        let mut workspace = Workspace::new(d, e, &tiling).unwrap();
        let (o_view, lse_view) = (o.view_mut(), lse.view_mut());
        attention_varlen_into(
            o_view,
            lse_view,
            q,
            k,
            v,
            query_offsets,
            key_offsets,
            &options,
            &mut workspace,
        )
        .unwrap();
        let context = |error| panic!("{error}\n{lengths:?} {features:?} {tiling:?}");
        let (o, lse) = (o.finish().unwrap(), lse.finish().unwrap());
        check_close(&o, &want.o, common::tolerance::<T>()).unwrap_or_else(context);
        check_close(&lse, &want.lse, common::lse_tolerance::<T>()).unwrap_or_else(context);
    }
    let got = attention_varlen(q, k, v, query_offsets, key_offsets, &options).unwrap();
    check_close(&got.o, &want.o, common::tolerance::<T>()).unwrap();
    check_close(&got.lse, &want.lse, common::lse_tolerance::<T>()).unwrap();
}

#[test]
fn packed_batches() {
    let mixed = [(3, 5), (0, 7), (40, 33), (1, 100), (4, 0), (0, 0), (33, 64)];
    let same_n = [(6, 6), (6, 30), (6, 71)];
    for (seed, features) in options().iter().enumerate() {
        let seed = seed as u64;
        let lengths = if features.tree { &same_n[..] } else { &mixed[..] };
        check_packed::<f32>(lengths, features, seed);
        let causal = Features { causal: true, ..features.clone() };
        match seed % 3 {
            0 => check_packed::<bf16>(lengths, &causal, seed),
            1 => check_packed::<f64>(lengths, &causal, seed),
            _ => check_packed::<f32>(lengths, &causal, seed),
        }
    }
    check_packed::<f32>(&[(1, 0), (0, 3), (0, 0)], &Features::default(), 0);
}

#[test]
fn packed_batches_of_nothing() {
    let (q, k) = (Array3::<f32>::zeros((0, 4, 8)), Array3::zeros((0, 2, 8)));
    for offsets in [&[0][..], &[0, 0, 0]] {
        let options = Options::default();
        let got =
            attention_varlen(q.view(), k.view(), k.view(), offsets, offsets, &options).unwrap();
        assert_eq!((got.o.dim(), got.lse.dim()), ((0, 4, 8), (0, 4)));
    }
}

/// A row that sees nothing, for each of the ways not to see.
#[test]
fn nothing_visible() {
    let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n: 3, m: 40, d: 8, e: 8 };
    let minus_infinity = ndarray::arr0(f32::NEG_INFINITY).into_dyn();
    let hidden = ndarray::arr0(false).into_dyn();
    let far = Window { left: None, right: Some(0) };
    let none = [
        Options { causal: true, query_offset: Some(-3), ..Options::default() },
        Options { window: far, query_offset: Some(-3), ..Options::default() },
        Options { key_lengths: Some(&[0]), ..Options::default() },
        Options { bias: Some(minus_infinity.view()), ..Options::default() },
        Options { mask: Some(hidden.view()), ..Options::default() },
    ];
    let inputs = Inputs::<f32>::normal(sizes, 9);
    for options in none {
        for tiling in common::tilings() {
            let got = common::attention_tiled(inputs.views(), &options, &tiling).unwrap();
            assert!(got.o.iter().all(|x| x.to_bits() == 0), "{options:?}");
            assert!(got.lse.iter().all(|&x| x == f32::NEG_INFINITY), "{options:?}");
            let sink = [1.25];
            let with_sink = Options { sinks: Some(&sink), ..options.clone() };
            let got = common::attention_tiled(inputs.views(), &with_sink, &tiling).unwrap();
            assert!(got.o.iter().all(|x| x.to_bits() == 0), "{options:?}");
            assert!(got.lse.iter().all(|&x| x == 1.25), "{options:?}");
        }
    }
}

/// A user mask is asked about pairs in tiles that it calls partly visible, and in no other.
#[test]
fn whole_tiles_are_not_asked_pair_by_pair() {
    #[derive(Debug, Default)]
    struct Prefix {
        asked: AtomicUsize,
        last: AtomicUsize,
    }
    impl Mask for Prefix {
        fn visible(&self, at: Pair) -> bool {
            self.asked.fetch_add(1, Ordering::Relaxed);
            self.last.fetch_max(at.key, Ordering::Relaxed);
            at.key < 100
        }
        fn coverage(&self, tile: Tile) -> Coverage {
            match tile.keys {
                keys if keys.end <= 100 => Coverage::Full,
                keys if keys.start >= 100 => Coverage::Skip,
                _ => Coverage::Partial,
            }
        }
    }
    let sizes = Sizes { batch: 1, key_heads: 1, group: 2, n: 10, m: 300, d: 8, e: 8 };
    let mut inputs = Inputs::<f32>::normal(sizes, 1);
    let prefix = Options { key_lengths: Some(&[100]), ..Options::default() };
    let want = common::attention_tiled(inputs.views(), &prefix, &Tiling::default()).unwrap();
    inputs.k.slice_axis_mut(Axis(2), Slice::from(100..)).fill(f32::NAN);
    for isa in isas() {
        let options = Options::default().with_user_mask(Prefix::default());
        let tiling = common::tiling((768, 32), isa);
        let got = common::attention_tiled(inputs.views(), &options, &tiling).unwrap();
        check_close(&got.o, &want.o, common::tolerance::<f32>()).unwrap();
        // The one partial block has keys 96 to 127.
        let Prefix { asked, last } = options.user_mask;
        assert!((1..=20 * 32).contains(&asked.into_inner()));
        assert!((100..128).contains(&last.into_inner()));
    }
}

/// One query with head size 1: the scores are `q k` for each key.
fn scores<T>(scores: &[f64], values: &[f64], options: &Options<'_, T>) -> Vec<Attention<T>>
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let column =
        |x: &[f64]| Array4::from_shape_fn((1, 1, x.len(), 1), |(_, _, j, _)| T::from_f64(x[j]));
    let (q, k, v) = (column(&[1.0]), column(scores), column(values));
    let views = (q.view(), k.view(), v.view());
    let run = |tiling: &_| common::attention_tiled(views, options, tiling).unwrap();
    common::tilings().iter().map(run).collect()
}

#[test]
fn scores_far_from_zero() {
    // A largest score of any size weighs 1: no sentinel stands in for -inf.
    for score in [-1e4, -5e4, -1e30, -3e38, 3e38, 1e30] {
        for at in [0, 31, 32, 99] {
            let mut far = vec![f64::from(f32::MIN); 100];
            far[at] = score;
            let values: Vec<f64> = (0..100).map(f64::from).collect();
            for got in scores::<f32>(&far, &values, &Options::default()) {
                assert_eq!(got.o[[0, 0, 0, 0]], at as f32, "{score:e}");
                assert_eq!(got.lse[[0, 0, 0]], score as f32, "{score:e}");
            }
        }
    }
    // A softcap bounds them first.
    let options = Options { softcap: Some(2.0), ..Options::default() };
    for got in scores::<f32>(&[1e30, -1e30], &[1.0, 0.0], &options) {
        let want = 1.0 / (1.0 + (-4.0_f32).exp());
        assert!((got.o[[0, 0, 0, 0]] - want).abs() < 1e-6, "{got:?}");
    }
}

#[test]
fn nan_queries_do_not_become_zeros() {
    let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n: 15, m: 70, d: 8, e: 8 };
    let mut inputs = Inputs::<f32>::normal(sizes, 9);
    inputs.q[[0, 0, 4, 2]] = f32::NAN;
    for tiling in common::tilings() {
        let got = common::attention_tiled(inputs.views(), &Options::default(), &tiling).unwrap();
        for ((_, _, i, _), x) in got.o.indexed_iter() {
            assert_eq!(x.is_nan(), i == 4);
        }
        for ((_, _, i), x) in got.lse.indexed_iter() {
            assert_eq!(x.is_nan(), i == 4);
        }
    }
}

/// Weights too small for a normal number are 0, not the subnormal numbers that slow the product.
#[test]
fn vanishing_weights_are_zero() {
    for got in scores::<f32>(&[0.0, -90.0], &[0.0, f64::from(f32::MAX)], &Options::default()) {
        assert_eq!(got.o[[0, 0, 0, 0]], 0.0);
    }
    for got in scores::<f32>(&[0.0, -80.0], &[0.0, f64::from(f32::MAX)], &Options::default()) {
        assert!(got.o[[0, 0, 0, 0]] > 0.0);
    }
}

/// The reference against sums done by hand.
#[test]
fn reference_by_hand() {
    let q = Array4::from_shape_vec((1, 2, 1, 1), vec![1.0_f64, 2.0]).unwrap();
    let k = Array4::from_shape_vec((1, 1, 3, 1), vec![0.0, 1.0, -1.0]).unwrap();
    let v = Array4::from_shape_vec((1, 1, 3, 1), vec![5.0, 7.0, 11.0]).unwrap();
    let exp = f64::exp;
    let got = attention_reference(q.view(), k.view(), v.view(), &Options::default()).unwrap();
    for (head, s) in [(0, 1.0), (1, 2.0)] {
        let sum = 1.0 + exp(s) + exp(-s);
        let o = (5.0 + 7.0 * exp(s) + 11.0 * exp(-s)) / sum;
        assert!((got.o[[0, head, 0, 0]] - o).abs() < 1e-14);
        assert!((got.lse[[0, head, 0]] - sum.ln()).abs() < 1e-14);
    }
    let slopes = ndarray::arr2(&[[0.5, 0.25]]);
    let bias = ndarray::arr1(&[0.0, 0.0, f64::NEG_INFINITY]).into_dyn();
    let options = Options {
        scale: Some(3.0),
        softcap: Some(2.0),
        bias: Some(bias.view()),
        alibi_slopes: Some(slopes.view()),
        sinks: Some(&[-1.0, 1.0]),
        ..Options::default()
    };
    // The query stands at position 2: keys 0 and 1 are 2 and 1 away.
    let got = attention_reference(q.view(), k.view(), v.view(), &options).unwrap();
    for (head, s, slope, sink) in [(0, 3.0_f64, 0.5, -1.0), (1, 6.0, 0.25, 1.0)] {
        let (a, b) = (exp(-2.0 * slope), exp(2.0 * (s / 2.0).tanh() - slope));
        let sum = a + b + exp(sink);
        assert!((got.o[[0, head, 0, 0]] - (5.0 * a + 7.0 * b) / sum).abs() < 1e-14);
        assert!((got.lse[[0, head, 0]] - sum.ln()).abs() < 1e-14);
    }
}

/// The visibility rules that the tests use are those of the reference.
#[test]
fn visible_pairs_by_hand() {
    let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n: 2, m: 4, d: 1, e: 1 };
    let drawn = |features: &Features| {
        let setting = Setting::<f32>::new(features, sizes, 1);
        let visible = setting.visible(sizes);
        let rows = visible.rows().into_iter();
        rows.map(|row| row.iter().map(|&x| if x { 'x' } else { '.' }).collect::<String>())
            .collect::<Vec<_>>()
    };
    let causal = Features { causal: true, ..Features::default() };
    assert_eq!(drawn(&causal), ["xxx.", "xxxx"]);
    assert_eq!(drawn(&Features { query_offset: Some(0), ..causal.clone() }), ["x...", "xx.."]);
    let window = Window { left: Some(1), right: Some(0) };
    assert_eq!(drawn(&Features { window, ..Features::default() }), [".xx.", "..xx"]);
    assert_eq!(drawn(&Features { tree: true, ..Features::default() })[0], "xxx.");
    let one_hot = Array4::from_elem((1, 1, 2, 1), 0.0);
    let k = Array4::<f64>::zeros((1, 1, 4, 1));
    let v = Array4::from_shape_fn((1, 1, 4, 4), |(_, _, j, c)| f64::from(u8::from(j == c)));
    let tree = AncestorMask::from_parents(&[-1, -1]).unwrap();
    let options = Options { tree: Some(&tree), ..Options::default() };
    let got = attention_reference(one_hot.view(), k.view(), v.view(), &options).unwrap();
    assert_eq!(
        got.o.mapv(|x| x > 0.0).into_raw_vec_and_offset().0,
        [
            true, true, true, false, //
            true, true, false, true,
        ]
    );
}

/// The workspace's contract on precision: the error against f64 over that of the plain algorithm in the
/// same type has a median of at most 1 and is nowhere above 2. (Not for f64, which nothing here is
/// more precise than.)
fn error_ratios<T>()
where
    T: Element + Poison,
    T::Acc: Poison,
{
    let shapes = [
        (1, 4, 64, 64, 64),
        (1, 2, 100, 100, 64),
        (1, 1, 128, 512, 64),
        (1, 1, 256, 256, 128),
        (2, 2, 97, 203, 59),
        (1, 2, 65, 300, 111),
        (1, 2, 200, 200, 40),
        (1, 32, 1, 1000, 64),
        (1, 1, 64, 1024, 128),
        (1, 4, 300, 33, 80),
        (1, 1, 128, 700, 16),
        (1, 1, 64, 256, 257),
    ];
    let plain = Features::default;
    let features = [
        plain(),
        Features { causal: true, ..plain() },
        Features { softcap: Some(10.0), ..plain() },
        Features { bias: Some(Broadcast::BatchAndHeads), causal: true, ..plain() },
    ];
    let isas = isas();
    let mut o = vec![ErrorRatios::default(); isas.len()];
    let mut lse = o.clone();
    for (seed, (batch, key_heads, n, m, d)) in shapes.into_iter().enumerate() {
        for features in &features {
            let sizes = Sizes { batch, key_heads, group: 1, n, m, d, e: d };
            let inputs = Inputs::<T>::normal(sizes, seed as u64);
            let setting = Setting::new(features, sizes, seed as u64);
            let (options, (q, k, v)) = (setting.options(), inputs.views());
            let exact = attention_reference(q, k, v, &options).unwrap();
            let naive = attention_naive(q, k, v, &options).unwrap();
            for (i, &isa) in isas.iter().enumerate() {
                let tiling = common::tiling((768, 256), isa);
                let ours = common::attention_tiled((q, k, v), &options, &tiling).unwrap();
                let case = format!("{sizes:?} {features:?}");
                o[i].push(&case, error_ratio(&ours.o, &naive.o, &exact.o).unwrap());
                lse[i].push(&case, error_ratio(&ours.lse, &naive.lse, &exact.lse).unwrap());
            }
        }
    }
    for (what, ratios) in [("o", o), ("lse", lse)] {
        for (isa, ratios) in isas.iter().zip(ratios) {
            let (median, (case, worst)) = (ratios.median(), ratios.worst().unwrap());
            println!(
                "{} {isa}: error of {what} over the naive one's: median {median:.3}, \
                 worst {worst:.3} ({case})",
                T::NAME
            );
            ratios.check(1.0, 2.0).unwrap();
        }
    }
}

#[test]
fn error_ratio_f32() {
    error_ratios::<f32>();
}

#[test]
fn error_ratio_bf16() {
    error_ratios::<bf16>();
}

#[test]
fn error_ratio_f16() {
    error_ratios::<f16>();
}

/// The convenience function is the `_into` one with default tiles.
#[test]
fn allocating_form_is_the_same() -> Result<(), Error> {
    let sizes = Sizes { batch: 2, key_heads: 2, group: 2, n: 33, m: 300, d: 24, e: 40 };
    let inputs = Inputs::<f32>::normal(sizes, 4);
    let (q, k, v) = inputs.views();
    let options = Options { causal: true, ..Options::default() };
    let a = attention(q, k, v, &options)?;
    let b = common::attention_tiled((q, k, v), &options, &Tiling::default())?;
    check_same_bits(&a.o, &b.o).unwrap();
    check_same_bits(&a.lse, &b.lse).unwrap();
    Ok(())
}
