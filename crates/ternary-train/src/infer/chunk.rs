//! What one step of a model reads.

use kvcache::{Cache, Queries, Rows, SeqId};

use crate::{Config, Error};

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// The sequence of the cache that they are appended to.
    pub seq: SeqId,
    /// The tokens, at least 1.
    pub tokens: &'a [u32],
    /// `None`: each follows the one before. Otherwise they are a tree, given by the parent of each
    /// (`-1`: the last token of the sequence so far), which comes before its children.
    pub parents: Option<&'a [i64]>,
}

impl<'a> Chunk<'a> {
    /// Tokens that follow each other.
    pub fn line(seq: SeqId, tokens: &'a [u32]) -> Self {
        Self { seq, tokens, parents: None }
    }

    /// Tokens that are the nodes of a tree.
    pub fn tree(seq: SeqId, tokens: &'a [u32], parents: &'a [i64]) -> Self {
        Self { seq, tokens, parents: Some(parents) }
    }

    pub(super) fn queries(&self) -> Queries<'a> {
        let rows = self.parents.map_or(Rows::Last(self.tokens.len()), Rows::Tree);
        Queries { seq: self.seq, rows }
    }

    /// The position of each token.
    pub(super) fn positions(&self, cache: &Cache) -> Result<Vec<usize>, Error> {
        let base = cache.len(self.seq)?;
        let Some(parents) = self.parents else {
            return Ok((base..base + self.tokens.len()).collect());
        };
        if parents.len() != self.tokens.len() {
            let expected = format!("{}, as many as tokens", self.tokens.len());
            return Err(Error::option("parents", expected, parents.len()));
        }
        let mut positions = Vec::with_capacity(parents.len());
        for (node, &parent) in parents.iter().enumerate() {
            let position = match usize::try_from(parent) {
                Ok(parent) if parent < node => positions[parent] + 1,
                Err(_) if parent == -1 => base,
                _ => return Err(Error::option("parents", "-1 or an earlier node", parent)),
            };
            positions.push(position);
        }
        Ok(positions)
    }

    /// Whether token `row` of the chunk sees row `key` of its sequence, which was `base` long before.
    pub(super) fn sees(&self, base: usize, row: usize, key: usize) -> bool {
        let Some(node) = key.checked_sub(base) else { return true };
        match self.parents {
            None => node <= row,
            Some(parents) => {
                let parent = |&node: &usize| usize::try_from(parents[node]).ok();
                std::iter::successors(Some(row), parent).any(|ancestor| ancestor == node)
            }
        }
    }

    pub(super) fn check(&self, config: &Config) -> Result<(), Error> {
        if self.tokens.is_empty() {
            return Err(Error::option("tokens", "at least one token a chunk", "none"));
        }
        match self.tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
            Some(token) => {
                let expected = format!("tokens below the vocabulary's {}", config.vocab_size);
                Err(Error::option("tokens", expected, token))
            }
            None => Ok(()),
        }
    }
}

/// Which tokens get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogitRows {
    /// The last of each chunk: `[chunks, V]`.
    #[default]
    Last,
    /// All of them: `[tokens of all chunks, V]`.
    All,
    /// None, only the cache is filled: `[0, V]`.
    None,
}
