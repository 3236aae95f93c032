//! Distributions over tokens.

use std::cmp::Ordering;

use ndarray::ArrayView1;
use tensor_utils::{Element, check_not_empty};

use crate::{Choices, Error, Sampling};

/// How far the sum of given probabilities may be from 1.
const SUM_TOLERANCE: f64 = 1e-6;
/// Numbers that are sorted first to find those that make up most of a sum.
const SORTED_FIRST: usize = 256;

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
        let mut left = Self {
            tokens: Vec::with_capacity(self.tokens.len()),
            probabilities: Vec::with_capacity(self.tokens.len()),
        };
        // Both are sorted: one walk over the two.
        let mut at = 0;
        for (&token, &p) in self.tokens.iter().zip(&self.probabilities) {
            while other.tokens.get(at).is_some_and(|&before| before < token) {
                at += 1;
            }
            let is_in_other = other.tokens.get(at) == Some(&token);
            let rest = if is_in_other { p - other.probabilities[at] } else { p };
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
        left.remove(token);
        left
    }

    /// [`without`](Self::without), in place.
    pub(crate) fn remove(&mut self, token: u32) {
        if let Ok(index) = self.tokens.binary_search(&token) {
            self.tokens.remove(index);
            self.probabilities.remove(index);
            self.normalise();
        }
    }

    fn normalise(&mut self) {
        let sum: f64 = self.probabilities.iter().sum();
        self.probabilities.iter_mut().for_each(|p| *p /= sum);
    }

    /// Keeps the most likely tokens, as many as the options say; of equal ones those with lower ids.
    fn cut(&mut self, sampling: &Sampling) {
        let Sampling { top_k, top_p, min_p, .. } = *sampling;
        let top_k = top_k.filter(|&k| k < self.tokens.len());
        if top_k.is_none() && top_p.is_none() && min_p.is_none() {
            return;
        }
        // How many stay and how likely the last of them is, are questions of the numbers alone.
        let mut best = self.probabilities.clone();
        if let Some(k) = top_k {
            best.select_nth_unstable_by(k, descending);
            best.truncate(k);
        }
        if let Some(top_p) = top_p {
            truncate_to_share(&mut best, top_p);
        }
        if let Some(min_p) = min_p {
            let least = min_p * best.iter().copied().fold(0.0, f64::max);
            best.retain(|&p| p >= least);
        }
        let last = best.iter().copied().fold(f64::INFINITY, f64::min);
        let ties = best.iter().filter(|&&p| p == last).count();
        self.keep_from(last, ties);
    }

    /// Keeps the tokens that are more likely than `last`, and the first `ties` of those as likely.
    fn keep_from(&mut self, last: f64, mut ties: usize) {
        let mut kept = 0;
        for index in 0..self.tokens.len() {
            let p = self.probabilities[index];
            let is_tie = p == last && ties > 0;
            ties -= usize::from(is_tie);
            if p > last || is_tie {
                self.tokens[kept] = self.tokens[index];
                self.probabilities[kept] = p;
                kept += 1;
            }
        }
        self.tokens.truncate(kept);
        self.probabilities.truncate(kept);
    }
}

fn descending(a: &f64, b: &f64) -> Ordering {
    b.total_cmp(a)
}

/// Keeps the largest of these positive numbers, descending, up to the one that brings their sum to `share` of the
/// sum of all, where both sums are those of the descending order. Few are sorted if few are enough.
fn truncate_to_share(numbers: &mut Vec<f64>, share: f64) {
    // Sums of the same numbers in two orders differ by less than this part of them.
    let slack = 2.0 * numbers.len() as f64 * f64::EPSILON;
    let goal = share * numbers.iter().sum::<f64>();
    let (mut cumulative, mut sorted, mut end) = (0.0, 0, SORTED_FIRST);
    while sorted < numbers.len() {
        sort_part(numbers, sorted, end);
        for index in sorted..numbers.len().min(end) {
            cumulative += numbers[index];
            if cumulative >= goal * (1.0 + slack) {
                return numbers.truncate(index + 1);
            }
            if cumulative >= goal * (1.0 - slack) {
                // Too close to tell without the sum in descending order.
                numbers.sort_unstable_by(descending);
                return numbers.truncate(reach(numbers, share));
            }
        }
        (sorted, end) = (end, end.saturating_mul(16));
    }
}

/// Brings the numbers of `start..end` to the places that they have in descending order, where those before `start`
/// have theirs; all of the others, if there are no more.
fn sort_part(numbers: &mut [f64], start: usize, end: usize) {
    let rest = &mut numbers[start..];
    let count = rest.len().min(end - start);
    if count < rest.len() {
        rest.select_nth_unstable_by(count, descending);
    }
    rest[..count].sort_unstable_by(descending);
}

/// How many of the first of these numbers reach `share` of the sum of all: all, if rounding keeps them from it.
fn reach(descending: &[f64], share: f64) -> usize {
    let sum: f64 = descending.iter().sum();
    let mut cumulative = 0.0;
    let reached = descending.iter().position(|&p| {
        cumulative += p;
        cumulative >= share * sum
    });
    reached.map_or(descending.len(), |last| last + 1)
}
