//! The model that is trained: forward pass, loss and gradients over a batch of sequences.

mod activations;
mod backward;
mod forward;
mod layout;

use tensor_utils::check_shape;

pub use layout::Layout;

use crate::ops::{Attention, Norm, Real, Rope};
use crate::{Config, Error};
use activations::{Activations, Gradients};

/// A Qwen3 model for batches of `sequences` of `length` tokens, with room for all that its backward
/// pass needs.
///
/// Weights and gradients are the caller's, each in one slice in the order of its [`Layout`]. The
/// matrices that come in are those that are multiplied with: for a ternary model the projected
/// ones, and then the gradients are those of the latent ones as well, straight through
/// (Bengio, Leonard and Courville, 2013), with the scales as constants.
///
/// With `f` the feed-forward width, `q` and `k` the sizes of all query and all key heads, `d` the
/// width, `h` and `g` the heads, and `T` the tokens of a batch, the activations take
/// `T (layers (4 d + 3 q + 3 k + 3 f + 2 h + g + 2) + 7 d + 2 q + 3 k + 3 f)` elements, and
/// the logits about a million.
#[derive(Debug)]
pub struct Model<A: Real> {
    config: Config,
    layout: Layout,
    sequences: usize,
    length: usize,
    eight_bit: bool,
    rope: Rope<A>,
    attention: Attention<A>,
    wide_norm: Norm<A>,
    query_norm: Norm<A>,
    key_norm: Norm<A>,
    activations: Activations<A>,
    gradients: Option<Gradients<A>>,
}

/// Weights in the order of a [`Layout`].
#[derive(Debug, Clone, Copy)]
pub struct View<'a, A> {
    /// All matrices, one after the other.
    pub matrices: &'a [A],
    /// All norms, one after the other.
    pub norms: &'a [A],
}

/// What a batch has given.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Loss {
    /// Sum of the losses of all tokens, in nats.
    pub sum: f64,
    /// Tokens that count.
    pub tokens: usize,
    /// Tokens that were predicted: their target had the largest logit.
    pub correct: usize,
}

impl Loss {
    /// Nats a token; NaN without tokens that count.
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens as f64
    }

    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            sum: self.sum + other.sum,
            tokens: self.tokens + other.tokens,
            correct: self.correct + other.correct,
        }
    }
}

impl<A: Real> Model<A> {
    /// Makes room for batches of `sequences` of `length` tokens. `eight_bit`: the inputs of all
    /// linear layers are rounded to 8 bits a token.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration makes no model or has fewer positions,
    /// [`Error::Option`] if a size is 0, [`Error::Shape`] if there is no memory.
    pub fn new(
        config: &Config,
        sequences: usize,
        length: usize,
        eight_bit: bool,
    ) -> Result<Self, Error> {
        config.check()?;
        for (option, size) in [("sequences", sequences), ("length", length)] {
            if size == 0 {
                return Err(Error::option(option, "at least 1", size));
            }
        }
        if length > config.max_position_embeddings {
            let most =
                format!("at most `max_position_embeddings` = {}", config.max_position_embeddings);
            return Err(Error::option("length", most, length));
        }
        let Some(tokens) = sequences.checked_mul(length) else {
            return Err(Error::option("sequences", "fewer for this length", sequences));
        };
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (size, eps) = (config.head_dim, config.rms_norm_eps);
        Ok(Self {
            layout: Layout::new(config),
            sequences,
            length,
            eight_bit,
            rope: Rope::new(size, config.rope_theta, length),
            attention: Attention::new(sequences, length, heads, key_heads, size)?,
            wide_norm: Norm::new(tokens, config.hidden_size, eps)?,
            query_norm: Norm::new(tokens * heads, size, eps)?,
            key_norm: Norm::new(tokens * key_heads, size, eps)?,
            activations: Activations::new(config, tokens, eight_bit)?,
            gradients: None,
            config: config.clone(),
        })
    }

    /// Where the weights lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The loss of a batch: `targets[t]` is to follow `tokens[t]`; both `[sequences, length]`.
    /// Targets that are [`IGNORE`](crate::ops::IGNORE) do not count.
    ///
    /// # Errors
    /// [`Error::Op`] if a token is not in the vocabulary, [`Error::Shape`] if a length does not fit.
    pub fn loss(
        &mut self,
        weights: View<'_, A>,
        tokens: &[u32],
        targets: &[u32],
    ) -> Result<Loss, Error> {
        self.check(weights, tokens, targets)?;
        self.forward(weights, tokens)?;
        self.head(weights, targets, None)
    }

    /// The loss of a batch, and its gradients times `scale` added to `gradients` (matrices, then
    /// norms).
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    pub fn loss_and_gradients(
        &mut self,
        weights: View<'_, A>,
        tokens: &[u32],
        targets: &[u32],
        scale: f64,
        gradients: &mut [A],
    ) -> Result<Loss, Error> {
        self.check(weights, tokens, targets)?;
        let all = self.layout.matrices + self.layout.norms;
        check_shape("gradients", &[gradients.len()], &[all])?;
        if self.gradients.is_none() {
            self.gradients = Some(Gradients::new(&self.config, self.sequences * self.length)?);
        }
        self.forward(weights, tokens)?;
        let loss = self.head(weights, targets, Some((A::from_f64(scale), &mut *gradients)))?;
        self.backward(weights, tokens, gradients)?;
        Ok(loss)
    }

    fn check(&self, weights: View<'_, A>, tokens: &[u32], targets: &[u32]) -> Result<(), Error> {
        let batch = self.sequences * self.length;
        check_shape("tokens", &[tokens.len()], &[batch])?;
        check_shape("targets", &[targets.len()], &[batch])?;
        check_shape("matrices", &[weights.matrices.len()], &[self.layout.matrices])?;
        check_shape("norms", &[weights.norms.len()], &[self.layout.norms])?;
        Ok(())
    }
}
