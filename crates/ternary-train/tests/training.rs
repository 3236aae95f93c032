//! Training as a whole: it learns, it resumes with the same bits, and what is wrong is named.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use tensor_utils::testing::in_pool;
use ternary_train::ops::IGNORE;
use ternary_train::{
    Config, Error, Layout, Model, Preset, Projection, StepReport, TrainOptions, Trainer, View,
    Weights, check_ternary, load_checkpoint, save_checkpoint,
};

/// A model of some thousand weights.
fn tiny(ternary: bool) -> Config {
    Config {
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        ternary: ternary.then(Projection::default),
        ..Preset::Nano.config(64)
    }
}

fn options() -> TrainOptions {
    TrainOptions { steps: 30, sequences: 4, length: 16, warmup: 5, ..TrainOptions::default() }
}

/// A text with something to learn.
fn text() -> Vec<u32> {
    (0..2000_u32).map(|i| (i * i / 7 + i % 5) % 64).collect()
}

fn train(config: &Config, options: &TrainOptions) -> (Trainer, Vec<StepReport>) {
    let weights = Weights::random(config, 5).unwrap();
    let mut trainer = Trainer::new(config, options, &weights).unwrap();
    let reports = (0..options.steps).map(|_| trainer.step(&text()).unwrap()).collect();
    (trainer, reports)
}

fn bits(weights: &Weights) -> Vec<u32> {
    let matrices = weights.matrices().into_iter().flat_map(|m| m.weight.iter().copied());
    let norms = weights.norms().into_iter().flat_map(|n| n.weight.iter().copied());
    matrices.chain(norms).map(f32::to_bits).collect()
}

#[test]
fn rates_belong_to_their_kind_of_weights() {
    // The first update of AdamW has the size of the learning rate, whatever the gradient is.
    let own = TrainOptions {
        embedding_rate: 2.0,
        residual_rate: 0.5,
        norm_rate: 4.0,
        weight_decay: 0.0,
        ..options()
    };
    let common = TrainOptions { weight_decay: 0.0, ..options() };
    for config in [tiny(false), Config { tie_word_embeddings: false, ..tiny(false) }] {
        let start = Weights::random(&config, 5).unwrap();
        let after = |options: &TrainOptions| {
            let mut trainer = Trainer::new(&config, options, &start).unwrap();
            trainer.step(&text()).unwrap();
            trainer.weights().unwrap()
        };
        let (own, common) = (after(&own), after(&common));
        let moved = |before: f32, after: f32| f64::from(after) - f64::from(before);
        let mut compared = 0;
        let mut compare = |name: &str, factor: f64, [start, own, common]: [f32; 3]| {
            let (own, common) = (moved(start, own), moved(start, common));
            compared += usize::from(common != 0.0);
            let rounding = 1e-6 + 1e-3 * common.abs();
            assert!((own - factor * common).abs() < rounding, "{name}: {own} {common}");
        };
        for ((start, own), common) in
            start.matrices().iter().zip(own.matrices()).zip(common.matrices())
        {
            let factor = match start.name.as_str() {
                "model.embed_tokens.weight" | "lm_head.weight" => 2.0,
                name if name.contains("o_proj") || name.contains("down_proj") => 0.5,
                _ => 1.0,
            };
            for ((&start_x, &own_x), &common_x) in
                start.weight.iter().zip(own.weight).zip(common.weight)
            {
                compare(&start.name, factor, [start_x, own_x, common_x]);
            }
        }
        for ((start, own), common) in start.norms().iter().zip(own.norms()).zip(common.norms()) {
            for ((&start_x, &own_x), &common_x) in
                start.weight.iter().zip(own.weight).zip(common.weight)
            {
                compare(&start.name, 4.0, [start_x, own_x, common_x]);
            }
        }
        assert!(compared > 10_000);
    }
}

#[test]
fn a_resumed_training_has_the_same_bits() {
    for config in [tiny(true), tiny(false), Config { tie_word_embeddings: false, ..tiny(true) }] {
        for eight_bit_activations in [false, true] {
            let options = TrainOptions { eight_bit_activations, accumulate: 2, ..options() };
            let (mut whole, reports) = train(&config, &options);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("checkpoint.safetensors");
            let weights = Weights::random(&config, 5).unwrap();
            let mut first = Trainer::new(&config, &options, &weights).unwrap();
            for _ in 0..11 {
                first.step(&text()).unwrap();
            }
            save_checkpoint(&path, &first, "a note").unwrap();
            // What is not saved is lost.
            first.step(&text()).unwrap();
            drop(first);
            let (mut resumed, note) = load_checkpoint(&path).unwrap();
            assert_eq!((note.as_str(), resumed.steps_done()), ("a note", 11));
            // Validation in between changes nothing.
            resumed.evaluate(&text(), 3).unwrap();
            for want in &reports[11..] {
                let got = resumed.step(&text()).unwrap();
                assert_eq!(got, *want);
            }
            assert_eq!(bits(&resumed.weights().unwrap()), bits(&whole.weights().unwrap()));
        }
    }
}

#[test]
fn a_ternary_model_whose_every_step_is_float_is_the_float_one() {
    let options = options();
    let all = TrainOptions { float_steps: options.steps, ..options.clone() };
    let [(mut ternary, reports), (mut float, twins)] =
        [(tiny(true), &all), (tiny(false), &options)]
            .map(|(config, options)| train(&config, options));
    assert_eq!(reports, twins);
    assert_eq!(bits(&ternary.weights().unwrap()), bits(&float.weights().unwrap()));
    assert_eq!(ternary.evaluate(&text(), 3).unwrap(), float.evaluate(&text(), 3).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    save_checkpoint(&path, &ternary, "").unwrap();
    let (mut resumed, _) = load_checkpoint(&path).unwrap();
    assert_eq!(bits(&resumed.weights().unwrap()), bits(&float.weights().unwrap()));
    // After float steps that are not all, what is evaluated is what the next step uses.
    let some = TrainOptions { float_steps: 3, ..options };
    let mut trainer =
        Trainer::new(&tiny(true), &some, &Weights::random(&tiny(true), 5).unwrap()).unwrap();
    let counts: Vec<_> = (0..4)
        .map(|_| {
            let found = check_ternary(&trainer.weights().unwrap().embedding, 128).unwrap();
            (found.violations == 0, trainer.step(&text()).unwrap().counts.is_some())
        })
        .collect();
    assert_eq!(counts, [(false, false), (false, false), (false, false), (true, true)]);
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let run =
        |threads| in_pool(threads, || bits(&train(&tiny(true), &options()).0.weights().unwrap()));
    let one = run(1);
    assert!(one == run(2) && one == run(5));
}

#[test]
fn it_learns_and_stays_ternary() {
    for config in [tiny(true), tiny(false)] {
        let (mut trainer, reports) = train(&config, &TrainOptions { steps: 150, ..options() });
        let mean = |reports: &[StepReport]| reports.iter().map(|r| r.loss).sum::<f64>() / 10.0;
        let (before, after) = (mean(&reports[..10]), mean(&reports[140..]));
        assert!(after < before - 0.5, "{before} {after}");
        for matrix in trainer.weights().unwrap().matrices() {
            let found = check_ternary(matrix.weight, 128).unwrap();
            let violations = if config.ternary.is_some() { 0 } else { found.groups };
            assert_eq!(found.violations, violations, "{}", matrix.name);
        }
        assert_eq!(reports[0].counts.is_some(), config.ternary.is_some());
    }
}

/// The gradients of the latent weights are those of a float model that has the projected weights.
#[test]
fn gradients_pass_straight_through() {
    let (ternary, float) = (tiny(true), tiny(false));
    let latent = Weights::random(&ternary, 9).unwrap();
    let mut projected = latent.clone();
    for (to, from) in projected.matrices_mut().into_iter().zip(latent.matrices()) {
        *to.weight = Projection::default().project(from.weight).unwrap().dequantize().unwrap();
    }
    assert_ne!(bits(&latent), bits(&projected));
    let options = options();
    let step = |config: &Config, weights: &Weights| {
        let mut trainer = Trainer::new(config, &options, weights).unwrap();
        trainer.step(&text()).unwrap()
    };
    let (through, oracle) = (step(&ternary, &latent), step(&float, &projected));
    assert_eq!((through.loss, through.gradient_norm), (oracle.loss, oracle.gradient_norm));
    let without = step(&float, &latent);
    assert_ne!(through.gradient_norm, without.gradient_norm);

    // The same through the model, a gradient at a time: it never sees the latent weights.
    let layout = Layout::new(&ternary);
    let flat = |weights: &Weights| -> (Vec<f32>, Vec<f32>) {
        let matrices = weights.matrices().into_iter().flat_map(|m| m.weight.iter().copied());
        (
            matrices.collect(),
            weights.norms().into_iter().flat_map(|n| n.weight.iter().copied()).collect(),
        )
    };
    let (matrices, norms) = flat(&projected);
    let mut model = Model::<f32>::new(&float, 4, 16, false).unwrap();
    let mut gradients = vec![0.0; layout.matrices + layout.norms];
    let view = View { matrices: &matrices, norms: &norms };
    let (tokens, targets) = (&text()[..64], &text()[1..65]);
    model.loss_and_gradients(view, tokens, targets, 1.0, &mut gradients).unwrap();
    assert!(gradients.iter().all(|g| g.is_finite()) && gradients.iter().any(|&g| g != 0.0));
}

#[test]
fn parts_that_accumulate_are_one_batch() {
    let config = tiny(false);
    let weights = Weights::random(&config, 5).unwrap();
    let step = |sequences, accumulate| {
        let options = TrainOptions { sequences, accumulate, ..options() };
        Trainer::new(&config, &options, &weights).unwrap().step(&text()).unwrap()
    };
    let (one, parts) = (step(8, 1), step(2, 4));
    assert!((one.loss - parts.loss).abs() < 1e-6);
    assert!((one.gradient_norm - parts.gradient_norm).abs() < 1e-5 * one.gradient_norm);
}

#[test]
fn targets_that_do_not_count_have_no_effect() {
    let config = tiny(true);
    let weights = Weights::random(&config, 5).unwrap();
    let step = |last: u32| {
        let options = TrainOptions { sequences: 1, length: 8, ..options() };
        let mut trainer = Trainer::new(&config, &options, &weights).unwrap();
        let fill = |_: usize, tokens: &mut [u32], targets: &mut [u32]| {
            tokens.copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, last]);
            targets.copy_from_slice(&[IGNORE, 3, 4, IGNORE, 6, 7, 8, IGNORE]);
        };
        trainer.step_on(fill).unwrap()
    };
    // Nothing that counts sees the last token.
    assert_eq!(step(8), step(60));
}

#[test]
fn damaged_checkpoints_are_refused_by_name() {
    let (trainer, _) = train(&tiny(true), &TrainOptions { steps: 1, ..options() });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.safetensors");
    save_checkpoint(&path, &trainer, "").unwrap();
    let good = fs::read(&path).unwrap();
    let refused = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = load_checkpoint(&path).expect_err("it is damaged").to_string();
        assert!(error.contains("c.safetensors"), "{error}");
        error
    };
    for cut in [0, 1, 8, 100, good.len() / 2, good.len() - 1] {
        refused(&good[..cut]);
    }
    let mut changed = good.clone();
    let last = changed.len() - 1000;
    changed[last] ^= 4;
    assert!(refused(&changed).contains("checksum"));
    // The learning rate in the header.
    let text = String::from_utf8_lossy(&good).into_owned();
    let at = text.find("learning_rate").unwrap() + 17;
    let mut changed = good.clone();
    changed[at] = if changed[at] == b'1' { b'2' } else { b'1' };
    refused(&changed);
    fs::write(&path, &good).unwrap();
    assert!(load_checkpoint(&path).is_ok());
    assert!(matches!(load_checkpoint(&folder.path().join("none")), Err(Error::Io { .. })));
}

/// An update so large that no f16 is a scale of its weights.
#[test]
fn weights_without_a_ternary_form_are_a_divergence() {
    let weights = Weights::random(&tiny(true), 5).unwrap();
    let options = TrainOptions { learning_rate: 1e5, warmup: 0, ..options() };
    let mut trainer = Trainer::new(&tiny(true), &options, &weights).unwrap();
    let error = trainer.step(&text()).unwrap_err();
    assert!(matches!(error, Error::Diverged { step: 1, .. }), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    let error = save_checkpoint(&path, &trainer, "").unwrap_err().to_string();
    assert!(error.contains("no ternary form") && !path.exists(), "{error}");
}

#[test]
fn divergence_and_bad_calls_are_named() {
    let config = tiny(false);
    let mut weights = Weights::random(&config, 5).unwrap();
    let start = |options: &TrainOptions, weights: &Weights| Trainer::new(&config, options, weights);
    let mut short = start(&options(), &weights).unwrap();
    assert!(matches!(short.step(&[1; 16]), Err(Error::TooShort { tokens: 16, length: 16 })));
    assert!(matches!(short.evaluate(&[], 1), Err(Error::TooShort { .. })));
    assert!(matches!(short.step(&[64; 40]), Err(Error::Op(_))));
    for wrong in [
        TrainOptions { steps: 0, ..options() },
        TrainOptions { length: 0, ..options() },
        TrainOptions { length: 1 << 20, ..options() },
        TrainOptions { learning_rate: f64::NAN, ..options() },
        TrainOptions { decay: 1.5, ..options() },
        TrainOptions { beta2: 1.0, ..options() },
        TrainOptions { weight_decay: -1.0, ..options() },
        TrainOptions { residual_rate: 1e-310, ..options() },
    ] {
        assert!(matches!(start(&wrong, &weights), Err(Error::Option { .. })), "{wrong:?}");
    }
    weights.norm[3] = f32::NAN;
    let mut broken = start(&options(), &weights).unwrap();
    assert!(matches!(broken.step(&text()), Err(Error::Diverged { step: 1, .. })));
    assert_eq!(broken.steps_done(), 0);
}

/// As any new file, not as a temporary one.
#[cfg(unix)]
#[test]
fn a_checkpoint_has_the_permissions_of_a_new_file() {
    use std::os::unix::fs::PermissionsExt;
    let weights = Weights::random(&tiny(true), 5).unwrap();
    let mut trainer = Trainer::new(&tiny(true), &options(), &weights).unwrap();
    trainer.step(&text()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [saved, new] = ["checkpoint", "new"].map(|name| folder.path().join(name));
    fs::write(&new, "").unwrap();
    save_checkpoint(&saved, &trainer, "").unwrap();
    let mode = |path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(saved), mode(new));
}

#[test]
fn a_batch_in_which_nothing_counts_is_no_divergence() {
    let weights = Weights::random(&tiny(true), 5).unwrap();
    let mut trainer = Trainer::new(&tiny(true), &options(), &weights).unwrap();
    let error = trainer.step_on(|_, tokens, targets| {
        tokens.fill(1);
        targets.fill(IGNORE);
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("`targets`") && error.contains("counts"), "{error}");
    assert_eq!(trainer.steps_done(), 0);
}
