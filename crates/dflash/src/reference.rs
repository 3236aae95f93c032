//! The definitions in plain loops, to check the rest against.

use ndarray::{Array2, ArrayView2};

use crate::greedy::check_tokens;
use crate::{Accepted, Error};

/// Greedy acceptance by its definition, one node after the other.
///
/// Node `c` is accepted if its parent is (or the prompt is its parent) and its token has the
/// largest logit in its parent's row; the lowest id of equal ones. The result is the accepted node
/// of greatest depth and its ancestors, then the token with the largest logit in its row.
///
/// # Errors
/// [`Error::Parent`] if a parent does not come before its child, [`Error::Shape`] for another number
/// of tokens or rows, [`Error::Token`] for a token outside the vocabulary, [`Error::Nan`] for a NaN in any
/// row.
pub fn accept_greedy_reference(
    tokens: &[u32],
    parents: &[i64],
    logits: ArrayView2<'_, f64>,
) -> Result<Accepted, Error> {
    tensor_utils::check_shape("parents", &[parents.len()], &[tokens.len()])?;
    tensor_utils::check_shape("logits", logits.shape(), &[1 + tokens.len(), logits.ncols()])?;
    tensor_utils::check_not_empty("logits", logits.shape(), 1, "vocabulary")?;
    check_tokens("tokens", tokens, logits.ncols())?;
    let mut choice = Vec::new();
    for row in 0..=tokens.len() {
        let mut best = 0;
        for token in 0..logits.ncols() {
            if logits[[row, token]].is_nan() {
                return Err(Error::Nan { row });
            }
            if logits[[row, token]] > logits[[row, best]] {
                best = token;
            }
        }
        choice.push(best as u32);
    }

    // Length of the accepted path down to each node; 0 for a rejected one.
    let mut length = vec![0_usize; tokens.len()];
    let mut deepest: Option<usize> = None;
    for node in 0..tokens.len() {
        let parent = parents[node];
        if parent < -1 || parent >= node as i64 {
            return Err(Error::Parent { node, parent });
        }
        let before = if parent == -1 { 0 } else { length[parent as usize] };
        let parent_accepted = parent == -1 || before > 0;
        if parent_accepted && tokens[node] == choice[(parent + 1) as usize] {
            length[node] = before + 1;
            if deepest.is_none_or(|other| length[node] > length[other]) {
                deepest = Some(node);
            }
        }
    }

    let mut nodes = Vec::new();
    let mut at = deepest.map_or(-1, |node| node as i64);
    let next = choice[(at + 1) as usize];
    while at >= 0 {
        nodes.insert(0, at as usize);
        at = parents[at as usize];
    }
    let path = nodes.iter().map(|&node| tokens[node]).chain([next]).collect();
    Ok(Accepted { nodes, tokens: path })
}

/// The dense mask by its definition: `[prompt + N, prompt + N]`, `true` where row `i` sees column
/// `j`. Parents that are not earlier nodes count as -1.
///
/// # Panics
/// If there is no memory for it, where [`build_tree_mask`](crate::build_tree_mask) gives an error.
pub fn tree_mask_reference(parents: &[i64], prompt: usize) -> Array2<bool> {
    let size = prompt.saturating_add(parents.len());
    Array2::from_shape_fn((size, size), |(i, j)| {
        if i < prompt || j < prompt {
            return j <= i;
        }
        let mut at = (i - prompt) as i64;
        while at >= 0 {
            if at as usize == j - prompt {
                return true;
            }
            at = if parents[at as usize] < at { parents[at as usize] } else { -1 };
        }
        false
    })
}

/// The probabilities of the `budget` likeliest paths of independent positions, descending, by
/// listing every path; `positions[d]` are the log-probabilities of the token at depth `d + 1`.
pub fn best_paths_reference(positions: &[Vec<f64>], budget: usize) -> Vec<f64> {
    let mut all = Vec::new();
    let mut level = vec![0.0];
    for position in positions {
        let mut next = Vec::new();
        for &path in &level {
            for &log_probability in position {
                if log_probability > f64::NEG_INFINITY {
                    next.push(path + log_probability);
                }
            }
        }
        all.extend_from_slice(&next);
        level = next;
    }
    all.sort_by(|a, b| b.total_cmp(a));
    all.truncate(budget);
    all
}
