//! Other toolchains and tools, if this machine has them.

use std::ffi::OsStr;
use std::process::Command;

use crate::workspace;

/// A command of another toolchain, run in the workspace's folder.
pub(super) fn of<A: AsRef<OsStr>>(
    toolchain: &str,
    arguments: impl IntoIterator<Item = A>,
) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", toolchain]).args(arguments).current_dir(workspace::root());
    // Cargo has set these for the toolchain that runs this program.
    command.env_remove("CARGO").env_remove("RUSTC").env_remove("RUSTUP_TOOLCHAIN");
    command
}

/// The installed toolchain that `name` stands for: `1.95` for `1.95.0` of this machine.
pub(super) fn installed(name: &str) -> Option<String> {
    let list = workspace::output_of("rustup", &["toolchain", "list"]);
    let mut toolchains = list.lines().filter_map(|line| line.split_whitespace().next());
    let is_it = |line: &&str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with('-') || rest.starts_with('.'))
    };
    toolchains.find(is_it).map(str::to_owned)
}

/// What its compiler prints about itself; `None` if it is not installed.
pub(super) fn version(toolchain: &str) -> Option<String> {
    // `rustup run` would try to install a toolchain that is missing.
    installed(toolchain)?;
    let output = of(toolchain, ["rustc", "--version", "--verbose"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The value of a line `key: value` of a version.
pub(super) fn field<'a>(version: &'a str, key: &str) -> Option<&'a str> {
    version.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "))
}

/// Whether a component of a toolchain is installed.
pub(super) fn has_component(toolchain: &str, component: &str) -> bool {
    let arguments = ["component", "list", "--installed", "--toolchain", toolchain];
    let installed = workspace::output_of("rustup", &arguments);
    installed.lines().any(|line| line.starts_with(component))
}

/// Whether `cargo TOOL` works.
pub(super) fn has_cargo_tool(tool: &str) -> bool {
    !workspace::output_of("cargo", &[tool, "--version"]).is_empty()
}
