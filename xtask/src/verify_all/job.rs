//! Commands, and how a person repeats them.

use std::path::Path;
use std::process::Command;

use tensor_utils::Isa;
use ternary_train::shell_line;

use crate::workspace::{self, Package};

/// A command that is one check, or a part of one.
pub(super) struct Job {
    /// Its row in the table.
    pub(super) name: String,
    pub(super) command: Command,
    /// What a person types in the workspace's folder to run it alone.
    pub(super) repeat: String,
}

impl Job {
    /// `cargo COMMAND.. SCOPE.. OPTIONS..`
    pub(super) fn cargo(name: &str, command: &[&str], scope: &[&str], options: &[&str]) -> Self {
        let arguments = [command, scope, options].concat();
        let repeat = format!("cargo {}", shell_line(&arguments));
        Self::new(name.to_owned(), workspace::cargo(arguments), repeat)
    }

    /// This program with another subcommand.
    pub(super) fn xtask(name: impl Into<String>, subcommand: &str, arguments: &[&str]) -> Self {
        let program = std::env::current_exe().unwrap_or_else(|_| "xtask".into());
        let mut command = Command::new(program);
        command.arg(subcommand).args(arguments).current_dir(workspace::root());
        let repeat = format!("cargo xtask {subcommand} {}", shell_line(arguments));
        Self::new(name.into(), command, repeat)
    }

    /// Any command, as a person types it.
    pub(super) fn command(name: impl Into<String>, command: Command) -> Self {
        let words: Vec<_> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        let repeat = shell_line(&words);
        Self::new(name.into(), command, repeat)
    }

    /// A program that cargo has built, run as cargo would.
    pub(super) fn built(name: String, program: &Path, package: &Package, repeat: String) -> Self {
        let mut command = Command::new(program);
        command.current_dir(package.folder()).env("CARGO_MANIFEST_DIR", package.folder());
        Self::new(name, command, repeat)
    }

    fn new(name: String, mut command: Command, repeat: String) -> Self {
        // What one check runs on is said by the check, not by the caller's environment.
        command.env_remove("KERNELS_ISA").env_remove("KERNELS_EFFORT");
        Self { name, command, repeat }
    }

    /// The same, where a person repeats it by this command.
    pub(super) fn repeated_by(mut self, command: &str) -> Self {
        command.clone_into(&mut self.repeat);
        self
    }

    /// The same with an environment variable.
    pub(super) fn env(mut self, key: &str, value: &str) -> Self {
        self.command.env(key, value);
        self.repeat = format!("{key}={} {}", shell_line(&[value]), self.repeat);
        self
    }

    /// The same tests with all that `tensor_utils::testing` promises of a deep run, and those that are
    /// ignored otherwise.
    pub(super) fn deep(mut self) -> Self {
        // All but the ones that write what is recorded.
        self.command.args(["--include-ignored", "--skip", "write_the_file"]);
        self.repeat.push_str(" -- --include-ignored --skip write_the_file");
        self.env("KERNELS_EFFORT", "deep")
    }

    /// The same on one instruction set.
    pub(super) fn on(self, isa: Isa) -> Self {
        self.env("KERNELS_ISA", isa.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_command_has_the_same_words() {
        let job = Job::xtask("compare", "compare", &["--python", "/my files/it's", "--pairs", "9"]);
        let job = job.env("RUSTDOCFLAGS", "-D warnings");
        let expected = r"RUSTDOCFLAGS='-D warnings' cargo xtask compare --python '/my files/it'\''s' --pairs 9";
        assert_eq!(job.repeat, expected);
        assert_eq!(shell_line(&["a;b", "", "$HOME"]), "'a;b' '' '$HOME'");
    }
}
