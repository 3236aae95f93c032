//! `fuzz`: each harness of the project `fuzz/` for a while.

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::job::Job;
use super::report::Extent;
use super::runner::Runner;
use super::toolchain;
use crate::workspace::{self, Workspace};

/// How long each harness runs, unless something else is asked for.
pub(super) const MINUTES: f64 = 10.0;

/// Larger inputs find nothing that smaller ones do not; requests for memory that fail are the reader's to
/// report.
const LIMITS: &[&str] =
    &["-max_len=16384", "-timeout=30", "-malloc_limit_mb=4096", "-print_final_stats=1"];

/// Fuzz everything that reads files or takes operations from outside, one harness after the other
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this harness
    harness: Option<String>,
    /// Minutes for each
    #[arg(long, default_value_t = MINUTES, value_parser = workspace::minutes)]
    minutes: f64,
}

/// Runs the harnesses; fails if one of them finds something.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    let mut runner = Runner::new(&workspace, "fuzzing")?;
    check(&mut runner, &workspace, args.harness.as_deref(), args.minutes)?;
    runner.finish(Extent::Usual, args.harness.is_none())
}

/// Rows for the harnesses, or for the one called `only`.
pub(super) fn check(
    runner: &mut Runner,
    workspace: &Workspace,
    only: Option<&str>,
    minutes: f64,
) -> Result<()> {
    let folder = workspace.root.join("fuzz/fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))?;
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut harnesses: Vec<_> =
        paths.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned())).collect();
    harnesses.sort();
    if let Some(only) = only {
        let known = harnesses.join(", ");
        harnesses.retain(|harness| harness == only);
        anyhow::ensure!(!harnesses.is_empty(), "there is no harness `{only}`; there are {known}");
    }
    let missing = match () {
        () if toolchain::version("nightly").is_none() => Some("there is no nightly toolchain"),
        () if !toolchain::has_cargo_tool("fuzz") => Some("cargo-fuzz is not installed"),
        () => None,
    };
    for harness in harnesses {
        let name = format!("fuzz {harness}");
        if let Some(reason) = missing {
            runner.skip(name, reason);
            continue;
        }
        // What is found goes to the first folder; the second holds the seeds.
        let found = workspace.target.join("fuzzing/corpus").join(&harness);
        fs::create_dir_all(&found)?;
        let seeds = format!("fuzz/corpus/{harness}");
        let mut command = toolchain::of("nightly", ["cargo", "fuzz", "run", &harness]);
        command.arg(found).arg(seeds).arg("--").args(LIMITS);
        // 0 would be no limit.
        command.arg(format!("-max_total_time={:.0}", (60.0 * minutes).ceil()));
        command.env("ASAN_OPTIONS", "allocator_may_return_null=1");
        runner.run(Job::command(name, command));
    }
    Ok(())
}
