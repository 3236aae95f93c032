//! The loop over the steps.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use ternary_train::formats::write_folder;
use ternary_train::{
    Error, Point, StepReport, TrainReport, Trainer, Validation, peak_memory, save_checkpoint,
};

use super::Note;
use super::bar::bar;
use super::texts::Data;
use crate::cli::{note, say};

/// Steps between updates of the progress bar.
const SHOW: usize = 10;

/// What has happened so far; a checkpoint holds it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(in crate::cli) struct Progress {
    seconds: f64,
    clipped: usize,
    curve: Vec<Point>,
    recent: Recent,
    last_tenth: Recent,
}

/// Sums over some steps.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Recent {
    steps: usize,
    loss: f64,
    clipped: usize,
    flipped: usize,
}

impl Recent {
    fn add(&mut self, report: &StepReport) {
        self.steps += 1;
        self.loss += report.loss;
        self.clipped += usize::from(report.clipped);
        self.flipped += report.counts.map_or(0, |counts| counts.flipped);
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.steps.max(1) as f64
    }
}

/// A training that is under way.
pub(super) struct Run<'a> {
    pub(super) out: &'a Path,
    pub(super) quiet: bool,
    pub(super) note: Note,
    pub(super) data: Data,
    pub(super) trainer: Trainer,
}

impl Run<'_> {
    /// Trains to the end, and writes model and report.
    pub(super) fn run(mut self) -> Result<()> {
        let options = self.trainer.options().clone();
        let bar = bar(options.steps, self.trainer.steps_done(), self.quiet);
        while self.trainer.steps_done() < options.steps {
            let start = Instant::now();
            let report = match self.trainer.step(&self.data.train) {
                Err(error @ Error::Diverged { .. }) => {
                    bar.abandon();
                    let path = self.checkpoint();
                    let last = if path.exists() {
                        format!("the last good checkpoint is {}", path.display())
                    } else {
                        "there is no checkpoint yet".to_owned()
                    };
                    return Err(error).context(last);
                }
                report => report?,
            };
            let progress = &mut self.note.progress;
            progress.seconds += start.elapsed().as_secs_f64();
            progress.clipped += usize::from(report.clipped);
            progress.recent.add(&report);
            if report.step > options.steps - options.steps.div_ceil(10) {
                progress.last_tenth.add(&report);
            }
            if report.step % SHOW == 0 {
                bar.set_message(self.message(&report));
            }
            bar.set_position(report.step as u64);
            let last = report.step == options.steps;
            if report.step % self.note.eval_every == 0 || last {
                let point = self.measure(&report, last)?;
                bar.suspend(|| note(line(&point)));
            }
            if report.step % self.note.checkpoint_every == 0 || last {
                let note = serde_json::to_string(&self.note)?;
                save_checkpoint(&self.checkpoint(), &self.trainer, &note)?;
            }
        }
        bar.finish();
        self.finish()
    }

    fn checkpoint(&self) -> std::path::PathBuf {
        self.out.join("checkpoint.safetensors")
    }

    /// What the bar says.
    fn message(&self, report: &StepReport) -> String {
        let options = self.trainer.options();
        let progress = &self.note.progress;
        let tokens = report.step * options.tokens_per_step();
        let speed = tokens as f64 / progress.seconds;
        let codes = report.counts.map_or(String::new(), |counts| {
            let zeros = 100.0 * counts.zeros as f64 / counts.weights.max(1) as f64;
            format!(" zeros {zeros:.1} % flips {}", counts.flipped)
        });
        let clipped = 100.0 * progress.clipped as f64 / report.step as f64;
        format!("loss {:.3} {speed:.0} tok/s{codes} clipped {clipped:.0} %", report.loss)
    }

    /// Ends a stretch of the curve with a validation.
    fn measure(&mut self, report: &StepReport, last: bool) -> Result<Point> {
        let windows = self.note.eval_windows.saturating_mul(if last { 5 } else { 1 });
        let loss = self.trainer.evaluate(&self.data.validation, windows)?;
        let recent = std::mem::take(&mut self.note.progress.recent);
        let zeros =
            |counts: ternary_train::Counts| counts.zeros as f64 / counts.weights.max(1) as f64;
        let point = Point {
            step: report.step,
            train_loss: recent.mean(recent.loss),
            validation_loss: Some(loss.mean()),
            zeros: report.counts.map(zeros),
            flipped: report.counts.map(|_| recent.mean(recent.flipped as f64)),
            clip_rate: recent.mean(recent.clipped as f64),
            learning_rate: report.learning_rate,
        };
        self.note.progress.curve.push(point);
        Ok(point)
    }

    /// Writes the model and the report.
    fn finish(mut self) -> Result<()> {
        let weights = self.trainer.weights()?;
        let mut config = self.trainer.config().clone();
        let options = self.trainer.options().clone();
        if options.float_embedding || options.is_float_throughout() {
            // Not all matrices are ternary: it is a float model to everybody else.
            config.ternary = None;
        }
        write_folder(self.out, &config, &weights, Some(&self.data.tokenizer))?;
        let windows = self.note.eval_windows.saturating_mul(5);
        let loss = self.trainer.evaluate(&self.data.validation, windows)?;
        let bytes: usize = self.data.validation[1..=loss.tokens]
            .iter()
            .map(|&token| self.data.tokenizer.token_bytes(token).len())
            .sum();
        let validation = Validation {
            loss: loss.mean(),
            perplexity: loss.mean().exp(),
            bits_per_byte: loss.sum / std::f64::consts::LN_2 / bytes.max(1) as f64,
            tokens: loss.tokens,
        };
        let progress = self.note.progress;
        let report = TrainReport {
            command: self.note.command,
            preset: self.note.preset,
            weights: TrainReport::describe(&config),
            tokenizer: self.data.tokenizer.name(),
            config: serde_json::from_str(&config.to_json())?,
            parameters: config.parameters(),
            text_tokens: self.data.train.len(),
            tokens: options.steps * options.tokens_per_step(),
            seconds: progress.seconds,
            train_loss: progress.last_tenth.mean(progress.last_tenth.loss),
            validation: Some(validation),
            leakage: self.data.leakage,
            peak_bytes: peak_memory(),
            clip_rate: progress.clipped as f64 / options.steps as f64,
            zeros: progress.curve.last().and_then(|point| point.zeros),
            curve: progress.curve,
            options,
        };
        report.write(self.out)?;
        say(format_args!(
            "trained {} in {:.0} s, {:.0} tokens/s; model, report.md, report.json and curve.svg are in {}",
            report.weights,
            report.seconds,
            report.tokens_per_second(),
            self.out.display(),
        ));
        say(format_args!(
            "validation loss {:.4} nats a token, perplexity {:.2} ({}), {:.4} bits per byte",
            validation.loss, validation.perplexity, report.tokenizer, validation.bits_per_byte,
        ));
        Ok(())
    }
}

/// A line of the log.
fn line(point: &Point) -> String {
    let validation =
        point.validation_loss.map_or(String::new(), |loss| format!(", validation {loss:.4}"));
    let codes = match (point.zeros, point.flipped) {
        (Some(zeros), Some(flipped)) => {
            format!(", zeros {:.1} %, {flipped:.0} codes flipped a step", 100.0 * zeros)
        }
        _ => String::new(),
    };
    let clipped = 100.0 * point.clip_rate;
    format!(
        "step {}: loss {:.4}{validation}{codes}, {clipped:.0} % clipped",
        point.step, point.train_loss
    )
}
