//! What models that learn nothing deep reach: counts of n-grams, and a compressor.

use std::collections::HashMap;
use std::io::{self, Write};

use lzma_rust2::{XzOptions, XzWriter};

/// An n-gram model of bytes with Witten-Bell smoothing (Witten and Bell, The zero-frequency
/// problem, 1991, method C), interpolated down to the uniform distribution.
#[derive(Debug)]
pub struct NGram {
    order: usize,
    /// For each context: how often it occurred, and how many different bytes followed it.
    contexts: HashMap<u64, (u32, u32)>,
    /// For each context and next byte: how often.
    counts: HashMap<u64, u32>,
}

impl NGram {
    /// A model that looks at the `order - 1` bytes before, at most 7; `order` is at least 1.
    pub fn new(order: usize) -> Self {
        Self { order: order.clamp(1, 8), contexts: HashMap::new(), counts: HashMap::new() }
    }

    /// Counts a text.
    pub fn learn(&mut self, text: &[u8]) {
        for at in 0..text.len() {
            for length in 0..self.order.min(at + 1) {
                let context = key(&text[at - length..at]);
                let count = self.counts.entry(next(context, text[at])).or_default();
                let (seen, kinds) = self.contexts.entry(context).or_default();
                *seen += 1;
                *kinds += u32::from(*count == 0);
                *count += 1;
            }
        }
    }

    /// The probability of `byte` after `before`.
    pub fn probability(&self, before: &[u8], byte: u8) -> f64 {
        let mut probability = 1.0 / 256.0;
        for length in 0..self.order.min(before.len() + 1) {
            let context = key(&before[before.len() - length..]);
            let Some(&(seen, kinds)) = self.contexts.get(&context) else { break };
            let count = self.counts.get(&next(context, byte)).copied().unwrap_or(0);
            let (seen, kinds, count) = (f64::from(seen), f64::from(kinds), f64::from(count));
            probability = (count + kinds * probability) / (seen + kinds);
        }
        probability
    }

    /// Bits for each byte of a text. 0 for an empty one.
    pub fn bits_per_byte(&self, text: &[u8]) -> f64 {
        let bits = |at: usize| {
            let from = at.saturating_sub(self.order - 1);
            -self.probability(&text[from..at], text[at]).log2()
        };
        (0..text.len()).map(bits).sum::<f64>() / text.len().max(1) as f64
    }
}

/// Up to 7 bytes and their number in 64 bits.
fn key(context: &[u8]) -> u64 {
    context.iter().fold(context.len() as u64, |key, &byte| key << 8 | u64::from(byte))
}

/// A context and the byte after it: mixed, since 8 bytes and a length do not fit.
fn next(context: u64, byte: u8) -> u64 {
    (context ^ (u64::from(byte) + 1) << 56).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
}

/// Bits for each byte of `text` that xz at its strongest setting needs, after it has seen `before`.
///
/// # Errors
/// What the compressor refuses; it writes to memory.
pub fn xz_bits_per_byte(before: &[u8], text: &[u8]) -> io::Result<f64> {
    let packed = |parts: [&[u8]; 2]| -> io::Result<usize> {
        let mut options = XzOptions::with_preset(9);
        options.lzma_options.dict_size = 1 << 26;
        let mut writer = XzWriter::new(Vec::new(), options)?;
        parts.into_iter().try_for_each(|part| writer.write_all(part))?;
        Ok(writer.finish()?.len())
    };
    let (all, first) = (packed([before, text])?, packed([before, &[]])?);
    Ok(8.0 * all.saturating_sub(first) as f64 / text.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use rand::rngs::ChaCha8Rng;
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_learn() {
        let mut model = NGram::new(4);
        model.learn(b"to be or not to be, that is the question");
        for before in [&b""[..], b"t", b"to", b" be", b"xyz", b"to b"] {
            let sum: f64 = (0..=255).map(|byte| model.probability(before, byte)).sum();
            assert!((sum - 1.0).abs() < 1e-9, "{before:?}: {sum}");
        }
        assert!(model.probability(b"to", b' ') > 0.5);
        assert!(model.bits_per_byte(b"to be or not") < 3.0);
        assert!((NGram::new(3).bits_per_byte(b"abc") - 8.0).abs() < 1e-12);
    }

    #[test]
    fn xz_uses_what_it_has_seen() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let text: Vec<u8> = (0..4000).map(|_| rng.random()).collect();
        let alone = xz_bits_per_byte(&[], &text).unwrap();
        let after = xz_bits_per_byte(&text, &text).unwrap();
        assert!(alone > 7.9 && after < 1.0, "{alone} {after}");
    }
}
