//! A model that is ready to run.

use kvcache::{Cache, Layout};
use ndarray::{Array1, Array2};
use rayon::prelude::*;

use super::{Matrix, llama_cpp};
use crate::formats::check_blocks;
use crate::{Config, Error, PackedMatrix, Ternary, Weights};

/// A Qwen3 model for inference.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub(super) config: Config,
    pub(super) order: Order,
    pub(super) embedding: Matrix,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Array1<f32>,
    /// `None`: the embedding.
    pub(super) head: Option<Matrix>,
}

/// The order in which a step adds and rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Of this workspace's kernels.
    Own,
    /// Of llama.cpp's.
    LlamaCpp,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Layer {
    pub(super) attention_norm: Array1<f32>,
    pub(super) q: Matrix,
    pub(super) k: Matrix,
    pub(super) v: Matrix,
    pub(super) o: Matrix,
    pub(super) q_norm: Array1<f32>,
    pub(super) k_norm: Array1<f32>,
    pub(super) feed_forward_norm: Array1<f32>,
    pub(super) gate: Matrix,
    pub(super) up: Matrix,
    pub(super) down: Matrix,
}

impl Model {
    /// A model that computes in f32 throughout.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Shape`] if the weights are not those of the configuration.
    pub fn float(config: Config, weights: Weights) -> Result<Self, Error> {
        weights.check(&config)?;
        Self::build(config, weights, |w| Ok(Matrix::Float(w.as_standard_layout().into_owned())))
    }

    /// A model that computes what llama.cpp computes with the file that
    /// [`write_gguf`](crate::formats::write_gguf) writes, in its order of operations: to check an
    /// exported file with. Slow, since it is plain loops.
    ///
    /// With ternary weights activations are rounded to int8 in blocks of 32. The logits have
    /// llama.cpp's bits where it runs with AVX-512, keys and values in f32 and no flash attention, for
    /// one sequence whose prompt is one chunk and whose other tokens are chunks of one. Elsewhere, in
    /// other chunks and with trees they differ by the rounding of f32, and by that of 8 bits where a
    /// number lies at the edge between two integers.
    ///
    /// # Errors
    /// As [`float`](Self::float). If the weights are ternary, as [`packed`](Self::packed), and
    /// [`Error::Config`] if blocks of 64 do not divide the group size and the columns of every matrix:
    /// such a model has no file.
    pub fn like_llama_cpp(config: Config, weights: Weights) -> Result<Self, Error> {
        weights.check(&config)?;
        let projection = config.ternary;
        if let Some(projection) = projection {
            for named in weights.matrices() {
                check_blocks(&named.name, named.weight.ncols(), projection.group)?;
            }
        }
        let model = Self::build(config, weights, |w| {
            Ok(Matrix::LlamaCpp(match projection {
                Some(projection) => {
                    llama_cpp::Weights::Ternary(Ternary::of_ternary(&w, projection.group)?)
                }
                None => llama_cpp::Weights::Float(w.as_standard_layout().into_owned()),
            }))
        })?;
        Ok(Self { order: Order::LlamaCpp, ..model })
    }

    /// A model whose matrices are packed: 2 bits a weight, activations in int8 per token. The weights
    /// have to be ternary already ([`Weights::project`] makes them so), and nothing of them is lost.
    ///
    /// # Errors
    /// As [`float`](Self::float); [`Error::Config`] if the configuration does not say how the weights
    /// were made ternary, [`Error::Group`] if they are not.
    pub fn packed(config: Config, weights: Weights) -> Result<Self, Error> {
        weights.check(&config)?;
        let Some(projection) = config.ternary else {
            let what = "the matrices are float (there is no `ternary`); project them first";
            return Err(Error::Config(what.to_owned()));
        };
        Self::build(config, weights, |w| {
            Ok(Matrix::Packed(PackedMatrix::new(&Ternary::of_ternary(&w, projection.group)?)?))
        })
    }

    fn build(
        config: Config,
        weights: Weights,
        matrix: impl Fn(Array2<f32>) -> Result<Matrix, Error> + Sync,
    ) -> Result<Self, Error> {
        let matrix =
            |w, name: &str| matrix(w).map_err(|error| error.in_matrix(&format!("{name}.weight")));
        let layers = weights.layers.into_par_iter().enumerate().map(|(index, layer)| {
            let matrix = |w, name| matrix(w, &format!("model.layers.{index}.{name}_proj"));
            Ok(Layer {
                attention_norm: layer.attention_norm,
                q: matrix(layer.q, "self_attn.q")?,
                k: matrix(layer.k, "self_attn.k")?,
                v: matrix(layer.v, "self_attn.v")?,
                o: matrix(layer.o, "self_attn.o")?,
                q_norm: layer.q_norm,
                k_norm: layer.k_norm,
                feed_forward_norm: layer.feed_forward_norm,
                gate: matrix(layer.gate, "mlp.gate")?,
                up: matrix(layer.up, "mlp.up")?,
                down: matrix(layer.down, "mlp.down")?,
            })
        });
        Ok(Self {
            embedding: matrix(weights.embedding, "model.embed_tokens")?,
            layers: layers.collect::<Result<_, Error>>()?,
            norm: weights.norm,
            head: weights.head.map(|w| matrix(w, "lm_head")).transpose()?,
            order: Order::Own,
            config,
        })
    }

    /// The shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Bytes of all matrices.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| {
            [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down]
        });
        let tables = [Some(&self.embedding), self.head.as_ref()];
        layers.chain(tables.into_iter().flatten()).map(Matrix::bytes).sum()
    }

    /// An empty cache for this model with room for `rows` tokens of all sequences together, in pages
    /// of 64, in f32.
    ///
    /// # Errors
    /// [`Error::Cache`] if there is no memory.
    pub fn cache(&self, rows: usize) -> Result<Cache, Error> {
        let config = self.cache_config();
        let layout = Layout::Paged { pages: rows.div_ceil(config.page_size) };
        Ok(Cache::new(&config.with_layout(layout))?)
    }

    /// The configuration that a cache for this model starts from.
    pub fn cache_config(&self) -> kvcache::Config {
        let config = &self.config;
        kvcache::Config::new(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    }

    pub(super) fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}
