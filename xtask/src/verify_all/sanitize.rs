//! `sanitize`: the tests under tools that see what a test cannot: reads out of bounds, data races,
//! undefined behaviour.

use std::process::ExitCode;

use anyhow::Result;
use clap::ValueEnum;

use super::job::Job;
use super::report::Extent;
use super::runner::Runner;
use super::toolchain;
use crate::workspace::Workspace;

/// Run the tests under AddressSanitizer, ThreadSanitizer and Miri, which need a nightly toolchain
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only these tools
    tools: Vec<Tool>,
    /// Only this crate
    #[arg(short, long, value_name = "CRATE")]
    package: Option<String>,
}

/// A tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tool {
    /// Memory errors, on the instruction sets that the processor has
    Address,
    /// Data races
    Thread,
    /// Undefined behaviour, on the portable path
    Miri,
}

impl Tool {
    pub(super) const ALL: [Self; 3] = [Self::Address, Self::Thread, Self::Miri];

    fn name(self) -> &'static str {
        match self {
            Self::Address => "address",
            Self::Thread => "thread",
            Self::Miri => "miri",
        }
    }
}

/// The tests whose kernels run on several threads at once.
const PARALLEL: &[(&str, &[&str])] = &[
    ("tensor-utils", &["parallel"]),
    ("attn-flash", &["invariance"]),
    ("attn-flash-bwd", &["invariance"]),
    ("layernorm-bwd", &["invariance"]),
    ("softmax-topk", &["invariance"]),
    ("kvcache", &["golden"]),
    ("beam", &["properties"]),
    ("ternary-train", &["packed"]),
];

/// The tests that an interpreter gets through: the logic, and small inputs of the portable path.
const INTERPRETED: &[(&str, &[&str])] = &[
    ("tensor-utils", &["parallel", "convert"]),
    ("kvcache", &["properties", "errors"]),
    ("beam", &["properties", "errors"]),
    ("dflash", &["properties", "errors", "formats"]),
    ("softmax-topk", &["errors"]),
    ("layernorm-bwd", &["errors"]),
];

/// Runs the tools; fails if one of them reports something.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let workspace = Workspace::load()?;
    workspace.select(args.package.as_deref())?;
    let mut runner = Runner::new(&workspace, "sanitize")?;
    let tools = if args.tools.is_empty() { &Tool::ALL[..] } else { &args.tools };
    check(&mut runner, &workspace, args.package.as_deref(), tools);
    runner.finish(Extent::Usual, args.tools.is_empty() && args.package.is_none())
}

/// Rows for the tools.
pub(super) fn check(
    runner: &mut Runner,
    workspace: &Workspace,
    package: Option<&str>,
    tools: &[Tool],
) {
    let version = toolchain::version("nightly");
    for &tool in tools {
        let Some(host) = version.as_deref().and_then(|version| toolchain::field(version, "host"))
        else {
            runner.skip(tool.name(), "there is no nightly toolchain");
            continue;
        };
        let needs: &[&str] = match tool {
            Tool::Address => &[],
            Tool::Thread => &["rust-src"],
            Tool::Miri => &["rust-src", "miri"],
        };
        let missing = needs.iter().find(|need| !toolchain::has_component("nightly", need));
        if let Some(missing) = missing {
            runner.skip(tool.name(), format!("the nightly toolchain has no component {missing}"));
            continue;
        }
        let wanted = |name: &str| package.is_none_or(|package| package == name);
        match tool {
            Tool::Address => {
                let members = workspace.packages.iter().filter(|package| package.has_kernels());
                for member in members.filter(|member| wanted(&member.name)) {
                    runner.run(address(workspace, host, &member.name));
                }
            }
            Tool::Thread => {
                for (name, tests) in PARALLEL.iter().filter(|(name, _)| wanted(name)) {
                    runner.run(thread(workspace, host, name, tests));
                }
            }
            Tool::Miri => {
                for (name, tests) in INTERPRETED.iter().filter(|(name, _)| wanted(name)) {
                    runner.run(miri(workspace, name, tests));
                }
            }
        }
    }
}

/// All tests of a crate, on the widest instruction set where a test does not take all of them.
fn address(workspace: &Workspace, host: &str, package: &str) -> Job {
    let mut command = toolchain::of("nightly", ["cargo", "test", "-p", package]);
    command.args(["--lib", "--bins", "--tests", "--target", host, "--target-dir"]);
    command.arg(workspace.target.join("sanitize/address"));
    let job = Job::command(format!("address {package}"), command);
    // Tests ask for more memory than there is, to see the error.
    let options = "allocator_may_return_null=1";
    job.env("RUSTFLAGS", "-Zsanitizer=address").env("ASAN_OPTIONS", options)
}

fn thread(workspace: &Workspace, host: &str, package: &str, tests: &[&str]) -> Job {
    let mut command = toolchain::of("nightly", ["cargo", "test", "-p", package]);
    command.args(tests.iter().flat_map(|test| ["--test", test]));
    // The standard library too, or its own locks look like races.
    command.args(["-Zbuild-std", "--target", host, "--target-dir"]);
    command.arg(workspace.target.join("sanitize/thread"));
    let job = Job::command(format!("thread {package}"), command);
    job.env("RUSTFLAGS", "-Zsanitizer=thread").env("PROPTEST_CASES", "8")
}

fn miri(workspace: &Workspace, package: &str, tests: &[&str]) -> Job {
    let mut command = toolchain::of("nightly", ["cargo", "miri", "test", "-p", package]);
    command.args(tests.iter().flat_map(|test| ["--test", test]));
    command.arg("--target-dir").arg(workspace.target.join("sanitize/miri"));
    // Tree borrows and leaks: what rayon's queues need. Isolation: tests read the environment and files.
    // Floats: the same power twice is the same number; Miri would round it at random.
    let flags = "-Zmiri-tree-borrows -Zmiri-ignore-leaks -Zmiri-disable-isolation \
                 -Zmiri-deterministic-floats";
    let job = Job::command(format!("miri {package}"), command);
    job.env("MIRIFLAGS", flags).env("PROPTEST_CASES", "2").env("KERNELS_ISA", "portable")
}
