//! The workspace: its folder, its crates, and commands that run in it.

use std::ffi::OsStr;
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use xshell::{Shell, cmd};

/// What `cargo metadata` says about the workspace.
#[derive(Debug, Deserialize)]
pub(crate) struct Workspace {
    /// The folder with the workspace's `Cargo.toml`.
    #[serde(rename = "workspace_root")]
    pub(crate) root: PathBuf,
    /// Where cargo builds.
    #[serde(rename = "target_directory")]
    pub(crate) target: PathBuf,
    /// The members, this one included.
    pub(crate) packages: Vec<Package>,
}

/// A member of the workspace.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    /// The oldest Rust it is for, such as `1.95`.
    #[serde(default)]
    pub(crate) rust_version: String,
    pub(crate) manifest_path: PathBuf,
    targets: Vec<Target>,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Clone, Deserialize)]
struct Dependency {
    name: String,
    /// The versions that will do.
    req: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn load() -> Result<Self> {
        let shell = shell()?;
        let cargo = cargo_path();
        let json = cmd!(shell, "{cargo} metadata --no-deps --format-version 1").quiet().read()?;
        serde_json::from_str(&json).context("the output of `cargo metadata` was not understood")
    }

    /// The versions of a dependency that a member asks for.
    pub(crate) fn requirement(&self, name: &str) -> Option<&str> {
        let mut all = self.packages.iter().flat_map(|package| &package.dependencies);
        Some(&all.find(|dependency| dependency.name == name)?.req)
    }

    /// The member called `name`, or all members.
    pub(crate) fn select(&self, name: Option<&str>) -> Result<Vec<Package>> {
        let Some(name) = name else { return Ok(self.packages.clone()) };
        let Some(package) = self.packages.iter().find(|package| package.name == name) else {
            let mut known: Vec<_> = self.packages.iter().map(|package| &*package.name).collect();
            known.sort_unstable();
            bail!("there is no crate `{name}` in the workspace; there are {}", known.join(", "));
        };
        Ok(vec![package.clone()])
    }
}

impl Package {
    /// The folder with its `Cargo.toml`.
    pub(crate) fn folder(&self) -> &Path {
        self.manifest_path.parent().unwrap_or(&self.manifest_path)
    }

    /// Whether it has a library.
    pub(crate) fn has_library(&self) -> bool {
        self.targets.iter().any(|target| target.kind.iter().any(|kind| kind == "lib"))
    }

    /// Names of the programs in `tests/`.
    pub(crate) fn integration_tests(&self) -> impl Iterator<Item = &str> {
        let tests =
            self.targets.iter().filter(|target| target.kind.iter().any(|kind| kind == "test"));
        tests.map(|target| target.name.as_str())
    }

    /// Whether its tests compute something, so that they are run on every instruction set.
    pub(crate) fn has_kernels(&self) -> bool {
        self.name != env!("CARGO_PKG_NAME")
    }
}

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// A shell in the workspace's folder.
pub(crate) fn shell() -> Result<Shell> {
    let shell = Shell::new()?;
    shell.change_dir(root());
    Ok(shell)
}

/// `cargo` with these arguments, to be run in the workspace's folder.
pub(crate) fn cargo<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(cargo_path());
    command.args(arguments).current_dir(root());
    command
}

/// The cargo that runs this program, or else the one in the path.
fn cargo_path() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

/// The commit, and whether files differ from it; empty without git.
pub(crate) fn commit() -> String {
    output_of("git", &["describe", "--always", "--dirty", "--abbrev=12"])
}

/// Prints a line. A reader that has gone changes nothing about what is checked, written and returned; what else
/// goes wrong ends the program.
pub(crate) fn say(line: impl Display) {
    match writeln!(std::io::stdout(), "{line}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            note(format_args!("error: cannot print: {error}"));
            std::process::exit(1);
        }
        _ => {}
    }
}

/// Prints a line to the error stream: an error, or how far the work is. The work does not depend on who reads
/// it, so a line that cannot be written is left out.
pub(crate) fn note(line: impl Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Reads an argument of a command line: a number of minutes.
pub(crate) fn minutes(text: &str) -> Result<f64, String> {
    let most = 1e6;
    match text.parse() {
        Ok(minutes) if minutes > 0.0 && minutes <= most => Ok(minutes),
        _ => Err(format!("expected a number of minutes above 0 and at most {most}")),
    }
}

/// What a program prints; empty if it cannot be run.
pub(crate) fn output_of(program: &str, arguments: &[&str]) -> String {
    let run = || -> Result<String> {
        let shell = shell()?;
        Ok(cmd!(shell, "{program} {arguments...}").quiet().ignore_stderr().read()?)
    };
    run().unwrap_or_default()
}
