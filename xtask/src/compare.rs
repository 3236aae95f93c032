//! `compare`: our kernels and PyTorch on the same arrays, in turn, in one run; on request also Rust
//! libraries. Without any, ours alone.
//!
//! One case at a time: the arrays are made here and sent to the peer's process; both sides compute
//! once and the results are compared; then they take turns (A B A B ..), each turn long enough to
//! be measured, with a pause between so that no idle worker of one side spins through the other's
//! turn. To compare another kernel, add a file like `attn_flash.rs` with a function that lists its
//! cases, a line to [`cases`], and the operation to `peers/torch_peer.py`.

mod attn_flash;
mod attn_flash_bwd;
mod beam;
mod duel;
mod kvcache;
mod layernorm_bwd;
pub(crate) mod machine;
mod memory;
mod peer;
mod precision;
mod report;
mod rust_peers;
mod softmax_topk;
mod ternary_train;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rayon::ThreadPoolBuilder;

use duel::Case;
use machine::Machine;
use peer::{Peer, Start};
use precision::PrecisionCase;
use report::Report;

use crate::workspace::{Workspace, note, say};

/// Compare the kernels with PyTorch on this machine.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only this crate
    #[arg(short, long, value_name = "CRATE")]
    package: Option<String>,
    /// Only cases whose name, shape and type contain this
    #[arg(long, value_name = "SUBSTRING")]
    case: Option<String>,
    /// The Python that has PyTorch
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// Compare with candle and burn too; the first time they are fetched and compiled, for minutes
    #[arg(long)]
    rust_peers: bool,
    /// Threads of either side
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// Pairs of turns after the warm-up
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(7..))]
    pairs: u16,
    /// Write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Every case, by kernel.
fn cases() -> Vec<Case> {
    [
        attn_flash::cases(),
        attn_flash_bwd::cases(),
        kvcache::cases(),
        layernorm_bwd::cases(),
        softmax_topk::cases(),
        ternary_train::cases(),
        beam::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Every case that is about errors, not time.
fn precision_cases() -> Vec<PrecisionCase> {
    [attn_flash::precision(), attn_flash_bwd::precision(), layernorm_bwd::precision()]
        .into_iter()
        .flatten()
        .collect()
}

/// Whether there is something to compare in `package`.
pub(crate) fn has_cases(package: Option<&str>) -> bool {
    cases().iter().any(|case| package.is_none_or(|package| package == case.package))
}

/// Why there is nothing to compare with, if that is so.
pub(crate) fn unavailable(python: &Path) -> Option<String> {
    match Peer::torch(python, 1) {
        Ok(Start::Ready(_)) => None,
        Ok(Start::Missing(reason)) => Some(reason),
        Err(error) => Some(format!("{error:#}")),
    }
}

/// The peers that a comparison would have now: PyTorch with its version, if `python` has it, and the Rust
/// libraries by name.
pub(crate) fn peers(python: &Path, with_rust_peers: bool) -> Vec<String> {
    let torch = match Peer::torch(python, 1) {
        Ok(Start::Ready(peer)) => Some(peer.name()),
        Ok(Start::Missing(_)) | Err(_) => None,
    };
    let libraries = with_rust_peers.then_some(rust_peers::LIBRARIES).into_iter().flatten();
    torch.into_iter().chain(libraries.map(|&library| library.to_owned())).collect()
}

/// Runs the comparison and prints the table.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let threads = usize::from(args.threads);
    let chosen = |package: &str, title: String| {
        args.package.as_ref().is_none_or(|chosen| package == chosen)
            && args.case.as_ref().is_none_or(|part| title.contains(part.as_str()))
    };
    let mut cases = cases();
    cases.retain(|case| chosen(case.package, case.title()));
    let mut precision_cases = precision_cases();
    precision_cases.retain(|case| chosen(case.package, case.title()));
    if cases.is_empty() && precision_cases.is_empty() {
        if let Some(package) = args.package.as_deref().filter(|&name| !has_cases(Some(name))) {
            Workspace::load()?.select(Some(package))?;
            bail!("`{package}` has nothing to be compared with here");
        }
        bail!("no case matches --case; without it all are run");
    }

    let mut torch = available(Peer::torch(&args.python, threads)?);
    let rust_peers = if args.rust_peers { rust_peers::start(threads)? } else { Vec::new() };
    let rust_peers: Vec<_> = rust_peers.into_iter().filter_map(available).collect();
    let pool = ThreadPoolBuilder::new().num_threads(threads).build().context("no thread pool")?;
    let machine = Machine::measure(&pool)?;

    let mut precision = Vec::new();
    for case in &precision_cases {
        note(case.title());
        precision.push(case.row(torch.as_mut(), &pool).with_context(|| case.title())?);
    }
    let mut peers: Vec<_> = torch.into_iter().chain(rust_peers).collect();
    let mut rows = Vec::new();
    for case in &cases {
        note(case.title());
        let with_each = duel::run(case, &mut peers, &pool, usize::from(args.pairs));
        rows.extend(with_each.with_context(|| case.title())?);
    }
    // Other work on the machine may have disturbed the first measurement.
    let machine = machine.best_of(&Machine::measure(&pool)?);
    let whole = args.package.is_none() && args.case.is_none();
    let peers = peers.iter().map(Peer::name).collect();
    let report = Report::new(whole, machine, peers, rows, precision);
    say(&report);
    if let Some(path) = &args.json {
        report.write(path)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The peer, unless it is missing.
fn available(start: Start) -> Option<Peer> {
    match start {
        Start::Ready(peer) => Some(peer),
        Start::Missing(reason) => {
            note(format_args!("a peer is not measured: {reason}"));
            None
        }
    }
}
