//! Teaches a small ternary model to repeat 16 random bytes, and asks it for sequences it has not
//! seen: `cargo run --release -p ternary-train --example copy_task`. It fails if the model has not learnt it.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use ternary_train::ops::IGNORE;
use ternary_train::{Config, Preset, Projection, TrainOptions, Trainer, Weights};

/// Bytes to repeat.
const LENGTH: usize = 16;
/// Bytes that the model sees of a sequence: all but the last.
const CONTEXT: usize = 2 * LENGTH - 1;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config {
        num_hidden_layers: 2,
        intermediate_size: 512,
        ternary: Some(Projection::default()),
        ..Preset::Nano.config(256)
    };
    let options = TrainOptions {
        steps: 500,
        sequences: 32,
        length: CONTEXT,
        learning_rate: 5e-3,
        warmup: 30,
        ..TrainOptions::default()
    };
    let start = std::time::Instant::now();
    let mut trainer = Trainer::new(&config, &options, &Weights::random(&config, 1)?)?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..options.steps {
        let report = trainer.step_on(|_, tokens, targets| fill(&mut rng, tokens, targets))?;
        if report.step % 50 == 0 {
            println!(
                "step {}: loss {:.4}, accuracy {:.1} %",
                report.step,
                report.loss,
                100.0 * report.accuracy
            );
        }
    }
    let mut held_out = ChaCha8Rng::seed_from_u64(2);
    let loss =
        trainer.evaluate_on(10, |_, tokens, targets| fill(&mut held_out, tokens, targets))?;
    let accuracy = 100.0 * loss.correct as f64 / loss.tokens as f64;
    println!(
        "{} held-out sequences in {:.0} s: loss {:.4}, accuracy {accuracy:.2} %",
        10 * options.sequences,
        start.elapsed().as_secs_f64(),
        loss.mean(),
    );
    if loss.mean() < 0.1 && accuracy > 99.0 {
        Ok(())
    } else {
        Err("expected a loss below 0.1 and an accuracy above 99 %".into())
    }
}

/// Sequences of random bytes and the same again; only the second half counts.
fn fill(rng: &mut ChaCha8Rng, tokens: &mut [u32], targets: &mut [u32]) {
    let rows = tokens.chunks_exact_mut(CONTEXT).zip(targets.chunks_exact_mut(CONTEXT));
    for (tokens, targets) in rows {
        let bytes: [u32; LENGTH] = std::array::from_fn(|_| rng.random_range(0..256));
        for i in 0..CONTEXT {
            tokens[i] = bytes[i % LENGTH];
            targets[i] = if i + 1 < LENGTH { IGNORE } else { bytes[(i + 1) % LENGTH] };
        }
    }
}
