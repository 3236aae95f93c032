//! What a training leaves for people to read: `report.json`, `report.md` and `curve.svg`.

mod curve;
mod markdown;
mod shell;

pub use shell::shell_line;

use std::fs;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::formats::write_file;
use crate::{Config, Error, TrainOptions};

/// Everything that is worth knowing about a training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// The command that repeats it, such as [`shell_line`] makes it.
    pub command: String,
    /// Name of the preset; `None` for a configuration of its own.
    pub preset: Option<String>,
    /// `ternary absmean, groups of 128`, or `float`.
    pub weights: String,
    /// Name of the tokenizer.
    pub tokenizer: String,
    /// The shape, as `config.json` has it.
    pub config: serde_json::Value,
    /// How it was trained.
    pub options: TrainOptions,
    /// Weights in all matrices and norms.
    pub parameters: usize,
    /// Tokens of the training text.
    pub text_tokens: usize,
    /// Tokens that were trained on, repetitions counted.
    pub tokens: usize,
    /// Seconds in steps, evaluations and checkpoints not counted.
    pub seconds: f64,
    /// Mean training loss of the last tenth of the steps, in nats a token.
    pub train_loss: f64,
    /// Validation at the end.
    pub validation: Option<Validation>,
    /// Windows shared between training and validation text; see the guard's length.
    pub leakage: Leakage,
    /// Bytes of memory at the peak, as the operating system counts them; 0 if it does not tell.
    pub peak_bytes: u64,
    /// Fraction of the steps whose gradients were clipped.
    pub clip_rate: f64,
    /// Fraction of zeros among the ternary weights at the end.
    pub zeros: Option<f64>,
    /// The course of the training.
    pub curve: Vec<Point>,
}

/// Validation loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Nats a token.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Bits for each byte of the text that was predicted.
    pub bits_per_byte: f64,
    /// Tokens that were predicted.
    pub tokens: usize,
}

/// What the guard against leakage found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Leakage {
    /// Bytes of a window; 0: not looked for.
    pub length: usize,
    /// Windows of the validation text that the training text has too.
    pub shared: usize,
    /// Windows of the validation text.
    pub windows: usize,
}

/// Some steps, averaged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// The last of the steps.
    pub step: usize,
    /// Mean training loss since the point before.
    pub train_loss: f64,
    /// Validation loss after it, if it was measured.
    pub validation_loss: Option<f64>,
    /// Fraction of zeros among the ternary weights.
    pub zeros: Option<f64>,
    /// Codes that changed in a step, on average.
    pub flipped: Option<f64>,
    /// Fraction of steps that were clipped.
    pub clip_rate: f64,
    /// Learning rate of the last step.
    pub learning_rate: f64,
}

impl TrainReport {
    /// Writes `report.json`, `report.md` and `curve.svg` to a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if one cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let put = |name: &str, text: String| {
            let path = folder.join(name);
            write_file(&path, |file| file.write_all(text.as_bytes()))
        };
        let json = serde_json::to_string_pretty(self).map_err(std::io::Error::other);
        put("report.json", json.map_err(Error::io(&folder.join("report.json")))? + "\n")?;
        put("report.md", self.markdown())?;
        put("curve.svg", curve::draw(&self.curve).map_err(Error::io(&folder.join("curve.svg")))?)
    }

    /// Tokens a second, in steps.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    /// What the weights of a configuration are, in words.
    pub fn describe(config: &Config) -> String {
        config.ternary.map_or("float".to_owned(), |projection| {
            format!("ternary {}, groups of {}", projection.rule.name(), projection.group)
        })
    }
}

/// The most memory that this process has had, in bytes; 0 where the system does not tell.
pub fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok());
    kilobytes.map_or(0, |kilobytes: u64| kilobytes * 1024)
}
