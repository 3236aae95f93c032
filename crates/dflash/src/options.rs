//! What to sample from, and when to stop.

use crate::Error;
use crate::error::invalid;

/// From the target's logits to the distribution that a token is drawn from; the default is the
/// softmax itself.
///
/// The cuts apply in this order, each to what the one before left: temperature, `top_k`, `top_p`,
/// `min_p`; then what is left is divided by its sum. Ties at a cut: lower ids stay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// The logits are divided by it: positive and finite. Default 1. (For 0, use
    /// [`accept_greedy`](crate::accept_greedy).)
    pub temperature: f64,
    /// Only the most likely `k`, at least 1. Default: all.
    pub top_k: Option<usize>,
    /// Only the most likely tokens up to and including the one that brings their probability to
    /// this, in (0, 1]. Default: all.
    pub top_p: Option<f64>,
    /// Only tokens at least this times as likely as the most likely one, in [0, 1]. Default: all.
    pub min_p: Option<f64>,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: None, min_p: None }
    }
}

impl Sampling {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Option`] names the field.
    pub fn check(&self) -> Result<(), Error> {
        let t = self.temperature;
        if !(t > 0.0 && t.is_finite()) {
            return Err(invalid("temperature", "a positive number", t));
        }
        if self.top_k == Some(0) {
            return Err(invalid("top_k", "at least 1", 0));
        }
        if let Some(p) = self.top_p.filter(|&p| !(p > 0.0 && p <= 1.0)) {
            return Err(invalid("top_p", "a number above 0 and at most 1", p));
        }
        if let Some(p) = self.min_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return Err(invalid("min_p", "a number from 0 to 1", p));
        }
        Ok(())
    }
}
