//! How much tests do: a little while somebody works, as much as is promised in a deep run.

use std::env;
use std::ops::RangeInclusive;

use proptest::test_runner::{Config, FileFailurePersistence};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::Isa;

/// `deep` asks for all of it.
const VARIABLE: &str = "KERNELS_EFFORT";

/// How many cases a property is tried on: what `PROPTEST_CASES` says, else 10,000 in a deep run, else
/// `usual`.
///
/// A run is deep if the environment variable `KERNELS_EFFORT` is `deep`.
pub fn property_cases(usual: u32) -> u32 {
    let wanted = env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    wanted.unwrap_or(if is_deep() { 10_000 } else { usual })
}

/// The configuration of a property: as many cases as [`property_cases`] says, and failures kept in
/// `file`, a path from the crate's folder, to be tried again.
pub fn property_config(usual: u32, file: &'static str) -> Config {
    Config {
        cases: property_cases(usual),
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(file))),
        ..Config::default()
    }
}

/// How often a call is repeated that must give the same bits every time: 50, or 250 in a deep run.
pub fn repeats() -> usize {
    if is_deep() { 250 } else { 50 }
}

/// The sizes of pool that must give the same bits: 1, 2, 3 and 8 threads, or 1 to 16 in a deep run.
pub fn thread_counts() -> impl Iterator<Item = usize> {
    chosen(1..=16, &[1, 2, 3, 8])
}

/// Runs in a pool of so many threads.
///
/// # Panics
/// If the threads cannot be started.
pub fn in_pool<R: Send>(threads: usize, run: impl FnOnce() -> R + Send) -> R {
    started_pool(threads).install(run)
}

/// A pool whose threads have all begun, and take no memory of their own any more.
///
/// # Panics
/// If they cannot be started.
pub fn started_pool(threads: usize) -> ThreadPool {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.expect("threads can be started");
    pool.broadcast(|_| ());
    pool
}

/// The sizes of batch in which a row must have the same bits: 1, 2, 7 and 33, or 1 to 64 in a deep run.
pub fn batch_sizes() -> impl Iterator<Item = usize> {
    chosen(1..=64, &[1, 2, 7, 33])
}

/// The instruction sets to test: the one that `KERNELS_ISA` asks for, else all of this machine.
///
/// # Panics
/// If `KERNELS_ISA` asks for one that this machine does not have: a test must not pass on another.
pub fn isas() -> Vec<Isa> {
    if env::var_os("KERNELS_ISA").is_none() {
        return Isa::available().collect();
    }
    match Isa::active() {
        Ok(isa) => vec![isa],
        Err(error) => panic!("{error}"),
    }
}

fn chosen(all: RangeInclusive<usize>, usual: &[usize]) -> impl Iterator<Item = usize> {
    let deep = is_deep();
    all.filter(move |n| deep || usual.contains(n))
}

/// Whether all of it is asked for.
fn is_deep() -> bool {
    env::var_os(VARIABLE).is_some_and(|value| value == "deep")
}
