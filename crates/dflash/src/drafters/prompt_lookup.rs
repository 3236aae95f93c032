//! Drafts copied from the text itself.

use super::{Draft, Drafter};
use crate::{BoxError, TokenTree};

/// Looks for earlier places where the text's last tokens stand and proposes what followed there
/// (Saxena, 2023, *Prompt lookup decoding*): free, and good where output repeats input, as in edits,
/// summaries and code.
///
/// Longer matches come first, later ones before earlier ones of the same length. What followed them
/// goes into one tree, common beginnings merged, until the budget is used up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptLookup {
    /// Tokens that must match, at most; 0 proposes nothing. Default 3.
    pub longest_match: usize,
    /// Tokens that must match, at least; 0 counts as 1, more than [`longest_match`](Self::longest_match) proposes
    /// nothing. Default 1.
    pub shortest_match: usize,
    /// Tokens of each continuation, at most; 0 proposes nothing. Default 10.
    pub length: usize,
    /// Places that are looked up, at most; 0 proposes nothing. Default 4.
    pub places: usize,
}

impl Default for PromptLookup {
    fn default() -> Self {
        Self { longest_match: 3, shortest_match: 1, length: 10, places: 4 }
    }
}

impl PromptLookup {
    /// What followed earlier occurrences of the last tokens, best first.
    fn continuations<'a>(&self, text: &'a [u32]) -> Vec<&'a [u32]> {
        let mut starts = Vec::new();
        let longest = self.longest_match.min(text.len());
        for matched in (self.shortest_match.max(1)..=longest).rev() {
            let Some(begin) = text.len().checked_sub(matched) else { continue };
            let suffix = &text[begin..];
            // A continuation begins before the end of the text.
            for end in (matched..text.len()).rev() {
                if starts.len() >= self.places {
                    break;
                }
                if &text[end - matched..end] == suffix && !starts.contains(&end) {
                    starts.push(end);
                }
            }
        }
        starts
            .into_iter()
            .map(|start| &text[start..text.len().min(start.saturating_add(self.length))])
            .collect()
    }
}

impl Drafter for PromptLookup {
    fn draft(&mut self, _: usize, text: &[u32], budget: usize) -> Result<Draft, BoxError> {
        let (mut tokens, mut parents) = (Vec::new(), Vec::new());
        for continuation in self.continuations(text) {
            let mut parent = -1;
            for &token in continuation {
                let known = (0..tokens.len()).find(|&i| parents[i] == parent && tokens[i] == token);
                parent = match known {
                    Some(node) => node as i64,
                    None if tokens.len() >= budget => break,
                    None => {
                        tokens.push(token);
                        parents.push(parent);
                        tokens.len() as i64 - 1
                    }
                };
            }
        }
        Ok(Draft::Tree(TokenTree::new(&tokens, &parents)?))
    }
}
