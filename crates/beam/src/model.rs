//! The model that is searched: a trait, the beams it is asked about, and the simplest one.

use ndarray::{Array2, ArrayView2, Axis};
use softmax_topk::Logit;
use tensor_utils::try_array;

use crate::Error;
use crate::error::{ModelError, invalid};
use crate::history::{History, NodeId};
use crate::options::check_tokens;

/// A model of the next token.
///
/// The search calls [`score`](Model::score) and [`keep`](Model::keep) in turns. A model that recomputes
/// everything from the tokens needs `score` alone; one with a cache appends each beam's last token to
/// that beam's cache in `score`, and rearranges its caches in `keep`.
pub trait Model {
    /// The type of its logits; 16-bit logits are compared and summed in wider types.
    type Element: Logit;

    /// How many tokens there are, `V`.
    fn vocabulary(&self) -> usize;

    /// The logits of the token after each beam, `[beams.len(), V]`; one call for all live beams of all
    /// prompts. Any strides; fast when the last axis is contiguous.
    ///
    /// The first call has one beam for each prompt, in order, with nothing generated yet: the prompts are
    /// to be read. In every other call each beam has one token more than its parent had in the call before.
    ///
    /// -inf is a token that cannot follow. NaN, +inf and a row of -inf alone end the search with an error.
    ///
    /// # Errors
    /// Whatever goes wrong; it ends the search.
    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, Self::Element>, ModelError>;

    /// Which beams survive: row `i` of the next call continues row `parents[i]` of the last one.
    ///
    /// A row that occurs more than once is to be forked, one that does not occur is not needed any more.
    /// Rows of a prompt stay together and in order. Called after every `score`; at the end with nothing.
    ///
    /// # Errors
    /// Whatever goes wrong; it ends the search.
    fn keep(&mut self, parents: &[usize]) -> Result<(), ModelError> {
        let _ = parents;
        Ok(())
    }
}

/// The live beams of all prompts, a row each; prompts in order, the better beams of a prompt first.
#[derive(Debug, Clone, Copy)]
pub struct Beams<'a> {
    pub(crate) rows: &'a [Row],
    pub(crate) prompts: &'a [Vec<u32>],
    pub(crate) histories: &'a [History],
}

/// A row of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row {
    pub(crate) item: usize,
    pub(crate) node: NodeId,
    pub(crate) length: usize,
}

impl<'a> Beams<'a> {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The index of the prompt that row `row` belongs to.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn item(&self, row: usize) -> usize {
        self.rows[row].item
    }

    /// The prompt of row `row`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn prompt(&self, row: usize) -> &'a [u32] {
        &self.prompts[self.rows[row].item]
    }

    /// How many tokens row `row` has generated.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn generated_len(&self, row: usize) -> usize {
        self.rows[row].length
    }

    /// The last token of row `row`: of the prompt, if nothing was generated yet.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn last_token(&self, row: usize) -> u32 {
        let Row { item, node, .. } = self.rows[row];
        let of_prompt = || self.prompts[item].last().copied().unwrap_or_default();
        self.histories[item].last_token(node).unwrap_or_else(of_prompt)
    }

    /// The tokens that row `row` has generated.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn generated(&self, row: usize) -> Vec<u32> {
        let mut tokens = Vec::new();
        self.histories[self.rows[row].item].tokens_into(self.rows[row].node, &mut tokens);
        tokens
    }

    /// Prompt and generated tokens of row `row`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn sequence(&self, row: usize) -> Vec<u32> {
        [self.prompt(row), &self.generated(row)].concat()
    }
}

/// A model whose logits depend on the last token alone: row `t` of a table follows token `t`.
///
/// For tests, and to see what a search does.
#[derive(Debug, Clone)]
pub struct Bigram<T> {
    table: Array2<T>,
    logits: Array2<T>,
}

impl<T: Logit> Bigram<T> {
    /// A model with `table` `[V, V]`.
    ///
    /// # Errors
    /// [`Error::Option`] if the table is not square.
    pub fn new(table: Array2<T>) -> Result<Self, Error> {
        let (rows, columns) = table.dim();
        if rows != columns {
            let got = format!("[{rows}, {columns}]");
            return Err(invalid("table", "as many rows as columns", got));
        }
        Ok(Self { table, logits: Array2::default((0, columns)) })
    }
}

impl<T: Logit> Model for Bigram<T> {
    type Element = T;

    fn vocabulary(&self) -> usize {
        self.table.ncols()
    }

    fn score(&mut self, beams: &Beams<'_>) -> Result<ArrayView2<'_, T>, ModelError> {
        let vocabulary = self.vocabulary();
        if self.logits.nrows() < beams.len() {
            self.logits = try_array("logits", (beams.len(), vocabulary))?;
        }
        let (mut logits, _) = self.logits.view_mut().split_at(Axis(0), beams.len());
        for (row, mut logits) in logits.outer_iter_mut().enumerate() {
            let last = beams.last_token(row);
            check_tokens("prompts", &[last], vocabulary)?;
            logits.assign(&self.table.row(last as usize));
        }
        Ok(self.logits.view().split_at(Axis(0), beams.len()).0)
    }
}
