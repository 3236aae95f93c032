//! Finished beams stay in the pool and compete ([`Rule::Pool`](crate::Rule::Pool)).

use std::cmp::Ordering;

use super::{Candidate, Finished, Group, Live, Step, push};
use crate::history::{History, Path};

/// A member of the pool.
struct Entry {
    score: f64,
    logprob: f64,
    path: Path,
    what: What,
}

enum What {
    Finished(Finished),
    Candidate(Candidate),
}

/// The best of finished beams and candidates stay; returns those that live, and the bound of what was
/// dropped.
pub(super) fn select(
    group: &mut Group,
    step: &Step<'_>,
    history: &mut History,
    candidates: Vec<Candidate>,
) -> (Vec<Live>, f64) {
    let finished = group.finished.drain(..).map(|finished| {
        let Finished { node, length, logprob, score } = finished;
        Entry { score, logprob, path: history.path(node, length), what: What::Finished(finished) }
    });
    let candidates = candidates.into_iter().map(|candidate| {
        let Candidate { beam, token, logprob, merit, .. } = candidate;
        let path = Path { parent: group.live[beam].node, token, length: step.length };
        Entry { score: step.score(merit), logprob, path, what: What::Candidate(candidate) }
    });
    let mut pool: Vec<_> = finished.chain(candidates).collect();

    let order = |a: &Entry, b: &Entry| -> Ordering {
        b.score
            .total_cmp(&a.score)
            .then(b.logprob.total_cmp(&a.logprob))
            .then_with(|| history.compare(a.path, b.path))
    };
    let mut dropped = f64::NEG_INFINITY;
    if step.beams < pool.len() {
        pool.select_nth_unstable_by(step.beams, order);
        for entry in pool.drain(step.beams..) {
            // A finished beam can be pushed out by live ones that come to nothing later.
            let bound = match entry.what {
                What::Finished(finished) => finished.score,
                What::Candidate(candidate) => step.reachable(candidate.logprob),
            };
            dropped = bound.max(dropped);
        }
    }
    pool.sort_unstable_by(order);

    let mut kept = Vec::with_capacity(pool.len());
    for entry in pool {
        match entry.what {
            What::Finished(finished) => group.finished.push(finished),
            What::Candidate(candidate) => {
                let Candidate { beam, token, logprob, .. } = candidate;
                let node = push(history, &group.live, &candidate);
                if step.is_end(token) {
                    let score = step.score(logprob);
                    group.finished.push(Finished { node, length: step.length, logprob, score });
                } else {
                    kept.push(Live { node, logprob, row: group.live[beam].row });
                }
            }
        }
    }
    group.done = kept.is_empty();
    (kept, dropped)
}
