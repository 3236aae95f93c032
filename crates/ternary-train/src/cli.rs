//! The subcommands, one file each.

mod presets;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Language models with ternary weights: train, measure, export, generate.
#[derive(Parser)]
#[command(version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the model shapes that have a name.
    Presets,
}

impl Cli {
    /// Runs the subcommand.
    pub(crate) fn run(self) -> Result<()> {
        match self.command {
            Command::Presets => presets::run(),
        }
    }
}
