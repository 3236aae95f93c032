//! Every crate has the same rooms, so that a reader who knows one knows all.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Findings;

/// What every crate has.
const EVERY_CRATE: &[&str] =
    &["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE", "src/lib.rs"];

/// What a crate with a kernel has too.
const EVERY_KERNEL: &[&str] = &[
    "docs/derivation.md",
    "src/options.rs",
    "src/error.rs",
    "src/reference.rs",
    "tests/reference.rs",
    "tests/properties.rs",
    "tests/golden.rs",
    "tests/errors.rs",
    "examples",
];

/// The crate without a kernel.
const GROUND_FLOOR: &str = "tensor-utils";

pub(super) fn check(root: &Path, findings: &mut Findings) -> Result<()> {
    for entry in fs::read_dir(root.join("crates")).context("there is no folder `crates`")? {
        let folder = entry?.path();
        if folder.is_dir() {
            check_crate(root, &folder, findings);
        }
    }
    Ok(())
}

fn check_crate(root: &Path, folder: &Path, findings: &mut Findings) {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let shown = folder.strip_prefix(root).unwrap_or(folder);
    let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap_or_default();
    if folder.join("benches").exists() && !manifest.contains("harness = false") {
        let fix = "add `[[bench]]` with its name and `harness = false`, or criterion never runs";
        findings.add(&shown.join("Cargo.toml"), 0, format_args!("does not name its bench: {fix}"));
    }
    let mut expect = |room: &str| {
        if !folder.join(room).exists() {
            let advice = "add it; CONTRIBUTING.md says what belongs there";
            findings.add(&shown.join(room), 0, format_args!("is missing: {advice}"));
        }
    };
    EVERY_CRATE.iter().copied().for_each(&mut expect);
    if name == GROUND_FLOOR {
        return;
    }
    EVERY_KERNEL.iter().copied().for_each(&mut expect);
    if name.ends_with("-bwd") {
        expect("tests/gradcheck.rs");
    }
    let bench = format!("benches/{name}.rs");
    if !folder.join(bench.replace('-', "_")).exists() {
        expect(&bench);
    }
}
