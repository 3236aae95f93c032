//! The patch files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use walkdir::WalkDir;

/// A way to be wrong.
#[derive(Debug)]
pub(super) struct Fault {
    /// The crate whose tests must notice.
    pub(super) package: String,
    pub(super) name: String,
    /// What is wrong, in a line.
    pub(super) what: String,
    /// The source file, from the workspace's folder.
    pub(super) path: PathBuf,
    diff: String,
}

/// Every fault of the workspace, by crate and name.
pub(super) fn all(root: &Path) -> Result<Vec<Fault>> {
    let mut faults = Vec::new();
    for entry in WalkDir::new(root.join("xtask/faults")).sort_by_file_name() {
        let entry = entry.context("cannot list xtask/faults")?;
        if entry.path().extension().is_some_and(|extension| extension == "patch") {
            let path = entry.path();
            faults.push(Fault::read(path).with_context(|| path.display().to_string())?);
        }
    }
    Ok(faults)
}

impl Fault {
    fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).context("cannot be read")?;
        let start = text.find("--- a/").context("has no line `--- a/PATH`")?;
        let (what, diff) = text.split_at(start);
        let target = diff["--- a/".len()..].lines().next().unwrap_or_default();
        let name = |path: Option<&Path>| {
            path.and_then(Path::file_stem).map(|name| name.to_string_lossy().into_owned())
        };
        Ok(Self {
            package: name(path.parent()).context("is in no folder")?,
            name: name(Some(path)).context("has no name")?,
            what: what.split_whitespace().collect::<Vec<_>>().join(" "),
            path: PathBuf::from(target.trim()),
            diff: diff.to_owned(),
        })
    }

    /// Crate and name.
    pub(super) fn title(&self) -> String {
        format!("{}/{}", self.package, self.name)
    }

    /// The source with the fault in it.
    pub(super) fn apply(&self, source: &str) -> Result<String> {
        let patch = diffy::Patch::from_str(&self.diff)
            .with_context(|| format!("{} is not a unified diff", self.title()))?;
        diffy::apply(source, &patch).with_context(|| {
            format!("{} does not fit {} any more; make it anew", self.title(), self.path.display())
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::workspace;

    #[test]
    fn every_patch_fits_and_changes_something() {
        let root = workspace::root();
        for fault in all(&root).unwrap() {
            let source = fs::read_to_string(root.join(&fault.path)).unwrap();
            assert_ne!(fault.apply(&source).unwrap(), source, "{}", fault.title());
            assert!(!fault.what.is_empty(), "{} does not say what is wrong", fault.title());
            assert!(root.join("crates").join(&fault.package).is_dir(), "{}", fault.title());
        }
    }
}
