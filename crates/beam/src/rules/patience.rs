//! First come, first served ([`Rule::Patience`](crate::Rule::Patience)).

use super::{
    Candidate, Finished, Group, Live, Step, best_of, compare_finished, highest, offered, push,
};
use crate::history::History;

/// Takes candidates in order until the beams are full or enough have finished; returns the live ones,
/// and the bound of what was dropped.
pub(super) fn select(
    group: &mut Group,
    step: &Step<'_>,
    history: &mut History,
    candidates: Vec<Candidate>,
    patience: f64,
) -> (Vec<Live>, f64) {
    let enough = (patience * step.beams as f64).round().max(1.0) as usize;
    let count = offered(step.options, step.beams);
    let (candidates, mut dropped) = best_of(candidates, count);
    let mut kept = Vec::new();
    for (rank, candidate) in candidates.iter().enumerate() {
        if kept.len() == step.beams || group.finished.len() >= enough {
            dropped = highest(&candidates[rank..]).max(dropped);
            break;
        }
        let Candidate { beam, token, logprob, .. } = *candidate;
        let node = push(history, &group.live, candidate);
        if step.is_end(token) {
            let score = step.score(logprob);
            group.finished.push(Finished { node, length: step.length, logprob, score });
        } else {
            kept.push(Live { node, logprob, row: group.live[beam].row });
        }
    }
    group.finished.sort_by(|a, b| compare_finished(history, a, b));
    group.done = kept.is_empty() || group.finished.len() >= enough;
    (kept, step.reachable(dropped))
}
