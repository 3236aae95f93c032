//! How the live and finished sequences of a prompt came about: a tree whose branches are never copied.

use std::cmp::Ordering;

/// A sequence: its last node. [`ROOT`] is the one without tokens.
pub(crate) type NodeId = usize;

/// The sequence without tokens.
pub(crate) const ROOT: NodeId = NodeId::MAX;

/// A token of a sequence.
#[derive(Debug, Clone, Copy)]
struct Node {
    parent: NodeId,
    token: u32,
    /// Which live beam of its group it continued.
    beam: u32,
    /// Its log-probability alone.
    logprob: f64,
}

/// All sequences of a prompt. Memory: 24 bytes for each token of each beam that was ever kept.
#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    nodes: Vec<Node>,
}

/// A sequence that need not be in the tree: one that is, and a token after it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Path {
    pub(crate) parent: NodeId,
    pub(crate) token: u32,
    /// Tokens of all.
    pub(crate) length: usize,
}

impl History {
    /// Adds a token to the sequence `parent`, which was beam `beam` of its group.
    pub(crate) fn push(&mut self, parent: NodeId, token: u32, beam: usize, logprob: f64) -> NodeId {
        let beam = u32::try_from(beam).unwrap_or(u32::MAX);
        self.nodes.push(Node { parent, token, beam, logprob });
        self.nodes.len() - 1
    }

    /// The last token; `None` if there is no token.
    pub(crate) fn last_token(&self, node: NodeId) -> Option<u32> {
        self.nodes.get(node).map(|node| node.token)
    }

    /// The last token, and what comes before it.
    pub(crate) fn path(&self, node: NodeId, length: usize) -> Path {
        let Node { parent, token, .. } = self.nodes[node];
        Path { parent, token, length }
    }

    /// Replaces the contents of `tokens` by the tokens of a sequence.
    pub(crate) fn tokens_into(&self, node: NodeId, tokens: &mut Vec<u32>) {
        tokens.clear();
        tokens.extend(self.backwards(node).map(|node| node.token));
        tokens.reverse();
    }

    /// Log-probabilities of the tokens, and the beams they continued.
    pub(crate) fn provenance(&self, node: NodeId) -> (Vec<f64>, Vec<usize>) {
        let (mut logprobs, mut beams): (Vec<_>, Vec<_>) =
            self.backwards(node).map(|node| (node.logprob, node.beam as usize)).unzip();
        logprobs.reverse();
        beams.reverse();
        (logprobs, beams)
    }

    /// The order of the tokens of two sequences: that of the first ones that differ; if one begins with
    /// the other, the shorter comes first.
    pub(crate) fn compare(&self, a: Path, b: Path) -> Ordering {
        let (mut x, mut y) = (a, b);
        while x.length > b.length {
            x = self.path(x.parent, x.length - 1);
        }
        while y.length > a.length {
            y = self.path(y.parent, y.length - 1);
        }
        // Backwards; the last difference met is the first one of the sequences.
        let mut order = a.length.cmp(&b.length);
        loop {
            if x.token != y.token {
                order = x.token.cmp(&y.token);
            }
            if x.parent == y.parent {
                return order;
            }
            x = self.path(x.parent, x.length - 1);
            y = self.path(y.parent, y.length - 1);
        }
    }

    fn backwards(&self, node: NodeId) -> impl Iterator<Item = &Node> {
        std::iter::successors(self.nodes.get(node), |node| self.nodes.get(node.parent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order is that of the slices.
    #[test]
    fn sequences_compare_as_slices_do() {
        let mut history = History::default();
        let mut all = vec![(ROOT, Vec::new())];
        // Every sequence of up to 3 tokens out of 3, some of them twice.
        let mut from = 0;
        for _ in 0..3 {
            let level = all[from..].to_vec();
            from = all.len();
            for (node, tokens) in level {
                for token in [2, 0, 1, 0] {
                    let next = history.push(node, token, 0, 0.0);
                    all.push((next, [tokens.as_slice(), &[token]].concat()));
                }
            }
        }
        for (a, a_tokens) in &all[1..] {
            for (b, b_tokens) in &all[1..] {
                let order = history
                    .compare(history.path(*a, a_tokens.len()), history.path(*b, b_tokens.len()));
                assert_eq!(order, a_tokens.cmp(b_tokens), "{a_tokens:?} {b_tokens:?}");
            }
        }
    }
}
