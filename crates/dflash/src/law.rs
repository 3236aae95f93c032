//! Distributions over tokens.

use ndarray::ArrayView1;
use tensor_utils::{Element, check_not_empty};

use crate::{Choices, Error, Sampling};

/// How far the sum of given probabilities may be from 1.
const SUM_TOLERANCE: f64 = 1e-6;

/// A distribution over tokens: those with a positive probability, by id.
///
/// Cuts such as top-k make it short, and the rules of acceptance walk no more than that.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Law {
    tokens: Vec<u32>,
    probabilities: Vec<f64>,
}

impl Law {
    /// From the probability of each token of the vocabulary, which are divided by their sum.
    ///
    /// # Errors
    /// [`Error::NotALaw`] for a negative number or NaN, or a sum further from 1 than 1e-6.
    pub fn from_probabilities(probabilities: &[f64]) -> Result<Self, Error> {
        let problem = |problem: String| Error::NotALaw { arg: "probabilities", problem };
        if let Some(token) = probabilities.iter().position(|p| p.is_nan() || *p < 0.0) {
            return Err(problem(format!("{} at token {token}", probabilities[token])));
        }
        let sum: f64 = probabilities.iter().sum();
        if sum.is_nan() || (sum - 1.0).abs() > SUM_TOLERANCE {
            return Err(problem(format!("its sum is {sum}")));
        }
        let mut law = Self::default();
        for (token, &p) in (0_u32..).zip(probabilities) {
            if p > 0.0 {
                law.tokens.push(token);
                law.probabilities.push(p / sum);
            }
        }
        Ok(law)
    }

    /// The law that [`Sampling`] makes of a row of logits, computed in `f64`.
    ///
    /// Logits of -inf have probability 0; one or more of +inf share everything evenly.
    ///
    /// # Errors
    /// [`Error::Nan`] with the given `row` for a NaN, [`Error::NotALaw`] if every logit is -inf,
    /// [`Error::Shape`] for an empty row, [`Error::Option`] from [`Sampling::check`].
    pub fn from_logits<T: Element>(
        logits: ArrayView1<'_, T>,
        row: usize,
        sampling: &Sampling,
    ) -> Result<Self, Error> {
        sampling.check()?;
        check_not_empty("logits", logits.shape(), 0, "vocabulary")?;
        let mut max = f64::NEG_INFINITY;
        for x in &logits {
            let x = x.to_f64();
            if x.is_nan() {
                return Err(Error::Nan { row });
            }
            max = max.max(x);
        }
        if max == f64::NEG_INFINITY {
            let problem = format!("every logit of row {row} is -inf");
            return Err(Error::NotALaw { arg: "logits", problem });
        }
        let mut law = Self::default();
        for (token, x) in (0_u32..).zip(&logits) {
            let x = x.to_f64();
            // inf - inf is NaN; equal logits weigh the same, infinite ones too.
            let weight = if x == max { 1.0 } else { ((x - max) / sampling.temperature).exp() };
            if weight >= f64::MIN_POSITIVE {
                law.tokens.push(token);
                law.probabilities.push(weight);
            }
        }
        law.cut(sampling);
        law.normalise();
        Ok(law)
    }

    /// The tokens with a positive probability, ascending.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Their probabilities.
    pub fn probabilities(&self) -> &[f64] {
        &self.probabilities
    }

    /// The probability of a token, 0 for tokens that are not there.
    pub fn probability(&self, token: u32) -> f64 {
        match self.tokens.binary_search(&token) {
            Ok(index) => self.probabilities[index],
            Err(_) => 0.0,
        }
    }

    /// Draws a token; `None` if the law is empty.
    pub fn draw(&self, choices: &mut impl Choices) -> Option<u32> {
        if self.tokens.is_empty() {
            return None;
        }
        self.tokens.get(choices.pick(&self.probabilities)).copied()
    }

    /// `norm(max(0, self - other))`: what is left to draw from after a draft from `other` was
    /// rejected. Empty if nothing is left.
    #[must_use]
    pub fn residual(&self, other: &Self) -> Self {
        let mut left = Self::default();
        for (&token, &p) in self.tokens.iter().zip(&self.probabilities) {
            let rest = p - other.probability(token);
            if rest > 0.0 {
                left.tokens.push(token);
                left.probabilities.push(rest);
            }
        }
        left.normalise();
        left
    }

    /// The law given that the token is another one. Empty if there is no other.
    #[must_use]
    pub fn without(&self, token: u32) -> Self {
        let mut left = self.clone();
        if let Ok(index) = left.tokens.binary_search(&token) {
            left.tokens.remove(index);
            left.probabilities.remove(index);
            left.normalise();
        }
        left
    }

    fn normalise(&mut self) {
        let sum: f64 = self.probabilities.iter().sum();
        self.probabilities.iter_mut().for_each(|p| *p /= sum);
    }

    fn cut(&mut self, sampling: &Sampling) {
        let Sampling { top_k, top_p, min_p, .. } = *sampling;
        if top_k.is_none_or(|k| k >= self.tokens.len()) && top_p.is_none() && min_p.is_none() {
            return;
        }
        let mut order: Vec<usize> = (0..self.tokens.len()).collect();
        // Descending; the sort is stable, so equal ones stay in the order of their ids.
        order.sort_by(|&a, &b| self.probabilities[b].total_cmp(&self.probabilities[a]));
        order.truncate(top_k.unwrap_or(usize::MAX));
        if let Some(top_p) = top_p {
            let sum: f64 = order.iter().map(|&index| self.probabilities[index]).sum();
            let mut cumulative = 0.0;
            let reached = order.iter().position(|&index| {
                cumulative += self.probabilities[index];
                cumulative >= top_p * sum
            });
            order.truncate(reached.map_or(order.len(), |last| last + 1));
        }
        if let (Some(min_p), Some(&first)) = (min_p, order.first()) {
            let least = min_p * self.probabilities[first];
            order.retain(|&index| self.probabilities[index] >= least);
        }
        order.sort_unstable();
        self.tokens = order.iter().map(|&index| self.tokens[index]).collect();
        self.probabilities = order.iter().map(|&index| self.probabilities[index]).collect();
    }
}
