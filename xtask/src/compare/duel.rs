//! One case: agreement first, then the two sides in turn.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rayon::ThreadPool;
use serde_json::Value;

use super::machine::Sampler;
use super::memory::{forget_peak, peak_mb};
use super::peer::{Input, Peer};
use super::report::{Against, Row};
use crate::workspace::note;

/// A turn lasts at least this long; short kernels are repeated.
const TURN: f64 = 0.02;
/// Between turns, until idle workers have stopped to spin.
const PAUSE: Duration = Duration::from_millis(10);

/// Something that both sides can compute.
pub(super) struct Case {
    pub(super) package: &'static str,
    pub(super) kernel: &'static str,
    /// The shape, and what else matters.
    pub(super) name: String,
    pub(super) dtype: &'static str,
    /// Operations that the result needs.
    pub(super) flops: f64,
    /// Bytes of the inputs and outputs.
    pub(super) bytes: f64,
    /// Largest difference between the results that is rounding.
    pub(super) tolerance: f64,
    /// Makes the arrays.
    pub(super) prepare: Box<dyn Fn() -> Result<Box<dyn Contest>>>,
}

impl Case {
    /// What tells it from the others.
    pub(super) fn title(&self) -> String {
        format!("{} {} {}", self.kernel, self.name, self.dtype)
    }
}

/// Our side of a case, with its arrays.
pub(super) trait Contest: Send {
    /// The operation in `peers/torch_peer.py`, and its options.
    fn peer_operation(&self) -> (&'static str, Value);

    /// The arrays that the peer needs.
    fn inputs(&self) -> Vec<Input>;

    /// Computes once.
    fn run(&mut self) -> Result<()>;

    /// Seconds since this was last asked that are not the kernel's, such as those inside a model.
    fn seconds_not_counted(&mut self) -> f64 {
        0.0
    }

    /// The largest difference between our result and the peer's; NaN if one has a NaN.
    fn largest_difference(&self, peer: &mut Peer) -> Result<f64>;
}

/// Compares the results with each peer's, then measures `pairs` pairs of turns with each: a row for
/// each peer that can compute it; without any, a row of `pairs` turns of ours. Each peer meets our
/// side as it was at first: a training step changes it.
pub(super) fn run(
    case: &Case,
    peers: &mut [Peer],
    pool: &ThreadPool,
    pairs: usize,
) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for peer in peers {
        forget_peak(std::process::id());
        let mut contest = (case.prepare)()?;
        let name = peer.name();
        match Opponent::new(peer, case, &mut *contest, pool)? {
            Err(reason) => note(format_args!("  {name} is SKIPPED: {reason}")),
            Ok(opponent) => rows.push(turns(case, &mut *contest, Some(opponent), pool, pairs)?),
        }
    }
    if rows.is_empty() {
        forget_peak(std::process::id());
        rows.push(turns(case, &mut *(case.prepare)()?, None, pool, pairs)?);
    }
    Ok(rows)
}

fn turns(
    case: &Case,
    contest: &mut dyn Contest,
    mut opponent: Option<Opponent<'_>>,
    pool: &ThreadPool,
    pairs: usize,
) -> Result<Row> {
    let our_repeats = repeats(|calls| run_ours(contest, pool, calls))?;
    // Before there is memory for samples of the machine.
    let memory = peak_mb(std::process::id());
    let mut machine = Sampler::new()?;
    let (mut ours, mut roofs, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..=pairs {
        sleep(PAUSE);
        let our_turn = run_ours(contest, pool, our_repeats)?;
        // Either side finds the caches full of what another one read.
        let roof = machine.sample(pool)?;
        sleep(PAUSE);
        let peer_turn = opponent.as_mut().map(Opponent::turn).transpose()?;
        // The first pair is the warm-up.
        if pair > 0 {
            ours.push(our_turn);
            roofs.push(roof);
            theirs.extend(peer_turn);
        }
    }
    let against = opponent.map(|opponent| opponent.result(&ours, &theirs));
    Ok(Row::new(case, pool.current_num_threads(), &ours, &roofs, memory, against))
}

/// A peer, once its result has been compared with ours.
struct Opponent<'a> {
    peer: &'a mut Peer,
    repeats: usize,
    max_error: f64,
}

impl<'a> Opponent<'a> {
    /// Or why the peer cannot compute it.
    fn new(
        peer: &'a mut Peer,
        case: &Case,
        contest: &mut dyn Contest,
        pool: &ThreadPool,
    ) -> Result<Result<Self, String>> {
        forget_peak(peer.pid());
        if let Some(reason) = peer.compute(contest)? {
            return Ok(Err(reason));
        }
        run_ours(contest, pool, 1)?;
        let max_error = contest.largest_difference(peer)?;
        ensure!(
            max_error <= case.tolerance,
            "the results of {} differ by {max_error:.1e}, more than {:.0e}",
            peer.name(),
            case.tolerance,
        );
        let repeats = repeats(|calls| peer.run(calls))?;
        Ok(Ok(Self { peer, repeats, max_error }))
    }

    fn turn(&mut self) -> Result<f64> {
        self.peer.run(self.repeats)
    }

    fn result(self, ours: &[f64], theirs: &[f64]) -> Against {
        let memory = peak_mb(self.peer.pid());
        Against::new(self.peer.name(), self.max_error, memory, ours, theirs)
    }
}

/// Seconds that one of `repeats` calls took.
fn run_ours(contest: &mut dyn Contest, pool: &ThreadPool, repeats: usize) -> Result<f64> {
    pool.install(|| {
        contest.seconds_not_counted();
        let start = Instant::now();
        for _ in 0..repeats {
            contest.run()?;
        }
        let seconds = start.elapsed().as_secs_f64() - contest.seconds_not_counted();
        Ok(seconds / repeats as f64)
    })
}

/// How often to repeat a call so that a turn is long enough. A call alone, with cold caches and sleeping
/// threads, may take ten times as long as one of many, so the number is approached by turns.
fn repeats(mut turn: impl FnMut(usize) -> Result<f64>) -> Result<usize> {
    let mut repeats = 1;
    loop {
        let enough = (TURN / turn(repeats)?.max(1e-9)).ceil().clamp(1.0, 1e6) as usize;
        if enough <= 2 * repeats {
            return Ok(enough);
        }
        repeats = enough;
    }
}
