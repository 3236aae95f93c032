//! One step of a model.

use kvcache::{Cache, Queries, SeqId};
use layernorm_bwd::{Kind, Options, Workspace, layer_norm_in_place, layer_norm_into};
use ndarray::{Array1, Array2, ArrayView2, Axis};
use rayon::prelude::*;
use tensor_utils::try_array;

use super::matrix::products;
use super::model::Layer;
use super::{Chunk, LogitRows, Model};
use crate::Error;
use crate::ops::{Direction, Rope, rotate};

/// Elements of a feed-forward layer that are worth another thread.
const GRAIN: usize = 1 << 14;

impl Model {
    /// Reads the tokens of `chunks`, whose keys and values are appended to the cache, and returns the
    /// logits of what follows.
    ///
    /// A prompt is one long chunk or several, a decoding step one token of each sequence, and a tree of
    /// drafted tokens a chunk with parents. The logits of a sequence have the same bits whatever else
    /// is in the call, however its tokens were cut into chunks, and on any number of threads.
    ///
    /// # Errors
    /// [`Error::Option`] for a token outside the vocabulary, an empty chunk or parents that make no
    /// tree; [`Error::Cache`] if the cache is full, was made for another model, or a sequence does not
    /// exist or occurs twice. The cache is as before then.
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
        let lengths: Vec<_> =
            step.seqs.iter().map(|&seq| cache.len(seq)).collect::<Result<_, _>>()?;
        let result = self.layers.iter().enumerate().try_for_each(|(index, layer)| {
            step.attention(cache, index, layer)?;
            step.feed_forward(layer)
        });
        if let Err(error) = result {
            // Some layers have the new rows and some do not.
            for (&seq, &length) in step.seqs.iter().zip(&lengths) {
                cache.truncate(seq, length)?;
            }
            return Err(error);
        }
        step.logits(rows)
    }
}

/// The state of a step: the residual stream and where its rows belong.
struct Step<'a> {
    model: &'a Model,
    queries: Vec<Queries<'a>>,
    seqs: Vec<SeqId>,
    counts: Vec<usize>,
    rope: Rope<f32>,
    /// `[tokens, hidden_size]`.
    x: Array2<f32>,
}

impl<'a> Step<'a> {
    fn new(model: &'a Model, cache: &Cache, chunks: &[Chunk<'a>]) -> Result<Self, Error> {
        let config = &model.config;
        let mut positions = Vec::new();
        let mut tokens: Vec<u32> = Vec::new();
        for chunk in chunks {
            chunk.check(config)?;
            positions.extend(chunk.positions(cache)?);
            tokens.extend(chunk.tokens);
        }
        let mut x = try_array("x", (tokens.len(), config.hidden_size))?;
        for (mut row, &token) in x.outer_iter_mut().zip(&tokens) {
            let row = row.as_slice_mut().unwrap_or_default();
            model.embedding.row_into(row, token as usize)?;
        }
        Ok(Self {
            model,
            queries: chunks.iter().map(Chunk::queries).collect(),
            seqs: chunks.iter().map(|chunk| chunk.seq).collect(),
            counts: chunks.iter().map(|chunk| chunk.tokens.len()).collect(),
            rope: Rope::at(config.head_dim, config.rope_theta, positions),
            x,
        })
    }

    fn attention(&mut self, cache: &mut Cache, index: usize, layer: &Layer) -> Result<(), Error> {
        let config = &self.model.config;
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (tokens, head_dim) = (self.x.nrows(), config.head_dim);
        let h = self.norm(self.x.view(), &layer.attention_norm)?;
        let [mut q, mut k, v] = products([&layer.q, &layer.k, &layer.v], h.view())?;
        for (x, heads, norm) in [(&mut q, heads, &layer.q_norm), (&mut k, key_heads, &layer.k_norm)]
        {
            let rows = x.view_mut().into_shape_with_order((tokens * heads, head_dim));
            let rows = rows.map_err(|_| unfit("x"))?;
            let options = self.norm_options(norm);
            let workspace = &mut Workspace::new(tokens * heads, head_dim, &Default::default())?;
            layer_norm_in_place(rows, None, &options, workspace)?;
            let x = x.as_slice_mut().unwrap_or_default();
            rotate(x, heads, head_dim, tokens, &self.rope, Direction::Forward)?;
        }
        let q = q.into_shape_with_order((tokens, heads, head_dim)).map_err(|_| unfit("q"))?;
        let k = k.into_shape_with_order((tokens, key_heads, head_dim)).map_err(|_| unfit("k"))?;
        let v = v.into_shape_with_order((tokens, key_heads, head_dim)).map_err(|_| unfit("v"))?;
        cache.append_batch(index, &self.seqs, &self.counts, k.view(), v.view())?;
        let o = cache.attend(index, q.view(), &self.queries, &kvcache::Options::default())?.o;
        let o = o.into_shape_with_order((tokens, heads * head_dim)).map_err(|_| unfit("o"))?;
        self.x += &layer.o.product(o.view())?;
        Ok(())
    }

    fn feed_forward(&mut self, layer: &Layer) -> Result<(), Error> {
        let h = self.norm(self.x.view(), &layer.feed_forward_norm)?;
        let [mut gate, up] = products([&layer.gate, &layer.up], h.view())?;
        let (gate_row, up_row) = (gate.as_slice_mut().unwrap_or_default(), up.as_slice());
        let parts =
            gate_row.par_chunks_mut(GRAIN).zip(up_row.unwrap_or_default().par_chunks(GRAIN));
        parts.for_each(|(gate, up)| {
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = *gate / (1.0 + (-*gate).exp()) * up;
            }
        });
        self.x += &layer.down.product(gate.view())?;
        Ok(())
    }

    fn logits(self, rows: LogitRows) -> Result<Array2<f32>, Error> {
        let x = match rows {
            LogitRows::None => return Ok(try_array("logits", (0, self.model.config.vocab_size))?),
            LogitRows::All => self.x.view().into_owned(),
            LogitRows::Last => {
                let ends = self.counts.iter().scan(0, |end, count| {
                    *end += count;
                    Some(*end - 1)
                });
                self.x.select(Axis(0), &ends.collect::<Vec<_>>())
            }
        };
        let h = self.norm(x.view(), &self.model.norm)?;
        self.model.head().product(h.view())
    }

    fn norm(&self, x: ArrayView2<'_, f32>, gamma: &Array1<f32>) -> Result<Array2<f32>, Error> {
        let (rows, columns) = x.dim();
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

/// A result of another size than its inputs imply.
fn unfit(arg: &'static str) -> Error {
    Error::option(arg, "rows of whole heads", "another size")
}
