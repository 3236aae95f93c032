//! Acceptance that keeps the target's distribution: sample and match, and rejection of drafts.

use ndarray::{ArrayView2, Axis};
use tensor_utils::Element;

use crate::greedy::check_logits;
use crate::{Accepted, Choices, DrawnTree, Error, Law, Sampling, Siblings, TokenTree};

/// Draws the target's token in each context and follows the child that has it: any tree, however it
/// was made (as long as no random number of the target's went into it).
///
/// `logits` as in [`accept_greedy`](crate::accept_greedy). One decision a token, so with the same
/// generator the tokens are those of plain sampling, one by one. Proof: `docs/derivation.md`,
/// section 3.
///
/// # Errors
/// Those of [`accept_greedy`](crate::accept_greedy) and of [`Law::from_logits`], for the rows that
/// are read.
pub fn accept_matching<T: Element>(
    tree: &TokenTree,
    logits: ArrayView2<'_, T>,
    sampling: &Sampling,
    choices: &mut impl Choices,
) -> Result<Accepted, Error> {
    check_logits(tree, &logits)?;
    accept_matching_by(tree, laws_of(logits, sampling), choices)
}

/// [`accept_matching`] with the target's law of each row, asked for as it is needed.
///
/// # Errors
/// What `target` reports, and [`Error::NotALaw`] for an empty law.
pub fn accept_matching_by(
    tree: &TokenTree,
    mut target: impl FnMut(usize) -> Result<Law, Error>,
    choices: &mut impl Choices,
) -> Result<Accepted, Error> {
    let mut accepted = Accepted::default();
    let mut row = 0;
    loop {
        let token = draw(&target(row)?, choices)?;
        accepted.tokens.push(token);
        let Some(node) = tree.child(row, token) else { return Ok(accepted) };
        accepted.nodes.push(node);
        row = TokenTree::row_of(node);
    }
}

/// Speculative sampling: each draft is accepted with probability `min(1, p / q)`, and what the
/// rejected ones leave over is drawn from.
///
/// For a tree of one draw a node this is the rule of Leviathan, Kalman and Matias (2023), algorithm
/// 1; for independent siblings the multi-step rule of Miao et al. (2023, SpecInfer, algorithm 2);
/// for distinct ones that of Jeon et al. (2024) and Chen et al. (2024, Sequoia). All give the target's
/// distribution: `docs/derivation.md`, section 4.
///
/// # Errors
/// Those of [`accept_matching`].
pub fn accept_drawn<T: Element>(
    drawn: &DrawnTree,
    logits: ArrayView2<'_, T>,
    sampling: &Sampling,
    choices: &mut impl Choices,
) -> Result<Accepted, Error> {
    check_logits(drawn.tree(), &logits)?;
    accept_drawn_by(drawn, laws_of(logits, sampling), choices)
}

/// [`accept_drawn`] with the target's law of each row, asked for as it is needed.
///
/// # Errors
/// What `target` reports, and [`Error::NotALaw`] for an empty law.
pub fn accept_drawn_by(
    drawn: &DrawnTree,
    mut target: impl FnMut(usize) -> Result<Law, Error>,
    choices: &mut impl Choices,
) -> Result<Accepted, Error> {
    let tree = drawn.tree();
    let mut accepted = Accepted::default();
    let mut row = 0;
    loop {
        let mut p = target(row)?;
        let Some(node) = accept_one(drawn, row, &mut p, choices) else {
            accepted.tokens.push(draw(&p, choices)?);
            return Ok(accepted);
        };
        accepted.tokens.push(tree.tokens()[node]);
        accepted.nodes.push(node);
        row = TokenTree::row_of(node);
    }
}

/// The first draft of `row` that is accepted; without one, `p` is left as the law to draw from.
fn accept_one(
    drawn: &DrawnTree,
    row: usize,
    p: &mut Law,
    choices: &mut impl Choices,
) -> Option<usize> {
    let mut q = drawn.law(row)?.clone();
    for &node in drawn.draws(row) {
        let token = drawn.tree().tokens()[node];
        let (p_token, q_token) = (p.probability(token), q.probability(token));
        if choices.accept(p_token / q_token) {
            return Some(node);
        }
        let left = p.residual(&q);
        if left.tokens().is_empty() {
            // p = q up to rounding: a rejection has probability 0, so there was none.
            return (p_token > 0.0).then_some(node);
        }
        *p = left;
        if drawn.siblings() == Siblings::Distinct {
            q.remove(token);
        }
    }
    None
}

fn laws_of<T: Element>(
    logits: ArrayView2<'_, T>,
    sampling: &Sampling,
) -> impl FnMut(usize) -> Result<Law, Error> {
    move |row| Law::from_logits(logits.index_axis(Axis(0), row), row, sampling)
}

fn draw(law: &Law, choices: &mut impl Choices) -> Result<u32, Error> {
    let empty = || Error::NotALaw { arg: "target", problem: "it has no token".to_owned() };
    law.draw(choices).ok_or_else(empty)
}
