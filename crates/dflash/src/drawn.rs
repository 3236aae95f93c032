//! Trees whose nodes were drawn at random from a drafter's distributions.

use tensor_utils::check_shape;

use crate::error::invalid;
use crate::urn::Urn;
use crate::{Choices, Error, Law, MAX_NODES, TokenTree};

/// How the children of one node were drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Siblings {
    /// Each from the whole law, so that a token may be drawn again (with replacement).
    Independent,
    /// Each from the law without the tokens drawn before it (without replacement).
    Distinct,
}

/// A tree with the laws it was drawn from, which [`accept_drawn`](crate::accept_drawn) needs.
///
/// A token that [`Siblings::Independent`] drew again is the same node again: the tree has it once,
/// the list of draws twice. Forgetting the second would change the output's distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct DrawnTree {
    tree: TokenTree,
    siblings: Siblings,
    /// For each row: the law of its children.
    laws: Vec<Law>,
    /// For each row: its children in the order in which they were drawn.
    draws: Vec<Vec<usize>>,
}

impl DrawnTree {
    /// Draws a tree: `widths[d]` children for each node of depth `d` (the last prompt token has
    /// depth 0), level by level, up to `max_nodes` nodes.
    ///
    /// `draft` gives the law of the token after a path of tokens below the prompt. Where a law has
    /// fewer tokens than distinct children are wanted, there are fewer. From a law of more than 512 tokens a child is
    /// drawn in two decisions: a block of 512 tokens, then one of them.
    ///
    /// # Errors
    /// What `draft` reports; [`Error::TooManyNodes`] for a limit above [`MAX_NODES`].
    pub fn draw(
        widths: &[usize],
        siblings: Siblings,
        max_nodes: usize,
        mut draft: impl FnMut(&[u32]) -> Result<Law, Error>,
        choices: &mut impl Choices,
    ) -> Result<Self, Error> {
        if max_nodes > MAX_NODES {
            return Err(Error::TooManyNodes { limit: MAX_NODES, got: max_nodes });
        }
        let (mut tokens, mut parents) = (Vec::new(), Vec::new());
        let mut laws = vec![Law::default()];
        let mut draws = vec![Vec::new()];
        let mut paths: Vec<Vec<u32>> = vec![Vec::new()];
        let mut row = 0;
        while row < paths.len() {
            let width = widths.get(paths[row].len()).copied().unwrap_or(0);
            if width > 0 && tokens.len() < max_nodes {
                let law = draft(&paths[row])?;
                let mut left = Urn::new(&law);
                for _ in 0..width {
                    // Before the draw: to stop because of what was drawn would bend its law.
                    if tokens.len() == max_nodes {
                        break;
                    }
                    let Some(index) = left.draw(choices) else { break };
                    let token = law.tokens()[index];
                    let known = draws[row].iter().copied().find(|&node| tokens[node] == token);
                    let node = match known {
                        Some(node) => node,
                        None => {
                            tokens.push(token);
                            parents.push(row as i64 - 1);
                            laws.push(Law::default());
                            draws.push(Vec::new());
                            let mut path = paths[row].clone();
                            path.push(token);
                            paths.push(path);
                            tokens.len() - 1
                        }
                    };
                    draws[row].push(node);
                    if siblings == Siblings::Distinct {
                        left.remove(index);
                    }
                }
                laws[row] = law;
            }
            row += 1;
        }
        Ok(Self { tree: TokenTree::new(&tokens, &parents)?, siblings, laws, draws })
    }

    /// From drafts that were drawn elsewhere: for each row the law and the children, in the order
    /// in which they were drawn.
    ///
    /// The result is only as exact as the claim that the draws came from these laws; greedy or
    /// top-k choices did not, and belong to [`accept_matching`](crate::accept_matching).
    ///
    /// # Errors
    /// [`Error::Shape`] unless there is one law and one list a row, [`Error::NotALaw`] if a draw has
    /// probability 0, [`Error::Option`] if a list does not hold the row's children, or
    /// repeats one that is to be distinct.
    pub fn from_draws(
        tree: TokenTree,
        siblings: Siblings,
        laws: Vec<Law>,
        draws: Vec<Vec<usize>>,
    ) -> Result<Self, Error> {
        check_shape("laws", &[laws.len()], &[tree.rows()])?;
        check_shape("draws", &[draws.len()], &[tree.rows()])?;
        for (row, list) in draws.iter().enumerate() {
            let mut sorted = list.clone();
            sorted.sort_unstable();
            if siblings == Siblings::Independent {
                sorted.dedup();
            }
            if sorted != tree.children(row) {
                let expected = format!("the children {:?} of row {row}", tree.children(row));
                return Err(invalid("draws", expected, format!("{list:?}")));
            }
            for &node in list {
                let token = tree.tokens()[node];
                if laws[row].probability(token) <= 0.0 {
                    let problem = format!("token {token}, drawn in row {row}, has probability 0");
                    return Err(Error::NotALaw { arg: "laws", problem });
                }
            }
        }
        Ok(Self { tree, siblings, laws, draws })
    }

    /// The nodes of at most this depth: of each row either all draws stay or none.
    pub(crate) fn up_to(&self, depth: usize) -> Result<Self, Error> {
        let (tree, kept) = self.tree.up_to(depth)?;
        let rows = || std::iter::once(0).chain(kept.iter().map(|&node| TokenTree::row_of(node)));
        let place = |node: &usize| kept.binary_search(node).ok();
        let draws = rows().map(|row| self.draws[row].iter().filter_map(place).collect()).collect();
        let laws = rows().map(|row| self.laws[row].clone()).collect();
        Ok(Self { tree, siblings: self.siblings, laws, draws })
    }

    /// The tree.
    pub fn tree(&self) -> &TokenTree {
        &self.tree
    }

    /// How siblings were drawn.
    pub fn siblings(&self) -> Siblings {
        self.siblings
    }

    /// The law of the children of a row; `None` for a row that does not exist.
    pub fn law(&self, row: usize) -> Option<&Law> {
        self.laws.get(row)
    }

    /// The children of a row in the order in which they were drawn; none for a row that does not
    /// exist.
    pub fn draws(&self, row: usize) -> &[usize] {
        self.draws.get(row).map_or(&[], Vec::as_slice)
    }
}
