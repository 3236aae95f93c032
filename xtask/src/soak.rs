//! `soak`: random decode traffic for as long as one likes, checked throughout.
//!
//! Several application threads use the crates at once. Each serves sequences from a cache of its own
//! ([`traffic`]), calls kernels whose bits are known, and generates text in two ways that must agree
//! ([`calls`]). Time is divided into epochs, after each of which everything is given back: what is in use
//! then must not grow.

mod calls;
mod traffic;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::workspace::say;
use crate::{ALLOCATOR, workspace};
use calls::Calls;
use traffic::Counts;

/// Serve random decode traffic with invariants checked throughout, and see that memory does not grow
#[derive(clap::Args)]
pub(crate) struct Args {
    /// How long
    #[arg(long, default_value_t = 60.0, value_parser = workspace::minutes)]
    minutes: f64,
    /// Application threads
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    threads: u16,
    /// Of the traffic
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop after so many epochs, if that is sooner
    #[arg(long, default_value_t = usize::MAX, value_parser = epochs)]
    epochs: usize,
}

/// Reads a number of epochs, of which one at least is compared with the first ones.
fn epochs(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(epochs) if epochs > WARM => Ok(epochs),
        _ => Err(format!(
            "expected at least {}: what is in use is compared with what was after the first {WARM}",
            WARM + 1
        )),
    }
}

/// Epochs until buffers that are kept have grown: one for each way to store numbers.
const WARM: usize = traffic::STORAGES;

/// What may be in use after an epoch that was not after the first ones: blocks of rayon's queues.
const SLACK: usize = 256 << 10;

/// How often a line is printed.
const LINE: Duration = Duration::from_secs(60);

/// Runs the traffic; fails at the first thing that is wrong.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let calls = Calls::new()?;
    let started = Instant::now();
    let limit = Duration::from_secs_f64(60.0 * args.minutes);
    let mut printed = started;
    let mut total = Counts::default();
    let mut memory = Memory::default();
    let mut epoch = 0;
    while started.elapsed() < limit && epoch < args.epochs {
        ALLOCATOR.reset_peak();
        total += one_epoch(args, epoch, &calls).with_context(|| format!("epoch {epoch}"))?;
        memory.after(epoch, ALLOCATOR.bytes_in_use(), ALLOCATOR.peak_above_baseline());
        memory.check().with_context(|| format!("epoch {epoch}"))?;
        epoch += 1;
        if printed.elapsed() > LINE {
            say(format_args!(
                "{:.0} s, {epoch} epochs: {total}; {memory}",
                started.elapsed().as_secs_f64()
            ));
            printed = Instant::now();
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    say(format_args!(
        "{seconds:.0} s, {epoch} epochs on {} threads: {total}; {memory}",
        args.threads
    ));
    ensure!(
        epoch > WARM,
        "too short: memory is compared after {WARM} epochs, of {epoch}; give it more --minutes",
    );
    ensure!(total.recovered > 0 && total.accepted > 0, "too short: not everything happened");
    Ok(ExitCode::SUCCESS)
}

/// All threads at once; everything they hold is given back when they are done.
fn one_epoch(args: &Args, epoch: usize, calls: &Calls) -> Result<Counts> {
    let threads = usize::from(args.threads);
    std::thread::scope(|scope| {
        let serve = |thread: usize| {
            let seed = args.seed.wrapping_add((epoch * threads + thread) as u64);
            let counts = traffic::serve(epoch, seed)?;
            calls.repeat(seed)?;
            anyhow::Ok(counts)
        };
        let threads: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || serve(thread))).collect();
        let mut total = Counts::default();
        for thread in threads {
            total += thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(total)
    })
}

/// Bytes in use.
#[derive(Default)]
struct Memory {
    /// After the warm epochs, the most.
    warm: usize,
    /// After the last epoch.
    now: usize,
    /// At once during an epoch, besides what was in use before it: warm epochs, later ones.
    peaks: [usize; 2],
}

impl Memory {
    fn after(&mut self, epoch: usize, in_use: usize, peak: usize) {
        let is_warm = epoch < WARM;
        if is_warm {
            self.warm = self.warm.max(in_use);
        }
        self.now = in_use;
        let peaks = &mut self.peaks[usize::from(!is_warm)];
        *peaks = peak.max(*peaks);
    }

    fn check(&self) -> Result<()> {
        let Self { warm, now, peaks } = self;
        ensure!(*now <= warm + SLACK, "a leak: {now} bytes are in use, {warm} were at first");
        let [first, later] = peaks;
        // Threads meet differently each time, so peaks differ by a cache or two, but do not climb.
        ensure!(*later <= 2 * first + SLACK, "an epoch took {later} bytes, the first ones {first}");
        Ok(())
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { warm, now, peaks: [first, later] } = self;
        let kib = |bytes: &usize| bytes >> 10;
        let (warm, now, first, later) = (kib(warm), kib(now), kib(first), kib(later));
        write!(
            f,
            "in use {now} KiB (at first {warm}), peak of an epoch {later} KiB (at first {first})"
        )
    }
}
