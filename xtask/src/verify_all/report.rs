//! The table at the end, what to do about each failure, and the report files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::compare::machine;
use crate::workspace::{self, say};

/// Lines of a failed check's output that are shown.
const TAIL: usize = 40;

/// A check and how it went.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) seconds: f64,
    #[serde(flatten)]
    pub(super) status: Status,
}

/// How a check went.
#[derive(Debug, Serialize)]
#[serde(tag = "status", rename_all = "UPPERCASE")]
pub(super) enum Status {
    #[serde(rename = "PASS")]
    Passed,
    #[serde(rename = "FAIL")]
    Failed {
        /// The command that runs this check alone.
        repeat: String,
        /// Its output.
        log: PathBuf,
    },
    Skipped {
        reason: String,
    },
}

/// How much was checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    Quick,
    Usual,
    Deep,
}

/// `report.json`.
#[derive(Serialize)]
struct Report<'a> {
    passed: bool,
    /// Not only a crate or another part.
    whole: bool,
    quick: bool,
    deep: bool,
    /// Seconds since 1970.
    unix_time: u64,
    seconds: f64,
    commit: String,
    rustc: String,
    cpu: String,
    instruction_sets: Vec<&'static str>,
    checks: &'a [Row],
}

impl Row {
    /// The row as a line of text.
    pub(super) fn line(&self) -> String {
        let (verdict, note) = self.verdict();
        format!("{verdict:<7} {:>7} {} {note}", self.time(), self.name).trim_end().to_owned()
    }

    fn verdict(&self) -> (&'static str, &str) {
        match &self.status {
            Status::Passed => ("PASS", ""),
            Status::Failed { repeat, .. } => ("FAIL", repeat),
            Status::Skipped { reason } => ("SKIPPED", reason),
        }
    }

    fn time(&self) -> String {
        match self.status {
            Status::Skipped { .. } => String::new(),
            Status::Passed | Status::Failed { .. } => format!("{:.1} s", self.seconds),
        }
    }
}

/// Prints the table and, below it, what is known about each failure.
pub(super) fn print(rows: &[Row]) {
    say(format_args!("\n{}", table(rows, presets::UTF8_FULL_CONDENSED)));
    for row in rows {
        if let Status::Failed { repeat, log } = &row.status {
            say(format_args!(
                "\nFAIL {}\n  repeat it: {repeat}\n  output:    {}",
                row.name,
                log.display()
            ));
            let text = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(TAIL)..] {
                say(format_args!("  | {line}"));
            }
        }
    }
    say(format_args!("\n{}", summary(rows)));
}

/// Writes `report.json` and `report.md`.
pub(super) fn write(
    folder: &Path,
    rows: &[Row],
    extent: Extent,
    whole: bool,
    took: Duration,
) -> Result<()> {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let report = Report {
        passed: !rows.iter().any(|row| matches!(row.status, Status::Failed { .. })),
        whole,
        quick: extent == Extent::Quick,
        deep: extent == Extent::Deep,
        unix_time: since_1970.map_or(0, |time| time.as_secs()),
        seconds: took.as_secs_f64(),
        commit: workspace::commit(),
        rustc: workspace::output_of("rustc", &["--version"]),
        cpu: machine::cpu(),
        instruction_sets: tensor_utils::Isa::available().map(tensor_utils::Isa::name).collect(),
        checks: rows,
    };
    let markdown = format!(
        "# verify-all\n\n{}\n\n- commit: {}\n- {}\n- {}, {}\n- {:.0} s{}\n\n{}\n",
        summary(rows),
        report.commit,
        report.rustc,
        report.cpu,
        report.instruction_sets.join(", "),
        report.seconds,
        match extent {
            Extent::Quick => ", --quick",
            Extent::Usual => "",
            Extent::Deep => ", --deep",
        },
        table(rows, presets::ASCII_MARKDOWN),
    );
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        say(format_args!("report: {}", path.display()));
        Ok(())
    };
    write("report.json", serde_json::to_string_pretty(&report)? + "\n")?;
    write("report.md", markdown)
}

fn table(rows: &[Row], style: comfy_table::TableStyle) -> Table {
    let mut table = Table::new();
    table.load_style(style).set_header(["check", "status", "time", "note"]);
    for row in rows {
        let (verdict, note) = row.verdict();
        let time = Cell::new(row.time()).set_alignment(CellAlignment::Right);
        table.add_row([Cell::new(&row.name), Cell::new(verdict), time, Cell::new(note)]);
    }
    table
}

fn summary(rows: &[Row]) -> String {
    let count = |verdict| rows.iter().filter(|row| row.verdict().0 == verdict).count();
    let (passed, failed, skipped) = (count("PASS"), count("FAIL"), count("SKIPPED"));
    format!("{passed} passed, {failed} failed, {skipped} skipped")
}
