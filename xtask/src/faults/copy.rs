//! A copy of the workspace that may be changed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use walkdir::WalkDir;

/// What the tests need of the workspace.
const PARTS: &[&str] =
    &["Cargo.toml", "Cargo.lock", "clippy.toml", "crates", "fixtures", "docs", "xtask"];

/// A folder that is like the workspace, but for what has been written to it.
pub(super) struct Copy(PathBuf);

impl Copy {
    /// Brings the copy in `folder` up to date. Files that are the same are left alone, so that cargo
    /// does not compile them again.
    pub(super) fn new(root: &Path, folder: &Path) -> Result<Self> {
        if folder.exists() {
            remove_strangers(root, folder)?;
        }
        for part in PARTS {
            for entry in WalkDir::new(root.join(part)) {
                let entry = entry.with_context(|| format!("cannot list {part}"))?;
                let to = folder.join(entry.path().strip_prefix(root)?);
                if entry.file_type().is_dir() {
                    fs::create_dir_all(&to)?;
                } else {
                    update(entry.path(), &to)?;
                }
            }
        }
        Ok(Self(folder.to_owned()))
    }

    /// Where it is.
    pub(super) fn folder(&self) -> &Path {
        &self.0
    }

    pub(super) fn read(&self, path: &Path) -> Result<String> {
        fs::read_to_string(self.0.join(path))
            .with_context(|| format!("cannot read {}", path.display()))
    }

    pub(super) fn write(&self, path: &Path, text: &str) -> Result<()> {
        fs::write(self.0.join(path), text)
            .with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Copies a file that is not the same already.
fn update(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(to, bytes).with_context(|| format!("cannot write {}", to.display()))
}

/// Removes files that the workspace does not have any more.
fn remove_strangers(root: &Path, folder: &Path) -> Result<()> {
    for entry in WalkDir::new(folder) {
        let entry = entry.context("cannot list the copy")?;
        let relative = entry.path().strip_prefix(folder)?;
        if entry.file_type().is_file() && !root.join(relative).exists() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
