//! Joining results over disjoint sets of keys.

use ndarray::{ArrayView3, ArrayView4, ArrayViewMut3, ArrayViewMut4, Axis, Zip};
use tensor_utils::{Element, Float, ShapeError, check_shape, try_array};

use crate::{Attention, Error};

/// Joins the results of the same queries over two disjoint sets of keys into the result over both
/// (eq. 9): `lse = ln(exp(lse_a) + exp(lse_b))` and the outputs weighted by `exp(lse_x - lse)`.
///
/// `o_a` and `o_b` are `[B, H, N, E]`, `lse_a` and `lse_b` `[B, H, N]`. The same keys must not be on
/// both sides, nor the same sink. A side that saw nothing (`lse = -inf`) leaves the other as it is,
/// bit for bit, whatever its outputs hold; two such sides give `o = 0`, `lse = -inf`. NaN shows.
///
/// Source: Ye et al., FlashInfer (2025), section 2.2, attention states.
///
/// # Errors
/// [`Error::Shape`] names the argument whose shape differs from `o_a`, or the output that there is no
/// memory for.
///
/// # Examples
/// ```
/// use attn_flash::{Options, attention, merge_states};
/// use ndarray::{Array4, s};
///
/// let q = Array4::<f32>::from_elem((1, 2, 3, 8), 0.5);
/// let k = Array4::from_shape_fn((1, 2, 10, 8), |(_, _, j, d)| ((j * 3 + d) % 5) as f32 * 0.1);
/// let v = Array4::from_shape_fn((1, 2, 10, 8), |(_, _, j, _)| j as f32);
/// let options = Options::default();
///
/// let whole = attention(q.view(), k.view(), v.view(), &options)?;
/// let [a, b] = [s![.., .., ..6, ..], s![.., .., 6.., ..]]
///     .map(|keys| attention(q.view(), k.slice(keys), v.slice(keys), &options));
/// let (a, b) = (a?, b?);
/// let merged = merge_states(a.o.view(), a.lse.view(), b.o.view(), b.lse.view())?;
/// assert!((&merged.o - &whole.o).iter().all(|error| error.abs() < 1e-5));
/// # Ok::<(), attn_flash::Error>(())
/// ```
pub fn merge_states<T: Element>(
    o_a: ArrayView4<'_, T>,
    lse_a: ArrayView3<'_, T::Acc>,
    o_b: ArrayView4<'_, T>,
    lse_b: ArrayView3<'_, T::Acc>,
) -> Result<Attention<T>, Error> {
    check_states(
        ["lse_a", "o_b", "lse_b"],
        o_a.shape(),
        lse_a.shape(),
        o_b.shape(),
        lse_b.shape(),
    )?;
    let mut o = try_array("o", o_a.dim())?;
    let mut lse = try_array("lse", lse_a.dim())?;
    o.assign(&o_a);
    lse.assign(&lse_a);
    merge_states_into(o.view_mut(), lse.view_mut(), o_b, lse_b)?;
    Ok(Attention { o, lse })
}

/// [`merge_states`] of `o`, `lse` with `o_b`, `lse_b` in place. Allocates nothing.
///
/// # Errors
/// [`Error::Shape`] names the argument whose shape differs from `o`. The outputs are untouched then.
pub fn merge_states_into<T: Element>(
    mut o: ArrayViewMut4<'_, T>,
    lse: ArrayViewMut3<'_, T::Acc>,
    o_b: ArrayView4<'_, T>,
    lse_b: ArrayView3<'_, T::Acc>,
) -> Result<(), Error> {
    check_states(["lse", "o_b", "lse_b"], o.shape(), lse.shape(), o_b.shape(), lse_b.shape())?;
    let outputs = Zip::from(o.lanes_mut(Axis(3))).and(o_b.lanes(Axis(3)));
    outputs.and(lse).and(lse_b).for_each(|mut o, o_b, lse, &lse_b| {
        let lse_a = *lse;
        if lse_b == T::Acc::NEG_INFINITY {
            if lse_a == T::Acc::NEG_INFINITY {
                o.fill(T::from_acc(T::Acc::ZERO));
            }
            return;
        }
        if lse_a == T::Acc::NEG_INFINITY {
            o.assign(&o_b);
            *lse = lse_b;
            return;
        }
        // Relative to the larger, so that no exponential overflows.
        let max = lse_a.max_nan(lse_b);
        let (a, b) = ((lse_a - max).exp(), (lse_b - max).exp());
        *lse = max + (a + b).ln();
        let (weight_a, weight_b) = (a / (a + b), b / (a + b));
        for (o, &o_b) in o.iter_mut().zip(o_b) {
            *o = T::from_acc(o.to_acc() * weight_a + o_b.to_acc() * weight_b);
        }
    });
    Ok(())
}

/// Checks the shapes of two states against that of `o_a`, which has 4 axes; the others are called `args`.
fn check_states(
    args: [&'static str; 3],
    o_a: &[usize],
    lse_a: &[usize],
    o_b: &[usize],
    lse_b: &[usize],
) -> Result<(), ShapeError> {
    check_shape(args[0], lse_a, &o_a[..3])?;
    check_shape(args[1], o_b, o_a)?;
    check_shape(args[2], lse_b, &o_a[..3])
}
