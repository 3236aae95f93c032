//! `verify`: every group of every matrix is {-1, 0, 1} times one scale.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use ternary_train::formats::read_folder;
use ternary_train::{Ternary, check_ternary};

use crate::cli::say;

/// Check that a model is ternary: |round(W / s) - W / s| < 1e-5 in every group of every matrix.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the model
    model: PathBuf,
    /// Weights that share a scale. Default: what the model says, else 128
    #[arg(long)]
    group: Option<usize>,
}

/// Runs the subcommand.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (config, weights) = read_folder(&args.model)?;
    let group = args.group.or(config.ternary.map(|projection| projection.group)).unwrap_or(128);
    let (mut groups, mut violations, mut weights_seen, mut zeros) = (0, 0, 0, 0);
    for matrix in weights.matrices() {
        let found = check_ternary(matrix.weight, group).with_context(|| matrix.name.clone())?;
        say(format_args!(
            "{:44} {:6} x {:<6} {:7} groups, {:5} violations, {:.1} % zeros",
            matrix.name,
            matrix.weight.nrows(),
            matrix.weight.ncols(),
            found.groups,
            found.violations,
            100.0 * found.zeros as f64 / matrix.weight.len().max(1) as f64,
        ));
        groups += found.groups;
        violations += found.violations;
        zeros += found.zeros;
        weights_seen += matrix.weight.len();
        // The second way: codes and scale read from the weights give the same weights again.
        if found.violations == 0 {
            let again = Ternary::of_ternary(matrix.weight, group)?.dequantize()?;
            ensure!(again == matrix.weight, "{} does not survive packing", matrix.name);
        }
    }
    say(format_args!(
        "{groups} groups of {group} checked, {violations} violations, {:.1} % zeros",
        100.0 * zeros as f64 / weights_seen.max(1) as f64
    ));
    ensure!(violations == 0, "{violations} groups are not ternary");
    Ok(())
}
