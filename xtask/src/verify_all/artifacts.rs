//! Building test programs once, to run them many times: on every instruction set.

use std::fs;
use std::path::PathBuf;

use serde::Deserialize;

use super::job::Job;
use super::runner::Runner;
use crate::workspace::Package;

/// The programs of a build.
pub(super) struct Artifacts(Vec<Artifact>);

/// A program that cargo built.
pub(super) struct Artifact {
    pub(super) kind: Kind,
    /// The manifest of its package.
    manifest_path: PathBuf,
    /// The name of the target.
    name: String,
    program: PathBuf,
}

/// What a program is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Unit tests of a library.
    Library,
    /// Unit tests of a binary.
    Binary,
    /// An integration test.
    Test,
    Example,
    Bench,
}

/// The part that matters here of cargo's message about a finished target.
#[derive(Deserialize)]
struct Message {
    manifest_path: PathBuf,
    target: Target,
    profile: Profile,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds with `cargo test SCOPE.. OPTIONS.. --no-run`; `None` if that failed.
pub(super) fn build(
    runner: &mut Runner,
    name: &str,
    scope: &[&str],
    options: &[&str],
) -> Option<Artifacts> {
    let mut job = Job::cargo(name, &["test", "--no-run"], scope, options);
    job.command.arg("--message-format=json-render-diagnostics");
    let messages = runner.run_for_output(job)?;
    let text = fs::read_to_string(messages).ok()?;
    Some(Artifacts(text.lines().filter_map(Artifact::parse).collect()))
}

impl Artifacts {
    /// Jobs that run the chosen programs of a package.
    pub(super) fn jobs(
        &self,
        package: &Package,
        choose: impl Fn(&Artifact) -> bool,
    ) -> impl Iterator<Item = Job> {
        let of_package =
            move |artifact: &&Artifact| artifact.manifest_path == package.manifest_path;
        self.0.iter().filter(of_package).filter(move |artifact| choose(artifact)).map(|artifact| {
            let repeat = artifact.repeat(&package.name);
            Job::built(artifact.row(&package.name), &artifact.program, package, repeat)
        })
    }
}

impl Artifact {
    fn parse(line: &str) -> Option<Self> {
        let message: Message = serde_json::from_str(line).ok()?;
        let kind = match message.target.kind.first()?.as_str() {
            "lib" if message.profile.test => Kind::Library,
            "bin" if message.profile.test => Kind::Binary,
            "test" => Kind::Test,
            "example" => Kind::Example,
            "bench" => Kind::Bench,
            _ => return None,
        };
        Some(Self {
            kind,
            manifest_path: message.manifest_path,
            name: message.target.name,
            program: message.executable?,
        })
    }

    /// Whether it is a unit or integration test.
    pub(super) fn is_test(&self) -> bool {
        matches!(self.kind, Kind::Library | Kind::Binary | Kind::Test)
    }

    fn row(&self, package: &str) -> String {
        match self.kind {
            Kind::Example => format!("example {package}/{}", self.name),
            Kind::Bench => format!("bench {package}/{}", self.name),
            Kind::Library | Kind::Binary | Kind::Test => format!("tests {package}"),
        }
    }

    fn repeat(&self, package: &str) -> String {
        let name = &self.name;
        match self.kind {
            Kind::Library => format!("cargo test -p {package} --lib"),
            Kind::Binary => format!("cargo test -p {package} --bin {name}"),
            Kind::Test => format!("cargo test -p {package} --test {name}"),
            Kind::Example => format!("cargo run -p {package} --example {name}"),
            Kind::Bench => format!("cargo test -p {package} --bench {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_messages_become_jobs() {
        let line = r#"{"reason":"compiler-artifact","manifest_path":"/x/Cargo.toml",
            "target":{"kind":["test"],"name":"golden"},"profile":{"test":true},
            "executable":"/t/golden-1"}"#
            .replace('\n', "");
        let artifact = Artifact::parse(&line).unwrap();
        assert_eq!(artifact.kind, Kind::Test);
        assert_eq!(artifact.repeat("attn-flash"), "cargo test -p attn-flash --test golden");
        // A library that is only linked, and a message about something else.
        let library = line.replace("[\"test\"]", "[\"lib\"]").replace(":true", ":false");
        assert!(Artifact::parse(&library).is_none());
        assert!(Artifact::parse(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
