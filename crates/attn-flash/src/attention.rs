//! The public entry points of the forward pass.

use ndarray::{
    Array2, Array3, Array4, ArrayView3, ArrayView4, ArrayViewMut2, ArrayViewMut3, ArrayViewMut4,
};
use tensor_utils::{Element, check_shape, try_array};

use crate::batch::Batch;
use crate::call::{Call, Sizes, check_sizes, invalid};
use crate::observe::Observer;
use crate::split::{Forward, Outputs};
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
    /// `[total queries, H, E]`: the softmax-weighted sums of the values.
    pub o: Array3<T>,
    /// `[total queries, H]`: the natural logarithm of the sum of `exp(score)` over the visible keys
    /// and the sink, in the compute type.
    pub lse: Array2<T::Acc>,
}

/// Softmax attention `o = softmax(scale q k^T + ...) v`, tile by tile, with the online softmax.
///
/// | argument | shape | |
/// | --- | --- | --- |
/// | `q` | `[B, H, N, D]` | queries |
/// | `k` | `[B, G, M, D]` | keys; `H` is a multiple of `G`, query head `h` uses key head `h / (H / G)` |
/// | `v` | `[B, G, M, E]` | values |
///
/// Any strides; fast when the last axis is contiguous. See [`Options`] for the scores and masks.
///
/// At the edges:
/// - A query that sees no key gets `o = 0` and `lse = -inf` (the sink, if there is one).
/// - `N = 0`, `M = 0`, `B = 0` and `H = 0` are fine; `D = 0` and `E = 0` are errors.
/// - NaN or infinity in a key, value or bias has no effect on queries that do not see it, and gives
///   the others what the formula gives: NaN, mostly.
/// - In bf16 on [`Isa::Avx512Bf16`](tensor_utils::Isa::Avx512Bf16), queries and keys below the smallest normal
///   number count as 0, and scores must be within the range of `f32` before the scale, too.
/// - Weights, relative to the largest, are 0 from `2^-127` (`f64`: `2^-1023`) down; between that and the
///   smallest normal number they are anything from 0 to it.
///
/// The same bits come out for any number of threads, for a row alone or in a batch, and for any
/// [`Tiling::query_block`].
///
/// Memory: the outputs and a [`Workspace`], whose size does not depend on `B`, `H`, `N` or `M`.
/// Use [`attention_into`] to keep both.
///
/// Source: Dao, Fu, Ermon, Rudra and Ré, FlashAttention (2022), algorithm 1, with the delayed
/// division of Dao, FlashAttention-2 (2023), section 3.1; equations in `docs/derivation.md`.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
///
/// # Examples
/// ```
/// use attn_flash::{Options, attention};
/// use ndarray::Array4;
///
/// // 8 query heads share 2 key/value heads; 16 new queries after 48 cached keys.
/// let q = Array4::<f32>::ones((1, 8, 16, 64));
/// let k = Array4::<f32>::ones((1, 2, 64, 64));
/// let v = Array4::<f32>::ones((1, 2, 64, 64));
/// let options = Options { causal: true, ..Options::default() };
/// let result = attention(q.view(), k.view(), v.view(), &options)?;
/// assert_eq!(result.o.dim(), (1, 8, 16, 64));
/// // The first query sees 49 equal scores of 64 / sqrt(64).
/// assert!((result.lse[[0, 0, 0]] - (8.0 + 49_f32.ln())).abs() < 1e-5);
/// # Ok::<(), attn_flash::Error>(())
/// ```
pub fn attention<T: Element, M: Mask>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Attention<T>, Error> {
    let (b, h, n, d) = q.dim();
    let e = v.dim().3;
    let mut o = try_array("o", (b, h, n, e))?;
    let mut lse = try_array("lse", (b, h, n))?;
    let mut workspace = Workspace::new(d, e, &Tiling::default())?;
    attention_into(o.view_mut(), lse.view_mut(), q, k, v, options, &mut workspace)?;
    Ok(Attention { o, lse })
}

/// [`attention`] into the caller's `o` `[B, H, N, E]` and `lse` `[B, H, N]`, both overwritten.
///
/// Allocates nothing. (Rayon's queues may, the first time a pool is entered.)
///
/// # Errors
/// As [`attention`]; [`Error::WorkspaceTooSmall`] if the workspace was made for smaller sizes. The
/// outputs are untouched then.
pub fn attention_into<T: Element, M: Mask>(
    o: ArrayViewMut4<'_, T>,
    lse: ArrayViewMut3<'_, T::Acc>,
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    attention_observed(o, lse, q, k, v, options, workspace, None)
}

/// [`attention_into`] with a look at the state of every row after every block of keys.
#[doc(hidden)]
pub fn attention_observed<T: Element, M: Mask>(
    o: ArrayViewMut4<'_, T>,
    lse: ArrayViewMut3<'_, T::Acc>,
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T::Acc>,
    observer: Option<&dyn Observer<T::Acc>>,
) -> Result<(), Error> {
    let (batch, heads, queries, d) = q.dim();
    let (_, key_heads, keys, _) = k.dim();
    let e = v.dim().3;
    let sizes = Sizes { batch, heads, key_heads, queries, keys, d, e };
    check_sizes(&sizes, q.shape(), v.shape())?;
    check_shape("k", k.shape(), &[batch, key_heads, keys, d])?;
    check_shape("v", v.shape(), &[batch, key_heads, keys, e])?;
    check_shape("o", o.shape(), &[batch, heads, queries, e])?;
    check_shape("lse", lse.shape(), &[batch, heads, queries])?;
    let (batch, outputs) = (Batch::Dense { q, k, v }, Outputs::Dense { o, lse });
    forward(sizes, &batch, outputs, options, workspace, observer)
}

/// [`attention`] for sequences of different lengths, packed one after the other.
///
/// | argument | shape | |
/// | --- | --- | --- |
/// | `q` | `[total queries, H, D]` | |
/// | `k` | `[total keys, G, D]` | |
/// | `v` | `[total keys, G, E]` | |
/// | `query_offsets` | `[sequences + 1]` | sequence `s` has queries `query_offsets[s]..query_offsets[s + 1]` |
/// | `key_offsets` | `[sequences + 1]` | the same for keys |
///
/// Both offsets start at 0, never decrease and end at the total (`cu_seqlens` elsewhere). Sequences
/// may be empty. A sequence gets the same bits as in a call of its own.
///
/// # Errors
/// [`Error`] names the argument or option that does not fit.
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
    let mut o = try_array("o", (total, h, e))?;
    let mut lse = try_array("lse", (total, h))?;
    let workspace = &mut Workspace::new(d, e, &Tiling::default())?;
    let (o_view, lse_view) = (o.view_mut(), lse.view_mut());
    attention_varlen_into(
        o_view,
        lse_view,
        q,
        k,
        v,
        query_offsets,
        key_offsets,
        options,
        workspace,
    )?;
    Ok(AttentionVarlen { o, lse })
}

/// [`attention_varlen`] into the caller's `o` `[total queries, H, E]` and `lse`
/// `[total queries, H]`, both overwritten. Allocates nothing.
///
/// # Errors
/// As [`attention_varlen`]; [`Error::WorkspaceTooSmall`] if the workspace was made for smaller
/// sizes. The outputs are untouched then.
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
    let (total_queries, heads, d) = q.dim();
    let (total_keys, key_heads, _) = k.dim();
    let e = v.dim().2;
    let queries = longest("query_offsets", query_offsets, total_queries)?;
    let keys = longest("key_offsets", key_offsets, total_keys)?;
    check_shape("key_offsets", &[key_offsets.len()], &[query_offsets.len()])?;
    let sizes = Sizes { batch: query_offsets.len() - 1, heads, key_heads, queries, keys, d, e };
    check_sizes(&sizes, q.shape(), v.shape())?;
    check_shape("k", k.shape(), &[total_keys, key_heads, d])?;
    check_shape("v", v.shape(), &[total_keys, key_heads, e])?;
    check_shape("o", o.shape(), &[total_queries, heads, e])?;
    check_shape("lse", lse.shape(), &[total_queries, heads])?;
    let batch = Batch::Packed { q, k, v, query_offsets, key_offsets };
    forward(sizes, &batch, Outputs::Packed { o, lse }, options, workspace, None)
}

/// Checks cumulative lengths and returns the length of the longest sequence.
///
/// # Errors
/// Says what is wrong with them.
pub fn longest(option: &'static str, offsets: &[usize], total: usize) -> Result<usize, Error> {
    let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else {
        return Err(invalid(option, "at least one offset, 0", "empty"));
    };
    if first != 0 {
        return Err(invalid(option, "0 as the first offset", first));
    }
    if last != total {
        return Err(invalid(option, format!("{total}, the total, as the last offset"), last));
    }
    let mut longest = 0;
    for (sequence, pair) in offsets.windows(2).enumerate() {
        let Some(length) = pair[1].checked_sub(pair[0]) else {
            let got = format!("{} then {} at sequence {sequence}", pair[0], pair[1]);
            return Err(invalid(option, "offsets that never decrease", got));
        };
        longest = longest.max(length);
    }
    Ok(longest)
}

/// Runs a call whose shapes have been checked.
fn forward<T: Element, M: Mask>(
    sizes: Sizes,
    batch: &Batch<'_, T>,
    outputs: Outputs<'_, T>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T::Acc>,
    observer: Option<&dyn Observer<T::Acc>>,
) -> Result<(), Error> {
    workspace.check(sizes.d, sizes.e)?;
    let call = Call::new(options, sizes)?;
    call.check_sequences(|entry| batch.lengths(entry))?;
    if outputs.is_empty() {
        return Ok(());
    }
    Ok(Forward { call: &call, batch, outputs, workspace, observer }.compute()?)
}
