//! `report`: everything that has been checked and measured, on one page.
//!
//! It gathers what the other commands leave under `target` (and runs those that have not been run),
//! measures memory itself, and writes `target/report/index.html`, `report.md` and
//! `report.json`. The page loads nothing from anywhere.

mod against;
mod benches;
mod gather;
mod memory;
mod plots;
mod training;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, context};
use serde::{Deserialize, Serialize};

use crate::workspace::Workspace;
use crate::workspace::say;
use against::Changes;
use benches::Group;
use gather::{Compared, Fault, Verified};
use memory::Curve;
use training::Training;

/// Gather checks, comparisons, memory and benchmarks in one page
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Open the page in the browser
    #[arg(long)]
    open: bool,
    /// Check and compare again, even if there are results of this state of the sources
    #[arg(long)]
    fresh: bool,
    /// Say what changed since this `report.json`
    #[arg(long, value_name = "FILE")]
    against: Option<PathBuf>,
    /// The Python whose PyTorch is compared with
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// Compare with candle and burn too; the first time they are fetched and compiled, for minutes
    #[arg(long)]
    rust_peers: bool,
    /// Folders of trainings (`ternary-train train --out`) whose losses are drawn
    #[arg(long, value_name = "FOLDER", num_args = 1..)]
    training: Vec<PathBuf>,
}

/// `report.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    /// Version of this format.
    schema: u32,
    verified: Verified,
    compared: Compared,
    memory: Vec<Curve>,
    /// The variants of each kernel, from `cargo bench`.
    benches: Vec<Group>,
    /// From `cargo xtask faults`.
    faults: Vec<Fault>,
    /// From `ternary-train train`.
    training: Vec<Training>,
}

const SCHEMA: u32 = 2;

/// Gathers, writes the three files, and opens the page if asked to.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    // What should be there already, before anything that takes time.
    let before = args.against.as_deref().map(gather::load).transpose()?;
    let training = training::read(&args.training)?;
    let workspace = Workspace::load()?;
    let (verified, compared) = gather::results(&workspace, args)?;
    let report = Report {
        schema: SCHEMA,
        verified,
        compared,
        memory: memory::measure()?,
        benches: benches::read(&workspace.target.join("criterion")),
        faults: gather::faults(&workspace.target.join("faults/report.json")),
        training,
    };
    let changes = before.map(|before| Changes::new(&before, &report));

    let folder = workspace.target.join("report");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let page = folder.join("index.html");
    write(&page, &render(&report, changes.as_ref(), "report.html")?)?;
    write(&folder.join("report.md"), &render(&report, changes.as_ref(), "report.md")?)?;
    write(&folder.join("report.json"), &(serde_json::to_string_pretty(&report)? + "\n"))?;
    if let Some(changes) = &changes {
        say(changes);
    }
    if args.open {
        opener::open_browser(&page).with_context(|| format!("cannot open {}", page.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Fills a template in.
fn render(report: &Report, changes: Option<&Changes>, template: &str) -> Result<String> {
    let mut templates = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    templates.set_syntax(syntax);
    templates.set_auto_escape_callback(|name| {
        if name.ends_with(".html") { AutoEscape::Html } else { AutoEscape::None }
    });
    templates.add_filter("fixed", |value: Option<f64>, digits: usize| match value {
        Some(value) if value.is_finite() => format!("{value:.digits$}"),
        _ => "not measured".to_owned(),
    });
    templates.add_filter("power", |value: Option<f64>| match value {
        Some(value) => format!("{value:.1e}"),
        None => "not measured".to_owned(),
    });
    templates.add_filter("date", gather::date);
    templates.add_template("report.html", include_str!("../templates/report.html"))?;
    templates.add_template("report.md", include_str!("../templates/report.md"))?;
    let roofline = plots::roofline(&report.compared)?;
    let curves: Vec<_> = report.memory.iter().map(plots::curve).collect::<Result<_>>()?;
    let losses = plots::losses(&report.training)?;
    Ok(templates.get_template(template)?.render(context! {
        report => Serde(report),
        changes => Serde(changes),
        summary => Serde(report.summary()),
        roofline,
        curves,
        losses,
    })?)
}

/// The figures at the top of the page.
#[derive(Debug, Serialize)]
struct Summary {
    passed: usize,
    failed: usize,
    skipped: usize,
    /// Cases that were compared with a peer.
    compared: usize,
    /// Those in which the peer was faster.
    lost: usize,
    /// Median of the speed ratios.
    ratio: Option<f64>,
    caught: usize,
}

impl Report {
    fn summary(&self) -> Summary {
        let checks =
            |status: &str| self.verified.checks.iter().filter(|row| row.status == status).count();
        let mut ratios: Vec<_> = self.compared.rows.iter().filter_map(|row| row.ratio).collect();
        ratios.sort_by(f64::total_cmp);
        Summary {
            passed: checks("PASS"),
            failed: checks("FAIL"),
            skipped: checks("SKIPPED"),
            compared: ratios.len(),
            lost: ratios.iter().filter(|&&ratio| ratio < 1.0).count(),
            ratio: ratios.get(ratios.len() / 2).copied(),
            caught: self.faults.iter().filter(|fault| fault.verdict == "CAUGHT").count(),
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    say(format_args!("report: {}", path.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use serde_json::{Value, json};

    use super::*;

    /// A report of one case, with what a peer adds to it.
    fn report(peer: Value) -> Report {
        let mut row = json!({
            "kernel": "attn-flash", "case": "[1, 2] <b>", "dtype": "f32",
            "ours_ms": 2.0, "gflops": 100.0, "gb_s": 5.0, "fraction_of_peak": 0.5,
        });
        if let (Some(row), Value::Object(peer)) = (row.as_object_mut(), peer) {
            row.extend(peer);
        }
        let point = json!({"length": 128, "ours": 1000, "naive": null, "matrices": 65536});
        let machine = json!({
            "cpu": "a processor", "isa": "avx2", "threads": 2,
            "peak_gflops": 400.0, "read_gb_s": 50.0,
        });
        let verified = json!({
            "quick": true, "unix_time": 0, "commit": "abc", "rustc": "rustc 1",
            "cpu": "a processor", "instruction_sets": ["avx2"],
            "checks": [{"name": "tidy", "status": "FAIL", "seconds": 1.5, "repeat": "cargo xtask tidy"}],
        });
        serde_json::from_value(json!({
            "schema": SCHEMA,
            "verified": verified,
            "compared": {"machine": machine, "peers": [], "notes": ["a note"], "rows": [row]},
            "memory": [{"kernel": "attn-flash", "shape": "[1]", "points": [point]}],
            "benches": [],
            "faults": [],
            "training": [{
                "name": "nano", "weights": "float", "parameters": 1, "tokens": 2, "peak_bytes": 3,
                "tokens_per_second": 4.0, "validation_loss": 1.5, "curve": [[10, 2.0], [20, 1.5]],
            }],
        }))
        .unwrap()
    }

    fn with_peer(ratio: f64) -> Value {
        json!({"peer": "torch 2", "peer_ms": 2.0 * ratio, "ratio": ratio, "ratio_quartiles": [ratio - 0.1, ratio + 0.1]})
    }

    #[test]
    fn pages_say_what_was_not_measured() {
        let report = report(Value::Null);
        for template in ["report.html", "report.md"] {
            let page = render(&report, None, template).unwrap();
            assert!(page.contains("not measured"), "{page}");
            assert!(page.contains("cargo xtask tidy") && page.contains("1970-01-01"), "{page}");
        }
        let page = render(&report, None, "report.html").unwrap();
        assert!(page.contains("[1, 2] &lt;b&gt;") && page.contains("<svg"), "{page}");
        assert!(!page.contains("src=") && !page.contains("href="), "the page loads something");
    }

    #[test]
    fn losses_show_like_wins() {
        let page = render(&report(with_peer(0.5)), None, "report.html").unwrap();
        assert!(page.contains(r#"<span class="loss">0.50x</span>"#), "{page}");
        assert!(page.contains("1 of 1"), "{page}");
        let page = render(&report(with_peer(2.0)), None, "report.html").unwrap();
        assert!(page.contains(r#"<span class="win">2.00x</span>"#), "{page}");
    }

    #[test]
    fn changes_within_the_noise_are_not_changes() {
        let before = report(with_peer(2.0));
        let changes = Changes::new(&before, &report(with_peer(2.15)));
        assert!(changes.to_string().contains("within noise"), "{changes}");
        let changes = Changes::new(&before, &report(with_peer(1.5)));
        assert!(changes.to_string().contains("slower"), "{changes}");
        let page = render(&before, Some(&changes), "report.html").unwrap();
        assert!(page.contains("Changes since abc"), "{page}");
    }

    #[test]
    fn a_report_can_be_read_again() {
        let report = report(with_peer(2.0));
        let text = serde_json::to_string(&report).unwrap();
        let again: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_value(&again).unwrap(), serde_json::to_value(&report).unwrap());
    }
}
