//! What `ternary-train train` has left: losses of ternary and float weights side by side.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use ternary_train::TrainReport;

use super::gather;

/// A training.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Training {
    /// The preset, or the folder.
    pub(super) name: String,
    /// Ternary or float, and how.
    pub(super) weights: String,
    parameters: usize,
    tokens: usize,
    peak_bytes: u64,
    tokens_per_second: f64,
    /// At the end, in nats a token.
    validation_loss: Option<f64>,
    /// Step and validation loss; training loss where no validation was asked for.
    pub(super) curve: Vec<(usize, f64)>,
}

/// Those of the folders.
pub(super) fn read(folders: &[PathBuf]) -> Result<Vec<Training>> {
    folders
        .iter()
        .map(|folder| {
            let report: TrainReport = gather::load(&folder.join("report.json"))?;
            let validated = report.curve.iter().any(|point| point.validation_loss.is_some());
            let curve = report.curve.iter().filter_map(|point| {
                let loss = if validated { point.validation_loss } else { Some(point.train_loss) };
                Some((point.step, loss?))
            });
            Ok(Training {
                name: report.preset.clone().unwrap_or_else(|| folder.display().to_string()),
                weights: report.weights.clone(),
                parameters: report.parameters,
                tokens: report.tokens,
                peak_bytes: report.peak_bytes,
                tokens_per_second: report.tokens_per_second(),
                validation_loss: report.validation.map(|validation| validation.loss),
                curve: curve.collect(),
            })
        })
        .collect()
}
