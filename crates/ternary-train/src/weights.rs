//! The named weights of a model, in `f32`.

use ndarray::{Array1, Array2};
use rand::rngs::ChaCha8Rng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Normal};
use tensor_utils::{check_shape, try_array};

use crate::{Config, Counts, Error, Projection};

/// All weights of a Qwen3 model. Gradients and the states of an optimizer have the same shape.
///
/// Matrices are `[out, in]`: a layer computes `y = x W^T`.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// `[vocab_size, hidden_size]`: a row a token.
    pub embedding: Array2<f32>,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// `[hidden_size]`: the norm before the head.
    pub norm: Array1<f32>,
    /// `[vocab_size, hidden_size]`; `None`: the head is the embedding.
    pub head: Option<Array2<f32>>,
}

/// The weights of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerWeights {
    /// `[hidden_size]`: the norm before attention.
    pub attention_norm: Array1<f32>,
    /// `[query_size, hidden_size]`.
    pub q: Array2<f32>,
    /// `[key_value_size, hidden_size]`.
    pub k: Array2<f32>,
    /// `[key_value_size, hidden_size]`.
    pub v: Array2<f32>,
    /// `[hidden_size, query_size]`.
    pub o: Array2<f32>,
    /// `[head_dim]`: the norm of each query head.
    pub q_norm: Array1<f32>,
    /// `[head_dim]`: the norm of each key head.
    pub k_norm: Array1<f32>,
    /// `[hidden_size]`: the norm before the feed-forward layer.
    pub feed_forward_norm: Array1<f32>,
    /// `[intermediate_size, hidden_size]`.
    pub gate: Array2<f32>,
    /// `[intermediate_size, hidden_size]`.
    pub up: Array2<f32>,
    /// `[hidden_size, intermediate_size]`.
    pub down: Array2<f32>,
}

/// A weight with its name in the Hugging Face layout.
#[derive(Debug)]
pub struct Named<T> {
    /// Such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The weight.
    pub weight: T,
}

impl<T> Named<T> {
    fn new(name: impl Into<String>, weight: T) -> Self {
        Self { name: name.into(), weight }
    }
}

// The order of the two lists is part of the interface: optimizers and checkpoints walk them in step.
macro_rules! matrices {
    ($self:ident, $iter:ident, $some:ident, $($ref:tt)+) => {{
        let mut all = vec![Named::new("model.embed_tokens.weight", $($ref)+ $self.embedding)];
        for (index, layer) in $self.layers.$iter().enumerate() {
            let name = |part| format!("model.layers.{index}.{part}_proj.weight");
            all.push(Named::new(name("self_attn.q"), $($ref)+ layer.q));
            all.push(Named::new(name("self_attn.k"), $($ref)+ layer.k));
            all.push(Named::new(name("self_attn.v"), $($ref)+ layer.v));
            all.push(Named::new(name("self_attn.o"), $($ref)+ layer.o));
            all.push(Named::new(name("mlp.gate"), $($ref)+ layer.gate));
            all.push(Named::new(name("mlp.up"), $($ref)+ layer.up));
            all.push(Named::new(name("mlp.down"), $($ref)+ layer.down));
        }
        all.extend($self.head.$some().map(|head| Named::new("lm_head.weight", head)));
        all
    }};
}

macro_rules! norms {
    ($self:ident, $iter:ident, $($ref:tt)+) => {{
        let mut all = Vec::new();
        for (index, layer) in $self.layers.$iter().enumerate() {
            let name = |part| format!("model.layers.{index}.{part}norm.weight");
            all.push(Named::new(name("input_layer"), $($ref)+ layer.attention_norm));
            all.push(Named::new(name("self_attn.q_"), $($ref)+ layer.q_norm));
            all.push(Named::new(name("self_attn.k_"), $($ref)+ layer.k_norm));
            all.push(Named::new(name("post_attention_layer"), $($ref)+ layer.feed_forward_norm));
        }
        all.push(Named::new("model.norm.weight", $($ref)+ $self.norm));
        all
    }};
}

impl Weights {
    /// Weights of 0.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration makes no model, [`Error::Shape`] if there is no memory.
    pub fn zeros(config: &Config) -> Result<Self, Error> {
        config.check()?;
        let layer = || -> Result<LayerWeights, Error> {
            let (width, inside) = (config.hidden_size, config.intermediate_size);
            let (query, key_value) = (config.query_size(), config.key_value_size());
            Ok(LayerWeights {
                attention_norm: try_array("attention_norm", width)?,
                q: try_array("q", (query, width))?,
                k: try_array("k", (key_value, width))?,
                v: try_array("v", (key_value, width))?,
                o: try_array("o", (width, query))?,
                q_norm: try_array("q_norm", config.head_dim)?,
                k_norm: try_array("k_norm", config.head_dim)?,
                feed_forward_norm: try_array("feed_forward_norm", width)?,
                gate: try_array("gate", (inside, width))?,
                up: try_array("up", (inside, width))?,
                down: try_array("down", (width, inside))?,
            })
        };
        let table = |name| try_array(name, (config.vocab_size, config.hidden_size));
        Ok(Self {
            embedding: table("embedding")?,
            layers: (0..config.num_hidden_layers).map(|_| layer()).collect::<Result<_, _>>()?,
            norm: try_array("norm", config.hidden_size)?,
            head: if config.tie_word_embeddings { None } else { Some(table("head")?) },
        })
    }

    /// Weights to start training from: every matrix normal with deviation `1 / sqrt(fan in)`, where
    /// o and down, which add to the residual stream, are divided by `sqrt(2 layers)` more; norms 1.
    /// The fan in of the embedding is its width. The same seed gives the same bits.
    ///
    /// # Errors
    /// As [`zeros`](Self::zeros).
    pub fn random(config: &Config, seed: u64) -> Result<Self, Error> {
        let mut weights = Self::zeros(config)?;
        let residual = 1.0 / (2.0 * config.num_hidden_layers as f64).sqrt();
        let rng = &mut ChaCha8Rng::seed_from_u64(seed);
        fill_normal(&mut weights.embedding, 1.0, rng);
        for layer in &mut weights.layers {
            for matrix in [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.gate, &mut layer.up]
            {
                fill_normal(matrix, 1.0, rng);
            }
            fill_normal(&mut layer.o, residual, rng);
            fill_normal(&mut layer.down, residual, rng);
        }
        if let Some(head) = &mut weights.head {
            fill_normal(head, 1.0, rng);
        }
        for norm in weights.norms_mut() {
            norm.weight.fill(1.0);
        }
        Ok(weights)
    }

    /// All matrices: embedding, then q, k, v, o, gate, up and down of each layer, then the head if it
    /// is not tied. These are what becomes ternary.
    pub fn matrices(&self) -> Vec<Named<&Array2<f32>>> {
        matrices!(self, iter, as_ref, &)
    }

    /// [`matrices`](Self::matrices) to write to, in the same order.
    pub fn matrices_mut(&mut self) -> Vec<Named<&mut Array2<f32>>> {
        matrices!(self, iter_mut, as_mut, &mut)
    }

    /// All norms: those before attention, of q, of k and before the feed-forward of each layer, then
    /// the last.
    pub fn norms(&self) -> Vec<Named<&Array1<f32>>> {
        norms!(self, iter, &)
    }

    /// [`norms`](Self::norms) to write to, in the same order.
    pub fn norms_mut(&mut self) -> Vec<Named<&mut Array1<f32>>> {
        norms!(self, iter_mut, &mut)
    }

    /// Makes every matrix ternary, in place.
    ///
    /// # Errors
    /// As [`Projection::project_into`]; some matrices are projected then.
    pub fn project(&mut self, projection: Projection) -> Result<Counts, Error> {
        let mut counts = Counts::default();
        for Named { weight, name } in self.matrices_mut() {
            let latent = weight.clone();
            let own = projection.project_into(weight, &latent);
            counts = counts.and(own.map_err(|error| error.in_matrix(&name))?);
        }
        Ok(counts)
    }

    /// The matrix that makes logits of hidden states.
    pub fn head(&self) -> &Array2<f32> {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Checks every shape against a configuration.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration makes no model or has another number of layers,
    /// [`Error::Shape`] for a weight of the wrong shape.
    pub fn check(&self, config: &Config) -> Result<(), Error> {
        config.check()?;
        if self.layers.len() != config.num_hidden_layers {
            return Err(Error::Config(format!(
                "`num_hidden_layers` is {}, the weights have {} layers",
                config.num_hidden_layers,
                self.layers.len(),
            )));
        }
        if self.head.is_none() != config.tie_word_embeddings {
            return Err(Error::Config(format!(
                "`tie_word_embeddings` is {}, the weights have {} head",
                config.tie_word_embeddings,
                if self.head.is_some() { "a" } else { "no" },
            )));
        }
        let (width, inside) = (config.hidden_size, config.intermediate_size);
        let (query, key_value) = (config.query_size(), config.key_value_size());
        check_shape("embedding", self.embedding.shape(), &[config.vocab_size, width])?;
        for layer in &self.layers {
            check_shape("attention_norm", layer.attention_norm.shape(), &[width])?;
            check_shape("q", layer.q.shape(), &[query, width])?;
            check_shape("k", layer.k.shape(), &[key_value, width])?;
            check_shape("v", layer.v.shape(), &[key_value, width])?;
            check_shape("o", layer.o.shape(), &[width, query])?;
            check_shape("q_norm", layer.q_norm.shape(), &[config.head_dim])?;
            check_shape("k_norm", layer.k_norm.shape(), &[config.head_dim])?;
            check_shape("feed_forward_norm", layer.feed_forward_norm.shape(), &[width])?;
            check_shape("gate", layer.gate.shape(), &[inside, width])?;
            check_shape("up", layer.up.shape(), &[inside, width])?;
            check_shape("down", layer.down.shape(), &[width, inside])?;
        }
        check_shape("norm", self.norm.shape(), &[width])?;
        if let Some(head) = &self.head {
            check_shape("head", head.shape(), &[config.vocab_size, width])?;
        }
        Ok(())
    }
}

fn fill_normal(matrix: &mut Array2<f32>, factor: f64, rng: &mut impl Rng) {
    let deviation = factor / (matrix.ncols() as f64).sqrt();
    let normal = Normal::new(0.0, deviation as f32).unwrap_or_else(|_| unreachable!("positive"));
    matrix.mapv_inplace(|_| normal.sample(rng));
}
