//! `package-check`: the crates as their users get them, away from the workspace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::job::Job;
use super::report::Extent;
use super::runner::Runner;
use super::toolchain;
use crate::workspace::{self, Package, Workspace};

/// Package every crate, test what comes out of the package, and use it in a project of its own
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this crate
    #[arg(short, long, value_name = "CRATE")]
    package: Option<String>,
}

/// Crates of the examples that a newcomer adds besides the one that is shown.
const COMPANIONS: &[&str] = &["ndarray", "rand"];

/// Makes the checks; fails if one of them does.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    workspace.select(args.package.as_deref())?;
    let mut runner = Runner::new(&workspace, "package-check")?;
    check(&mut runner, &workspace, args.package.as_deref())?;
    runner.finish(Extent::Usual, args.package.is_none())
}

/// Rows for all crates, or for one.
pub(super) fn check(runner: &mut Runner, workspace: &Workspace, only: Option<&str>) -> Result<()> {
    check_tools(runner);
    let job = Job::cargo(
        "package",
        &["package"],
        &["--workspace", "--exclude", env!("CARGO_PKG_NAME")],
        &["--no-verify", "--allow-dirty"],
    );
    if !runner.run_for_result(job) {
        runner.skip("packages", "they were not made");
        return Ok(());
    }
    let outside = Outside::new(workspace)?;
    for package in workspace.select(only)?.iter().filter(|package| package.has_kernels()) {
        check_package(runner, workspace, &outside, package)?;
    }
    Ok(())
}

/// Rules on dependencies and features, as far as the tools for them are installed.
fn check_tools(runner: &mut Runner) {
    let rows: [(&str, &[&str], &[&str]); 2] = [
        ("deny", &["deny", "--workspace"], &["check", "licenses", "bans", "sources"]),
        ("hack", &["hack", "check"], &["--workspace", "--feature-powerset", "--no-dev-deps"]),
    ];
    for (tool, command, options) in rows {
        let name = format!("cargo {tool}");
        if toolchain::has_cargo_tool(tool) {
            runner.run(Job::cargo(&name, command, &[], options));
        } else {
            runner.skip(name, format!("cargo-{tool} is not installed"));
        }
    }
    runner.skip("cargo semver-checks", "no version is published that it could compare with");
}

fn check_package(
    runner: &mut Runner,
    workspace: &Workspace,
    outside: &Outside,
    package: &Package,
) -> Result<()> {
    let name = &package.name;
    let folder = outside.unpacked(package);
    let without = outside.job(
        format!("build {name}, no features"),
        &folder,
        None,
        &["check", "--no-default-features", "--lib"],
    );
    let with = outside.job(format!("test {name}"), &folder, None, &["test", "--all-features"]);
    runner.run_all(format!("package {name}"), vec![without, with]);

    let row = format!("package {name} on Rust {}", package.rust_version);
    let current = workspace::output_of("rustc", &["--version"]);
    if current.starts_with(&format!("rustc {}.", package.rust_version)) {
        runner.skip(row, format!("it is the one that all checks ran on: {current}"));
    } else if let Some(toolchain) = toolchain::installed(&package.rust_version) {
        runner.run(outside.job(row, &folder, Some(&toolchain), &["test", "--all-features"]));
    } else {
        runner.skip(row, "that toolchain is not installed");
    }

    let row = format!("newcomer to {name}");
    let readme = fs::read_to_string(package.folder().join("README.md"))?;
    match example(&readme) {
        Some(example) => {
            let project = outside.newcomer(workspace, package, &example)?;
            runner.run(outside.job(row, &project, None, &["run"]));
        }
        None => runner.skip(row, "its README has no example"),
    }
    Ok(())
}

/// A folder that no workspace is above, where the packages stand in for crates.io.
struct Outside {
    folder: TempDir,
    target: PathBuf,
}

impl Outside {
    /// Unpacks all packages, since they depend on each other.
    fn new(workspace: &Workspace) -> Result<Self> {
        let folder = TempDir::new().context("no temporary folder")?;
        // A package brings no profile, and kernels without optimisation are too slow to test.
        let mut config = String::from("[profile.dev]\nopt-level = 2\n\n[patch.crates-io]\n");
        let outside = Self { folder, target: workspace.target.join("package-check/build") };
        for package in workspace.packages.iter().filter(|package| package.has_kernels()) {
            let file = format!("{}-{}.crate", package.name, package.version);
            let file = workspace.target.join("package").join(file);
            let status =
                Command::new("tar").arg("xzf").arg(&file).current_dir(&outside.folder).status();
            let status = status.context("cannot run tar")?;
            anyhow::ensure!(status.success(), "cannot unpack {}", file.display());
            let path = outside.unpacked(package);
            config += &format!("{} = {{ path = {path:?} }}\n", package.name);
        }
        fs::create_dir(outside.folder.path().join(".cargo"))?;
        fs::write(outside.folder.path().join(".cargo/config.toml"), config)?;
        Ok(outside)
    }

    fn unpacked(&self, package: &Package) -> PathBuf {
        self.folder.path().join(format!("{}-{}", package.name, package.version))
    }

    /// `cargo` in one of its folders.
    fn job(&self, name: String, folder: &Path, toolchain: Option<&str>, arguments: &[&str]) -> Job {
        let mut command = match toolchain {
            Some(toolchain) => toolchain::of(toolchain, ["cargo"]),
            None => workspace::cargo::<&str>([]),
        };
        command.args(arguments).current_dir(folder).env("CARGO_TARGET_DIR", &self.target);
        Job::command(name, command).repeated_by("cargo xtask package-check")
    }

    /// A project that depends on this crate alone, and on what its example uses besides.
    fn newcomer(&self, workspace: &Workspace, package: &Package, example: &str) -> Result<PathBuf> {
        let folder = self.folder.path().join(format!("newcomer-{}", package.name));
        fs::create_dir_all(folder.join("src"))?;
        let mut manifest = format!(
            "[package]\nname = \"newcomer\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
             [dependencies]\n{} = \"={}\"\n",
            package.name, package.version
        );
        for companion in COMPANIONS.iter().filter(|name| example.contains(&format!("{name}::"))) {
            let requirement = workspace.requirement(companion).unwrap_or("*");
            manifest += &format!("{companion} = {requirement:?}\n");
        }
        fs::write(folder.join("Cargo.toml"), manifest)?;
        fs::write(folder.join("src/main.rs"), program(example))?;
        Ok(folder)
    }
}

/// The first Rust example of a README, with the lines that documentation hides.
fn example(readme: &str) -> Option<String> {
    let (_, from) = readme.split_once("```rust\n")?;
    let (example, _) = from.split_once("\n```")?;
    let lines = example.lines().map(|line| line.strip_prefix("# ").unwrap_or(line));
    Some(lines.collect::<Vec<_>>().join("\n"))
}

/// An example as a program.
fn program(example: &str) -> String {
    if example.contains("fn main()") {
        return example.to_owned();
    }
    format!(
        "fn main() {{\n    let run = || {{\n{example}\n    }};\n    run().expect(\"the example runs\");\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_become_programs() {
        let readme = "# x\n\n```rust\nlet x = 1;\n# Ok::<(), ()>(())\n```\n\n```rust\nno\n```\n";
        let example = example(readme).unwrap();
        assert_eq!(example, "let x = 1;\nOk::<(), ()>(())");
        assert!(program(&example).contains("let run = || {\nlet x = 1;\n"));
        assert_eq!(program("fn main() {}"), "fn main() {}");
        assert_eq!(super::example("no example"), None);
    }
}
