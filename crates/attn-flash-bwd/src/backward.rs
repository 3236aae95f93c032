//! The public entry points of the backward pass.

use attn_flash::{Mask, Options};
use ndarray::{
    Array1, Array2, Array3, Array4, ArrayD, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut1,
    ArrayViewMut2, ArrayViewMut3, ArrayViewMut4, ArrayViewMutD,
};
use tensor_utils::Element;

use crate::{Error, Workspace};

/// What the forward pass got and gave, and the gradients that come in.
#[derive(Debug, Clone)]
pub struct Inputs<'a, T: Element> {
    /// `[B, H, N, D]`.
    pub q: ArrayView4<'a, T>,
    /// `[B, G, M, D]`.
    pub k: ArrayView4<'a, T>,
    /// `[B, G, M, E]`.
    pub v: ArrayView4<'a, T>,
    /// `[B, H, N, E]`, as the forward pass returned it.
    pub o: ArrayView4<'a, T>,
    /// `[B, H, N]`, as the forward pass returned it.
    pub lse: ArrayView3<'a, T::Acc>,
    /// `[B, H, N, E]`: the gradient of `o`.
    pub d_o: ArrayView4<'a, T>,
    /// `[B, H, N]`: the gradient of `lse`. `None`: 0.
    pub d_lse: Option<ArrayView3<'a, T::Acc>>,
}

/// The gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients<T: Element> {
    /// `[B, H, N, D]`.
    pub dq: Array4<T>,
    /// `[B, G, M, D]`.
    pub dk: Array4<T>,
    /// `[B, G, M, E]`.
    pub dv: Array4<T>,
    /// `[B, H, N]`: `rowsum(do * o)`, a by-product.
    pub delta: Array3<T::Acc>,
    /// In the shape of the bias; `None` if there is none.
    pub dbias: Option<ArrayD<T>>,
    /// `[H]`; `None` if there are no sinks.
    pub dsinks: Option<Array1<T::Acc>>,
}

/// Where the gradients go; all are overwritten.
#[derive(Debug)]
pub struct GradientsMut<'a, T: Element> {
    /// `[B, H, N, D]`.
    pub dq: ArrayViewMut4<'a, T>,
    /// `[B, G, M, D]`.
    pub dk: ArrayViewMut4<'a, T>,
    /// `[B, G, M, E]`.
    pub dv: ArrayViewMut4<'a, T>,
    /// `[B, H, N]`; `None`: not wanted.
    pub delta: Option<ArrayViewMut3<'a, T::Acc>>,
    /// In the shape of the bias; `None`: not wanted (it costs two matrix products of its own).
    pub dbias: Option<ArrayViewMutD<'a, T>>,
    /// `[H]`; `None`: not wanted.
    pub dsinks: Option<ArrayViewMut1<'a, T::Acc>>,
}

/// [`Inputs`] of a packed batch.
#[derive(Debug, Clone)]
pub struct VarlenInputs<'a, T: Element> {
    /// `[total queries, H, D]`.
    pub q: ArrayView3<'a, T>,
    /// `[total keys, G, D]`.
    pub k: ArrayView3<'a, T>,
    /// `[total keys, G, E]`.
    pub v: ArrayView3<'a, T>,
    /// `[sequences + 1]`, where the queries of each sequence begin.
    pub query_offsets: &'a [usize],
    /// `[sequences + 1]`, where the keys of each sequence begin.
    pub key_offsets: &'a [usize],
    /// `[total queries, H, E]`, as the forward pass returned it.
    pub o: ArrayView3<'a, T>,
    /// `[total queries, H]`, as the forward pass returned it.
    pub lse: ArrayView2<'a, T::Acc>,
    /// `[total queries, H, E]`: the gradient of `o`.
    pub d_o: ArrayView3<'a, T>,
    /// `[total queries, H]`: the gradient of `lse`. `None`: 0.
    pub d_lse: Option<ArrayView2<'a, T::Acc>>,
}

/// [`Gradients`] of a packed batch.
#[derive(Debug, Clone, PartialEq)]
pub struct VarlenGradients<T: Element> {
    /// `[total queries, H, D]`.
    pub dq: Array3<T>,
    /// `[total keys, G, D]`.
    pub dk: Array3<T>,
    /// `[total keys, G, E]`.
    pub dv: Array3<T>,
    /// `[total queries, H]`: `rowsum(do * o)`, a by-product.
    pub delta: Array2<T::Acc>,
    /// In the shape of the bias; `None` if there is none.
    pub dbias: Option<ArrayD<T>>,
    /// `[H]`; `None` if there are no sinks.
    pub dsinks: Option<Array1<T::Acc>>,
}

/// [`GradientsMut`] of a packed batch.
#[derive(Debug)]
pub struct VarlenGradientsMut<'a, T: Element> {
    /// `[total queries, H, D]`.
    pub dq: ArrayViewMut3<'a, T>,
    /// `[total keys, G, D]`.
    pub dk: ArrayViewMut3<'a, T>,
    /// `[total keys, G, E]`.
    pub dv: ArrayViewMut3<'a, T>,
    /// `[total queries, H]`; `None`: not wanted.
    pub delta: Option<ArrayViewMut2<'a, T::Acc>>,
    /// In the shape of the bias; `None`: not wanted (it costs two matrix products of its own).
    pub dbias: Option<ArrayViewMutD<'a, T>>,
    /// `[H]`; `None`: not wanted.
    pub dsinks: Option<ArrayViewMut1<'a, T::Acc>>,
}

/// STUB
///
/// # Errors
/// STUB
pub fn attention_backward<T: Element, M: Mask>(
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Gradients<T>, Error> {
    let _ = options;
    Ok(Gradients {
        dq: Array4::default(inputs.q.dim()),
        dk: Array4::default(inputs.k.dim()),
        dv: Array4::default(inputs.v.dim()),
        delta: Array3::default(inputs.lse.dim()),
        dbias: None,
        dsinks: None,
    })
}

/// STUB
///
/// # Errors
/// STUB
pub fn attention_backward_into<T: Element, M: Mask>(
    gradients: GradientsMut<'_, T>,
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T>,
) -> Result<(), Error> {
    let _ = (gradients, inputs, options, workspace);
    Ok(())
}

/// STUB
///
/// # Errors
/// STUB
pub fn attention_varlen_backward<T: Element, M: Mask>(
    inputs: &VarlenInputs<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<VarlenGradients<T>, Error> {
    let _ = options;
    Ok(VarlenGradients {
        dq: Array3::default(inputs.q.dim()),
        dk: Array3::default(inputs.k.dim()),
        dv: Array3::default(inputs.v.dim()),
        delta: Array2::default(inputs.lse.dim()),
        dbias: None,
        dsinks: None,
    })
}

/// STUB
///
/// # Errors
/// STUB
pub fn attention_varlen_backward_into<T: Element, M: Mask>(
    gradients: VarlenGradientsMut<'_, T>,
    inputs: &VarlenInputs<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T>,
) -> Result<(), Error> {
    let _ = (gradients, inputs, options, workspace);
    Ok(())
}
