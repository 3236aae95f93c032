//! The same bits on any number of threads, for a row alone or in a batch, and again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{Features, Inputs, Values, tilings};
use ndarray::{Array2, Axis};
use softmax_topk::{Logit, Options, Tiling, TopK, softmax_topk_backward};
use tensor_utils::testing::{batch_sizes, in_pool, repeats, thread_counts};
use tensor_utils::{Element, Isa, bf16, f16};

fn bits<A: Element>(top: &TopK<A>) -> (Vec<u32>, Vec<u64>) {
    let indices = top.indices.iter().chain(&top.kept).copied().collect();
    (indices, top.probs.iter().chain(&top.lse).map(|x| x.bits()).collect())
}

/// Rows that are shared out whole, and rows that are cut.
#[test]
fn threads_have_no_influence() {
    fn check<T: Logit>(rows: usize, vocabulary: usize) {
        let features = Features { temperatures: true, ..Features::new(rows, vocabulary, 40) };
        let inputs = Inputs::<T>::new(features);
        for tiling in tilings() {
            let want = bits(&in_pool(1, || inputs.forward(&tiling)).unwrap());
            for threads in thread_counts() {
                let got = in_pool(threads, || inputs.forward(&tiling)).unwrap();
                assert_eq!(bits(&got), want, "{rows} x {vocabulary}, {threads}, {tiling:?}");
            }
            assert_eq!(bits(&inputs.forward(&tiling).unwrap()), want, "outside a pool");
        }
    }
    check::<f32>(1, 151_936);
    check::<f32>(3, 70_000);
    check::<f32>(40, 3000);
    check::<bf16>(5, 80_000);
    check::<f16>(2, 66_000);
    check::<f64>(1, 100_000);
}

#[test]
fn the_batch_has_no_influence() {
    let inputs = Inputs::<f32>::new(Features::new(9, 70_001, 40));
    for tiling in tilings() {
        let all = in_pool(4, || inputs.forward(&tiling)).unwrap();
        for row in [0, 4, 8] {
            let mut alone = inputs.clone();
            alone.features.rows = 1;
            alone.logits = inputs.logits.slice_axis(Axis(0), (row..row + 1).into()).to_owned();
            let alone = in_pool(2, || alone.forward(&tiling)).unwrap();
            assert_eq!(alone.indices.row(0), all.indices.row(row));
            assert_eq!(alone.probs.row(0), all.probs.row(row));
            assert_eq!(alone.lse[0].to_bits(), all.lse[row].to_bits());
        }
    }
}

/// A row of a batch of any size has the bits it has alone.
#[test]
fn any_batch_size() {
    let alone = Inputs::<f32>::new(Features::new(1, 3001, 40));
    for tiling in tilings() {
        let want = bits(&alone.forward(&tiling).unwrap());
        for rows in batch_sizes() {
            let mut batch = Inputs::<f32>::new(Features::new(rows, 3001, 40));
            batch.logits.row_mut(rows - 1).assign(&alone.logits.row(0));
            let all = batch.forward(&tiling).unwrap();
            let indices: Vec<u32> = all.indices.row(rows - 1).to_vec();
            assert_eq!(indices, want.0[..indices.len()], "{rows} {tiling:?}");
            let probs: Vec<u64> = all.probs.row(rows - 1).iter().map(|x| x.bits()).collect();
            assert_eq!(probs, want.1[..probs.len()], "{rows} {tiling:?}");
        }
    }
}

#[test]
fn every_run() {
    for (rows, vocabulary) in [(2, 70_000), (40, 900)] {
        let inputs = Inputs::<f32>::new(Features::new(rows, vocabulary, 40));
        for tiling in tilings() {
            let want = bits(&inputs.forward(&tiling).unwrap());
            in_pool(3, || {
                for run in 0..repeats() {
                    assert_eq!(bits(&inputs.forward(&tiling).unwrap()), want, "{run} {tiling:?}");
                }
            });
        }
    }
}

/// Order and ties are the same on every instruction set and for every number of passes.
#[test]
fn tokens_are_the_same_everywhere() {
    for values in [Values::Normal, Values::Whole, Values::Equal, Values::Zeros, Values::Extreme] {
        let inputs = Inputs::<f32>::new(Features { values, ..Features::new(2, 30_000, 500) });
        let results: Vec<_> =
            tilings().iter().map(|tiling| inputs.forward(tiling).unwrap().indices).collect();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{values:?}");
    }
}

#[test]
fn gradients_do_not_depend_on_threads() {
    let inputs = Inputs::<f32>::new(Features { tokens: 2, ..Features::new(7, 5000, 30) });
    let (options, gradients) = (inputs.options(), inputs.gradients());
    let top = inputs.forward(&Tiling::default()).unwrap();
    let run = |threads| {
        in_pool(threads, || {
            softmax_topk_backward(&gradients, inputs.logits.view(), top.view(), &options).unwrap()
        })
    };
    let want: Array2<f32> = run(1);
    for threads in thread_counts() {
        assert_eq!(run(threads), want, "{threads} threads");
    }
}

/// The path that is asked for is the path that runs: the last bits of a sum tell them apart.
#[test]
fn each_instruction_set_runs() {
    let inputs = Inputs::<f32>::new(Features::new(40, 5000, 5));
    let active = Isa::active().unwrap();
    let of = |isa| inputs.forward(&Tiling { isa, ..Tiling::default() }).unwrap();
    assert_eq!(bits(&of(None)), bits(&of(Some(active))));
    let _: Options<'_, f32> = inputs.options();
    // The products that the one has and the other has not are none of this kernel's.
    let same = |isa| if isa == Isa::Avx512Bf16 { Isa::Avx512 } else { isa };
    for isa in Isa::available() {
        let equal = bits(&of(Some(isa))) == bits(&of(Some(active)));
        assert_eq!(equal, same(isa) == same(active), "{isa}");
    }
}
