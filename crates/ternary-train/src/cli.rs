//! The subcommands, one file each.

mod bench;
mod export;
mod folder;
mod generate;
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
    Generate(generate::Generate),
    Export(export::Export),
    Bench(bench::Bench),
    /// Print the model shapes that have a name.
    Presets,
}

impl Cli {
    /// Runs the subcommand.
    pub(crate) fn run(self) -> Result<()> {
        match self.command {
            Command::Generate(command) => command.run(),
            Command::Export(command) => command.run(),
            Command::Bench(command) => command.run(),
            Command::Presets => presets::run(),
        }
    }
}
