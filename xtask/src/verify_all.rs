//! `verify-all`: every check of the workspace, one after the other, with a table at the end.

mod artifacts;
pub(crate) mod fuzz;
mod job;
pub(crate) mod package_check;
mod report;
mod runner;
pub(crate) mod sanitize;
mod toolchain;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use tensor_utils::Isa;

use crate::workspace::{Package, Workspace};
use crate::{compare, tidy, verify_cases};
use artifacts::{Artifact, Kind};
use job::Job;
use report::Extent;
use runner::Runner;

/// Run every check: format, lints, tests on every instruction set, cases, examples, docs, benches.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out what is slow; the table says what
    #[arg(long)]
    quick: bool,
    /// All that is promised, which takes a night: 10,000 cases a property, exp of every f32, 250 repeats,
    /// 1 to 16 threads, batches of 1 to 64, sanitizers, fuzzing, packages, an hour of traffic
    #[arg(long, conflicts_with = "quick")]
    deep: bool,
    /// Only this crate
    #[arg(short, long, value_name = "CRATE")]
    package: Option<String>,
    /// The Python whose PyTorch is compared with
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
}

const LEFT_OUT: &str = "left out by --quick";

/// Runs the checks; fails if one of them does.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    let packages = workspace.select(args.package.as_deref())?;
    let mut runner = Runner::new(&workspace, "verify")?;
    let scope: Vec<&str> = match &args.package {
        Some(package) => vec!["-p", package],
        None => vec!["--workspace"],
    };

    check_sources(&mut runner, args, &scope);
    check_tests(&mut runner, args, &scope, &packages);
    check_cases(&mut runner, args, &workspace);
    check_docs(&mut runner, &scope);
    check_benches(&mut runner, args, &scope, &packages);
    check_comparison(&mut runner, args, &workspace);
    if args.deep {
        package_check::check(&mut runner, &workspace, args.package.as_deref())?;
        sanitize::check(&mut runner, &workspace, args.package.as_deref(), &sanitize::Tool::ALL);
        fuzz::check(&mut runner, &workspace, None, fuzz::MINUTES)?;
        runner.run(Job::xtask("soak", "soak", &[]));
    }

    let extent = match (args.quick, args.deep) {
        (true, _) => Extent::Quick,
        (_, true) => Extent::Deep,
        _ => Extent::Usual,
    };
    runner.finish(extent, args.package.is_none())
}

fn check_sources(runner: &mut Runner, args: &Args, scope: &[&str]) {
    let all = if args.package.is_some() { scope } else { &["--all"] };
    runner.run(Job::cargo("rustfmt", &["fmt"], all, &["--", "--check"]));
    runner.check("tidy", "cargo xtask tidy", tidy::check_workspace);
    runner.run(Job::cargo(
        "clippy",
        &["clippy"],
        scope,
        &["--all-targets", "--", "-D", "warnings"],
    ));
}

/// Unit and integration tests on every instruction set, documentation tests, and examples.
fn check_tests(runner: &mut Runner, args: &Args, scope: &[&str], packages: &[Package]) {
    let Some(built) = artifacts::build(runner, "build tests", scope, &[]) else {
        runner.skip("tests, examples", "they did not build");
        return;
    };
    let default = Isa::active().ok();
    for isa in Isa::ALL {
        if !isa.is_available() {
            runner.skip(format!("tests [{isa}]"), "this machine does not have it");
        } else if args.quick && isa != Isa::Portable && Some(isa) != default {
            runner.skip(format!("tests [{isa}]"), LEFT_OUT);
        } else {
            for package in packages.iter().filter(|package| package.has_kernels()) {
                let jobs = built.jobs(package, Artifact::is_test).map(|job| job.on(isa));
                let jobs = jobs.map(|job| if args.deep { job.deep() } else { job }).collect();
                runner.run_all(format!("tests {} [{isa}]", package.name), jobs);
            }
        }
    }
    for package in packages.iter().filter(|package| !package.has_kernels()) {
        let jobs = built.jobs(package, Artifact::is_test).collect();
        runner.run_all(format!("tests {}", package.name), jobs);
    }
    if packages.iter().any(Package::has_library) {
        runner.run(Job::cargo("doctests", &["test"], scope, &["--doc"]));
    }
    for package in packages {
        for job in built.jobs(package, |artifact| artifact.kind == Kind::Example) {
            runner.run(job);
        }
    }
}

/// The recorded cases of `fixtures/` on every instruction set.
fn check_cases(runner: &mut Runner, args: &Args, workspace: &Workspace) {
    if let Some(package) = &args.package
        && !verify_cases::any(&workspace.root.join("fixtures"), package)
    {
        runner.skip("cases", format!("fixtures/ has no case of {package}"));
        return;
    }
    let filter: Vec<&str> = args.package.iter().flat_map(|package| ["-p", package]).collect();
    for isa in Isa::available() {
        let name = format!("cases [{isa}]");
        runner
            .run(Job::xtask(name, "verify-cases", &[&filter[..], &["fixtures"]].concat()).on(isa));
    }
}

fn check_docs(runner: &mut Runner, scope: &[&str]) {
    let docs = Job::cargo("docs", &["doc"], scope, &["--no-deps", "--all-features"]);
    runner.run(docs.env("RUSTDOCFLAGS", "-D warnings"));
}

/// Each benchmark once, without measuring.
fn check_benches(runner: &mut Runner, args: &Args, scope: &[&str], packages: &[Package]) {
    if args.quick {
        runner.skip("benches", LEFT_OUT);
        return;
    }
    let Some(built) = artifacts::build(runner, "build benches", scope, &["--benches"]) else {
        runner.skip("benches", "they did not build");
        return;
    };
    for package in packages {
        for job in built.jobs(package, |artifact| artifact.kind == Kind::Bench) {
            runner.run(job);
        }
    }
}

/// The comparison with PyTorch, if there is one.
fn check_comparison(runner: &mut Runner, args: &Args, workspace: &Workspace) {
    let name = "compare";
    if args.quick {
        return runner.skip(name, LEFT_OUT);
    }
    if !compare::has_cases(args.package.as_deref()) {
        return runner.skip(name, "this crate has nothing to compare");
    }
    if let Some(reason) = compare::unavailable(&args.python) {
        return runner.skip(name, reason);
    }
    let python = args.python.display().to_string();
    let json = workspace.target.join("verify/compare.json").display().to_string();
    let mut arguments = vec!["--python", &python, "--json", &json];
    arguments.extend(args.package.iter().flat_map(|package| ["-p", package]));
    runner.run(Job::xtask(name, "compare", &arguments));
}
