//! The worker with Rust libraries: a project of its own, so that nobody has to compile them who does
//! not ask for them.

use anyhow::{Context, Result};

use super::peer::{Peer, Start};
use crate::workspace::{self, Workspace, note};

/// The folder of the project.
const PROJECT: &str = "xtask/peers/rust";
pub(super) const LIBRARIES: &[&str] = &["candle", "burn"];

/// Builds the worker and starts one with each library.
pub(super) fn start(threads: usize) -> Result<Vec<Start>> {
    let workspace = Workspace::load()?;
    let (project, target) = (workspace.root.join(PROJECT), workspace.target.join("peers"));
    note(format_args!("compiling {}", LIBRARIES.join(" and ")));
    let built = workspace::cargo(["build", "--release", "--locked", "--quiet", "--target-dir"])
        .arg(&target)
        .current_dir(&project)
        .status()
        .context("cannot run cargo")?;
    if !built.success() {
        let reason = format!("{PROJECT} does not build here; what cargo printed is above");
        return Ok(vec![Start::Missing(reason)]);
    }
    let worker = target.join("release/peers").with_extension(std::env::consts::EXE_EXTENSION);
    LIBRARIES.iter().map(|library| Peer::rust(&worker, library, threads)).collect()
}
