//! Where the weights lie in one slice: all matrices in the order of
//! [`Weights::matrices`](crate::Weights::matrices), then all norms.

use ndarray::ArrayView2;

use crate::Config;

/// Where the weights of a model lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Elements of all matrices.
    pub matrices: usize,
    /// Elements of all norms.
    pub norms: usize,
    width: usize,
    inside: usize,
    query: usize,
    key_value: usize,
    head_size: usize,
    vocabulary: usize,
    layers: usize,
    tied: bool,
}

/// The matrices of a layer; `T` is a view, or a slice to write to.
#[derive(Debug)]
pub(super) struct Matrices<T> {
    /// `[query_size, hidden_size]`.
    pub(super) q: T,
    /// `[key_value_size, hidden_size]`.
    pub(super) k: T,
    /// `[key_value_size, hidden_size]`.
    pub(super) v: T,
    /// `[hidden_size, query_size]`.
    pub(super) o: T,
    /// `[intermediate_size, hidden_size]`.
    pub(super) gate: T,
    /// `[intermediate_size, hidden_size]`.
    pub(super) up: T,
    /// `[hidden_size, intermediate_size]`.
    pub(super) down: T,
}

/// The norms of a layer.
#[derive(Debug)]
pub(super) struct Norms<T> {
    /// `[hidden_size]`.
    pub(super) attention: T,
    /// `[head_dim]`.
    pub(super) q: T,
    /// `[head_dim]`.
    pub(super) k: T,
    /// `[hidden_size]`.
    pub(super) feed_forward: T,
}

impl Layout {
    /// The layout of a model.
    pub fn new(config: &Config) -> Self {
        let mut layout = Self {
            matrices: 0,
            norms: 0,
            width: config.hidden_size,
            inside: config.intermediate_size,
            query: config.query_size(),
            key_value: config.key_value_size(),
            head_size: config.head_dim,
            vocabulary: config.vocab_size,
            layers: config.num_hidden_layers,
            tied: config.tie_word_embeddings,
        };
        let tables = if layout.tied { 1 } else { 2 };
        layout.matrices = tables * layout.table() + layout.layers * layout.layer_matrices();
        layout.norms = layout.layers * layout.layer_norms() + layout.width;
        layout
    }

    /// The shapes of all matrices, in order.
    pub fn shapes(&self) -> Vec<[usize; 2]> {
        let (d, f, q, k) = (self.width, self.inside, self.query, self.key_value);
        let mut shapes = vec![[self.vocabulary, d]];
        for _ in 0..self.layers {
            shapes.extend([[q, d], [k, d], [k, d], [d, q], [f, d], [f, d], [d, f]]);
        }
        if !self.tied {
            shapes.push([self.vocabulary, d]);
        }
        shapes
    }

    /// Whether the matrix of this index is the embedding or the head.
    pub fn is_table(&self, index: usize) -> bool {
        index == 0 || index > 7 * self.layers
    }

    /// Whether the matrix of this index adds to the residual stream: o or down.
    pub fn is_residual(&self, index: usize) -> bool {
        !self.is_table(index) && matches!((index - 1) % 7, 3 | 6)
    }

    /// Elements of the embedding.
    pub(super) fn table(&self) -> usize {
        self.vocabulary * self.width
    }

    fn layer_matrices(&self) -> usize {
        self.width * (2 * self.query + 2 * self.key_value + 3 * self.inside)
    }

    fn layer_norms(&self) -> usize {
        2 * (self.width + self.head_size)
    }

    /// Where the head begins: at the embedding, if it is tied.
    pub(super) fn head(&self) -> usize {
        if self.tied { 0 } else { self.matrices - self.table() }
    }

    /// The matrices of a layer, of all of them.
    pub(super) fn matrices<'a, A>(
        &self,
        all: &'a [A],
        layer: usize,
    ) -> Matrices<ArrayView2<'a, A>> {
        let mut rest = &all[self.table() + layer * self.layer_matrices()..];
        let mut take = |rows: usize, columns: usize| {
            let (matrix, after) = rest.split_at(rows * columns);
            rest = after;
            ArrayView2::from_shape((rows, columns), matrix).expect("rows times columns elements")
        };
        let (d, f) = (self.width, self.inside);
        Matrices {
            q: take(self.query, d),
            k: take(self.key_value, d),
            v: take(self.key_value, d),
            o: take(d, self.query),
            gate: take(f, d),
            up: take(f, d),
            down: take(d, f),
        }
    }

    /// The same, to be written.
    pub(super) fn matrices_mut<'a, A>(
        &self,
        all: &'a mut [A],
        layer: usize,
    ) -> Matrices<&'a mut [A]> {
        let mut rest = &mut all[self.table() + layer * self.layer_matrices()..];
        let mut take = |elements: usize| {
            let (matrix, after) = std::mem::take(&mut rest).split_at_mut(elements);
            rest = after;
            matrix
        };
        let (d, f) = (self.width, self.inside);
        Matrices {
            q: take(self.query * d),
            k: take(self.key_value * d),
            v: take(self.key_value * d),
            o: take(d * self.query),
            gate: take(f * d),
            up: take(f * d),
            down: take(d * f),
        }
    }

    /// The norms of a layer, of all norms.
    pub(super) fn norms<'a, A>(&self, all: &'a [A], layer: usize) -> Norms<&'a [A]> {
        let norms = &all[layer * self.layer_norms()..][..self.layer_norms()];
        let (attention, norms) = norms.split_at(self.width);
        let (q, norms) = norms.split_at(self.head_size);
        let (k, feed_forward) = norms.split_at(self.head_size);
        Norms { attention, q, k, feed_forward }
    }

    /// The same, to be written.
    pub(super) fn norms_mut<'a, A>(&self, all: &'a mut [A], layer: usize) -> Norms<&'a mut [A]> {
        let norms = &mut all[layer * self.layer_norms()..][..self.layer_norms()];
        let (attention, norms) = norms.split_at_mut(self.width);
        let (q, norms) = norms.split_at_mut(self.head_size);
        let (k, feed_forward) = norms.split_at_mut(self.head_size);
        Norms { attention, q, k, feed_forward }
    }

    /// Where the last norm begins among the norms.
    pub(super) fn last_norm(&self) -> usize {
        self.norms - self.width
    }
}
