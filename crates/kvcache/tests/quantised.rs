//! What quantised storage costs in accuracy: of the numbers, of the logits and of the result.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use kvcache::{Cache, Config, Options, Queries, Rows, Storage, attend_reference};
use ndarray::{Array3, Axis};
use tensor_utils::testing::{Seeded, largest_difference};

const LEN: usize = 2048;
const SIZE: usize = 128;

/// How far a storage is from the numbers it was given.
#[derive(Debug)]
struct Divergence {
    /// Largest error of a key and of a value, relative to the largest magnitude of its group.
    numbers: [f64; 2],
    /// Root mean square and largest error of a logit, relative to the deviation of the logits.
    logits: [f64; 2],
    /// Mean Kullback-Leibler divergence of the weights, in nats.
    weights: f64,
    /// Largest error of the output, relative to its largest magnitude.
    output: f64,
}

/// Of keys with a few channels of ten times the size of others, as models have them, if `outliers`.
fn divergence(storage: Storage, outliers: bool) -> Divergence {
    let seeded = &mut Seeded::new(1);
    let mut k: Array3<f32> = seeded.normal((LEN, 1, SIZE));
    let v: Array3<f32> = seeded.normal((LEN, 1, SIZE));
    let q: Array3<f32> = seeded.normal((1, 8, SIZE));
    if outliers {
        for channel in [5, 50, 100] {
            k.index_axis_mut(Axis(2), channel).mapv_inplace(|x| 10.0 * x);
        }
    }
    let config = Config { residual: 0, ..Config::new(1, 1, SIZE) }.stored_as(storage);
    let mut cache = Cache::new(&config).unwrap();
    let seq = cache.create().unwrap();
    cache.append(0, seq, k.view(), v.view()).unwrap();
    let (kept_k, kept_v) = cache.read(0, seq, 0, LEN).unwrap();

    let (mut of_keys, mut of_values) = (Vec::new(), Vec::new());
    let page = config.page_size;
    for channel in 0..SIZE {
        for start in (0..LEN).step_by(page) {
            let group =
                (start..start + page).map(|row| (k[[row, 0, channel]], kept_k[[row, 0, channel]]));
            of_keys.push((relative_error(group), 0.0));
        }
    }
    for row in 0..LEN {
        let group = (0..SIZE).map(|channel| (v[[row, 0, channel]], kept_v[[row, 0, channel]]));
        of_values.push((relative_error(group), 0.0));
    }
    let numbers = [of_keys, of_values].map(largest_difference);

    let (mut squares, mut pairs, mut weights, mut deviation) = (0.0, Vec::new(), 0.0, 0.0);
    for q in q.index_axis(Axis(0), 0).rows() {
        let logits = |k: &Array3<f32>| -> Vec<f64> {
            let dot = |k: ndarray::ArrayView1<'_, f32>| -> f64 {
                q.iter().zip(k).map(|(&q, &k)| f64::from(q) * f64::from(k)).sum()
            };
            let scale = 1.0 / (SIZE as f64).sqrt();
            k.index_axis(Axis(1), 0).rows().into_iter().map(|k| scale * dot(k)).collect()
        };
        let (exact, kept) = (logits(&k), logits(&kept_k));
        for (a, b) in exact.iter().zip(&kept) {
            squares += (a - b).powi(2);
            pairs.push((*a, *b));
            deviation += a * a;
        }
        let sum = |x: &[f64]| x.iter().map(|x| x.exp()).sum::<f64>().ln();
        let (exact_lse, kept_lse) = (sum(&exact), sum(&kept));
        let divergence =
            |(a, b): (&f64, &f64)| (a - exact_lse).exp() * (a - exact_lse - b + kept_lse);
        weights += exact.iter().zip(&kept).map(divergence).sum::<f64>();
    }
    let deviation = (deviation / (8 * LEN) as f64).sqrt();
    let largest = largest_difference(pairs);
    let logits = [(squares / (8 * LEN) as f64).sqrt() / deviation, largest / deviation];

    let batch = [Queries::last(seq, 1)];
    let options = Options::default();
    let got = cache.attend(0, q.view(), &batch, &options).unwrap();
    let (want, _) =
        attend_reference(q.view(), k.view(), v.view(), Rows::Last(1), &options, None).unwrap();
    let scale = want.iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    let output = common::difference(&got.o, &want) / scale;
    Divergence { numbers, logits, weights: weights / 8.0, output }
}

/// The largest error in a group over the largest magnitude in it.
fn relative_error(group: impl Iterator<Item = (f32, f32)>) -> f64 {
    let mut scale = 0.0_f64;
    let error = largest_difference(group.map(|(exact, kept)| {
        scale = scale.max(f64::from(exact).abs());
        (f64::from(exact), f64::from(kept))
    }));
    error / scale
}

#[test]
fn an_error_that_is_nan_is_kept() {
    assert_eq!(relative_error([(1.0, 1.5), (-2.0, -2.0)].into_iter()), 0.25);
    assert!(relative_error([(1.0, f32::NAN), (-2.0, -2.0)].into_iter()).is_nan());
}

/// With `--nocapture` it prints the table of docs/derivation.md, section 2.
#[test]
fn errors_of_numbers_logits_and_outputs() {
    // (storage, bounds of the numbers, the logits' deviation, the weights, the output)
    let bounds = [
        (Storage::F32, 0.0, 0.0, 1e-12, 1e-5),
        (Storage::Bf16, 0.004, 0.003, 1e-5, 0.01),
        (Storage::F16, 0.0005, 0.0004, 1e-6, 0.002),
        (Storage::Int8, 0.005, 0.006, 5e-5, 0.02),
        (Storage::Int4, 0.08, 0.1, 0.01, 0.3),
    ];
    println!("| storage | keys | numbers | logits (rms, largest) | weights (KL, nats) | output |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for outliers in [false, true] {
        for (storage, numbers, logits, weights, output) in bounds {
            let got = divergence(storage, outliers);
            let keys = if outliers { "3 channels tenfold" } else { "normal" };
            let [key, value] = got.numbers;
            let [rms, largest] = got.logits;
            println!(
                "| {} | {keys} | {:.4} | {rms:.4}, {largest:.4} | {:.1e} | {:.4} |",
                storage.name(),
                key.max(value),
                got.weights,
                got.output
            );
            assert!(key <= numbers && value <= numbers, "{storage:?}: {got:?}");
            assert!(rms <= logits, "{storage:?}: {got:?}");
            // With larger logits the same relative error weighs more.
            let room = if outliers { 20.0 } else { 1.0 };
            assert!(got.weights <= room * weights, "{storage:?}: {got:?}");
            assert!(got.output <= room * output, "{storage:?}: {got:?}");
        }
    }
}
