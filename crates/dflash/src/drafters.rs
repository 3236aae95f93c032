//! Who proposes the trees.

mod model;
mod prompt_lookup;
mod scripted;

pub use model::{ModelDrafter, ModelDrafts};
pub use prompt_lookup::PromptLookup;
pub use scripted::{NoDraft, Scripted};

use crate::{BoxError, DrawnTree, Error, ScoredTree, TokenTree};

/// A proposal.
#[derive(Debug, Clone, PartialEq)]
pub enum Draft {
    /// Any tree.
    Tree(TokenTree),
    /// A tree with the drafter's opinion, of which a cost curve may choose a part
    /// ([`DecodeOptions::cost`](crate::DecodeOptions::cost)).
    Scored(ScoredTree),
    /// A tree drawn at random, for speculative sampling.
    Drawn(DrawnTree),
}

impl Draft {
    /// The tree.
    pub fn tree(&self) -> &TokenTree {
        match self {
            Self::Tree(tree) => tree,
            Self::Scored(scored) => &scored.tree,
            Self::Drawn(drawn) => drawn.tree(),
        }
    }

    /// The nodes of at most this depth. Of a drawn tree too: what was drawn does not decide what goes.
    pub(crate) fn up_to(self, depth: usize) -> Result<Self, Error> {
        if self.tree().max_depth() <= depth {
            return Ok(self);
        }
        Ok(match self {
            Self::Tree(tree) => Self::Tree(tree.up_to(depth)?.0),
            Self::Scored(ScoredTree { tree, log_probabilities }) => {
                let (tree, kept) = tree.up_to(depth)?;
                let kept = kept.iter().filter_map(|&node| log_probabilities.get(node).copied());
                Self::Scored(ScoredTree { tree, log_probabilities: kept.collect() })
            }
            Self::Drawn(drawn) => Self::Drawn(drawn.up_to(depth)?),
        })
    }
}

/// Proposes continuations. What it proposes changes the speed and nothing else: greedy output and
/// the law of sampled output are the target's.
pub trait Drafter {
    /// A tree of at most `budget` nodes that may follow `text` (prompt and generated tokens, never
    /// empty). `sequence` tells the sequences of a batch apart: texts of the same number grow from
    /// call to call, unless [`finish`](Self::finish) came between.
    ///
    /// # Errors
    /// Whatever goes wrong.
    fn draft(&mut self, sequence: usize, text: &[u32], budget: usize) -> Result<Draft, BoxError>;

    /// There will be no more of this sequence; the number may be used again.
    fn finish(&mut self, sequence: usize) {
        let _ = sequence;
    }
}

impl<D: Drafter + ?Sized> Drafter for &mut D {
    fn draft(&mut self, sequence: usize, text: &[u32], budget: usize) -> Result<Draft, BoxError> {
        (**self).draft(sequence, text, budget)
    }

    fn finish(&mut self, sequence: usize) {
        (**self).finish(sequence);
    }
}
