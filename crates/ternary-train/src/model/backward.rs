//! The backward pass.

use ndarray::ArrayView2;

use super::forward::{matrix, matrix_mut};
use super::{Model, View};
use crate::Error;
use crate::ops::{
    Direction, Product, Real, Term, attention_backward, embed_backward, products,
    rms_norm_backward, rotate, swiglu_backward,
};

impl<A: Real> Model<A> {
    /// From the gradient of the input of the head to those of all weights before it, added to `all`.
    pub(super) fn backward(
        &mut self,
        weights: View<'_, A>,
        tokens: &[u32],
        all: &mut [A],
    ) -> Result<(), Error> {
        let Some(g) = &mut self.gradients else { return Ok(()) };
        let (config, layout) = (&self.config, &self.layout);
        let (d, f) = (config.hidden_size, config.intermediate_size);
        let (query, key_value) = (config.query_size(), config.key_value_size());
        let (heads, key_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let (head_size, length) = (config.head_dim, self.length);
        let saved = &self.activations;
        let (d_matrices, d_norms) = all.split_at_mut(layout.matrices);

        let (x, last) = (&saved.streams[config.num_hidden_layers], layout.last_norm());
        let (norm, d_norm) = (&weights.norms[last..], &mut d_norms[last..]);
        let wide = &mut self.wide_norm;
        rms_norm_backward(&mut g.x, d_norm, &g.normed, None, x, &saved.rstd, norm, wide)?;
        for (index, layer) in saved.layers.iter().enumerate().rev() {
            let w = layout.matrices(weights.matrices, index);
            let dw = layout.matrices_mut(d_matrices, index);
            let norms = layout.norms(weights.norms, index);
            let d_norms = layout.norms_mut(d_norms, index);

            // The feed-forward half.
            let (dx, hidden) = (matrix(&g.x, d), matrix(&layer.hidden, f));
            products(vec![
                input_gradient(&mut g.hidden, f, vec![Term::Nn(dx, w.down)]),
                weight_gradient(dw.down, dx, hidden),
            ])?;
            swiglu_backward(&mut g.gate, &mut g.up, &g.hidden, &layer.gate, &layer.up)?;
            let (d_gate, d_up) = (matrix(&g.gate, f), matrix(&g.up, f));
            let normed = matrix(&layer.feed_forward_normed, d);
            let terms = vec![Term::Nn(d_gate, w.gate), Term::Nn(d_up, w.up)];
            products(vec![
                input_gradient(&mut g.normed, d, terms),
                weight_gradient(dw.gate, d_gate, normed),
                weight_gradient(dw.up, d_up, normed),
            ])?;
            rms_norm_backward(
                &mut g.x_before,
                d_norms.feed_forward,
                &g.normed,
                Some(&g.x),
                &layer.middle,
                &layer.feed_forward_rstd,
                norms.feed_forward,
                &mut self.wide_norm,
            )?;

            // The attention half.
            let dx = matrix(&g.x_before, d);
            let o = if self.eight_bit { &layer.o_rounded } else { &layer.o };
            products(vec![
                input_gradient(&mut g.o, query, vec![Term::Nn(dx, w.o)]),
                weight_gradient(dw.o, dx, matrix(o, query)),
            ])?;
            attention_backward(
                [&mut g.q, &mut g.k, &mut g.v],
                &g.o,
                [&layer.q, &layer.k, &layer.v],
                &layer.o,
                &layer.lse,
                &mut self.attention,
            )?;
            rotate(&mut g.q, heads, head_size, length, &self.rope, Direction::Backward)?;
            rotate(&mut g.k, key_heads, head_size, length, &self.rope, Direction::Backward)?;
            let (raw, rstd) = (&layer.q_raw, &layer.q_rstd);
            let norm = &mut self.query_norm;
            rms_norm_backward(&mut g.o, d_norms.q, &g.q, None, raw, rstd, norms.q, norm)?;
            let (raw, rstd) = (&layer.k_raw, &layer.k_rstd);
            let norm = &mut self.key_norm;
            rms_norm_backward(&mut g.k_raw, d_norms.k, &g.k, None, raw, rstd, norms.k, norm)?;
            let (dq, dk, dv) =
                (matrix(&g.o, query), matrix(&g.k_raw, key_value), matrix(&g.v, key_value));
            let normed = matrix(&layer.attention_normed, d);
            let terms = vec![Term::Nn(dq, w.q), Term::Nn(dk, w.k), Term::Nn(dv, w.v)];
            products(vec![
                input_gradient(&mut g.normed, d, terms),
                weight_gradient(dw.q, dq, normed),
                weight_gradient(dw.k, dk, normed),
                weight_gradient(dw.v, dv, normed),
            ])?;
            rms_norm_backward(
                &mut g.x,
                d_norms.attention,
                &g.normed,
                Some(&g.x_before),
                &saved.streams[index],
                &layer.attention_rstd,
                norms.attention,
                &mut self.wide_norm,
            )?;
        }
        embed_backward(&mut d_matrices[..layout.table()], &g.x, tokens, d)?;
        Ok(())
    }
}

/// `dx = ` a sum of `dy W`, for `columns` columns of `dx`.
fn input_gradient<'a, A: Real>(
    dx: &'a mut [A],
    columns: usize,
    terms: Vec<Term<'a, A>>,
) -> Product<'a, A> {
    Product { c: matrix_mut(dx, columns), terms, add: false }
}

/// `dW += dy^T x`.
fn weight_gradient<'a, A: Real>(
    dw: &'a mut [A],
    dy: ArrayView2<'a, A>,
    x: ArrayView2<'a, A>,
) -> Product<'a, A> {
    Product { c: matrix_mut(dw, x.ncols()), terms: vec![Term::Tn(dy, x)], add: true }
}
