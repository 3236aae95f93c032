//! What the other commands have found out; those that have not run on these sources are run.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Args;
use crate::compare;
use crate::workspace::{self, Workspace};

/// `target/verify/report.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Verified {
    /// Not only a crate.
    #[serde(default)]
    whole: bool,
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
    /// Not only a crate or some cases.
    #[serde(default)]
    whole: bool,
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

impl Verified {
    /// Whether these are all the checks, of the sources at `commit`.
    fn serves(&self, commit: &str) -> bool {
        self.whole && is_current(&self.commit, commit)
    }
}

impl Compared {
    /// Whether this is the whole comparison, of the sources at `commit` and with all of `peers`, of which
    /// those without a version may have any.
    fn serves(&self, commit: &str, peers: impl FnOnce() -> Vec<String>) -> bool {
        let is_there = |peer: &String| {
            let mut names = self.peers.iter();
            names.any(|name| name == peer || name.split(' ').next() == Some(peer))
        };
        self.whole && is_current(&self.commit, commit) && peers().iter().all(is_there)
    }
}

/// Whether results of one commit are those of another: sources that differ from their commit, or are of
/// none that is known, may have changed since.
fn is_current(of: &str, now: &str) -> bool {
    of == now && !now.is_empty() && !now.ends_with("-dirty")
}

/// The checks and the comparison, of this state of the sources.
pub(super) fn results(workspace: &Workspace, args: &Args) -> Result<(Verified, Compared)> {
    let folder = workspace.target.join("verify");
    let (verified, compared) = (folder.join("report.json"), folder.join("compare.json"));
    let commit = workspace::commit();
    let old = load(&verified).ok();
    let verified = match old.filter(|old: &Verified| !args.fresh && old.serves(&commit)) {
        Some(old) => old,
        None => {
            // A failed check is on the page; it does not keep the page from being written.
            run(&["verify-all", "--quick"])?;
            load(&verified)?
        }
    };
    let serves = |old: &Compared| {
        let peers = || compare::peers(&args.python, args.rust_peers);
        !args.fresh && old.serves(&commit, peers)
    };
    let compared = match load(&compared).ok().filter(serves) {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use serde_json::json;

    use super::*;

    #[test]
    fn only_whole_checks_of_a_known_commit_are_shown_again() {
        let verified = |commit: &str, whole: bool| -> Verified {
            serde_json::from_value(json!({
                "whole": whole, "quick": true, "unix_time": 0, "commit": commit, "rustc": "", "cpu": "",
                "instruction_sets": [], "checks": [],
            }))
            .unwrap()
        };
        assert!(verified("abc", true).serves("abc"));
        assert!(!verified("abc", false).serves("abc"));
        assert!(!verified("abc", true).serves("abd"));
        assert!(!verified("abc-dirty", true).serves("abc-dirty"));
        assert!(!verified("", true).serves(""));
    }

    #[test]
    fn a_comparison_is_shown_again_with_the_peers_that_are_asked_for() {
        let compared = |whole: bool, peers: &[&str]| -> Compared {
            let machine =
                json!({"cpu": "", "isa": "", "threads": 2, "peak_gflops": 1.0, "read_gb_s": 1.0});
            serde_json::from_value(json!({
                "commit": "abc", "whole": whole, "machine": machine, "peers": peers, "notes": [],
                "rows": [],
            }))
            .unwrap()
        };
        let serves = |old: &Compared, peers: &[&str]| {
            old.serves("abc", || peers.iter().map(|&peer| peer.to_owned()).collect())
        };
        let (alone, all) = (compared(true, &[]), compared(true, &["torch 2.15", "candle 0.9"]));
        assert!(serves(&alone, &[]) && !serves(&alone, &["torch 2.15"]));
        assert!(serves(&all, &[]) && serves(&all, &["torch 2.15", "candle"]));
        assert!(!serves(&all, &["torch 2.16"]) && !serves(&all, &["torch 2.15", "burn"]));
        assert!(!serves(&compared(false, &[]), &[]));
    }
}
