//! One training: weights, moments, and how a step changes them.

use ndarray::{ArrayView2, ArrayViewMut2};
use tensor_utils::{check_shape, try_vec};

use super::adamw::{Update, adamw, norm};
use super::batches::Batches;
use super::{TrainOptions, windows_of};
use crate::model::{Layout, Loss, Model, View};
use crate::ops::IGNORE;
use crate::{Config, Counts, Error, Weights};

/// How many steps in a row the loss may be far above that of guessing.
const PATIENCE: usize = 20;

/// A training that can be stopped after any step and goes on with the same bits.
///
/// Memory besides the activations ([`Model`]): latent weights, gradients and two moments, and for a
/// ternary model the projected matrices: 16 or 20 bytes a weight.
#[derive(Debug)]
pub struct Trainer {
    pub(super) config: Config,
    pub(super) options: TrainOptions,
    pub(super) state: State,
    layout: Layout,
    model: Model<f32>,
    /// Projected matrices; empty for a float model.
    effective: Vec<f32>,
    /// What the projection to `effective` did; `None` if the latent weights have changed since.
    projected: Option<Counts>,
    gradients: Vec<f32>,
    tokens: Vec<u32>,
    targets: Vec<u32>,
    batches: Option<Batches>,
    far_off: usize,
}

/// What a checkpoint must hold.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct State {
    /// Steps that are done.
    pub(super) step: usize,
    /// Matrices, then norms.
    pub(super) latent: Vec<f32>,
    pub(super) mean: Vec<f32>,
    pub(super) square: Vec<f32>,
}

/// What a step has done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: usize,
    /// Mean loss of its tokens, in nats, before the update.
    pub loss: f64,
    /// Fraction of its tokens that were predicted.
    pub accuracy: f64,
    /// Norm of the gradients before clipping.
    pub gradient_norm: f64,
    /// Whether they were clipped.
    pub clipped: bool,
    /// Its learning rate.
    pub learning_rate: f64,
    /// Counts of the projection before it; `None` for a float model.
    pub counts: Option<Counts>,
}

impl Trainer {
    /// Starts from `weights`; ternary if the configuration says how.
    ///
    /// # Errors
    /// [`Error::Option`], [`Error::Config`] or [`Error::Shape`] for what does not fit.
    pub fn new(config: &Config, options: &TrainOptions, weights: &Weights) -> Result<Self, Error> {
        weights.check(config)?;
        let layout = Layout::new(config);
        let mut latent = Vec::with_capacity(layout.matrices + layout.norms);
        weights.matrices().iter().for_each(|matrix| latent.extend(matrix.weight.iter()));
        weights.norms().iter().for_each(|norm| latent.extend(norm.weight.iter()));
        let zeros = || try_vec("moments", &[layout.matrices + layout.norms]);
        let state = State { step: 0, mean: zeros()?, square: zeros()?, latent };
        // Flips are counted against the codes of the step before, of which there was none.
        Self::with_state(config, options, state, 0)
    }

    /// Goes on from a state; the step before has flipped so many codes.
    pub(super) fn with_state(
        config: &Config,
        options: &TrainOptions,
        state: State,
        flipped: usize,
    ) -> Result<Self, Error> {
        options.check()?;
        let TrainOptions { sequences, length, eight_bit_activations, .. } = *options;
        let model = Model::new(config, sequences, length, eight_bit_activations)?;
        let layout = model.layout().clone();
        let all = layout.matrices + layout.norms;
        for (arg, moments) in
            [("latent", &state.latent), ("mean", &state.mean), ("square", &state.square)]
        {
            check_shape(arg, &[moments.len()], &[all])?;
        }
        let projected = if config.ternary.is_some() { layout.matrices } else { 0 };
        let mut trainer = Self {
            effective: try_vec("effective", &[projected])?,
            gradients: try_vec("gradients", &[all])?,
            tokens: try_vec("tokens", &[sequences * length])?,
            targets: try_vec("targets", &[sequences * length])?,
            config: config.clone(),
            options: options.clone(),
            state,
            layout,
            model,
            projected: None,
            batches: None,
            far_off: 0,
        };
        let counts = trainer.project()?;
        trainer.projected = Some(Counts { flipped, ..counts });
        Ok(trainer)
    }

    /// The configuration of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The options it was made with.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Steps that are done.
    pub fn steps_done(&self) -> usize {
        self.state.step
    }

    /// Codes that the last step flipped.
    pub(super) fn flipped(&self) -> usize {
        self.projected.map_or(0, |counts| counts.flipped)
    }

    /// Whether the weights have the form that the model wants.
    pub(super) fn is_sound(&self) -> bool {
        self.config.ternary.is_none() || self.projected.is_some()
    }

    /// Whether the next step multiplies with ternary matrices, or would if there is none.
    fn is_ternary(&self) -> bool {
        self.config.ternary.is_some()
            && !self.options.is_float_throughout()
            && self.state.step >= self.options.float_steps
    }

    /// Projects the latent matrices, if they have changed. Counts are those of ternary matrices.
    fn project(&mut self) -> Result<Counts, Error> {
        if let Some(counts) = self.projected {
            return Ok(counts);
        }
        let mut counts = Counts::default();
        let Some(projection) = self.config.ternary else { return Ok(counts) };
        let mut at = 0;
        for (index, [rows, columns]) in self.layout.shapes().into_iter().enumerate() {
            let range = at..at + rows * columns;
            at = range.end;
            let w = &self.state.latent[range.clone()];
            let out = &mut self.effective[range];
            if self.options.float_embedding && self.layout.is_table(index) {
                out.copy_from_slice(w);
                continue;
            }
            let shape = (rows, columns);
            let w = ArrayView2::from_shape(shape, w).expect("the layout has this shape");
            let mut out = ArrayViewMut2::from_shape(shape, out).expect("the layout has this shape");
            counts = counts.and(projection.project_into(&mut out, &w)?);
        }
        self.projected = Some(counts);
        Ok(counts)
    }

    /// One update from the next windows of `text`.
    ///
    /// # Errors
    /// [`Error::TooShort`] if the text is shorter than a window, and as [`step_on`](Self::step_on).
    pub fn step(&mut self, text: &[u32]) -> Result<StepReport, Error> {
        let TrainOptions { sequences, length, accumulate, seed, .. } = self.options;
        if text.len() <= length {
            return Err(Error::TooShort { tokens: text.len(), length });
        }
        let mut batches = match self.batches.take() {
            Some(batches) if batches.fits(text.len()) => batches,
            _ => Batches::new(seed, length, text.len()),
        };
        let first = self.state.step * accumulate * sequences;
        let report = self.step_on(|part, tokens, targets| {
            batches.fill(text, first + part * sequences, tokens, targets);
        });
        self.batches = Some(batches);
        report
    }

    /// One update from batches that `fill(part, tokens, targets)` writes, for each part of the
    /// accumulation; both are `[sequences, length]`, and targets that are [`IGNORE`] do not count.
    ///
    /// # Errors
    /// [`Error::Op`] for a token that the vocabulary does not have; [`Error::Option`] if no target counts;
    /// [`Error::Diverged`] if the loss or the gradients are not finite, or the loss stays far above that of
    /// guessing. The weights are those before the step then. Also if the update makes weights that have no ternary form: the
    /// training is over then, and [`save_checkpoint`](crate::save_checkpoint) refuses it.
    pub fn step_on(
        &mut self,
        mut fill: impl FnMut(usize, &mut [u32], &mut [u32]),
    ) -> Result<StepReport, Error> {
        let ternary = self.is_ternary();
        let counts = self.project()?;
        self.gradients.fill(0.0);
        let mut loss = Loss::default();
        let (latent, norms) = self.state.latent.split_at(self.layout.matrices);
        let weights = View { matrices: if ternary { &self.effective } else { latent }, norms };
        for part in 0..self.options.accumulate {
            fill(part, &mut self.tokens, &mut self.targets);
            let (tokens, targets) = (&self.tokens, &self.targets);
            let counted = targets.iter().filter(|&&target| target != IGNORE).count().max(1);
            let scale = 1.0 / (counted * self.options.accumulate) as f64;
            let gradients = &mut self.gradients;
            let part = self.model.loss_and_gradients(weights, tokens, targets, scale, gradients)?;
            loss = loss.and(part);
        }
        if loss.tokens == 0 {
            return Err(Error::option("targets", "a token that counts", "none"));
        }
        self.update(loss, ternary.then_some(counts))
    }

    /// Clips the gradients and moves the weights.
    fn update(&mut self, loss: Loss, counts: Option<Counts>) -> Result<StepReport, Error> {
        let options = &self.options;
        let gradient_norm = norm(&self.gradients);
        let far_off = (self.config.vocab_size as f64).ln() + 5.0;
        self.far_off = if loss.mean() > far_off { self.far_off + 1 } else { 0 };
        let finite = loss.mean().is_finite() && gradient_norm.is_finite();
        if !finite || self.far_off > PATIENCE {
            let step = self.state.step + 1;
            return Err(Error::Diverged { step, loss: loss.mean(), gradient_norm });
        }
        let clipped = gradient_norm > options.clip;
        let step = self.state.step;
        let learning_rate = options.learning_rate_at(step);
        let update = Update {
            learning_rate,
            weight_decay: options.weight_decay_at(step),
            beta1: options.beta1,
            beta2: options.beta2,
            epsilon: options.epsilon,
            scale: if clipped { options.clip / gradient_norm } else { 1.0 },
            step: step + 1,
        };
        let State { latent, mean, square, .. } = &mut self.state;
        let mut at = 0;
        let mut move_next = |count: usize, rate: f64, weight_decay: f64| {
            let range = at..at + count;
            at = range.end;
            let update = Update { learning_rate: rate * learning_rate, weight_decay, ..update };
            let (latent, mean) = (&mut latent[range.clone()], &mut mean[range.clone()]);
            adamw(latent, mean, &mut square[range.clone()], &self.gradients[range], &update)
        };
        for (index, [rows, columns]) in self.layout.shapes().into_iter().enumerate() {
            let rate = match index {
                _ if self.layout.is_table(index) => options.embedding_rate,
                _ if self.layout.is_residual(index) => options.residual_rate,
                _ => 1.0,
            };
            // A matrix decays by the common rate, whatever its own.
            move_next(rows * columns, rate, update.weight_decay / rate)?;
        }
        move_next(self.layout.norms, options.norm_rate, 0.0)?;
        self.state.step += 1;
        self.projected = None;
        if let Err(Error::Group { .. }) = self.project() {
            // Weights beyond the scales of f16 lead nowhere either.
            let step = self.state.step;
            return Err(Error::Diverged { step, loss: loss.mean(), gradient_norm });
        }
        let accuracy = loss.correct as f64 / loss.tokens as f64;
        let (step, loss) = (self.state.step, loss.mean());
        Ok(StepReport { step, loss, accuracy, gradient_norm, clipped, learning_rate, counts })
    }

    /// The loss over the first `most` windows of `text` that do not overlap, each a sequence of its
    /// own, with the matrices as the next step uses them: projected, for a ternary model after its float steps.
    ///
    /// # Errors
    /// [`Error::TooShort`] if the text is shorter than a window.
    pub fn evaluate(&mut self, text: &[u32], most: usize) -> Result<Loss, Error> {
        let TrainOptions { sequences, length, .. } = self.options;
        let windows = windows_of(text.len(), length).min(most);
        if windows == 0 {
            return Err(Error::TooShort { tokens: text.len(), length });
        }
        let batches = windows.div_ceil(sequences);
        self.evaluate_on(batches, |batch, tokens, targets| {
            let first = batch * sequences;
            let count = sequences.min(windows - first);
            for row in 0..sequences {
                // The last batch is filled up with a window that does not count.
                let start = (first + row.min(count - 1)) * length;
                let at = row * length..(row + 1) * length;
                tokens[at.clone()].copy_from_slice(&text[start..][..length]);
                targets[at].copy_from_slice(&text[start + 1..][..length]);
            }
            targets[count * length..].fill(IGNORE);
        })
    }

    /// The loss over `batches` batches that `fill(batch, tokens, targets)` writes, as in
    /// [`step_on`](Self::step_on).
    ///
    /// # Errors
    /// [`Error::Op`] for a token that the vocabulary does not have.
    pub fn evaluate_on(
        &mut self,
        batches: usize,
        mut fill: impl FnMut(usize, &mut [u32], &mut [u32]),
    ) -> Result<Loss, Error> {
        self.project()?;
        let ternary = self.is_ternary();
        let (latent, norms) = self.state.latent.split_at(self.layout.matrices);
        let weights = View { matrices: if ternary { &self.effective } else { latent }, norms };
        let mut loss = Loss::default();
        for batch in 0..batches {
            fill(batch, &mut self.tokens, &mut self.targets);
            loss = loss.and(self.model.loss(weights, &self.tokens, &self.targets)?);
        }
        Ok(loss)
    }

    /// The weights as the next step uses them: projected, for a ternary model after its float steps.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no memory.
    pub fn weights(&mut self) -> Result<Weights, Error> {
        self.project()?;
        let (latent, norms) = self.state.latent.split_at(self.layout.matrices);
        let matrices = if self.is_ternary() { &self.effective } else { latent };
        let mut weights = Weights::zeros(&self.config)?;
        let mut from = matrices.iter();
        for matrix in weights.matrices_mut() {
            matrix.weight.iter_mut().zip(&mut from).for_each(|(to, &from)| *to = from);
        }
        let mut from = norms.iter();
        for norm in weights.norms_mut() {
            norm.weight.iter_mut().zip(&mut from).for_each(|(to, &from)| *to = from);
        }
        Ok(weights)
    }
}
