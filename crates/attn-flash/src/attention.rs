//! The public entry points of the forward pass.

use ndarray::{
    Array2, Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut2, ArrayViewMut3, ArrayViewMut4,
};
use tensor_utils::Element;

use crate::{Error, Mask, Options, Tiling, Workspace};

/// The result of [`attention`].
#[derive(Debug, Clone, PartialEq)]
pub struct Attention<T: Element> {
    /// `[B, H, N, E]`: the softmax-weighted sums of the values.
    pub o: Array4<T>,
    /// `[B, H, N]`: the natural logarithm of the sum of `exp(score)` over the visible keys and the
    /// sink, in the compute type.
    pub lse: Array3<T::Acc>,
}

/// The result of [`attention_varlen`].
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionVarlen<T: Element> {
    /// `[total queries, H, E]`.
    pub o: Array3<T>,
    /// `[total queries, H]`.
    pub lse: Array2<T::Acc>,
}

/// STUB
pub fn attention<T: Element, M: Mask>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Attention<T>, Error> {
    let (b, h, n, d) = q.dim();
    let e = v.dim().3;
    let mut o = Array4::default((b, h, n, e));
    let mut lse = Array3::default((b, h, n));
    let mut workspace = Workspace::new(d, e, &Tiling::default())?;
    attention_into(o.view_mut(), lse.view_mut(), q, k, v, options, &mut workspace)?;
    Ok(Attention { o, lse })
}

/// STUB
pub fn attention_into<T: Element, M: Mask>(
    o: ArrayViewMut4<'_, T>,
    lse: ArrayViewMut3<'_, T::Acc>,
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    let _ = (o, lse, q, k, v, options, workspace);
    Ok(())
}

/// STUB
pub fn attention_varlen<T: Element, M: Mask>(
    q: ArrayView3<'_, T>,
    k: ArrayView3<'_, T>,
    v: ArrayView3<'_, T>,
    query_offsets: &[usize],
    key_offsets: &[usize],
    options: &Options<'_, T, M>,
) -> Result<AttentionVarlen<T>, Error> {
    let (total, h, d) = q.dim();
    let e = v.dim().2;
    let mut o = Array3::default((total, h, e));
    let mut lse = Array2::default((total, h));
    let mut workspace = Workspace::new(d, e, &Tiling::default())?;
    attention_varlen_into(
        o.view_mut(), lse.view_mut(), q, k, v, query_offsets, key_offsets, options, &mut workspace,
    )?;
    Ok(AttentionVarlen { o, lse })
}

/// STUB
pub fn attention_varlen_into<T: Element, M: Mask>(
    o: ArrayViewMut3<'_, T>,
    lse: ArrayViewMut2<'_, T::Acc>,
    q: ArrayView3<'_, T>,
    k: ArrayView3<'_, T>,
    v: ArrayView3<'_, T>,
    query_offsets: &[usize],
    key_offsets: &[usize],
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    let _ = (o, lse, q, k, v, query_offsets, key_offsets, options, workspace);
    Ok(())
}
