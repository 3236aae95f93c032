//! What the forward pass leaves for the backward pass, and the gradients that pass through.

use tensor_utils::try_vec;

use crate::ops::Real;
use crate::{Config, Error};

/// Activations of all layers; a row a token.
#[derive(Debug)]
pub(super) struct Activations<A> {
    pub(super) layers: Vec<LayerActivations<A>>,
    /// The residual stream before each layer, and after the last.
    pub(super) streams: Vec<Vec<A>>,
    pub(super) rstd: Vec<A>,
    /// The input of the head.
    pub(super) normed: Vec<A>,
    /// A loss a token.
    pub(super) losses: Vec<A>,
}

/// Activations of one layer.
#[derive(Debug)]
pub(super) struct LayerActivations<A> {
    pub(super) attention_rstd: Vec<A>,
    /// The input of q, k and v.
    pub(super) attention_normed: Vec<A>,
    pub(super) q_raw: Vec<A>,
    pub(super) k_raw: Vec<A>,
    pub(super) q_rstd: Vec<A>,
    pub(super) k_rstd: Vec<A>,
    /// Normalised and rotated.
    pub(super) q: Vec<A>,
    /// Normalised and rotated.
    pub(super) k: Vec<A>,
    pub(super) v: Vec<A>,
    pub(super) o: Vec<A>,
    /// `o` in 8 bits; empty if that is not asked for.
    pub(super) o_rounded: Vec<A>,
    pub(super) lse: Vec<A>,
    /// The residual stream between attention and feed-forward.
    pub(super) middle: Vec<A>,
    pub(super) feed_forward_rstd: Vec<A>,
    /// The input of gate and up.
    pub(super) feed_forward_normed: Vec<A>,
    pub(super) gate: Vec<A>,
    pub(super) up: Vec<A>,
    /// The input of down.
    pub(super) hidden: Vec<A>,
}

/// Gradients on their way back, of one layer at a time.
#[derive(Debug)]
pub(super) struct Gradients<A> {
    /// Of the stream.
    pub(super) x: Vec<A>,
    /// Of the stream, before.
    pub(super) x_before: Vec<A>,
    /// Of the output of a norm.
    pub(super) normed: Vec<A>,
    /// Of `o`, then of `q_raw`.
    pub(super) o: Vec<A>,
    pub(super) q: Vec<A>,
    pub(super) k: Vec<A>,
    pub(super) k_raw: Vec<A>,
    pub(super) v: Vec<A>,
    pub(super) gate: Vec<A>,
    pub(super) up: Vec<A>,
    pub(super) hidden: Vec<A>,
}

impl<A: Real> Activations<A> {
    pub(super) fn new(config: &Config, tokens: usize, eight_bit: bool) -> Result<Self, Error> {
        let rows = |columns: usize| try_vec("activations", &[tokens, columns]);
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, k) = (config.query_size(), config.key_value_size());
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let layer = || -> Result<LayerActivations<A>, Error> {
            Ok(LayerActivations {
                attention_rstd: rows(1)?,
                attention_normed: rows(d)?,
                q_raw: rows(q)?,
                k_raw: rows(k)?,
                q_rstd: rows(heads)?,
                k_rstd: rows(key_heads)?,
                q: rows(q)?,
                k: rows(k)?,
                v: rows(k)?,
                o: rows(q)?,
                o_rounded: if eight_bit { rows(q)? } else { Vec::new() },
                lse: rows(heads)?,
                middle: rows(d)?,
                feed_forward_rstd: rows(1)?,
                feed_forward_normed: rows(d)?,
                gate: rows(f)?,
                up: rows(f)?,
                hidden: rows(f)?,
            })
        };
        Ok(Self {
            layers: (0..config.num_hidden_layers).map(|_| layer()).collect::<Result<_, _>>()?,
            streams: (0..=config.num_hidden_layers).map(|_| rows(d)).collect::<Result<_, _>>()?,
            rstd: rows(1)?,
            normed: rows(d)?,
            losses: rows(1)?,
        })
    }
}

impl<A: Real> Gradients<A> {
    pub(super) fn new(config: &Config, tokens: usize) -> Result<Self, Error> {
        let rows = |columns: usize| try_vec("gradients", &[tokens, columns]);
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (q, k) = (config.query_size(), config.key_value_size());
        Ok(Self {
            x: rows(d)?,
            x_before: rows(d)?,
            normed: rows(d)?,
            o: rows(q)?,
            q: rows(q)?,
            k: rows(k)?,
            k_raw: rows(k)?,
            v: rows(k)?,
            gate: rows(f)?,
            up: rows(f)?,
            hidden: rows(f)?,
        })
    }
}
