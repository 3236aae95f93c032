//! A law that is drawn from again and again, with or without replacement.

use std::ops::Range;

use crate::{Choices, Law};

/// Tokens of a block; of a law with no more, all are in one.
const BLOCK: usize = 512;

/// The probabilities of a law, in blocks with their sums: a draw takes a block, then a token of it, and so reads
/// `V / 512 + 512` numbers instead of `V`. A law of one block is drawn from as [`Law::draw`] does.
pub(crate) struct Urn {
    /// By index in the law; 0 for what was taken out.
    weights: Vec<f64>,
    /// The sum of each block, never negative.
    sums: Vec<f64>,
    block: usize,
}

impl Urn {
    /// With everything in it.
    pub(crate) fn new(law: &Law) -> Self {
        Self::with_blocks(law.probabilities().to_vec(), BLOCK)
    }

    fn with_blocks(weights: Vec<f64>, block: usize) -> Self {
        let sums = weights.chunks(block).map(|weights| weights.iter().sum()).collect();
        Self { weights, sums, block }
    }

    /// The index in the law of the token that is drawn; `None` if nothing is left.
    pub(crate) fn draw(&self, choices: &mut impl Choices) -> Option<usize> {
        if !self.sums.iter().any(|&sum| sum > 0.0) {
            return None;
        }
        let block = if self.sums.len() > 1 { choices.pick(&self.sums) } else { 0 };
        let range = self.range(block);
        Some(range.start + choices.pick(&self.weights[range]))
    }

    /// Takes a token out.
    pub(crate) fn remove(&mut self, index: usize) {
        self.weights[index] = 0.0;
        let block = index / self.block;
        // Anew: what is left may be far smaller than the rounding of a difference.
        self.sums[block] = self.weights[self.range(block)].iter().sum();
    }

    /// The indices of a block.
    fn range(&self, block: usize) -> Range<usize> {
        let start = block * self.block;
        start..self.weights.len().min(start + self.block)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::exact::{Branch, enumerate, total_variation};

    /// How far the law of the order in which all tokens are drawn is from that of a law drawn from without replacement.
    fn distance(law: &Law, mut draw: impl FnMut(&Law, &mut Branch) -> Vec<u32>) -> f64 {
        let got = enumerate(|choices| Ok(draw(law, choices))).unwrap();
        let want = enumerate(|choices| {
            let mut left = law.clone();
            let mut drawn = Vec::new();
            while let Some(token) = left.draw(choices) {
                drawn.push(token);
                left = left.without(token);
            }
            Ok(drawn)
        });
        total_variation(&got, &want.unwrap())
    }

    #[test]
    fn blocks_do_not_show() {
        let law = Law::from_probabilities(&[0.1, 0.0, 0.3, 0.05, 0.25, 0.3]).unwrap();
        for block in 1..=6 {
            let distance = distance(&law, |law, choices| {
                let mut urn = Urn::with_blocks(law.probabilities().to_vec(), block);
                let mut drawn = Vec::new();
                while let Some(index) = urn.draw(choices) {
                    drawn.push(law.tokens()[index]);
                    urn.remove(index);
                }
                drawn
            });
            assert!(distance < 1e-14, "blocks of {block}: {distance:e}");
        }
    }

    #[test]
    fn what_is_left_may_be_tiny() {
        let law = Law::from_probabilities(&[1.0, 1e-300, 1e-17]).unwrap();
        let mut urn = Urn::with_blocks(law.probabilities().to_vec(), 2);
        let mut choices = Branch::default();
        for index in [0, 2] {
            urn.remove(index);
        }
        assert_eq!(urn.draw(&mut choices), Some(1));
        urn.remove(1);
        assert_eq!(urn.draw(&mut choices), None);
        assert_eq!(Urn::new(&Law::default()).draw(&mut choices), None);
    }
}
