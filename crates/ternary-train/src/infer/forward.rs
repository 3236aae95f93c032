//! One step of a model.

use kvcache::{Cache, Queries, SeqId};
use layernorm_bwd::{Kind, Options, Workspace, layer_norm_in_place, layer_norm_into};
use ndarray::{Array1, Array2, Array3, ArrayView2, ArrayView3, Axis};
use rayon::prelude::*;
use tensor_utils::try_array;

use super::matrix::products;
use super::model::{Layer, Order};
use super::{Chunk, LogitRows, Model, llama_cpp};
use crate::Error;
use crate::ops::{Direction, Rope, rotate, slice, slice_mut};

/// Elements of a feed-forward layer that are worth another thread.
const GRAIN: usize = 1 << 14;

impl Model {
    /// Reads the tokens of `chunks`, whose keys and values are appended to the cache, and returns the
    /// logits of what follows.
    ///
    /// A prompt is one long chunk or several, a decoding step one token of each sequence, and a tree of
    /// drafted tokens a chunk with parents. The logits of a sequence have the same bits whatever else
    /// is in the call, however its tokens were cut into chunks (but for
    /// [`like_llama_cpp`](Self::like_llama_cpp)), and on any number of threads.
    ///
    /// # Errors
    /// [`Error::Option`] for a token outside the vocabulary, an empty chunk or parents that make no
    /// tree; [`Error::Cache`] if the cache is full, was made for another model, or a sequence does not
    /// exist or occurs twice; errors of the instruction set and of memory. The cache is as before then.
    pub fn forward(
        &self,
        cache: &mut Cache,
        chunks: &[Chunk<'_>],
        rows: LogitRows,
    ) -> Result<Array2<f32>, Error> {
        // A step is some 200 parallel regions, short ones with packed weights. Entered from a thread
        // outside the pool each would put that thread to sleep and wake it again.
        rayon::scope(|_| self.step(cache, chunks, rows))
    }

    fn step(
        &self,
        cache: &mut Cache,
        chunks: &[Chunk<'_>],
        rows: LogitRows,
    ) -> Result<Array2<f32>, Error> {
        let mut step = Step::new(self, cache, chunks)?;
        let seqs = step.seqs.clone();
        let lengths: Vec<_> = seqs.iter().map(|&seq| cache.len(seq)).collect::<Result<_, _>>()?;
        let result = self.layers.iter().enumerate().try_for_each(|(index, layer)| {
            step.attention(cache, index, layer)?;
            if index + 1 == self.layers.len() {
                // What follows is for the logits alone.
                step.select(rows);
            }
            step.feed_forward(layer)
        });
        let result = result.and_then(|()| step.logits());
        if result.is_err() {
            // Some layers have the new rows, or all, and they are not to count.
            for (&seq, &length) in seqs.iter().zip(&lengths) {
                cache.truncate(seq, length)?;
            }
        }
        result
    }
}

/// The state of a step: the residual stream and where its rows belong.
struct Step<'a> {
    model: &'a Model,
    chunks: &'a [Chunk<'a>],
    queries: Vec<Queries<'a>>,
    seqs: Vec<SeqId>,
    counts: Vec<usize>,
    /// Of the position of each token.
    rope: Rope<f32>,
    /// `[tokens, hidden_size]`.
    x: Array2<f32>,
}

impl<'a> Step<'a> {
    fn new(model: &'a Model, cache: &Cache, chunks: &'a [Chunk<'a>]) -> Result<Self, Error> {
        let config = &model.config;
        let mut positions = Vec::new();
        let mut tokens: Vec<u32> = Vec::new();
        for chunk in chunks {
            chunk.check(config)?;
            positions.extend(chunk.positions(cache)?);
            tokens.extend(chunk.tokens);
        }
        let mut x = try_array("x", (tokens.len(), config.hidden_size))?;
        for (row, &token) in x.outer_iter_mut().zip(&tokens) {
            model.embedding.row_into(slice_mut("x", row)?, token as usize)?;
        }
        Ok(Self {
            model,
            chunks,
            queries: chunks.iter().map(Chunk::queries).collect(),
            seqs: chunks.iter().map(|chunk| chunk.seq).collect(),
            counts: chunks.iter().map(|chunk| chunk.tokens.len()).collect(),
            rope: match model.order {
                Order::Own => Rope::at(config.head_dim, config.rope_theta, positions),
                Order::LlamaCpp => llama_cpp::rope(config.head_dim, config.rope_theta, &positions),
            },
            x,
        })
    }

    fn attention(&mut self, cache: &mut Cache, index: usize, layer: &Layer) -> Result<(), Error> {
        let config = &self.model.config;
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (tokens, head_dim) = (self.x.nrows(), config.head_dim);
        let h = self.norm(self.x.view(), &layer.attention_norm)?;
        let [mut q, mut k, v] = products([&layer.q, &layer.k, &layer.v], h.view())?;
        self.turn(&mut q, heads, &layer.q_norm)?;
        self.turn(&mut k, key_heads, &layer.k_norm)?;
        let q = q.into_shape_with_order((tokens, heads, head_dim)).map_err(|_| unfit("q"))?;
        let k = k.into_shape_with_order((tokens, key_heads, head_dim)).map_err(|_| unfit("k"))?;
        let v = v.into_shape_with_order((tokens, key_heads, head_dim)).map_err(|_| unfit("v"))?;
        cache.append_batch(index, &self.seqs, &self.counts, k.view(), v.view())?;
        let o = self.attend(cache, index, q.view())?;
        let o = o.into_shape_with_order((tokens, heads * head_dim)).map_err(|_| unfit("o"))?;
        self.x += &layer.o.product(o.view())?;
        Ok(())
    }

    /// Normalises and rotates the heads of queries or keys.
    fn turn(&self, x: &mut Array2<f32>, heads: usize, norm: &Array1<f32>) -> Result<(), Error> {
        let (config, tokens) = (&self.model.config, x.nrows());
        let head_dim = config.head_dim;
        if self.model.order == Order::LlamaCpp {
            let x = slice_mut("x", x.view_mut())?;
            llama_cpp::rms_norm(x, slice("norm", norm.view())?, config.rms_norm_eps);
            llama_cpp::rotate(x, heads * head_dim, head_dim, &self.rope);
            return Ok(());
        }
        let rows = x.view_mut().into_shape_with_order((tokens * heads, head_dim));
        let rows = rows.map_err(|_| unfit("x"))?;
        let workspace = &mut Workspace::new(tokens * heads, head_dim, &Default::default())?;
        layer_norm_in_place(rows, None, &self.norm_options(norm), workspace)?;
        let x = slice_mut("x", x.view_mut())?;
        Ok(rotate(x, heads, head_dim, tokens, &self.rope, Direction::Forward)?)
    }

    fn attend(
        &self,
        cache: &mut Cache,
        index: usize,
        q: ArrayView3<'_, f32>,
    ) -> Result<Array3<f32>, Error> {
        if self.model.order == Order::Own {
            return Ok(cache.attend(index, q, &self.queries, &kvcache::Options::default())?.o);
        }
        let mut o = try_array("o", q.dim())?;
        let (mut q, mut o_left) = (q, o.view_mut());
        for chunk in self.chunks {
            let len = cache.layer_len(index, chunk.seq)?;
            let base = len - chunk.tokens.len();
            let (q_rows, q_rest) = q.split_at(Axis(0), chunk.tokens.len());
            let (o_rows, o_rest) = o_left.split_at(Axis(0), chunk.tokens.len());
            let rows = cache.read(index, chunk.seq, 0, len)?;
            llama_cpp::attention_into(o_rows, q_rows, rows, |row, key| chunk.sees(base, row, key))?;
            (q, o_left) = (q_rest, o_rest);
        }
        Ok(o)
    }

    fn feed_forward(&mut self, layer: &Layer) -> Result<(), Error> {
        if self.x.is_empty() {
            return Ok(());
        }
        let h = self.norm(self.x.view(), &layer.feed_forward_norm)?;
        let [mut gate, up] = products([&layer.gate, &layer.up], h.view())?;
        let swiglu = match self.model.order {
            Order::Own => swiglu,
            Order::LlamaCpp => llama_cpp::swiglu,
        };
        let gate_row = slice_mut("gate", gate.view_mut())?;
        let parts = gate_row.par_chunks_mut(GRAIN).zip(slice("up", up.view())?.par_chunks(GRAIN));
        parts.for_each(|(gate, up)| swiglu(gate, up));
        self.x += &layer.down.product(gate.view())?;
        Ok(())
    }

    /// Keeps the rows of the residual stream that get logits.
    fn select(&mut self, rows: LogitRows) {
        let ends = self.counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end - 1)
        });
        self.x = match rows {
            LogitRows::All => return,
            LogitRows::Last => self.x.select(Axis(0), &ends.collect::<Vec<_>>()),
            LogitRows::None => Array2::zeros((0, self.x.ncols())),
        };
    }

    fn logits(self) -> Result<Array2<f32>, Error> {
        if self.x.is_empty() {
            return Ok(Array2::zeros((0, self.model.config.vocab_size)));
        }
        let h = self.norm(self.x.view(), &self.model.norm)?;
        self.model.head().product(h.view())
    }

    fn norm(&self, x: ArrayView2<'_, f32>, gamma: &Array1<f32>) -> Result<Array2<f32>, Error> {
        let (rows, columns) = x.dim();
        if self.model.order == Order::LlamaCpp {
            let (mut y, gamma) = (x.to_owned(), slice("norm", gamma.view())?);
            let eps = self.model.config.rms_norm_eps;
            llama_cpp::rms_norm(slice_mut("y", y.view_mut())?, gamma, eps);
            return Ok(y);
        }
        let mut y = try_array("y", (rows, columns))?;
        let workspace = &mut Workspace::new(rows, columns, &Default::default())?;
        layer_norm_into(y.view_mut(), None, x, &self.norm_options(gamma), workspace)?;
        Ok(y)
    }

    fn norm_options<'g>(&self, gamma: &'g Array1<f32>) -> Options<'g, f32> {
        Options {
            kind: Kind::RmsNorm,
            eps: self.model.config.rms_norm_eps,
            gamma: Some(gamma.view()),
            ..Options::default()
        }
    }
}

/// `gate = silu(gate) * up`.
fn swiglu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + (-*gate).exp()) * up;
    }
}

/// A result of another size than its inputs imply.
fn unfit(arg: &'static str) -> Error {
    Error::option(arg, "rows of whole heads", "another size")
}
