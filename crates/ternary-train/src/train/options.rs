//! How a model is trained.

use serde::{Deserialize, Serialize};

use crate::Error;

/// How a model is trained. The defaults are a plain recipe; [`Preset::options`](crate::Preset::options) has
/// what is best for the presets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainOptions {
    /// Updates of the weights, at least 1.
    pub steps: usize,
    /// Sequences that are computed at once, at least 1.
    pub sequences: usize,
    /// Tokens of a sequence, at least 1.
    pub length: usize,
    /// Batches whose gradients are averaged for one update, at least 1. Default 1.
    pub accumulate: usize,
    /// Highest learning rate. Default 3e-3.
    pub learning_rate: f64,
    /// Steps in which the learning rate rises from 0, linearly. Default 100.
    pub warmup: usize,
    /// Fraction of the steps at the end in which it falls, linearly. Default 0.3.
    pub decay: f64,
    /// Fraction of the highest learning rate that it falls to. Default 0.05.
    pub final_rate: f64,
    /// Decoupled weight decay of matrices; norms have none. Default 0.1.
    pub weight_decay: f64,
    /// Fraction of the steps after which there is no weight decay. Default 2/3.
    pub weight_decay_until: f64,
    /// Factor of the learning rate for embedding and head, tied or not. Default 1. The weight decay of
    /// a matrix is that of the common rate.
    pub embedding_rate: f64,
    /// The same for the matrices that add to the residual stream, o and down. Default 1.
    pub residual_rate: f64,
    /// The same for norms. Default 1.
    pub norm_rate: f64,
    /// Decay of the mean of the gradients. Default 0.9.
    pub beta1: f64,
    /// Decay of the mean of their squares. Default 0.95.
    pub beta2: f64,
    /// Added to the root of the mean of the squares. Default 1e-8.
    pub epsilon: f64,
    /// Largest norm of all gradients together; larger ones are scaled down to it. Default 1.
    pub clip: f64,
    /// Steps at the start in which a ternary model is trained as a float one. If there are no others, it stays
    /// a float model, in its weights and where it is evaluated. Default 0.
    pub float_steps: usize,
    /// Whether embedding and head stay float while the other matrices are ternary; to measure what
    /// they cost. Default `false`.
    pub float_embedding: bool,
    /// Whether the inputs of linear layers are rounded to 8 bits a token. Default `false`.
    pub eight_bit_activations: bool,
    /// Seed of the data order. Default 1.
    pub seed: u64,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            steps: 2000,
            sequences: 12,
            length: 64,
            accumulate: 1,
            learning_rate: 3e-3,
            warmup: 100,
            decay: 0.3,
            final_rate: 0.05,
            weight_decay: 0.1,
            weight_decay_until: 2.0 / 3.0,
            embedding_rate: 1.0,
            residual_rate: 1.0,
            norm_rate: 1.0,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            clip: 1.0,
            float_steps: 0,
            float_embedding: false,
            eight_bit_activations: false,
            seed: 1,
        }
    }
}

impl TrainOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Option`] names the first that does not fit.
    pub fn check(&self) -> Result<(), Error> {
        for (option, value) in [
            ("steps", self.steps),
            ("sequences", self.sequences),
            ("length", self.length),
            ("accumulate", self.accumulate),
        ] {
            if value == 0 {
                return Err(Error::option(option, "at least 1", value));
            }
        }
        self.check_tokens()?;
        for (option, value) in [
            ("learning_rate", self.learning_rate),
            ("embedding_rate", self.embedding_rate),
            ("residual_rate", self.residual_rate),
            ("norm_rate", self.norm_rate),
            ("epsilon", self.epsilon),
            ("clip", self.clip),
        ] {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::option(option, "a positive number", value));
            }
        }
        for (option, value) in [
            ("decay", self.decay),
            ("final_rate", self.final_rate),
            ("weight_decay_until", self.weight_decay_until),
        ] {
            if !(0.0..=1.0).contains(&value) {
                return Err(Error::option(option, "a number from 0 to 1", value));
            }
        }
        for (option, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::option(option, "a number from 0 to below 1", value));
            }
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::option("weight_decay", "at least 0", self.weight_decay));
        }
        for (option, rate) in
            [("embedding_rate", self.embedding_rate), ("residual_rate", self.residual_rate)]
        {
            // Which the decay of these matrices is divided by.
            if !(self.weight_decay / rate).is_finite() {
                let decay = self.weight_decay;
                let what =
                    format!("so large that a weight decay of {decay:e} divided by it is finite");
                return Err(Error::option(option, what, format!("{rate:e}")));
            }
        }
        Ok(())
    }

    /// Checks that the tokens of the whole training can be counted; names the largest of the numbers that they
    /// are the product of.
    fn check_tokens(&self) -> Result<(), Error> {
        let factors = [
            ("steps", self.steps),
            ("sequences", self.sequences),
            ("length", self.length),
            ("accumulate", self.accumulate),
        ];
        let tokens = factors.iter().try_fold(1_usize, |all, &(_, factor)| all.checked_mul(factor));
        match factors.into_iter().max_by_key(|&(_, factor)| factor) {
            Some((option, largest)) if tokens.is_none() => {
                let what = "at most as many as make a number of tokens that can be counted";
                Err(Error::option(option, what, largest))
            }
            _ => Ok(()),
        }
    }

    /// Whether a ternary model is trained as a float one to the end, and is one then.
    pub fn is_float_throughout(&self) -> bool {
        self.float_steps >= self.steps
    }

    /// Tokens of one update.
    pub fn tokens_per_step(&self) -> usize {
        self.sequences * self.length * self.accumulate
    }
}
