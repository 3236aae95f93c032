//! Runs checks, keeps their output in files, and says how they went.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::ProgressBar;

use super::job::Job;
use super::report::{self, Extent, Row, Status};
use crate::workspace::Workspace;
use crate::workspace::say;

/// Runs one check after the other and collects the rows of the table.
pub(super) struct Runner {
    /// Where the report and the logs are written.
    folder: PathBuf,
    rows: Vec<Row>,
    progress: ProgressBar,
    started: Instant,
}

impl Runner {
    /// Writes to `target/NAME`.
    pub(super) fn new(workspace: &Workspace, name: &str) -> Result<Self> {
        let folder = workspace.target.join(name);
        let logs = folder.join("logs");
        if logs.exists() {
            fs::remove_dir_all(&logs)
                .with_context(|| format!("cannot empty {}", logs.display()))?;
        }
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        let progress = ProgressBar::new_spinner();
        progress.enable_steady_tick(Duration::from_millis(120));
        Ok(Self { folder, rows: Vec::new(), progress, started: Instant::now() })
    }

    /// A check that is one command.
    pub(super) fn run(&mut self, job: Job) {
        self.run_all(job.name.clone(), vec![job]);
    }

    /// A check that is several commands, up to the first that fails.
    pub(super) fn run_all(&mut self, name: String, jobs: Vec<Job>) {
        if jobs.is_empty() {
            return self.skip(name, "there is nothing to run");
        }
        self.measure(name, |log| {
            for job in jobs {
                if !execute(job.command, log, None)?.success() {
                    return Ok(Some(job.repeat));
                }
            }
            Ok(None)
        });
    }

    /// A check that others build on; whether it passed.
    pub(super) fn run_for_result(&mut self, job: Job) -> bool {
        self.measure(job.name, |log| {
            let status = execute(job.command, log, None)?;
            Ok((!status.success()).then_some(job.repeat))
        })
    }

    /// A check whose standard output is wanted: the file it is in, or `None` if the check failed.
    pub(super) fn run_for_output(&mut self, job: Job) -> Option<PathBuf> {
        let output = self.folder.join("logs").join(format!("{}.json", slug(&job.name)));
        let passed = self.measure(job.name, |log| {
            let status = execute(job.command, log, Some(&output))?;
            Ok((!status.success()).then_some(job.repeat))
        });
        passed.then_some(output)
    }

    /// A check that is a function: it passes if there are no findings.
    pub(super) fn check(
        &mut self,
        name: &str,
        repeat: &str,
        find: impl FnOnce() -> Result<Vec<String>>,
    ) {
        self.measure(name.to_owned(), |log| {
            let findings = find()?;
            for finding in &findings {
                writeln!(log, "{finding}")?;
            }
            Ok((!findings.is_empty()).then(|| repeat.to_owned()))
        });
    }

    /// A check that is not made, and why.
    pub(super) fn skip(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        let status = Status::Skipped { reason: reason.into() };
        self.add(Row { name: name.into(), seconds: 0.0, status });
    }

    /// Prints the table and the failures, writes the reports, which say whether this was the `whole` or only
    /// a crate or another part.
    pub(super) fn finish(self, extent: Extent, whole: bool) -> Result<ExitCode> {
        self.progress.finish_and_clear();
        let failed = self.rows.iter().any(|row| matches!(row.status, Status::Failed { .. }));
        report::print(&self.rows);
        report::write(&self.folder, &self.rows, extent, whole, self.started.elapsed())?;
        Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    /// Runs `work`, which returns the command to repeat if it failed, and adds a row. Whether it
    /// passed.
    fn measure(
        &mut self,
        name: String,
        work: impl FnOnce(&mut File) -> Result<Option<String>>,
    ) -> bool {
        let number = self.rows.len() + 1;
        let path = self.folder.join("logs").join(format!("{number:02}-{}.log", slug(&name)));
        if self.progress.is_hidden() {
            say(format_args!("running {name}"));
        }
        self.progress.set_message(format!("{number}: {name}"));
        let started = Instant::now();
        let result = File::create(&path)
            .with_context(|| format!("cannot write {}", path.display()))
            .and_then(|mut log| work(&mut log));
        let status = match result {
            Ok(None) => Status::Passed,
            Ok(Some(repeat)) => Status::Failed { repeat, log: path },
            Err(error) => {
                let repeat = format!("cargo xtask verify-all ({error:#})");
                Status::Failed { repeat, log: path }
            }
        };
        let passed = matches!(status, Status::Passed);
        self.add(Row { name, seconds: started.elapsed().as_secs_f64(), status });
        passed
    }

    fn add(&mut self, row: Row) {
        self.progress.suspend(|| say(format_args!("{}", row.line())));
        self.rows.push(row);
    }
}

/// Runs a command with its output in `log`, or the standard output in a file of its own.
fn execute(mut command: Command, log: &mut File, output: Option<&Path>) -> Result<ExitStatus> {
    let output = match output {
        Some(path) => File::create(path)?,
        None => log.try_clone()?,
    };
    let program = command.get_program().to_owned();
    command.stdin(Stdio::null()).stdout(output).stderr(log.try_clone()?);
    command.status().with_context(|| format!("cannot run {}", program.display()))
}

/// The name as a file name.
fn slug(name: &str) -> String {
    let keep = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' };
    let text: String = name.chars().map(keep).collect();
    text.trim_matches('-').replace("--", "-")
}
