//! The exact law of a random procedure, by walking through every way its decisions can fall.
//!
//! Sampling finds a wrong acceptance rule only when it is very wrong. Enumeration runs the shipped
//! code itself, with [`Branch`] in place of a generator, once for each sequence of decisions, and
//! adds up the probabilities: an error shows at the size of rounding.
//!
//! ```
//! use dflash::{Choices, Law, TokenTree, accept_matching_by, exact};
//!
//! let p = Law::from_probabilities(&[0.5, 0.2, 0.3])?;
//! let tree = TokenTree::new(&[1, 2], &[-1, -1])?;
//! let law = exact::enumerate(|choices| {
//!     Ok(accept_matching_by(&tree, |_| Ok(p.clone()), choices)?.tokens)
//! })?;
//! let target = |_: &[u32]| Ok(p.clone());
//! let (got, want) = (exact::extend(&law, 2, target)?, exact::autoregressive(2, target)?);
//! assert!(exact::total_variation(&got, &want) < 1e-15);
//! # Ok::<(), dflash::Error>(())
//! ```

use std::collections::BTreeMap;

use crate::{Choices, Error, Law};

/// Probabilities of outcomes.
pub type Outcomes<T> = BTreeMap<T, f64>;

/// Decisions on one way through a procedure.
#[derive(Debug, Default)]
pub struct Branch {
    taken: Vec<Decision>,
    at: usize,
    probability: f64,
}

#[derive(Debug)]
struct Decision {
    weights: Vec<f64>,
    chosen: usize,
}

impl Decision {
    /// Moves to the next possible choice at or after `from`.
    fn advance(&mut self, from: usize) -> bool {
        match self.weights.iter().skip(from).position(|&weight| weight > 0.0) {
            Some(offset) => {
                self.chosen = from + offset;
                true
            }
            None => false,
        }
    }
}

impl Branch {
    /// To the next way; `false` after the last.
    fn advance(&mut self) -> bool {
        while let Some(decision) = self.taken.last_mut() {
            if decision.advance(decision.chosen + 1) {
                return true;
            }
            self.taken.pop();
        }
        false
    }
}

impl Choices for Branch {
    fn accept(&mut self, p: f64) -> bool {
        let p = p.clamp(0.0, 1.0);
        self.pick(&[p, 1.0 - p]) == 0
    }

    fn pick(&mut self, weights: &[f64]) -> usize {
        if self.at == self.taken.len() {
            let mut decision = Decision { weights: weights.to_vec(), chosen: 0 };
            decision.advance(0);
            self.taken.push(decision);
        }
        let chosen = self.taken[self.at].chosen;
        self.at += 1;
        let sum: f64 = weights.iter().sum();
        // Without weights there is one way.
        if sum > 0.0 {
            self.probability *= weights.get(chosen).copied().unwrap_or(0.0) / sum;
        }
        chosen
    }
}

/// The law of what `run` returns. It must take all its randomness from the [`Branch`], and is run
/// once for each sequence of decisions.
///
/// # Errors
/// What `run` reports.
pub fn enumerate<T: Ord>(
    mut run: impl FnMut(&mut Branch) -> Result<T, Error>,
) -> Result<Outcomes<T>, Error> {
    let mut branch = Branch::default();
    let mut outcomes = Outcomes::new();
    loop {
        branch.at = 0;
        branch.probability = 1.0;
        let outcome = run(&mut branch)?;
        *outcomes.entry(outcome).or_default() += branch.probability;
        if !branch.advance() {
            return Ok(outcomes);
        }
    }
}

/// The law of the first `length` tokens when sequences of `law` go on by `target`: shorter ones are
/// continued, longer ones cut.
///
/// This is how a verification, which yields one token or more, compares with plain decoding.
///
/// # Errors
/// What `target` reports, given the tokens so far.
pub fn extend(
    law: &Outcomes<Vec<u32>>,
    length: usize,
    mut target: impl FnMut(&[u32]) -> Result<Law, Error>,
) -> Result<Outcomes<Vec<u32>>, Error> {
    let mut done = Outcomes::new();
    let mut open: Vec<_> = law.iter().map(|(tokens, &p)| (tokens.clone(), p)).collect();
    while let Some((mut tokens, probability)) = open.pop() {
        if tokens.len() >= length {
            tokens.truncate(length);
            *done.entry(tokens).or_default() += probability;
            continue;
        }
        let next = target(&tokens)?;
        for (&token, &p) in next.tokens().iter().zip(next.probabilities()) {
            let longer = tokens.iter().copied().chain([token]).collect();
            open.push((longer, probability * p));
        }
    }
    Ok(done)
}

/// The law of the first `length` tokens of plain decoding.
///
/// # Errors
/// What `target` reports, given the tokens so far.
pub fn autoregressive(
    length: usize,
    target: impl FnMut(&[u32]) -> Result<Law, Error>,
) -> Result<Outcomes<Vec<u32>>, Error> {
    extend(&Outcomes::from([(Vec::new(), 1.0)]), length, target)
}

/// Half the sum of the differences: the largest difference in the probability of any event.
pub fn total_variation<T: Ord>(a: &Outcomes<T>, b: &Outcomes<T>) -> f64 {
    let only_b: f64 = b.iter().filter(|(key, _)| !a.contains_key(key)).map(|(_, p)| p).sum();
    let rest: f64 = a.iter().map(|(key, p)| (p - b.get(key).copied().unwrap_or(0.0)).abs()).sum();
    (rest + only_b) / 2.0
}
