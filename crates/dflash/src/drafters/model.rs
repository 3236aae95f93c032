//! Drafts of a smaller model.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use kvcache::{Cache, Rows, SeqId};
use ndarray::{Array2, ArrayView1, ArrayView2, Axis};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use softmax_topk::{Options as TopKOptions, softmax_topk};

use super::{Draft, Drafter};
use crate::best_first::Candidate;
use crate::error::invalid;
use crate::{
    BoxError, DrawnTree, Error, Law, Pass, Random, Sampling, ScoredTree, Siblings, Target,
    TokenTree, best_first_by,
};

/// What a [`ModelDrafter`] proposes.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelDrafts {
    /// The likeliest paths. Level by level the `width` likeliest nodes are given `width` children
    /// each, and of all nodes the budget's number of likeliest ones is kept (Li et al., 2024,
    /// EAGLE-2, sections 4.1 and 4.2). One pass of the model a level.
    Best {
        /// Nodes that are continued on each level, and children of each; at least 1, or drafting fails.
        width: usize,
        /// Levels; at least 1, or drafting fails.
        depth: usize,
    },
    /// Random paths for speculative sampling; see [`DrawnTree::draw`]. One pass a node that is
    /// continued. Each sequence has a generator of its own, from the seed and its number.
    Drawn {
        /// Children drawn for each node, by depth.
        widths: Vec<usize>,
        /// How they are drawn.
        siblings: Siblings,
        /// The law they are drawn from.
        sampling: Sampling,
        /// Seed of the draws, which must not be the target's.
        seed: u64,
    },
}

/// A smaller model with the target's vocabulary, which keeps a cache of its own.
#[derive(Debug)]
pub struct ModelDrafter<M> {
    runner: Runner<M>,
    drafts: ModelDrafts,
    /// The generator of each sequence.
    randoms: HashMap<usize, Random<ChaCha8Rng>>,
    /// The cached tokens of each sequence.
    texts: HashMap<usize, (SeqId, Vec<u32>)>,
}

impl<M: Target> ModelDrafter<M> {
    /// From a model and an empty cache of its shape.
    pub fn new(model: M, cache: Cache, drafts: ModelDrafts) -> Self {
        let runner = Runner { model, cache };
        Self { runner, drafts, randoms: HashMap::new(), texts: HashMap::new() }
    }

    /// The cache; between drafts it holds, for each sequence, the text without its last token.
    pub fn cache(&self) -> &Cache {
        &self.runner.cache
    }

    /// Brings the cache to `text` without its last token. On an error the sequence stays, with what it holds.
    fn catch_up(&mut self, sequence: usize, text: &[u32]) -> Result<SeqId, Error> {
        let Self { runner, texts, .. } = self;
        let (seq, cached) = match texts.entry(sequence) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert((runner.cache.create()?, Vec::new())),
        };
        let known = &text[..text.len() - 1];
        let common = cached.iter().zip(known).take_while(|(a, b)| a == b).count();
        let common = runner.shorten(*seq, common)?;
        cached.truncate(common);
        if common < known.len() {
            let pass = Pass {
                seq: *seq,
                tokens: known[common..].to_vec(),
                positions: (common..known.len()).collect(),
                rows: Rows::Last(known.len() - common),
            };
            runner.run(&pass, common, None)?;
            cached.extend(&known[common..]);
        }
        Ok(*seq)
    }
}

/// A model and its cache.
#[derive(Debug)]
struct Runner<M> {
    model: M,
    cache: Cache,
}

impl<M: Target> Runner<M> {
    /// Shortens a sequence to `len` rows, or to none where a quantised cache or a window keeps it from going back
    /// there; returns how many it has.
    fn shorten(&mut self, seq: SeqId, len: usize) -> Result<usize, Error> {
        match self.cache.truncate(seq, len) {
            Err(kvcache::Error::Irreversible { .. }) => {
                self.cache.truncate(seq, 0)?;
                Ok(0)
            }
            shortened => Ok(shortened.map(|()| len)?),
        }
    }

    /// Logits after the last token and after each node; the cache stays as it was.
    fn logits(&mut self, seq: SeqId, last: u32, tree: &TokenTree) -> Result<Array2<f32>, Error> {
        let base = self.cache.len(seq)?;
        let parents = tree.pass_parents();
        let pass = Pass::of_tree(seq, base, last, tree, &parents);
        let mut logits = tensor_utils::try_array("logits", (tree.rows(), self.model.vocabulary()))?;
        self.run(&pass, base, Some(&mut logits))?;
        self.cache.truncate(seq, base)?;
        Ok(logits)
    }

    fn run(
        &mut self,
        pass: &Pass<'_>,
        base: usize,
        logits: Option<&mut Array2<f32>>,
    ) -> Result<(), Error> {
        let logits = logits.map(|logits| logits.view_mut());
        let batch = std::slice::from_ref(pass);
        self.model.forward(&mut self.cache, batch, logits).map_err(|source| {
            // The model's error is the one to report.
            let _ = self.cache.truncate(pass.seq, base);
            Error::Callback { who: "drafter's model", source }
        })
    }

    /// Grows a tree level by level and keeps the best part.
    fn best(
        &mut self,
        (seq, last): (SeqId, u32),
        (width, depth): (usize, usize),
        budget: usize,
    ) -> Result<ScoredTree, Error> {
        let mut tree = TokenTree::empty();
        // The children of each path that was continued.
        let mut lists: HashMap<Vec<u32>, Vec<Candidate>> = HashMap::new();
        // Of the newest level: path, score, row.
        let mut level = vec![(Vec::new(), 0.0, 0)];
        for _ in 0..depth {
            let logits = self.logits(seq, last, &tree)?;
            let (mut tokens, mut parents) = (tree.tokens().to_vec(), tree.parents().to_vec());
            let mut next: Vec<(Vec<u32>, f64, usize)> = Vec::new();
            for (path, score, row) in level {
                let list = top_log_probabilities(logits.row(row), width)?;
                for &(token, log_probability) in &list {
                    let longer = path.iter().copied().chain([token]).collect();
                    next.push((longer, score + log_probability, row));
                }
                lists.insert(path, list);
            }
            // Stable, so that ties stay in order.
            next.sort_by(|a, b| b.1.total_cmp(&a.1));
            next.truncate(width);
            for (path, _, row) in &mut next {
                tokens.push(*path.last().unwrap_or(&0));
                parents.push(*row as i64 - 1);
                *row = tokens.len();
            }
            tree = TokenTree::new(&tokens, &parents)?;
            level = next;
        }
        let children = |path: &[u32]| Ok(lists.get(path).cloned().unwrap_or_default());
        best_first_by(budget, children)
    }
}

impl<M: Target> Drafter for ModelDrafter<M> {
    fn draft(&mut self, sequence: usize, text: &[u32], budget: usize) -> Result<Draft, BoxError> {
        let Some(&last) = text.last() else { return Ok(Draft::Tree(TokenTree::empty())) };
        let seq = self.catch_up(sequence, text)?;
        let Self { runner, drafts, randoms, .. } = self;
        match drafts {
            ModelDrafts::Best { width: 0, .. } => Err(invalid("width", "at least 1", 0).into()),
            ModelDrafts::Best { depth: 0, .. } => Err(invalid("depth", "at least 1", 0).into()),
            ModelDrafts::Best { width, depth } => {
                Ok(Draft::Scored(runner.best((seq, last), (*width, *depth), budget)?))
            }
            ModelDrafts::Drawn { widths, siblings, sampling, seed } => {
                let random = randoms.entry(sequence).or_insert_with(|| {
                    let mut rng = ChaCha8Rng::seed_from_u64(*seed);
                    rng.set_stream(sequence as u64);
                    Random(rng)
                });
                let law = |path: &[u32]| {
                    let logits = runner.logits(seq, last, &TokenTree::chain(path)?)?;
                    Law::from_logits(logits.row(path.len()), path.len(), sampling)
                };
                Ok(Draft::Drawn(DrawnTree::draw(widths, *siblings, budget, law, random)?))
            }
        }
    }

    fn finish(&mut self, sequence: usize) {
        self.randoms.remove(&sequence);
        if let Some((seq, _)) = self.texts.remove(&sequence) {
            // It exists: only this drafter has its handle.
            let _ = self.runner.cache.free(seq);
        }
    }
}

/// The `k` likeliest tokens, or all, with their log-probabilities.
fn top_log_probabilities(row: ArrayView1<'_, f32>, k: usize) -> Result<Vec<Candidate>, Error> {
    let options = TopKOptions { log: true, ..TopKOptions::default() };
    let matrix: ArrayView2<'_, f32> = row.insert_axis(Axis(0));
    let top = softmax_topk(matrix, k.min(matrix.ncols()), &options)?;
    let pairs = top.indices.iter().zip(&top.probs);
    // Rounding can bring the logarithm of a probability of 1 above 0.
    Ok(pairs.map(|(&token, &p)| (token, f64::from(p).min(0.0))).collect())
}
