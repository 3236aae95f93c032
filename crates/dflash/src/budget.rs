//! How many nodes are worth verifying: from a measured cost of verification.

use std::time::Instant;

use tensor_utils::check_shape;

use crate::error::invalid;
use crate::{Error, ScoredTree};

/// Seconds that one pass of the target takes, by its rows; measured points, straight between them.
///
/// On a CPU a pass over few rows costs little more than over one, as it is bound by reading weights
/// and cache, until arithmetic takes over; where that is depends on the machine, so it is measured.
#[derive(Debug, Clone, PartialEq)]
pub struct CostCurve {
    points: Vec<(usize, f64)>,
}

impl CostCurve {
    /// From measured points `(rows, seconds)`, by ascending rows.
    ///
    /// # Errors
    /// [`Error::Option`] unless there is a point, rows ascend, and seconds are positive numbers.
    pub fn new(points: &[(usize, f64)]) -> Result<Self, Error> {
        if points.is_empty() {
            return Err(invalid("points", "at least one", "none"));
        }
        if points.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
            return Err(invalid("points", "ascending rows", format!("{points:?}")));
        }
        if let Some((_, s)) = points.iter().find(|(_, s)| !(*s > 0.0 && s.is_finite())) {
            return Err(invalid("points", "positive seconds", s));
        }
        Ok(Self { points: points.to_vec() })
    }

    /// Measures passes of `rows` rows: the shortest of `repeats` (at least 1) each.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and what `pass` reports.
    pub fn measure(
        rows: &[usize],
        repeats: usize,
        mut pass: impl FnMut(usize) -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let mut points = Vec::with_capacity(rows.len());
        for &rows in rows {
            let mut shortest = f64::INFINITY;
            for _ in 0..repeats.max(1) {
                let start = Instant::now();
                pass(rows)?;
                shortest = shortest.min(start.elapsed().as_secs_f64());
            }
            // A clock may be too coarse to see a very short pass.
            points.push((rows, shortest.max(1e-9)));
        }
        Self::new(&points)
    }

    /// Seconds of a pass over `rows` rows: the first point's before it, the last segment's line
    /// beyond the last, but never less than the last point.
    pub fn seconds(&self, rows: usize) -> f64 {
        let after = self.points.partition_point(|&(at, _)| at < rows);
        let line = |(r0, s0): (usize, f64), (r1, s1): (usize, f64)| {
            s0 + (s1 - s0) * (rows as f64 - r0 as f64) / (r1 as f64 - r0 as f64)
        };
        match (after, self.points.len()) {
            (0, _) => self.points[0].1,
            (after, len) if after < len => line(self.points[after - 1], self.points[after]),
            (_, 1) => self.points[0].1,
            (_, len) => {
                let last = self.points[len - 1];
                line(self.points[len - 2], last).max(last.1)
            }
        }
    }
}

/// A choice of how many nodes to verify.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// The number of nodes; 0 is plain decoding.
    pub nodes: usize,
    /// Tokens that a cycle yields on average, if the drafter is right.
    pub expected_tokens: f64,
    /// Of those, in a second.
    pub tokens_per_second: f64,
}

/// The number of nodes of `scored` whose verification yields the most tokens a second, when a pass
/// over `n` nodes and the last token costs `curve.seconds(n + 1)` and drafting `draft_seconds`,
/// whether the draft is used or not. The fewest among equals.
///
/// The tree for it is [`scored.prefix(nodes)`](ScoredTree::prefix).
///
/// # Errors
/// [`Error::Option`] if `draft_seconds` is negative or not a number, [`Error::Shape`] unless there are as many
/// log-probabilities as nodes.
pub fn choose_budget(
    scored: &ScoredTree,
    curve: &CostCurve,
    draft_seconds: f64,
) -> Result<Budget, Error> {
    if !(draft_seconds >= 0.0 && draft_seconds.is_finite()) {
        return Err(invalid("draft_seconds", "a number from 0", draft_seconds));
    }
    check_shape("log_probabilities", &[scored.log_probabilities.len()], &[scored.tree.len()])?;
    let rate = |tokens: f64, nodes: usize| tokens / (curve.seconds(nodes + 1) + draft_seconds);
    let mut best = Budget { nodes: 0, expected_tokens: 1.0, tokens_per_second: rate(1.0, 0) };
    let mut expected_tokens = 1.0;
    for (node, log_probability) in scored.log_probabilities.iter().enumerate() {
        expected_tokens += log_probability.exp();
        let tokens_per_second = rate(expected_tokens, node + 1);
        if tokens_per_second > best.tokens_per_second {
            best = Budget { nodes: node + 1, expected_tokens, tokens_per_second };
        }
    }
    Ok(best)
}
