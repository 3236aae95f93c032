//! A checked call: options resolved against the shapes they came with.

use ndarray::{ArrayView2, ArrayView4};
use tensor_utils::{Element, Float, broadcast_4d, check_not_empty, check_shape};

use crate::mask::RowMask;
use crate::{AncestorMask, Error, Mask, Options, Window};

/// The sizes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Batch entries, or sequences of a packed batch.
    pub batch: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub key_heads: usize,
    /// Queries (of the longest sequence).
    pub queries: usize,
    /// Keys (of the longest sequence).
    pub keys: usize,
    /// Head size.
    pub d: usize,
    /// Value size.
    pub e: usize,
}

impl Sizes {
    /// Query heads that share a key/value head.
    pub fn group(&self) -> usize {
        self.heads / self.key_heads.max(1)
    }
}

/// Options of a call, checked, broadcast and in the compute type.
#[derive(Debug)]
pub struct Call<'a, T: Element> {
    /// Sizes of the call.
    pub sizes: Sizes,
    /// Factor of the dot products.
    pub scale: T::Acc,
    /// See [`Options::causal`].
    pub causal: bool,
    /// See [`Options::query_offset`].
    pub query_offset: Option<isize>,
    /// See [`Options::window`].
    pub window: Window,
    /// See [`Options::softcap`].
    pub softcap: Option<T::Acc>,
    /// Broadcast to `[B, H, N, M]`.
    pub bias: Option<ArrayView4<'a, T>>,
    /// Broadcast to `[B, H, N, M]`.
    pub mask: Option<ArrayView4<'a, bool>>,
    /// `[B]`.
    pub key_lengths: Option<&'a [usize]>,
    /// Broadcast to `[B, H]`.
    pub alibi_slopes: Option<ArrayView2<'a, T::Acc>>,
    /// `[H]`.
    pub sinks: Option<&'a [T::Acc]>,
    /// See [`Options::tree`].
    pub tree: Option<&'a AncestorMask>,
    /// See [`Options::user_mask`].
    pub user_mask: &'a dyn RowMask<T::Acc>,
}

impl<'a, T: Element> Call<'a, T> {
    /// Checks everything but the shapes of `q`, `k`, `v` and the outputs.
    ///
    /// # Errors
    /// Names the option.
    pub fn new<M: Mask>(options: &'a Options<'_, T, M>, sizes: Sizes) -> Result<Self, Error> {
        let Sizes { batch, heads, queries, keys, d, .. } = sizes;
        // Checked as the numbers that are computed with: not all of `f64` fit into the compute type.
        let scale_f64 = options.scale.unwrap_or(1.0 / (d as f64).sqrt());
        let scale = T::Acc::from_f64(scale_f64);
        if !scale.is_finite() {
            let expected = format!("a finite number in {}", T::Acc::NAME);
            return Err(invalid("scale", expected, format_args!("{scale_f64:?}")));
        }
        let softcap = options.softcap.map(T::Acc::from_f64);
        if let (Some(cap), Some(got)) = (softcap, options.softcap)
            && !(cap.is_finite() && cap > T::Acc::ZERO)
        {
            let expected = format!("a finite number above 0 in {}", T::Acc::NAME);
            return Err(invalid("softcap", expected, format_args!("{got:?}")));
        }
        let target = [batch, heads, queries, keys];
        let bias = options.bias.as_ref().map(|bias| broadcast_4d("bias", bias, target));
        let mask = options.mask.as_ref().map(|mask| broadcast_4d("mask", mask, target));
        if let Some(lengths) = options.key_lengths {
            check_shape("key_lengths", &[lengths.len()], &[batch])?;
            if let Some(entry) = lengths.iter().position(|&length| length > keys) {
                let expected = format!("at most the {keys} keys of batch entry {entry}");
                return Err(invalid("key_lengths", expected, lengths[entry]));
            }
        }
        let alibi_slopes = match &options.alibi_slopes {
            None => None,
            Some(slopes) => {
                if slopes.nrows() != 1 {
                    check_shape("alibi_slopes", slopes.shape(), &[batch, heads])?;
                }
                check_shape("alibi_slopes", slopes.shape(), &[slopes.nrows(), heads])?;
                slopes.broadcast((batch, heads))
            }
        };
        if let Some(sinks) = options.sinks {
            check_shape("sinks", &[sinks.len()], &[heads])?;
        }
        Ok(Self {
            sizes,
            scale,
            causal: options.causal,
            query_offset: options.query_offset,
            window: options.window,
            softcap,
            bias: bias.transpose()?,
            mask: mask.transpose()?,
            key_lengths: options.key_lengths,
            alibi_slopes,
            sinks: options.sinks,
            tree: options.tree,
            user_mask: &options.user_mask,
        })
    }

    /// Checks what depends on the numbers of queries and keys of each batch entry, which `lengths`
    /// gives.
    ///
    /// # Errors
    /// If the tree or a key length does not fit them.
    pub fn check_sequences(&self, lengths: impl Fn(usize) -> (usize, usize)) -> Result<(), Error> {
        if let Some(tree) = self.tree {
            let Sizes { batch, queries, keys, .. } = self.sizes;
            // A batch without entries still has lengths.
            check_tree(tree, queries, keys)?;
            (0..batch).map(&lengths).try_for_each(|(n, m)| check_tree(tree, n, m))?;
        }
        for (batch, &length) in self.key_lengths.unwrap_or(&[]).iter().enumerate() {
            let (_, keys) = lengths(batch);
            if length > keys {
                let expected = format!("at most the {keys} keys of sequence {batch}");
                return Err(invalid("key_lengths", expected, length));
            }
        }
        Ok(())
    }

    /// Batch entry `batch` with its own numbers of queries and keys.
    pub fn sequence(&self, batch: usize, queries: usize, keys: usize) -> Sequence {
        let offset = match self.query_offset {
            Some(offset) => offset as i64,
            None => keys as i64 - queries as i64,
        };
        let key_length = self.key_lengths.map_or(keys, |lengths| lengths[batch]);
        Sequence { batch, queries, keys, key_length, offset }
    }
}

/// Whether the nodes of the tree are the queries, and the last keys.
fn check_tree(tree: &AncestorMask, queries: usize, keys: usize) -> Result<(), Error> {
    let got = || format!("{} nodes", tree.len());
    if tree.len() != queries {
        let expected = format!("one node for each of the {queries} queries");
        return Err(invalid("tree", expected, got()));
    }
    if tree.len() > keys {
        return Err(invalid("tree", format!("at most as many nodes as keys, {keys}"), got()));
    }
    Ok(())
}

/// One batch entry of a call.
#[derive(Debug, Clone, Copy)]
pub struct Sequence {
    /// Its index.
    pub batch: usize,
    /// Its number of queries.
    pub queries: usize,
    /// Its number of keys.
    pub keys: usize,
    /// Keys at or past it are masked.
    pub key_length: usize,
    /// Position of query 0.
    pub offset: i64,
}

/// Checks the shapes that all forms of the call have in common.
///
/// # Errors
/// If a head is empty or the heads cannot be shared out.
pub fn check_sizes(sizes: &Sizes, q: &[usize], v: &[usize]) -> Result<(), Error> {
    check_not_empty("q", q, q.len() - 1, "head size")?;
    check_not_empty("v", v, v.len() - 1, "value size")?;
    let Sizes { heads, key_heads, .. } = *sizes;
    let divisible = if key_heads == 0 { heads == 0 } else { heads % key_heads == 0 };
    if !divisible {
        return Err(Error::HeadsNotDivisible { query_heads: heads, key_heads });
    }
    Ok(())
}

/// An [`Error::Option`].
pub fn invalid(option: &'static str, expected: impl Into<String>, got: impl ToString) -> Error {
    Error::Option { option, expected: expected.into(), got: got.to_string() }
}
