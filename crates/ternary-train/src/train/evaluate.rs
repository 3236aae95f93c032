//! How a text is cut for evaluation.

/// Windows of `length` tokens and the one after in a text of `tokens`, that do not overlap.
pub fn windows_of(tokens: usize, length: usize) -> usize {
    tokens.saturating_sub(1).checked_div(length).unwrap_or(0)
}
