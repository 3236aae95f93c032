//! The subcommands, one file each.

mod bench;
mod eval;
mod export;
mod folder;
mod generate;
mod presets;
mod train;
mod values;
mod verify;

use std::fmt::Display;
use std::io::{ErrorKind, Write};

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
    Train(Box<train::Args>),
    Eval(eval::Args),
    Verify(verify::Args),
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
            Command::Train(args) => train::run(&args),
            Command::Eval(args) => eval::run(&args),
            Command::Verify(args) => verify::run(&args),
            Command::Generate(command) => command.run(),
            Command::Export(command) => command.run(),
            Command::Bench(command) => command.run(),
            Command::Presets => presets::run(),
        }
    }
}

/// Prints a line. A reader that has gone changes nothing about what is done and reported; what else goes wrong ends
/// the program.
fn say(line: impl Display) {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            note(format_args!("error: cannot print: {error}"));
            std::process::exit(1);
        }
        _ => {}
    }
}

/// Prints a line to the error stream: an error, or how far the work is. The work does not depend on who reads
/// it, so a line that cannot be written is left out.
pub(crate) fn note(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
