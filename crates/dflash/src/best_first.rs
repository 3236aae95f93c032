//! Building a tree: the most likely beginnings first, under a budget of nodes.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::rc::Rc;

use ndarray::{ArrayView1, ArrayView2, Axis};
use softmax_topk::{Logit, Options, softmax_topk};
use tensor_utils::{Element, check_shape};

use crate::error::invalid;
use crate::{Error, MAX_NODES, TokenTree};

/// A token that may come next, with its log-probability.
pub type Candidate = (u32, f64);

/// A tree with the drafter's opinion of each node.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredTree {
    /// The nodes in the order in which they were chosen: the most likely first.
    pub tree: TokenTree,
    /// For each node the logarithm of the probability, by the drafter, of the whole path to it;
    /// descending.
    pub log_probabilities: Vec<f64>,
}

impl ScoredTree {
    /// The first `nodes` nodes, which are the best tree of that size.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are as many log-probabilities as nodes.
    pub fn prefix(&self, nodes: usize) -> Result<Self, Error> {
        let got = self.log_probabilities.len();
        check_shape("log_probabilities", &[got], &[self.tree.len()])?;
        let nodes = nodes.min(self.tree.len());
        let tree = TokenTree::new(&self.tree.tokens()[..nodes], &self.tree.parents()[..nodes])?;
        Ok(Self { tree, log_probabilities: self.log_probabilities[..nodes].to_vec() })
    }

    /// The tokens that verifying the tree yields on average, if the drafter is right: one, and the
    /// probability of each node that it is accepted.
    pub fn expected_tokens(&self) -> f64 {
        1.0 + self.log_probabilities.iter().map(|p| p.exp()).sum::<f64>()
    }
}

/// The `budget` most likely paths of drafts that do not depend on each other: row `d` of
/// `log_probabilities` `[L, V]` is the drafter's opinion of the token `d + 1` after the prompt,
/// whatever the tokens before it.
///
/// So drafts a block-diffusion model such as DFlash, all positions at once. No other tree of
/// `budget` nodes has a larger [`expected_tokens`](ScoredTree::expected_tokens): DDTree
/// ([arXiv:2604.12989](https://arxiv.org/abs/2604.12989)), and `docs/derivation.md`, section 5. The
/// tree is smaller than the budget if there are no more tokens with a probability. Ties: what came
/// first into the queue. When a node is chosen, its next sibling comes into the queue and then its
/// first child; so of equal siblings the lower id is first.
///
/// # Errors
/// [`Error::Option`] for a budget above [`MAX_NODES`], for NaN and
/// log-probabilities above 0.
///
/// ```
/// use dflash::best_first;
/// use ndarray::array;
///
/// let p = array![[0.6_f64, 0.3, 0.1], [0.2, 0.7, 0.1]];
/// let scored = best_first(p.ln().view(), 4)?;
/// // 0 (0.6), 0-1 (0.42), 1 (0.3), 1-1 (0.21)
/// assert_eq!(scored.tree.tokens(), [0, 1, 1, 1]);
/// assert_eq!(scored.tree.parents(), [-1, 0, -1, 2]);
/// # Ok::<(), dflash::Error>(())
/// ```
pub fn best_first<T: Element>(
    log_probabilities: ArrayView2<'_, T>,
    budget: usize,
) -> Result<ScoredTree, Error> {
    let positions: Vec<Rc<[Candidate]>> = log_probabilities
        .axis_iter(Axis(0))
        .take(budget)
        .map(|row| most_likely(row, budget).into())
        .collect();
    let none: Rc<[Candidate]> = Rc::new([]);
    grow(budget, |growth, row| Ok(positions.get(growth.depths[row]).unwrap_or(&none).clone()))
}

/// [`best_first`] from the logits of each position, `[L, V]`: log-softmax and the best `budget`
/// candidates of each row in one read, through `softmax_topk`. Logits of +inf share the probability of their row.
///
/// # Errors
/// Those of [`best_first`] and of [`softmax_topk()`].
pub fn best_first_logits<T: Logit>(
    logits: ArrayView2<'_, T>,
    budget: usize,
) -> Result<ScoredTree, Error> {
    let used = logits.slice_axis(Axis(0), (0..logits.nrows().min(budget)).into());
    if used.is_empty() {
        return grow(0, |_, _| Ok(Rc::new([])));
    }
    let options = Options { log: true, ..Options::default() };
    let top = softmax_topk(used, budget.min(used.ncols()), &options)?;
    let positions: Vec<Rc<[Candidate]>> = top
        .indices
        .rows()
        .into_iter()
        .zip(top.probs.rows())
        .map(|(tokens, log_probabilities)| {
            // Rounding can bring the logarithm of a probability of 1 above 0.
            let log_probabilities = log_probabilities.into_iter().map(|p| p.to_f64().min(0.0));
            tokens.into_iter().copied().zip(log_probabilities).collect()
        })
        .collect();
    let none: Rc<[Candidate]> = Rc::new([]);
    grow(budget, |growth, row| Ok(positions.get(growth.depths[row]).unwrap_or(&none).clone()))
}

/// The same for drafts that depend on the path: `candidates` gives the tokens that may follow the
/// given ones, in any order. It is asked once for the prompt and once for each node that is chosen,
/// but not for the last, so at most `budget` times.
///
/// # Errors
/// Those of [`best_first`], what `candidates` reports, and [`Error::DuplicateSiblings`] if it names
/// a token twice and both are chosen.
pub fn best_first_by(
    budget: usize,
    mut candidates: impl FnMut(&[u32]) -> Result<Vec<Candidate>, Error>,
) -> Result<ScoredTree, Error> {
    grow(budget, |growth, row| {
        let mut list = candidates(&growth.path(row))?;
        list.sort_by(descending);
        Ok(list.into())
    })
}

/// A place in the queue: the `rank`-th candidate after `row`.
struct Entry {
    log_probability: f64,
    row: usize,
    rank: usize,
    /// Entries before this one.
    order: usize,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        self.log_probability
            .total_cmp(&other.log_probability)
            .then_with(|| other.order.cmp(&self.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

/// What has been chosen of the tree, and what may be next.
#[derive(Default)]
struct Growth {
    tokens: Vec<u32>,
    parents: Vec<i64>,
    /// For each row: tokens from the last prompt token to its context.
    depths: Vec<usize>,
    log_probabilities: Vec<f64>,
    /// For each row: its candidates, descending.
    lists: Vec<Rc<[Candidate]>>,
    queue: BinaryHeap<Entry>,
    entries: usize,
}

impl Growth {
    /// Puts the `rank`-th candidate after `row` into the queue, if there is one with a probability.
    fn offer(&mut self, row: usize, rank: usize) -> Result<(), Error> {
        let Some(&(_, log_probability)) = self.lists[row].get(rank) else { return Ok(()) };
        if log_probability.is_nan() || log_probability > 0.0 {
            return Err(invalid("log_probabilities", "numbers at most 0", log_probability));
        }
        let path = if row == 0 { 0.0 } else { self.log_probabilities[row - 1] };
        if log_probability > f64::NEG_INFINITY {
            let log_probability = path + log_probability;
            self.queue.push(Entry { log_probability, row, rank, order: self.entries });
            self.entries += 1;
        }
        Ok(())
    }

    /// The tokens before the context of `row`.
    fn path(&self, row: usize) -> Vec<u32> {
        let mut path = Vec::with_capacity(self.depths[row]);
        let mut at = row;
        while let Some(node) = at.checked_sub(1) {
            path.push(self.tokens[node]);
            at = (self.parents[node] + 1) as usize;
        }
        path.reverse();
        path
    }
}

/// Chooses nodes; `list_after` gives the candidates after a row, descending.
fn grow(
    budget: usize,
    mut list_after: impl FnMut(&Growth, usize) -> Result<Rc<[Candidate]>, Error>,
) -> Result<ScoredTree, Error> {
    if budget > MAX_NODES {
        return Err(invalid("budget", format!("at most {MAX_NODES}"), budget));
    }
    let mut growth = Growth { depths: vec![0], ..Growth::default() };
    if budget > 0 {
        let list = list_after(&growth, 0)?;
        growth.lists.push(list);
        growth.offer(0, 0)?;
    }
    while growth.tokens.len() < budget
        && let Some(Entry { log_probability, row, rank, .. }) = growth.queue.pop()
    {
        let token = growth.lists[row][rank].0;
        growth.tokens.push(token);
        growth.parents.push(row as i64 - 1);
        growth.depths.push(growth.depths[row] + 1);
        growth.log_probabilities.push(log_probability);
        // The last node needs no successors.
        if growth.tokens.len() < budget {
            growth.offer(row, rank + 1)?;
            let newest = growth.tokens.len();
            let list = list_after(&growth, newest)?;
            growth.lists.push(list);
            growth.offer(newest, 0)?;
        }
    }
    let Growth { tokens, parents, log_probabilities, .. } = growth;
    Ok(ScoredTree { tree: TokenTree::new(&tokens, &parents)?, log_probabilities })
}

/// The `k` best candidates of a row, descending, lower ids first among equals; NaN comes before
/// everything, to be found.
pub(crate) fn most_likely<T: Element>(row: ArrayView1<'_, T>, k: usize) -> Vec<Candidate> {
    let mut list: Vec<Candidate> = (0_u32..).zip(row.iter().map(|x| x.to_f64())).collect();
    if k < list.len() {
        list.select_nth_unstable_by(k, descending);
        list.truncate(k);
    }
    list.sort_unstable_by(descending);
    list
}

fn descending(a: &Candidate, b: &Candidate) -> Ordering {
    let by_value = match (a.1.is_nan(), b.1.is_nan()) {
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
        _ => b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal),
    };
    by_value.then(a.0.cmp(&b.0))
}
