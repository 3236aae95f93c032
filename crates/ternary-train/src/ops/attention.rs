//! Causal attention over a batch of sequences of one length, by `attn-flash` and `attn-flash-bwd`.

use attn_flash::{Options, Tiling, Workspace, attention_into};
use attn_flash_bwd::{GradientsMut, Inputs, attention_backward_into};
use ndarray::{ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4};
use tensor_utils::Float;

use super::OpError;

/// Sizes of attention, with its scratch memory.
#[derive(Debug)]
pub struct Attention<A: Float> {
    sequences: usize,
    length: usize,
    heads: usize,
    key_heads: usize,
    head_size: usize,
    forward: Workspace<A>,
    backward: Option<attn_flash_bwd::Workspace<A>>,
}

impl<A: Float> Attention<A> {
    /// For `sequences` of `length` tokens with `heads` query heads on `key_heads`.
    ///
    /// # Errors
    /// [`OpError::Attention`] if there is no memory for it.
    pub fn new(
        sequences: usize,
        length: usize,
        heads: usize,
        key_heads: usize,
        head_size: usize,
    ) -> Result<Self, OpError> {
        let default = Tiling::default();
        let tiling = Tiling {
            query_block: default.query_block.min(length.max(1)),
            key_block: default.key_block.min(length.max(1)),
            ..default
        };
        let forward = Workspace::new(head_size, head_size, &tiling)?;
        Ok(Self { sequences, length, heads, key_heads, head_size, forward, backward: None })
    }

    /// `[tokens, heads, head_size]` as `[sequences, heads, length, head_size]`.
    fn heads<'a>(
        &self,
        arg: &'static str,
        x: &'a [A],
        heads: usize,
    ) -> Result<ArrayView4<'a, A>, OpError> {
        let shape = (self.sequences, self.length, heads, self.head_size);
        let view = ArrayView4::from_shape(shape, x).map_err(|_| self.mismatch(arg, x, heads))?;
        Ok(view.permuted_axes([0, 2, 1, 3]))
    }

    /// The same, to be written.
    fn heads_mut<'a>(
        &self,
        arg: &'static str,
        x: &'a mut [A],
        heads: usize,
    ) -> Result<ArrayViewMut4<'a, A>, OpError> {
        let error = self.mismatch(arg, x, heads);
        let shape = (self.sequences, self.length, heads, self.head_size);
        let view = ArrayViewMut4::from_shape(shape, x).map_err(|_| error)?;
        Ok(view.permuted_axes([0, 2, 1, 3]))
    }

    fn mismatch(&self, arg: &'static str, x: &[A], heads: usize) -> OpError {
        let expected = vec![self.sequences * self.length, heads, self.head_size];
        tensor_utils::ShapeError::Mismatch { arg, expected, got: vec![x.len()] }.into()
    }
}

/// `o = softmax(q k^T / sqrt(D)) v`, causal, for `q`, `o: [tokens, heads, D]`, `k`, `v: [tokens,
/// key heads, D]`; `lse: [sequences, heads, length]` is for the backward pass.
///
/// # Errors
/// [`OpError`] if a length does not fit.
pub fn attention<A: Float>(
    o: &mut [A],
    lse: &mut [A],
    q: &[A],
    k: &[A],
    v: &[A],
    sizes: &mut Attention<A>,
) -> Result<(), OpError> {
    let lse_shape = (sizes.sequences, sizes.heads, sizes.length);
    let error = sizes.mismatch("lse", lse, 1);
    let lse = ArrayViewMut3::from_shape(lse_shape, lse).map_err(|_| error)?;
    let o = sizes.heads_mut("o", o, sizes.heads)?;
    let q = sizes.heads("q", q, sizes.heads)?;
    let k = sizes.heads("k", k, sizes.key_heads)?;
    let v = sizes.heads("v", v, sizes.key_heads)?;
    let options = Options { causal: true, ..Options::default() };
    attention_into(o, lse, q, k, v, &options, &mut sizes.forward)?;
    Ok(())
}

/// The gradients of [`attention`] with respect to `q`, `k` and `v`, from that of `o`.
///
/// # Errors
/// [`OpError`] if a length does not fit.
pub fn attention_backward<A: Float>(
    [dq, dk, dv]: [&mut [A]; 3],
    d_o: &[A],
    [q, k, v]: [&[A]; 3],
    o: &[A],
    lse: &[A],
    sizes: &mut Attention<A>,
) -> Result<(), OpError> {
    let lse_shape = (sizes.sequences, sizes.heads, sizes.length);
    let inputs = Inputs {
        q: sizes.heads("q", q, sizes.heads)?,
        k: sizes.heads("k", k, sizes.key_heads)?,
        v: sizes.heads("v", v, sizes.key_heads)?,
        o: sizes.heads("o", o, sizes.heads)?,
        lse: ArrayView3::from_shape(lse_shape, lse).map_err(|_| sizes.mismatch("lse", lse, 1))?,
        d_o: sizes.heads("d_o", d_o, sizes.heads)?,
        d_lse: None,
    };
    let gradients = GradientsMut {
        dq: sizes.heads_mut("dq", dq, sizes.heads)?,
        dk: sizes.heads_mut("dk", dk, sizes.key_heads)?,
        dv: sizes.heads_mut("dv", dv, sizes.key_heads)?,
        delta: None,
        dbias: None,
        dsinks: None,
    };
    let mut workspace = match sizes.backward.take() {
        Some(workspace) => workspace,
        None => {
            let default = attn_flash_bwd::Tiling::default();
            let key_block = default.key_block.min(sizes.length.max(1));
            let tiling = attn_flash_bwd::Tiling { key_block, ..default };
            attn_flash_bwd::Workspace::new(&inputs, &tiling)?
        }
    };
    let options = Options { causal: true, ..Options::default() };
    let result = attention_backward_into(gradients, &inputs, &options, &mut workspace);
    sizes.backward = Some(workspace);
    Ok(result?)
}
