//! What the other commands have found out; those that have not run on these sources are run.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Args;
use crate::workspace::{self, Workspace};

/// `target/verify/report.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Verified {
    pub(super) quick: bool,
    pub(super) unix_time: i64,
    pub(super) commit: String,
    pub(super) rustc: String,
    pub(super) cpu: String,
    pub(super) instruction_sets: Vec<String>,
    pub(super) checks: Vec<Check>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Check {
    pub(super) name: String,
    pub(super) status: String,
    pub(super) seconds: f64,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    repeat: Option<String>,
}

/// `target/verify/compare.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Compared {
    #[serde(default)]
    commit: String,
    pub(super) machine: Machine,
    pub(super) peers: Vec<String>,
    pub(super) notes: Vec<String>,
    pub(super) rows: Vec<Row>,
    #[serde(default)]
    pub(super) precision: Vec<Precision>,
}

/// Errors against `f64`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Precision {
    kernel: String,
    case: String,
    dtype: String,
    ours: Spread,
    naive: Spread,
    peer: Option<Spread>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Spread {
    largest: f64,
    p99: f64,
    median: f64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) isa: String,
    pub(super) threads: usize,
    pub(super) peak_gflops: f64,
    pub(super) read_gb_s: f64,
}

/// A case of the comparison.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) kernel: String,
    pub(super) case: String,
    pub(super) dtype: String,
    pub(super) ours_ms: f64,
    pub(super) peer: Option<String>,
    pub(super) peer_ms: Option<f64>,
    pub(super) ratio: Option<f64>,
    pub(super) ratio_quartiles: Option<[f64; 2]>,
    pub(super) gflops: f64,
    pub(super) gb_s: f64,
    pub(super) fraction_of_peak: f64,
}

/// A row of `target/faults/report.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Fault {
    package: String,
    name: String,
    what: String,
    pub(super) verdict: String,
    test: String,
    #[serde(default)]
    commit: String,
}

/// The checks and the comparison, of this state of the sources.
pub(super) fn results(workspace: &Workspace, args: &Args) -> Result<(Verified, Compared)> {
    let folder = workspace.target.join("verify");
    let (verified, compared) = (folder.join("report.json"), folder.join("compare.json"));
    let commit = workspace::commit();
    // Sources that differ from the commit may have changed since.
    let is_current = |of: &str| !args.fresh && of == commit && !commit.ends_with("-dirty");
    let old = load(&verified).ok().filter(|old: &Verified| is_current(&old.commit));
    let verified = match old {
        Some(old) => old,
        None => {
            // A failed check is on the page; it does not keep the page from being written.
            run(&["verify-all", "--quick"])?;
            load(&verified)?
        }
    };
    let old = load(&compared).ok().filter(|old: &Compared| is_current(&old.commit));
    let compared = match old {
        Some(old) => old,
        None => {
            let (python, json) =
                (args.python.display().to_string(), compared.display().to_string());
            let mut arguments = vec!["compare", "--python", &python, "--json", &json];
            arguments.extend(args.rust_peers.then_some("--rust-peers"));
            anyhow::ensure!(run(&arguments)?, "the comparison failed; what it printed is above");
            load(&compared)?
        }
    };
    Ok((verified, compared))
}

/// The faults, if they have been tried.
pub(super) fn faults(path: &Path) -> Vec<Fault> {
    load(path).unwrap_or_default()
}

/// Runs another command of this program; whether it succeeded.
fn run(arguments: &[&str]) -> Result<bool> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir(workspace::root());
    let status = command.status().with_context(|| format!("cannot run {}", arguments[0]))?;
    Ok(status.success())
}

/// What a file of JSON says.
pub(super) fn load<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not understood", path.display()))
}

/// Seconds since 1970 as a day, year first.
pub(super) fn date(seconds: i64) -> String {
    let time = jiff::Timestamp::from_second(seconds).unwrap_or_default();
    time.strftime("%Y-%m-%d").to_string()
}
