//! Finding what other systems have computed.

use std::fs;
use std::path::{Path, PathBuf};

/// The folder `fixtures/NAME` of the workspace; `manifest` is the crate's `CARGO_MANIFEST_DIR`.
///
/// `None`, with a message, in a crate that was unpacked from its package: fixtures are not in it.
pub fn recorded(manifest: &str, name: &str) -> Option<PathBuf> {
    let manifest = Path::new(manifest);
    // Cargo puts this file into packages.
    if manifest.join("Cargo.toml.orig").exists() {
        println!("skipped: fixtures/{name} is not in the package");
        return None;
    }
    Some(manifest.join("../../fixtures").join(name))
}

/// The case files in a [`recorded`] folder, sorted.
///
/// # Panics
/// In the workspace, if the folder cannot be read or has no case.
pub fn recorded_cases(manifest: &str, name: &str) -> Option<Vec<PathBuf>> {
    let folder = recorded(manifest, name)?;
    let entries = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let is_case = |path: &PathBuf| path.extension().is_some_and(|end| end == "safetensors");
    let mut cases: Vec<_> = paths.filter(is_case).collect();
    assert!(!cases.is_empty(), "{} has no case", folder.display());
    cases.sort();
    Some(cases)
}
