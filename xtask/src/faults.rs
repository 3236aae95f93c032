//! `faults`: makes the workspace wrong in one place at a time and sees whether the tests notice.
//!
//! Each file `faults/CRATE/NAME.patch` is a unified diff of one source file, after a line or two on
//! what is wrong with it. It is applied to a copy of the workspace under `target/faults`, and the
//! tests of the crate are run there. A fault that they do not catch is a test that is missing.

mod copy;
mod patch;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use comfy_table::{Table, presets};
use serde::{Deserialize, Serialize};

use crate::workspace::{self, Package, Workspace, note, say};
use copy::Copy;
use patch::Fault;

/// Make the workspace wrong, one fault at a time, and see whether the tests notice
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only faults of this crate
    #[arg(short, long, value_name = "CRATE")]
    package: Option<String>,
    /// Only faults whose name contains this
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
    /// Say what the faults are, and run nothing
    #[arg(long)]
    list: bool,
}

/// Tests that run longer than this hang, which is noticed too.
const LIMIT: Duration = Duration::from_secs(900);

/// What came of a fault.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    package: String,
    name: String,
    what: String,
    verdict: Verdict,
    /// The first test that failed.
    test: String,
    seconds: f64,
    /// Of the sources it was tried on.
    #[serde(default)]
    commit: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum Verdict {
    Caught,
    Missed,
    /// The patched source does not compile: the fault says nothing about the tests.
    Broken,
    /// No run has come to it yet.
    Untried,
}

/// Tries every chosen fault; fails unless all are caught. The file
/// has all of them, those that were not chosen as they were.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let is_chosen = |fault: &Fault| {
        args.package.as_ref().is_none_or(|package| *package == fault.package)
            && args.only.as_ref().is_none_or(|part| fault.name.contains(part.as_str()))
    };
    let faults = patch::all(&workspace::root())?;
    let chosen: Vec<_> = (0..faults.len()).filter(|&index| is_chosen(&faults[index])).collect();
    ensure!(!chosen.is_empty(), "no fault matches; without -p and --only all are tried");
    if args.list {
        for index in chosen {
            say(format_args!("{}: {}", faults[index].title(), faults[index].what));
        }
        return Ok(ExitCode::SUCCESS);
    }

    let workspace = Workspace::load()?;
    let folder = workspace.target.join("faults");
    let copy = Copy::new(&workspace::root(), &folder.join("copy"))?;
    let tests = Tests { copy: &copy, target: folder.join("target"), log: folder.join("log.txt") };
    let report = folder.join("report.json");
    let (mut rows, commit) = (known(&report, &faults), workspace::commit());
    for of_package in chosen.chunk_by(|&a, &b| faults[a].package == faults[b].package) {
        let name = &faults[of_package[0]].package;
        let package = workspace.select(Some(name))?.remove(0);
        note(format_args!("{name} without a fault"));
        let (verdict, test) = tests.run(name, &["--tests"])?;
        ensure!(
            verdict == Verdict::Missed,
            "the tests of {name} fail without any fault ({test}); see {}",
            tests.log.display(),
        );
        for &index in of_package {
            let (fault, row) = (&faults[index], &mut rows[index]);
            let started = Instant::now();
            let original = copy.read(&fault.path)?;
            copy.write(&fault.path, &fault.apply(&original)?)?;
            let outcome = tests.run_until_noticed(&package);
            copy.write(&fault.path, &original)?;
            (row.verdict, row.test) = outcome?;
            row.seconds = started.elapsed().as_secs_f64();
            row.commit.clone_from(&commit);
            let Row { verdict, test, seconds, .. } = &*row;
            note(format_args!("{verdict:?} {} {test} ({seconds:.0} s)", fault.title()));
            // After each one: a run of an hour that is broken off is not lost.
            save(&report, &rows)?;
        }
    }
    let caught = print(chosen.iter().map(|&index| &rows[index]));
    say(format_args!("caught {caught} of {}\nreport: {}", chosen.len(), report.display()));
    Ok(if caught == chosen.len() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A row for each fault: as the file has it from the last time it was tried, if it was.
fn known(report: &Path, faults: &[Fault]) -> Vec<Row> {
    let old = fs::read_to_string(report).unwrap_or_default();
    let mut old: Vec<Row> = serde_json::from_str(&old).unwrap_or_default();
    let mut row = |fault: &Fault| {
        let same = |row: &Row| {
            (&row.package, &row.name, &row.what) == (&fault.package, &fault.name, &fault.what)
        };
        let at = old.iter().position(same)?;
        Some(old.swap_remove(at))
    };
    faults.iter().map(|fault| row(fault).unwrap_or_else(|| Row::untried(fault))).collect()
}

impl Row {
    fn untried(fault: &Fault) -> Self {
        Self {
            package: fault.package.clone(),
            name: fault.name.clone(),
            what: fault.what.clone(),
            verdict: Verdict::Untried,
            test: String::new(),
            seconds: 0.0,
            commit: String::new(),
        }
    }
}

fn save(path: &Path, rows: &[Row]) -> Result<()> {
    let text = serde_json::to_string_pretty(rows)? + "\n";
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Prints a table, and counts the faults that were caught.
fn print<'a>(rows: impl Iterator<Item = &'a Row>) -> usize {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(["crate", "fault", "verdict", "noticed by", "time"]);
    let mut caught = 0;
    for row in rows {
        let verdict = format!("{:?}", row.verdict).to_uppercase();
        let time = format!("{:.0} s", row.seconds);
        table.add_row([&row.package, &row.name, &verdict, &row.test, &time]);
        caught += usize::from(row.verdict == Verdict::Caught);
    }
    say(&table);
    caught
}

/// The tests of a crate, in the copy.
struct Tests<'a> {
    copy: &'a Copy,
    target: PathBuf,
    log: PathBuf,
}

impl Tests<'_> {
    /// One test program after the other, so that those after the first that fails are not even
    /// built; recorded cases first, which notice most, and the unit tests last: they compile the
    /// crate once more.
    fn run_until_noticed(&self, package: &Package) -> Result<(Verdict, String)> {
        let mut programs: Vec<_> = package.integration_tests().collect();
        programs.sort_by_key(|&name| (name != "golden", name));
        let programs = programs.into_iter().map(|name| vec!["--test", name]);
        for program in programs.chain([vec!["--lib"]]) {
            let outcome = self.run(&package.name, &program)?;
            if outcome.0 != Verdict::Missed {
                return Ok(outcome);
            }
        }
        Ok((Verdict::Missed, String::new()))
    }

    /// Builds and runs some of a crate's tests; names the first that failed.
    fn run(&self, package: &str, which: &[&str]) -> Result<(Verdict, String)> {
        let Some(programs) = self.build(package, which)? else {
            return Ok((Verdict::Broken, "does not compile".to_owned()));
        };
        for program in &programs {
            let mut command = program.command();
            if !succeeds(command.env_remove("KERNELS_ISA"), &self.create_log()?, LIMIT)? {
                let log = fs::read_to_string(&self.log).unwrap_or_default();
                let failed = log.lines().find_map(|line| {
                    line.strip_prefix("test ").and_then(|line| line.strip_suffix(" ... FAILED"))
                });
                return Ok((
                    Verdict::Caught,
                    failed.unwrap_or("fails as a whole or does not end").to_owned(),
                ));
            }
        }
        Ok((Verdict::Missed, String::new()))
    }

    /// Builds the programs; `None` if they do not compile. They are run without cargo, which would leave
    /// one that hangs behind when it is ended.
    fn build(&self, package: &str, which: &[&str]) -> Result<Option<Vec<Program>>> {
        let how = ["test", "--package", package, "--no-run"];
        let output = workspace::cargo([&how, which].concat())
            .arg("--message-format=json-render-diagnostics")
            .current_dir(self.copy.folder())
            .env("CARGO_TARGET_DIR", &self.target)
            .stdin(Stdio::null())
            .stderr(self.create_log()?)
            .output()
            .context("cannot run cargo")?;
        let messages = String::from_utf8_lossy(&output.stdout);
        let programs: Vec<_> = messages.lines().filter_map(Program::parse).collect();
        ensure!(!output.status.success() || !programs.is_empty(), "cargo names no test program");
        Ok(output.status.success().then_some(programs))
    }

    fn create_log(&self) -> Result<File> {
        File::create(&self.log).with_context(|| format!("cannot write {}", self.log.display()))
    }
}

/// A test program, as cargo says that it has built it.
#[derive(Debug, PartialEq, Deserialize)]
struct Program {
    manifest_path: PathBuf,
    executable: PathBuf,
    profile: Profile,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Profile {
    test: bool,
}

impl Program {
    /// `None` for messages about anything else, programs among it that tests start.
    fn parse(message: &str) -> Option<Self> {
        serde_json::from_str(message).ok().filter(|program: &Self| program.profile.test)
    }

    /// Runs it where cargo would.
    fn command(&self) -> Command {
        let folder = self.manifest_path.parent().unwrap_or(&self.manifest_path);
        let mut command = Command::new(&self.executable);
        command.current_dir(folder).env("CARGO_MANIFEST_DIR", folder);
        command
    }
}

/// Whether a program succeeds within the time limit, after which it is ended.
fn succeeds(command: &mut Command, log: &File, limit: Duration) -> Result<bool> {
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log.try_clone()?);
    let program = command.get_program().to_owned();
    let mut child = command.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if started.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_programs_that_cargo_has_built_are_run_in_their_package() {
        let line = r#"{"manifest_path":"/x/Cargo.toml","profile":{"opt_level":"3","test":true},"executable":"/t/golden-1","fresh":true}"#;
        let command = Program::parse(line).unwrap().command();
        assert_eq!(command.get_program(), "/t/golden-1");
        assert_eq!(command.get_current_dir(), Some(Path::new("/x")));
        assert_eq!(Program::parse(&line.replace(r#""/t/golden-1""#, "null")), None);
        assert_eq!(Program::parse(&line.replace(r#""test":true"#, r#""test":false"#)), None);
        assert_eq!(Program::parse(r#"{"reason":"build-finished","success":true}"#), None);
    }

    /// This very program, told to run a test that does not end.
    #[test]
    fn a_program_that_hangs_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let log = File::create(folder.path().join("log.txt")).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "faults::tests::does_not_end"]);
        assert!(!succeeds(&mut command, &log, Duration::from_millis(200)).unwrap());
        let mut command = Command::new(std::env::current_exe().unwrap());
        assert!(succeeds(command.arg("--list"), &log, Duration::from_secs(60)).unwrap());
    }

    #[test]
    #[ignore = "it is what hangs in another test"]
    fn does_not_end() {
        std::thread::sleep(Duration::from_secs(30));
    }
}
