//! Finished sequences apart from the live beams, as in Hugging Face Transformers
//! ([`Rule::Transformers`](crate::Rule::Transformers)).

use std::cmp::Ordering;

use super::{Candidate, Finished, Group, Live, Step, best_of, offered, push};
use crate::EarlyStopping;
use crate::history::History;

/// Stores the candidates that end and keeps the best others; returns those, and the bound of what was
/// dropped. (What has to leave the store is worse than all that is in it, now and later.)
pub(super) fn select(
    group: &mut Group,
    step: &Step<'_>,
    history: &mut History,
    candidates: Vec<Candidate>,
    early_stopping: EarlyStopping,
) -> (Vec<Live>, f64) {
    let count = offered(step.options, step.beams);
    let (candidates, mut dropped) = best_of(candidates, count);
    let mut kept = Vec::new();
    for (rank, candidate) in candidates.iter().enumerate() {
        let Candidate { beam, token, logprob, .. } = *candidate;
        let ends = step.is_last() || step.is_end(token);
        let is_wanted = if ends { rank < step.beams } else { kept.len() < step.beams };
        if !is_wanted {
            dropped = logprob.max(dropped);
            continue;
        }
        let node = push(history, &group.live, candidate);
        if ends {
            let finished =
                Finished { node, length: step.length, logprob, score: step.score(logprob) };
            group.finished.push(finished);
        } else {
            kept.push(Live { node, logprob, row: group.live[beam].row });
        }
    }
    keep_best(&mut group.finished, step.beams);
    // Merits order them, so the first need not have the highest log-probability.
    let best_live = kept.iter().map(|live| live.logprob).reduce(f64::max);
    group.done = best_live.is_none_or(|best| is_done(group, step, best, early_stopping));
    (kept, step.reachable(dropped))
}

/// Keeps the best sequences; of those that are as good, the ones that came first.
fn keep_best(finished: &mut Vec<Finished>, places: usize) {
    let by_score = |a: &Finished, b: &Finished| b.score.partial_cmp(&a.score);
    finished.sort_by(|a, b| by_score(a, b).unwrap_or(Ordering::Equal));
    finished.truncate(places);
}

/// Whether nothing is stored any more.
fn is_done(group: &Group, step: &Step<'_>, best_live: f64, early_stopping: EarlyStopping) -> bool {
    let Some(worst) = group.finished.get(step.beams - 1) else { return false };
    let options = step.options;
    let length = match early_stopping {
        // One beam is greedy search there.
        _ if options.num_beams == 1 => return true,
        EarlyStopping::Immediate => return true,
        EarlyStopping::Never if options.alpha > 0.0 => options.max_new_tokens,
        EarlyStopping::Never | EarlyStopping::Heuristic => step.length,
    };
    crate::score::normalised(best_live, length, options.alpha) <= worst.score
}
