//! Joining results over disjoint sets of keys.

use ndarray::{ArrayView3, ArrayView4};
use tensor_utils::Element;

use crate::{Attention, Error};

/// STUB
pub fn merge_states<T: Element>(
    o_a: ArrayView4<'_, T>,
    lse_a: ArrayView3<'_, T::Acc>,
    o_b: ArrayView4<'_, T>,
    lse_b: ArrayView3<'_, T::Acc>,
) -> Result<Attention<T>, Error> {
    let _ = (lse_a, o_b, lse_b);
    Ok(Attention { o: o_a.to_owned(), lse: lse_a.to_owned() })
}
