//! The same bits for any number of threads, in any company and on every run.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use attn_flash::{Options, attention};
use attn_flash_bwd::{
    Gradients, Inputs, Strategy, Tiling, VarlenInputs, Workspace, attention_backward,
    attention_varlen_backward,
};
use common::{Broadcast, Call, Features, Sizes, UserMask, check_same};
use ndarray::{Array3, Array4, ArrayView4, Axis, Slice};
use tensor_utils::testing::{Poison, check_same_bits, in_pool, isas, repeats, thread_counts};
use tensor_utils::{Element, bf16, f16};

/// Wide in each direction in which work is shared out: batch, heads, queries of one head, keys of
/// one head, heads that share keys.
const SIZES: [Sizes; 5] = [
    Sizes { batch: 3, key_heads: 2, group: 2, n: 29, m: 61, d: 20, e: 12 },
    Sizes { batch: 1, key_heads: 1, group: 1, n: 1700, m: 300, d: 8, e: 16 },
    Sizes { batch: 1, key_heads: 1, group: 1, n: 300, m: 1100, d: 16, e: 8 },
    Sizes { batch: 1, key_heads: 1, group: 5, n: 111, m: 300, d: 16, e: 24 },
    Sizes { batch: 2, key_heads: 1, group: 1, n: 13, m: 270, d: 7, e: 5 },
];

fn settings() -> Vec<Features> {
    let plain = Features::default;
    vec![
        plain(),
        Features { causal: true, sinks: true, ..plain() },
        Features { bias: Some(Broadcast::Nothing), key_lengths: true, ..plain() },
        Features { bias: Some(Broadcast::Everything), alibi_slopes: Some(true), ..plain() },
        Features { bias: Some(Broadcast::Rows), softcap: Some(5.0), causal: true, ..plain() },
        Features { user_mask: UserMask::Dilated(3), mask: Some(Broadcast::Batch), ..plain() },
    ]
}

/// Every size with every setting, in a type and a way to compute delta that change.
macro_rules! for_all_calls {
    ($check:ident) => {
        for (i, features) in settings().iter().enumerate() {
            for (j, sizes) in SIZES.into_iter().enumerate() {
                let strategy =
                    if (i + j) % 3 == 0 { Strategy::TwoPass } else { Strategy::SavedOutput };
                match (i + j) % 5 {
                    0 => $check::<bf16>(sizes, features, strategy),
                    1 => $check::<f16>(sizes, features, strategy),
                    2 => $check::<f64>(sizes, features, strategy),
                    _ => $check::<f32>(sizes, features, strategy),
                }
            }
        }
    };
}

fn tilings(strategy: Strategy) -> impl Iterator<Item = Tiling> {
    let blocks = [(768, 256), (64, 32)];
    let isas = isas().into_iter();
    isas.flat_map(move |isa| blocks.map(|blocks| common::tiling(blocks, strategy, isa)))
}

#[test]
fn any_number_of_threads() {
    fn check<T>(sizes: Sizes, features: &Features, strategy: Strategy)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let call = Call::<T>::new(sizes, features, 1);
        for tiling in tilings(strategy) {
            let run = || call.run(&tiling);
            let alone = in_pool(1, run);
            for threads in thread_counts() {
                check_same(&in_pool(threads, run), &alone).unwrap_or_else(|error| {
                    panic!("{threads} threads: {error}\n{sizes:?} {features:?} {tiling:?}")
                });
            }
            check_same(&run(), &alone).unwrap();
        }
    }
    for_all_calls!(check);
}

/// A workspace of another pool: one slot for eight threads and eight for one.
#[test]
fn any_number_of_slots() {
    let call = Call::<f32>::new(SIZES[2], &settings()[1], 2);
    for tiling in tilings(Strategy::SavedOutput) {
        let want = call.run(&tiling);
        for (slots, threads) in [(1, 8), (8, 1), (2, 3)] {
            let mut workspace = in_pool(slots, || Workspace::new(&call.inputs(), &tiling).unwrap());
            let got = in_pool(threads, || {
                common::backward_with(&call.inputs(), &call.options(), &mut workspace).unwrap()
            });
            check_same(&got, &want)
                .unwrap_or_else(|error| panic!("{slots} slots, {threads} threads: {error}"));
        }
    }
}

#[test]
fn every_run() {
    let features =
        Features { causal: true, sinks: true, bias: Some(Broadcast::Batch), ..Features::default() };
    for (sizes, strategy) in [
        (Sizes { batch: 2, key_heads: 2, group: 2, ..SIZES[3] }, Strategy::SavedOutput),
        (SIZES[2], Strategy::TwoPass),
    ] {
        let call = Call::<f32>::new(sizes, &features, 3);
        for isa in isas() {
            let tiling = common::tiling((64, 64), strategy, isa);
            let want = call.run(&tiling);
            in_pool(3, || {
                for run in 0..repeats() {
                    check_same(&call.run(&tiling), &want)
                        .unwrap_or_else(|error| panic!("run {run}: {error}"));
                }
            });
        }
    }
}

/// A key block is a multiple of 32, whatever was asked for.
#[test]
fn key_blocks_are_rounded_up() {
    let call = Call::<f32>::new(SIZES[4], &Features::default(), 4);
    for isa in isas() {
        let run = |key_block| call.run(&common::tiling((768, key_block), Strategy::TwoPass, isa));
        check_same(&run(33), &run(64)).unwrap();
        check_same(&run(1), &run(32)).unwrap();
    }
}

/// Neither a smaller call nor one full of NaN leaves anything in a workspace.
#[test]
fn used_workspace() {
    let large = Sizes { batch: 1, key_heads: 3, group: 2, n: 50, m: 300, d: 64, e: 64 };
    let features = Features { causal: true, softcap: Some(9.0), ..Features::default() };
    fn check<T>(large: Sizes, features: &Features)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let mut nan = Call::<T>::new(large, features, 1);
        for x in [&mut nan.k, &mut nan.v, &mut nan.d_o] {
            x.fill(T::from_f64(f64::NAN));
        }
        nan.forward();
        for tiling in common::tilings() {
            let mut workspace = Workspace::new(&nan.inputs(), &tiling).unwrap();
            for sizes in [
                Sizes { batch: 2, key_heads: 1, group: 3, n: 14, m: 45, d: 5, e: 3 },
                Sizes { batch: 1, key_heads: 1, group: 1, n: 40, m: 20, d: 64, e: 64 },
            ] {
                let call = Call::<T>::new(sizes, features, 6);
                let fresh = call.run(&tiling);
                let mut run = |call: &Call<T>| {
                    common::backward_with(&call.inputs(), &call.options(), &mut workspace).unwrap()
                };
                check_same(&run(&call), &fresh).unwrap();
                check_same(&run(&call), &fresh).unwrap();
                run(&nan);
                check_same(&run(&call), &fresh)
                    .unwrap_or_else(|error| panic!("after NaN: {error} {sizes:?} {tiling:?}"));
            }
        }
    }
    check::<f32>(large, &features);
    check::<bf16>(large, &features);
}

/// The part at `index` of an axis, which keeps length 1.
fn one<X>(x: ArrayView4<'_, X>, axis: usize, index: usize) -> ArrayView4<'_, X> {
    x.slice_axis_move(Axis(axis), Slice::from(index..=index))
}

/// Each batch entry gets the bits that it has in a call of its own, whatever the others hold.
#[test]
fn batch_entries_alone() {
    fn check<T>(sizes: Sizes, features: &Features, strategy: Strategy)
    where
        T: Element + Poison,
        T::Acc: Poison,
    {
        let sizes = Sizes { batch: 3, n: sizes.n.min(200), m: sizes.m.min(300), ..sizes };
        let call = Call::<T>::new(sizes, features, 8);
        let options = call.options();
        let bias = options.bias.as_ref().map(|bias| bias.broadcast(sizes.scores()).unwrap());
        let mask = options.mask.as_ref().map(|mask| mask.broadcast(sizes.scores()).unwrap());
        let inputs = call.inputs();
        for tiling in tilings(strategy) {
            for entry in 0..3 {
                let user_mask = features.user_mask.part([entry, 0, 0, 0]);
                let of_entry = Options {
                    bias: bias.map(|bias| one(bias, 0, entry).into_dyn()),
                    mask: mask.map(|mask| one(mask, 0, entry).into_dyn()),
                    key_lengths: options.key_lengths.map(|lengths| &lengths[entry..=entry]),
                    alibi_slopes: options.alibi_slopes.map(|slopes| {
                        let row = if slopes.nrows() == 1 { 0 } else { entry };
                        slopes.slice_axis_move(Axis(0), Slice::from(row..=row))
                    }),
                    user_mask: &user_mask,
                    ..options.clone()
                };
                let slice = Slice::from(entry..=entry);
                let alone = Inputs {
                    q: one(inputs.q, 0, entry),
                    k: one(inputs.k, 0, entry),
                    v: one(inputs.v, 0, entry),
                    o: one(inputs.o, 0, entry),
                    lse: inputs.lse.slice_axis(Axis(0), slice),
                    d_o: one(inputs.d_o, 0, entry),
                    d_lse: inputs.d_lse.as_ref().map(|d_lse| d_lse.slice_axis(Axis(0), slice)),
                };
                let alone = common::backward_tiled(&alone, &of_entry, &tiling).unwrap();

                let mut others = call.clone();
                for x in [&mut others.q, &mut others.k, &mut others.v, &mut others.d_o] {
                    let own = x.index_axis(Axis(0), entry).to_owned();
                    x.fill(T::from_f64(f64::NAN));
                    x.index_axis_mut(Axis(0), entry).assign(&own);
                }
                for batch in [call.run(&tiling), others.run(&tiling)] {
                    let what =
                        |error| panic!("entry {entry}: {error}\n{sizes:?} {features:?} {tiling:?}");
                    let same = |got: &Array4<T>, alone: &Array4<T>| {
                        let got = got.slice_axis(Axis(0), slice);
                        check_same_bits(&got, &alone.view()).unwrap_or_else(what);
                    };
                    same(&batch.dq, &alone.dq);
                    same(&batch.dk, &alone.dk);
                    same(&batch.dv, &alone.dv);
                    let delta = batch.delta.slice_axis(Axis(0), slice);
                    check_same_bits(&delta, &alone.delta.view()).unwrap_or_else(what);
                    if let (Some(dbias), Some(alone), Some(Broadcast::Nothing)) =
                        (&batch.dbias, &alone.dbias, features.bias)
                    {
                        let dbias = dbias.slice_axis(Axis(0), slice);
                        check_same_bits(&dbias, &alone.view()).unwrap_or_else(what);
                    }
                }
            }
        }
    }
    for_all_calls!(check);
}

/// Key/value heads, with the query heads that share each, get the bits that they have alone.
#[test]
fn heads_alone() {
    let sizes = Sizes { batch: 2, key_heads: 3, group: 2, n: 150, m: 290, d: 12, e: 9 };
    let features = Features { causal: true, ..Features::default() };
    let call = Call::<f32>::new(sizes, &features, 9);
    let inputs = call.inputs();
    for tiling in tilings(Strategy::SavedOutput).chain(tilings(Strategy::TwoPass)) {
        let whole = call.run(&tiling);
        for head in 0..3 {
            let (queries, keys) = (Slice::from(2 * head..2 * head + 2), Slice::from(head..=head));
            let axis = Axis(1);
            let alone = Inputs {
                q: inputs.q.slice_axis(axis, queries),
                k: inputs.k.slice_axis(axis, keys),
                v: inputs.v.slice_axis(axis, keys),
                o: inputs.o.slice_axis(axis, queries),
                lse: inputs.lse.slice_axis(axis, queries),
                d_o: inputs.d_o.slice_axis(axis, queries),
                d_lse: inputs.d_lse.as_ref().map(|d_lse| d_lse.slice_axis(axis, queries)),
            };
            let alone = common::backward_tiled(&alone, &call.options(), &tiling).unwrap();
            let want = Gradients {
                dq: whole.dq.slice_axis(axis, queries).to_owned(),
                dk: whole.dk.slice_axis(axis, keys).to_owned(),
                dv: whole.dv.slice_axis(axis, keys).to_owned(),
                delta: whole.delta.slice_axis(axis, queries).to_owned(),
                dbias: None,
                dsinks: None,
            };
            check_same(&alone, &want).unwrap_or_else(|error| panic!("{error} {tiling:?}"));
        }
    }
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
    let all = Call::<f32>::new(packed, &Features::default(), 10);
    let options = Options { causal: true, ..Options::default() };
    let rows_first = |x: &Array4<f32>| -> Array3<f32> {
        x.index_axis(Axis(0), 0).permuted_axes([1, 0, 2]).as_standard_layout().to_owned()
    };
    let slice = |x: &Array4<f32>, offsets: &[usize], s: usize| {
        x.slice_axis(Axis(2), Slice::from(offsets[s]..offsets[s + 1])).to_owned()
    };
    for s in 0..lengths.len() {
        let q = slice(&all.q, &query_offsets, s);
        let k = slice(&all.k, &key_offsets, s);
        let v = slice(&all.v, &key_offsets, s);
        let d_o = slice(&all.d_o, &query_offsets, s);
        let forward = attention(q.view(), k.view(), v.view(), &options).unwrap();
        let alone = Inputs {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            o: forward.o.view(),
            lse: forward.lse.view(),
            d_o: d_o.view(),
            d_lse: None,
        };
        let alone = attention_backward(&alone, &options).unwrap();
        for poisoned in [false, true] {
            // Its own rows in the middle of the others', or of NaN.
            let among = |all: &Array4<f32>, offsets: &[usize], own: &Array4<f32>| {
                let mut x =
                    if poisoned { Array4::from_elem(all.dim(), f32::NAN) } else { all.clone() };
                x.slice_axis_mut(Axis(2), Slice::from(offsets[s]..offsets[s + 1])).assign(own);
                rows_first(&x)
            };
            let q = among(&all.q, &query_offsets, &q);
            let k = among(&all.k, &key_offsets, &k);
            let v = among(&all.v, &key_offsets, &v);
            let d_o = among(&all.d_o, &query_offsets, &d_o);
            let (queries, keys) = (&query_offsets[..], &key_offsets[..]);
            let views = (q.view(), k.view(), v.view());
            let forward =
                attn_flash::attention_varlen(views.0, views.1, views.2, queries, keys, &options)
                    .unwrap();
            let inputs = VarlenInputs {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                query_offsets: queries,
                key_offsets: keys,
                o: forward.o.view(),
                lse: forward.lse.view(),
                d_o: d_o.view(),
                d_lse: None,
            };
            let got = attention_varlen_backward(&inputs, &options).unwrap();
            let own = |x: &Array3<f32>, offsets: &[usize]| {
                let x = x.slice_axis(Axis(0), Slice::from(offsets[s]..offsets[s + 1]));
                x.permuted_axes([1, 0, 2]).insert_axis(Axis(0)).to_owned()
            };
            let got = Gradients {
                dq: own(&got.dq, queries),
                dk: own(&got.dk, keys),
                dv: own(&got.dv, keys),
                delta: own(&got.delta.insert_axis(Axis(2)), queries).remove_axis(Axis(3)),
                dbias: None,
                dsinks: None,
            };
            check_same(&got, &alone).unwrap_or_else(|error| panic!("{s} {poisoned}: {error}"));
        }
    }
}
