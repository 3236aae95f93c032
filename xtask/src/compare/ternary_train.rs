//! A training step of a ternary model against the same model in eager PyTorch: projection, forward,
//! backward, clipping and AdamW, on the same batch again and again.

use anyhow::Result;
use ndarray::{Array1, ArrayD, arr1};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tensor_utils::testing::largest_difference;
use ternary_train::{Config, Preset, Projection, StepReport, TrainOptions, Trainer, Weights};

use super::duel::{Case, Contest};
use super::peer::{Input, Peer};

/// The presets with the batches they are trained with.
pub(super) fn cases() -> Vec<Case> {
    Preset::ALL.map(case).into()
}

fn case(preset: Preset) -> Case {
    let TrainOptions { sequences, length, .. } = preset.options(false);
    let config = Config { ternary: Some(Projection::default()), ..preset.config(256) };
    let (parameters, tokens) = (config.parameters() as f64, (sequences * length) as f64);
    // Two products forward and five backward for a pair of a query and a key it sees.
    let pairs = tokens * (length as f64 + 1.0) / 2.0;
    let attention = 7.0 * 2.0 * pairs * (config.num_hidden_layers * config.query_size()) as f64;
    Case {
        package: "ternary-train",
        kernel: "training step",
        name: format!("{} {sequences} x {length}", preset.name()),
        dtype: "f32",
        // Every weight is multiplied with every token forward, and twice backward.
        flops: 6.0 * parameters * tokens + attention,
        // The optimizer reads four numbers a weight and writes three.
        bytes: 7.0 * 4.0 * parameters,
        tolerance: 1e-3,
        prepare: Box::new(move || Ok(Box::new(Training::new(&config, sequences, length)?))),
    }
}

/// Our side.
struct Training {
    trainer: Trainer,
    weights: Array1<f32>,
    tokens: Vec<u32>,
    last: Option<StepReport>,
}

impl Training {
    fn new(config: &Config, sequences: usize, length: usize) -> Result<Self> {
        let options = TrainOptions { sequences, length, ..TrainOptions::default() };
        let weights = Weights::random(config, 1)?;
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let tokens = (0..sequences * (length + 1)).map(|_| rng.random_range(0..256)).collect();
        let trainer = Trainer::new(config, &options, &weights)?;
        let matrices = weights.matrices().into_iter().flat_map(|m| m.weight.iter().copied());
        let norms = weights.norms().into_iter().flat_map(|n| n.weight.iter().copied());
        Ok(Self { trainer, weights: matrices.chain(norms).collect(), tokens, last: None })
    }
}

impl Contest for Training {
    fn peer_operation(&self) -> (&'static str, Value) {
        let (config, options) = (self.trainer.config(), self.trainer.options());
        let options = json!({
            "vocabulary": config.vocab_size,
            "width": config.hidden_size,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "key_heads": config.num_key_value_heads,
            "head_size": config.head_dim,
            "inside": config.intermediate_size,
            "eps": config.rms_norm_eps,
            "theta": config.rope_theta,
            "sequences": options.sequences,
            "length": options.length,
            "learning_rate": options.learning_rate_at(0),
            "weight_decay": options.weight_decay,
            "betas": [options.beta1, options.beta2],
            "clip": options.clip,
        });
        ("qwen3_training_step", options)
    }

    fn inputs(&self) -> Vec<Input> {
        let tokens: Array1<f32> = self.tokens.iter().map(|&token| token as f32).collect();
        vec![Input::new("weights", &self.weights), Input::new("tokens", &tokens)]
    }

    fn run(&mut self) -> Result<()> {
        let all = &self.tokens;
        let length = self.trainer.options().length;
        let report = self.trainer.step_on(|_, tokens, targets| {
            let rows = tokens.chunks_exact_mut(length).zip(targets.chunks_exact_mut(length));
            for ((tokens, targets), all) in rows.zip(all.chunks_exact(length + 1)) {
                tokens.copy_from_slice(&all[..length]);
                targets.copy_from_slice(&all[1..]);
            }
        })?;
        self.last = Some(report);
        Ok(())
    }

    fn largest_difference(&self, peer: &mut Peer) -> Result<f64> {
        let ours =
            self.last.map_or([f32::NAN; 2], |last| [last.loss as f32, last.gradient_norm as f32]);
        Ok(relative_difference(ours, &peer.output("loss_and_norm")?))
    }
}

/// How far the quotients are from 1.
fn relative_difference(ours: [f32; 2], theirs: &ArrayD<f32>) -> f64 {
    let quotients = theirs.mapv(f64::from) / arr1(&ours.map(f64::from));
    largest_difference(quotients.iter().map(|&quotient| (quotient, 1.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_or_norm_that_is_nan_differs() {
        let theirs = |values: [f32; 2]| arr1(&values).into_dyn();
        assert_eq!(relative_difference([2.0, 4.0], &theirs([2.0, 5.0])), 0.25);
        assert_eq!(relative_difference([2.0, 4.0], &theirs([1.0, 4.0])), 0.5);
        let nan = f32::NAN;
        for wrong in [[nan, 4.0], [2.0, nan], [nan; 2]] {
            assert!(relative_difference(wrong, &theirs([2.0, 4.0])).is_nan(), "{wrong:?}");
            assert!(relative_difference([2.0, 4.0], &theirs(wrong)).is_nan(), "{wrong:?}");
        }
    }
}
