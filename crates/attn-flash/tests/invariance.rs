//! The same bits for any number of threads, in any company and on every run.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::{
    Attention, Options, Tiling, Window, Workspace, attention, attention_into, attention_varlen,
};
use common::{Broadcast, Features, Inputs, Setting, Sizes, UserMask, attention_tiled};
use ndarray::{Array2, Array3, Array4, ArrayView4, Axis, Slice};
use tensor_utils::testing::{
    Guarded, Poison, batch_sizes, check_same_bits, in_pool, isas, repeats, thread_counts,
};
use tensor_utils::{Element, bf16, f16};

/// Wide in each direction in which work is shared out: batch, heads, one head alone, one query.
const SIZES: [Sizes; 5] = [
    Sizes { batch: 5, key_heads: 3, group: 2, n: 29, m: 61, d: 20, e: 12 },
    Sizes { batch: 1, key_heads: 1, group: 1, n: 700, m: 700, d: 32, e: 32 },
    Sizes { batch: 1, key_heads: 1, group: 5, n: 211, m: 300, d: 16, e: 24 },
    Sizes { batch: 2, key_heads: 2, group: 4, n: 1, m: 1000, d: 64, e: 64 },
    Sizes { batch: 3, key_heads: 1, group: 1, n: 13, m: 270, d: 7, e: 5 },
];

fn settings() -> Vec<Features> {
    let plain = Features::default;
    vec![
        plain(),
        Features { causal: true, ..plain() },
        Features { window: Window { left: Some(70), right: Some(9) }, ..plain() },
        Features { key_lengths: true, sinks: true, softcap: Some(5.0), ..plain() },
        Features { bias: Some(Broadcast::Nothing), alibi_slopes: Some(true), ..plain() },
        Features { user_mask: UserMask::Dilated(3), mask: Some(Broadcast::Batch), ..plain() },
        Features {
            user_mask: UserMask::Documents { length: 41, first_query: 0 },
            causal: true,
            ..plain()
        },
    ]
}

/// Every size with every setting, in a type that changes.
macro_rules! for_all_calls {
    ($check:ident) => {
        for (i, features) in settings().iter().enumerate() {
            for (j, sizes) in SIZES.into_iter().enumerate() {
                match (i + j) % 5 {
                    0 => $check::<bf16>(sizes, features),
                    1 => $check::<f16>(sizes, features),
                    2 => $check::<f64>(sizes, features),
                    _ => $check::<f32>(sizes, features),
                }
            }
        }
    };
}

fn assert_same<T: Element>(got: &Attention<T>, want: &Attention<T>, what: &str) {
    check_same_bits(&got.o, &want.o).unwrap_or_else(|error| panic!("{what}: o: {error}"));
    check_same_bits(&got.lse, &want.lse).unwrap_or_else(|error| panic!("{what}: lse: {error}"));
}

#[test]
fn any_number_of_threads() {
    fn check<T>(sizes: Sizes, features: &Features)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T>::normal(sizes, 1);
        let setting = Setting::new(features, sizes, 1);
        for isa in isas() {
            let tiling = Tiling { isa: Some(isa), ..Tiling::default() };
            let run = || attention_tiled(inputs.views(), &setting.options(), &tiling).unwrap();
            let alone = in_pool(1, run);
            for threads in thread_counts() {
                let what = format!("{threads} threads, {isa}, {sizes:?}, {features:?}");
                assert_same(&in_pool(threads, run), &alone, &what);
            }
            assert_same(&run(), &alone, "outside of a pool");
        }
    }
    for_all_calls!(check);
}

#[test]
fn every_run() {
    let features =
        Features { causal: true, sinks: true, bias: Some(Broadcast::Batch), ..Features::default() };
    for sizes in [SIZES[0], SIZES[2]] {
        let inputs = Inputs::<f32>::normal(sizes, 12);
        let setting = Setting::new(&features, sizes, 12);
        for isa in isas() {
            let tiling = common::tiling((64, 64), isa);
            let run = || attention_tiled(inputs.views(), &setting.options(), &tiling).unwrap();
            let want = run();
            in_pool(3, || {
                for at in 0..repeats() {
                    assert_same(&run(), &want, &format!("run {at}, {isa}, {sizes:?}"));
                }
            });
        }
    }
}

/// The first entry of a batch, and the last, whatever stands beside them.
#[test]
fn any_batch_size() {
    let entry = |x: &Array4<f32>, b: usize| x.slice_axis(Axis(0), Slice::from(b..=b)).to_owned();
    let sizes = |batch| Sizes { batch, key_heads: 2, group: 2, n: 5, m: 70, d: 20, e: 12 };
    let options = Options { causal: true, ..Options::default() };
    for isa in isas() {
        let tiling = Tiling { isa: Some(isa), ..Tiling::default() };
        for batch in batch_sizes() {
            let inputs = Inputs::<f32>::normal(sizes(batch), 13);
            let all = attention_tiled(inputs.views(), &options, &tiling).unwrap();
            for b in [0, batch - 1] {
                let (q, k, v) = (entry(&inputs.q, b), entry(&inputs.k, b), entry(&inputs.v, b));
                let views = (q.view(), k.view(), v.view());
                let alone = attention_tiled(views, &options, &tiling).unwrap();
                let got = Attention {
                    o: entry(&all.o, b),
                    lse: all.lse.slice_axis(Axis(0), Slice::from(b..=b)).to_owned(),
                };
                assert_same(&got, &alone, &format!("entry {b} of {batch}, {isa}"));
            }
        }
    }
}

/// A workspace of another pool: one slot for eight threads and eight for one.
#[test]
fn any_number_of_slots() {
    let sizes = SIZES[1];
    let inputs = Inputs::<f32>::normal(sizes, 2);
    let (q, k, v) = inputs.views();
    let options = Options { causal: true, ..Options::default() };
    let want = attention(q, k, v, &options).unwrap();
    for (slots, threads) in [(1, 8), (8, 1), (2, 3)] {
        let mut workspace =
            in_pool(slots, || Workspace::new(sizes.d, sizes.e, &Tiling::default()).unwrap());
        let mut o = Guarded::contiguous(want.o.raw_dim());
        let mut lse = Guarded::contiguous(want.lse.raw_dim());
        let (o_view, lse_view) = (o.view_mut(), lse.view_mut());
        in_pool(threads, || {
            attention_into(o_view, lse_view, q, k, v, &options, &mut workspace).unwrap();
        });
        let got = Attention { o: o.finish().unwrap(), lse: lse.finish().unwrap() };
        assert_same(&got, &want, &format!("{slots} slots, {threads} threads"));
    }
}

#[test]
fn any_query_block() {
    fn check<T>(sizes: Sizes, features: &Features)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T>::normal(sizes, 3);
        let setting = Setting::new(features, sizes, 3);
        for isa in isas() {
            for key_block in [32, 256] {
                let run = |query_block| {
                    let tiling = common::tiling((query_block, key_block), isa);
                    attention_tiled(inputs.views(), &setting.options(), &tiling).unwrap()
                };
                let want = run(768);
                for query_block in [1, 5, 12, 100] {
                    let what = format!("query block {query_block}, {isa}, {sizes:?} {features:?}");
                    assert_same(&run(query_block), &want, &what);
                }
            }
        }
    }
    for_all_calls!(check);
}

/// A key block is a multiple of 32, whatever was asked for.
#[test]
fn key_blocks_are_rounded_up() {
    let sizes = SIZES[4];
    let inputs = Inputs::<f32>::normal(sizes, 4);
    for isa in isas() {
        let run = |key_block| {
            let tiling = common::tiling((768, key_block), isa);
            attention_tiled(inputs.views(), &Options::default(), &tiling).unwrap()
        };
        assert_same(&run(33), &run(64), "33");
        assert_same(&run(1), &run(32), "1");
    }
}

#[test]
fn second_run_and_used_workspace() {
    for tiling in common::tilings() {
        let mut workspace = Workspace::new(64, 64, &tiling).unwrap();
        // NaN everywhere leaves its traces in the workspace.
        let large = Sizes { batch: 1, key_heads: 2, group: 2, n: 50, m: 300, d: 64, e: 64 };
        let nan = |sizes: Sizes, seed| {
            let mut inputs = Inputs::<f32>::normal(sizes, seed);
            inputs.v.fill(f32::NAN);
            inputs.k.fill(f32::NAN);
            inputs
        };
        let run = |inputs: &Inputs<f32>, sizes: Sizes, workspace: &mut Workspace<f32>| {
            let (batch, heads) = (sizes.batch, sizes.heads());
            let mut o = Guarded::padded((batch, heads, sizes.n, sizes.e));
            let mut lse = Guarded::padded((batch, heads, sizes.n));
            let options = Options { causal: true, ..Options::default() };
            let (o_view, lse_view) = (o.view_mut(), lse.view_mut());
            let (q, k, v) = inputs.views();
            attention_into(o_view, lse_view, q, k, v, &options, workspace).unwrap();
            Attention { o: o.finish().unwrap(), lse: lse.finish().unwrap() }
        };
        for sizes in [
            Sizes { batch: 2, key_heads: 1, group: 3, n: 14, m: 45, d: 5, e: 3 },
            Sizes { batch: 1, key_heads: 1, group: 1, n: 40, m: 20, d: 64, e: 64 },
        ] {
            let inputs = Inputs::<f32>::normal(sizes, 6);
            let first = run(&inputs, sizes, &mut workspace);
            assert_same(&run(&inputs, sizes, &mut workspace), &first, "second run");
            run(&nan(large, 7), large, &mut workspace);
            assert_same(&run(&inputs, sizes, &mut workspace), &first, "after NaN");
        }
    }
}

/// Each row gets the bits that it has in a call of its own.
#[test]
fn rows_alone() {
    fn check<T>(sizes: Sizes, features: &Features)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let inputs = Inputs::<T>::normal(sizes, 8);
        let setting = Setting::new(features, sizes, 8);
        let options = setting.options();
        let bias = options.bias.as_ref().map(|bias| bias.broadcast(sizes.scores()).unwrap());
        let mask = options.mask.as_ref().map(|mask| mask.broadcast(sizes.scores()).unwrap());
        let (q, k, v) = inputs.views();
        for isa in isas() {
            let tiling = Tiling { isa: Some(isa), ..Tiling::default() };
            let whole = attention_tiled((q, k, v), &options, &tiling).unwrap();
            for seed in 0..12 {
                let (b, h) = (seed % sizes.batch, seed * 5 % sizes.heads());
                let i = seed * 97 % sizes.n;
                // The row's own entry of every array, as arrays of one batch entry, head and query.
                fn one<X>(
                    x: ArrayView4<'_, X>,
                    [b, h, i]: [Option<usize>; 3],
                ) -> ArrayView4<'_, X> {
                    let mut x = x;
                    for (axis, at) in [b, h, i].into_iter().enumerate() {
                        if let Some(at) = at {
                            x.slice_axis_inplace(Axis(axis), Slice::from(at..=at));
                        }
                    }
                    x
                }
                let row = [Some(b), Some(h), Some(i)];
                let keys = [Some(b), Some(h / sizes.group), None];
                let first = sizes.m as isize - sizes.n as isize;
                let slopes = options.alibi_slopes.map(|slopes| {
                    let entry = if slopes.nrows() == 1 { 0 } else { b };
                    Array2::from_elem((1, 1), slopes[[entry, h]])
                });
                let user_mask = features.user_mask.part([b, h, i, 0]);
                let alone = Options {
                    query_offset: Some(options.query_offset.unwrap_or(first) + i as isize),
                    bias: bias.map(|bias| one(bias, row).into_dyn()),
                    mask: mask.map(|mask| one(mask, row).into_dyn()),
                    key_lengths: options.key_lengths.map(|lengths| &lengths[b..=b]),
                    alibi_slopes: slopes.as_ref().map(|slopes| slopes.view()),
                    sinks: options.sinks.map(|sinks| &sinks[h..=h]),
                    user_mask: &user_mask,
                    ..options.clone()
                };
                let views = (one(q, row), one(k, keys), one(v, keys));
                let alone = attention_tiled(views, &alone, &tiling).unwrap();
                let o = one(whole.o.view(), row);
                let what = format!("row {row:?} {isa} {sizes:?} {features:?}");
                check_same_bits(&alone.o, &o).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert_eq!(alone.lse[[0, 0, 0]].bits(), whole.lse[[b, h, i]].bits(), "{what}");
            }
        }
    }
    for_all_calls!(check);
}

/// A sequence of a packed batch gets the bits that it has in a call of its own, also when the
/// sequences beside it hold NaN.
#[test]
fn sequences_alone() {
    let lengths = [(3, 5), (40, 300), (0, 7), (1, 100), (257, 257), (4, 0)];
    let offsets = |length: fn(&(usize, usize)) -> usize| {
        let mut offsets = vec![0];
        offsets.extend(lengths.iter().scan(0, |end, lengths| {
            *end += length(lengths);
            Some(*end)
        }));
        offsets
    };
    let (query_offsets, key_offsets) = (offsets(|l| l.0), offsets(|l| l.1));
    let (queries, keys) = (*query_offsets.last().unwrap(), *key_offsets.last().unwrap());
    let packed = Sizes { batch: 1, key_heads: 2, group: 2, n: queries, m: keys, d: 24, e: 9 };
    let Inputs { q, k, v } = Inputs::<f32>::normal(packed, 10);
    let options = Options { causal: true, ..Options::default() };
    // `[total, heads, size]`.
    let rows_first = |x: &Array4<f32>| -> Array3<f32> {
        x.index_axis(Axis(0), 0).permuted_axes([1, 0, 2]).as_standard_layout().to_owned()
    };
    let slice = |x: &Array4<f32>, offsets: &[usize], s: usize| {
        x.slice_axis(Axis(2), Slice::from(offsets[s]..offsets[s + 1])).to_owned()
    };
    for s in 0..lengths.len() {
        let own =
            (slice(&q, &query_offsets, s), slice(&k, &key_offsets, s), slice(&v, &key_offsets, s));
        let alone = attention(own.0.view(), own.1.view(), own.2.view(), &options).unwrap();
        for poisoned in [false, true] {
            let only_own = |x: &Array4<f32>, offsets: &[usize], own: &Array4<f32>| {
                let mut x = if poisoned { Array4::from_elem(x.dim(), f32::NAN) } else { x.clone() };
                x.slice_axis_mut(Axis(2), Slice::from(offsets[s]..offsets[s + 1])).assign(own);
                rows_first(&x)
            };
            let q = only_own(&q, &query_offsets, &own.0);
            let k = only_own(&k, &key_offsets, &own.1);
            let v = only_own(&v, &key_offsets, &own.2);
            let views = (q.view(), k.view(), v.view());
            let got =
                attention_varlen(views.0, views.1, views.2, &query_offsets, &key_offsets, &options)
                    .unwrap();
            let rows = Slice::from(query_offsets[s]..query_offsets[s + 1]);
            let o = got.o.slice_axis(Axis(0), rows).permuted_axes([1, 0, 2]).insert_axis(Axis(0));
            let lse = got.lse.slice_axis(Axis(0), rows).reversed_axes().insert_axis(Axis(0));
            check_same_bits(&o, &alone.o.view()).unwrap_or_else(|error| panic!("{s}: {error}"));
            check_same_bits(&lse, &alone.lse.view()).unwrap_or_else(|error| panic!("{s}: {error}"));
        }
    }
}

/// Whether an input is contiguous changes no bit.
#[test]
fn strides_do_not_matter() {
    for sizes in SIZES {
        let inputs = Inputs::<bf16>::normal(sizes, 12);
        let transposed =
            |x: &Array4<bf16>| x.view().reversed_axes().as_standard_layout().to_owned();
        let (q, k, v) = (transposed(&inputs.q), transposed(&inputs.k), transposed(&inputs.v));
        let views = (q.view().reversed_axes(), k.view().reversed_axes(), v.view().reversed_axes());
        for tiling in common::tilings() {
            let options = Options { causal: true, ..Options::default() };
            let want = attention_tiled(inputs.views(), &options, &tiling).unwrap();
            let got = attention_tiled(views, &options, &tiling).unwrap();
            assert_same(&got, &want, &format!("{sizes:?} {tiling:?}"));
        }
    }
}
