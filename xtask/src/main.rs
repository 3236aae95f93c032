//! The workspace's tasks; `cargo xtask --help` lists them.
#![forbid(unsafe_code)]

mod cases;
mod compare;
mod corpus;
mod faults;
mod report;
mod soak;
mod tidy;
mod verify_all;
mod verify_cases;
mod workspace;

use std::process::ExitCode;

use clap::Parser;
use tensor_utils::testing::PeakAlloc;

/// Counts what the kernels allocate, for the curves of the report.
#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc::new();

/// Check the kernels, and compare them with others
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    VerifyAll(verify_all::Args),
    VerifyCases(verify_cases::Args),
    Compare(compare::Args),
    Corpus(corpus::Args),
    Faults(faults::Args),
    Report(report::Args),
    Sanitize(verify_all::sanitize::Args),
    Fuzz(verify_all::fuzz::Args),
    PackageCheck(verify_all::package_check::Args),
    Soak(soak::Args),
    /// Check the rules of this workspace that the compiler does not know
    Tidy,
}

fn main() -> ExitCode {
    let result = match Task::parse() {
        Task::VerifyAll(args) => verify_all::run(&args),
        Task::VerifyCases(args) => Ok(verify_cases::run(&args)),
        Task::Compare(args) => compare::run(&args),
        Task::Corpus(args) => corpus::run(&args),
        Task::Faults(args) => faults::run(&args),
        Task::Report(args) => report::run(&args),
        Task::Sanitize(args) => verify_all::sanitize::run(&args),
        Task::Fuzz(args) => verify_all::fuzz::run(&args),
        Task::PackageCheck(args) => verify_all::package_check::run(&args),
        Task::Soak(args) => soak::run(&args),
        Task::Tidy => tidy::run(),
    };
    result.unwrap_or_else(|error| {
        workspace::note(format_args!("error: {error:#}"));
        ExitCode::FAILURE
    })
}
