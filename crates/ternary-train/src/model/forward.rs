//! The forward pass.

use ndarray::{ArrayView2, ArrayViewMut2};

use super::{Loss, Model, View};
use crate::Error;
use crate::ops::{
    CrossEntropy, Direction, IGNORE, Product, Real, Term, attention, cross_entropy, embed,
    fake_quantize_rows, products, rms_norm, rotate, swiglu,
};

impl<A: Real> Model<A> {
    /// From the tokens to the input of the head.
    pub(super) fn forward(&mut self, weights: View<'_, A>, tokens: &[u32]) -> Result<(), Error> {
        let (config, layout) = (&self.config, &self.layout);
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (query, key_value) = (config.query_size(), config.key_value_size());
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (head_size, length, eight_bit) = (config.head_dim, self.length, self.eight_bit);
        let round = |x: &mut [A], width| {
            if eight_bit {
                fake_quantize_rows(x, width);
            }
        };

        let all = &mut self.activations;
        embed(&mut all.streams[0], &weights.matrices[..layout.table()], tokens, d)?;
        for (index, layer) in all.layers.iter_mut().enumerate() {
            let (streams, later) = all.streams.split_at_mut(index + 1);
            let (x, next) = (&streams[index], &mut later[0]);
            let w = layout.matrices(weights.matrices, index);
            let norms = layout.norms(weights.norms, index);

            let (normed, rstd) = (&mut layer.attention_normed, &mut layer.attention_rstd);
            rms_norm(normed, rstd, x, norms.attention, &mut self.wide_norm)?;
            round(normed, d);
            let normed = matrix(normed, d);
            products(vec![
                linear(&mut layer.q_raw, query, normed, w.q),
                linear(&mut layer.k_raw, key_value, normed, w.k),
                linear(&mut layer.v, key_value, normed, w.v),
            ])?;
            rms_norm(&mut layer.q, &mut layer.q_rstd, &layer.q_raw, norms.q, &mut self.query_norm)?;
            rms_norm(&mut layer.k, &mut layer.k_rstd, &layer.k_raw, norms.k, &mut self.key_norm)?;
            rotate(&mut layer.q, heads, head_size, length, &self.rope, Direction::Forward)?;
            rotate(&mut layer.k, key_heads, head_size, length, &self.rope, Direction::Forward)?;
            let (q, k, v) = (&layer.q, &layer.k, &layer.v);
            attention(&mut layer.o, &mut layer.lse, q, k, v, &mut self.attention)?;
            if eight_bit {
                layer.o_rounded.copy_from_slice(&layer.o);
                round(&mut layer.o_rounded, query);
            }
            layer.middle.copy_from_slice(x);
            let o = matrix(if eight_bit { &layer.o_rounded } else { &layer.o }, query);
            products(vec![Product { add: true, ..linear(&mut layer.middle, d, o, w.o) }])?;

            let (normed, rstd) = (&mut layer.feed_forward_normed, &mut layer.feed_forward_rstd);
            rms_norm(normed, rstd, &layer.middle, norms.feed_forward, &mut self.wide_norm)?;
            round(normed, d);
            let normed = matrix(normed, d);
            products(vec![
                linear(&mut layer.gate, f, normed, w.gate),
                linear(&mut layer.up, f, normed, w.up),
            ])?;
            swiglu(&mut layer.hidden, &layer.gate, &layer.up)?;
            round(&mut layer.hidden, f);
            next.copy_from_slice(&layer.middle);
            let hidden = matrix(&layer.hidden, f);
            products(vec![Product { add: true, ..linear(next, d, hidden, w.down) }])?;
        }
        let x = &all.streams[config.num_hidden_layers];
        let norm = &weights.norms[layout.last_norm()..];
        rms_norm(&mut all.normed, &mut all.rstd, x, norm, &mut self.wide_norm)?;
        round(&mut all.normed, d);
        Ok(())
    }

    /// The loss, and with a scale the gradients with respect to the head, added to `gradients`, and
    /// to its input.
    pub(super) fn head(
        &mut self,
        weights: View<'_, A>,
        targets: &[u32],
        gradients: Option<(A, &mut [A])>,
    ) -> Result<Loss, Error> {
        let (d, table) = (self.config.hidden_size, self.layout.table());
        let at = self.layout.head()..self.layout.head() + table;
        let (head, all) = (&weights.matrices[at.clone()], &mut self.activations);
        let gradients = match (gradients, &mut self.gradients) {
            (Some((scale, gradients)), Some(own)) => {
                Some(CrossEntropy { dx: &mut own.normed, d_head: &mut gradients[at], scale })
            }
            _ => None,
        };
        let correct = cross_entropy(&mut all.losses, &all.normed, head, targets, d, gradients)?;
        let sum = all.losses.iter().map(|loss| loss.to_f64()).sum();
        let tokens = targets.iter().filter(|&&target| target != IGNORE).count();
        Ok(Loss { sum, tokens, correct })
    }
}

/// `y = x W^T`, for `columns` columns of `y`.
fn linear<'a, A: Real>(
    y: &'a mut [A],
    columns: usize,
    x: ArrayView2<'a, A>,
    w: ArrayView2<'a, A>,
) -> Product<'a, A> {
    Product { c: matrix_mut(y, columns), terms: vec![Term::Nt(x, w)], add: false }
}

/// Activations as a matrix.
pub(super) fn matrix<A>(x: &[A], columns: usize) -> ArrayView2<'_, A> {
    ArrayView2::from_shape((x.len() / columns, columns), x).expect("whole rows")
}

/// The same, to be written.
pub(super) fn matrix_mut<A>(x: &mut [A], columns: usize) -> ArrayViewMut2<'_, A> {
    ArrayViewMut2::from_shape((x.len() / columns, columns), x).expect("whole rows")
}
