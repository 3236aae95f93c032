//! `tidy`: the rules of this workspace that the compiler and clippy do not know.
//!
//! It is also a test, so that `cargo test` enforces it.

mod manifests;
mod rooms;
mod sources;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use walkdir::{DirEntry, WalkDir};

use crate::workspace::{self, say};

/// Prints every finding; fails if there is one.
pub(crate) fn run() -> Result<ExitCode> {
    let findings = check_workspace()?;
    for finding in &findings {
        say(finding);
    }
    say(format_args!("{} findings", findings.len()));
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Checks the whole workspace; each finding is a line `file:line: what is wrong: how to mend it`.
pub(crate) fn check_workspace() -> Result<Vec<String>> {
    let root = workspace::root();
    let mut findings = Findings::default();
    for file in text_files(&root)? {
        sources::check(&file, &mut findings);
        manifests::check(&file, &mut findings);
    }
    rooms::check(&root, &mut findings)?;
    Ok(findings.0)
}

/// What was found so far.
#[derive(Default)]
struct Findings(Vec<String>);

impl Findings {
    /// Adds a finding; lines count from 1, and 0 stands for the file as a whole.
    fn add(&mut self, path: &Path, line: usize, what: impl Display) {
        let line = if line == 0 { String::new() } else { format!("{line}:") };
        self.0.push(format!("{}:{line} {what}", path.display()));
    }
}

/// A file of the workspace.
struct File {
    /// Its path from the workspace's folder.
    path: PathBuf,
    text: String,
}

impl File {
    /// Lines with their numbers, from 1.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.lines().enumerate().map(|(index, line)| (index + 1, line))
    }

    fn is_rust(&self) -> bool {
        self.path.extension().is_some_and(|end| end == "rs")
    }
}

/// All files under `root` that are text, without version control, build output and caches.
fn text_files(root: &Path) -> Result<Vec<File>> {
    let is_ours = |entry: &DirEntry| {
        let name = entry.file_name().to_string_lossy();
        let is_build_output = entry.path().join("CACHEDIR.TAG").exists();
        !(entry.depth() > 0 && (name == ".git" || name == "target" || name == "__pycache__"))
            && !is_build_output
    };
    let mut files = Vec::new();
    for entry in WalkDir::new(root).sort_by_file_name().into_iter().filter_entry(is_ours) {
        let entry = entry.context("the workspace cannot be searched")?;
        if entry.file_type().is_file()
            && let Ok(text) = std::fs::read_to_string(entry.path())
        {
            let path = entry.path().strip_prefix(root)?.to_owned();
            files.push(File { path, text });
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_tidy() {
        let findings = check_workspace().unwrap();
        assert!(findings.is_empty(), "\n{}\n", findings.join("\n"));
    }
}
