//! Values that are checked while the command line is read, so that messages name the option.

use clap::builder::RangedU64ValueParser;
use ternary_train::Error;

/// At least 1.
pub(crate) fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// A positive number.
pub(crate) fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value > 0.0 && f64::is_finite(value) => Ok(value),
        _ => Err("expected a positive number".to_owned()),
    }
}

/// Divides logits.
pub(crate) fn temperature(text: &str) -> Result<f64, String> {
    positive(text)
        .map_err(|what| format!("{what}; leave the option out for the likeliest tokens (greedy)"))
}

/// Tokens of a byte-level BPE, or 0.
pub(crate) fn bpe(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(tokens) if tokens == 0 || tokens >= 256 => Ok(tokens),
        _ => Err("expected 0 or at least 256".to_owned()),
    }
}

/// An error about a field of the training options as one about the option that sets it; others as they are.
pub(crate) fn of_command_line(error: Error) -> anyhow::Error {
    let Error::Option { option, expected, got } = error else { return error.into() };
    let name = match option {
        "learning_rate" => "lr".to_owned(),
        "sequences" => "batch".to_owned(),
        "length" => "context".to_owned(),
        other => other.replace('_', "-"),
    };
    anyhow::anyhow!("--{name} is {got}, expected {expected}")
}
