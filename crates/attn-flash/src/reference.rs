//! The oracle: attention as its formula reads, one row of scores at a time, in plain loops.
//!
//! Shares no code with the fast path. [`attention_reference`] says what the result is;
//! [`attention_naive`] says how precise a plain program is in the same type, the yardstick that the
//! error of the fast path is measured with.

use std::ops::Range;

use ndarray::{
    Array2, Array3, Array4, ArrayView, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewD,
    Axis, Dimension, Slice,
};
use tensor_utils::{Element, Float, broadcast_4d, check_not_empty, check_shape};

use crate::{Attention, AttentionVarlen, Error, Mask, Options, Pair};

/// Attention of `q` `[B, H, N, D]`, `k` `[B, G, M, D]` and `v` `[B, G, M, E]`, computed in `f64`
/// throughout and not rounded.
///
/// A row in which nothing is visible has `o = 0` and `lse = -inf`, or the sink as its lse.
///
/// # Errors
/// [`Error`] names the argument that does not fit.
pub fn attention_reference<T: Element, M: Mask>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Attention<f64>, Error> {
    let (o, lse) = plain::<T, f64, M>(q, k, v, options)?;
    Ok(Attention { o, lse })
}

/// The same with all arithmetic in the compute type of `T`, and the output rounded to `T`.
///
/// # Errors
/// [`Error`] names the argument that does not fit.
pub fn attention_naive<T: Element, M: Mask>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Attention<T>, Error> {
    let (o, lse) = plain::<T, T::Acc, M>(q, k, v, options)?;
    Ok(Attention { o: o.mapv(T::from_acc), lse })
}

/// [`attention_reference`] of each sequence of a packed batch: `q` `[total queries, H, D]`, `k`
/// `[total keys, G, D]` and `v` `[total keys, G, E]`, where sequence `s` has the queries
/// `query_offsets[s]..query_offsets[s + 1]` and the keys `key_offsets[s]..key_offsets[s + 1]`.
///
/// # Errors
/// [`Error`] names the argument that does not fit.
pub fn attention_varlen_reference<T: Element, M: Mask>(
    q: ArrayView3<'_, T>,
    k: ArrayView3<'_, T>,
    v: ArrayView3<'_, T>,
    query_offsets: &[usize],
    key_offsets: &[usize],
    options: &Options<'_, T, M>,
) -> Result<AttentionVarlen<f64>, Error> {
    let (total_queries, heads, _) = q.dim();
    check_inputs(q.shape(), k.shape(), v.shape())?;
    check_offsets("query_offsets", query_offsets, total_queries)?;
    check_offsets("key_offsets", key_offsets, k.dim().0)?;
    let sequences = query_offsets.len() - 1;
    if key_offsets.len() != query_offsets.len() {
        return option_error("key_offsets", "as many as query_offsets", key_offsets.len());
    }
    let longest_n = query_offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let longest_m = key_offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let padded = check_options([sequences, heads, longest_n, longest_m], options, None)?;

    let mut o = Array3::zeros((total_queries, heads, v.dim().2));
    let mut lse = Array2::zeros((total_queries, heads));
    for sequence in 0..sequences {
        let queries = query_offsets[sequence]..query_offsets[sequence + 1];
        let keys = key_offsets[sequence]..key_offsets[sequence + 1];
        let of_sequence = Options {
            scale: options.scale,
            causal: options.causal,
            query_offset: options.query_offset,
            window: options.window,
            softcap: options.softcap,
            bias: padded.bias.map(|bias| of_sequence(bias, sequence, queries.len(), keys.len())),
            mask: padded.mask.map(|mask| of_sequence(mask, sequence, queries.len(), keys.len())),
            key_lengths: options.key_lengths.map(|lengths| &lengths[sequence..=sequence]),
            alibi_slopes: padded.slopes.map(|slopes| one(slopes, sequence)),
            sinks: options.sinks,
            tree: options.tree,
            user_mask: InSequence { mask: &options.user_mask, sequence },
        };
        let q = heads_first(q, &queries);
        let (k, v) = (heads_first(k, &keys), heads_first(v, &keys));
        let (o_s, lse_s) = plain::<T, f64, _>(q.view(), k.view(), v.view(), &of_sequence)?;
        for ((_, head, i, c), &x) in o_s.indexed_iter() {
            o[[queries.start + i, head, c]] = x;
        }
        for ((_, head, i), &x) in lse_s.indexed_iter() {
            lse[[queries.start + i, head]] = x;
        }
    }
    Ok(AttentionVarlen { o, lse })
}

/// Attention with all arithmetic in `A`; returns `o` and the lse.
fn plain<T: Element, A: Float, M: Mask>(
    q: ArrayView4<'_, T>,
    k: ArrayView4<'_, T>,
    v: ArrayView4<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<(Array4<A>, Array3<A>), Error> {
    let (batch, heads, n, d) = q.dim();
    let (_, key_heads, m, e) = v.dim();
    check_shape("k", k.shape(), &[batch, k.dim().1, k.dim().2, d])?;
    check_inputs(q.shape(), k.shape(), v.shape())?;
    let checked = check_options([batch, heads, n, m], options, Some((n, m)))?;

    let number = |x: f64| A::from_f64(x);
    let widen = |x: ArrayView4<'_, T>| x.mapv(|x| number(x.to_f64()));
    let (q, k, v) = (widen(q), widen(k), widen(v));
    let scale = number(options.scale.unwrap_or(1.0 / (d as f64).sqrt()));
    let offset = options.query_offset.map_or(m as i128 - n as i128, |offset| offset as i128);

    let score = |at: Pair, distance: i128| {
        let q_row = row(&q, at.batch, at.head, at.query);
        let k_row = row(&k, at.batch, at.head / (heads / key_heads), at.key);
        let dot: A = q_row.iter().zip(k_row).map(|(&q, &k)| q * k).sum();
        let mut score = scale * dot;
        let pair = [at.batch, at.head, at.query, at.key];
        if let Some(cap) = options.softcap.map(number) {
            score = cap * Float::tanh(score / cap);
        }
        if let Some(bias) = checked.bias {
            score += number(bias[pair].to_f64());
        }
        if let Some(slopes) = checked.slopes {
            let slope = number(slopes[[at.batch, at.head]].to_f64());
            score += -slope * number(distance.abs() as f64);
        }
        score
    };

    let mut o = Array4::from_elem((batch, heads, n, e), A::ZERO);
    let mut lse = Array3::from_elem((batch, heads, n), A::NEG_INFINITY);
    for ((b, h, i), lse) in lse.indexed_iter_mut() {
        let mut visible = Vec::new();
        for j in 0..m {
            let at = Pair { batch: b, head: h, query: i, key: j };
            let distance = i as i128 + offset - j as i128;
            if is_visible(at, distance, m - n.min(m), &checked, options) {
                let score = score(at, distance);
                if score != A::NEG_INFINITY {
                    visible.push((j, score));
                }
            }
        }
        let sink = options.sinks.map_or(A::NEG_INFINITY, |sinks| number(sinks[h].to_f64()));
        let max = visible.iter().fold(sink, |max, &(_, score)| max.max_nan(score));
        if max == A::NEG_INFINITY {
            continue;
        }
        let sum: A = visible.iter().map(|&(_, score)| (score - max).exp()).sum();
        let sum = sum + (sink - max).exp();
        *lse = max + sum.ln();
        for (j, score) in visible {
            let p = (score - max).exp() / sum;
            for (c, &v) in row(&v, b, h / (heads / key_heads), j).iter().enumerate() {
                o[[b, h, i, c]] += p * v;
            }
        }
    }
    Ok((o, lse))
}

/// Row `[a, b, c, ..]`.
fn row<A>(x: &Array4<A>, a: usize, b: usize, c: usize) -> ArrayView1<'_, A> {
    let plane = x.index_axis(Axis(0), a).index_axis_move(Axis(0), b);
    plane.index_axis_move(Axis(0), c)
}

/// Every condition but that the score is not -inf; a bias of -inf counts here, whatever it is added
/// to. `distance` is the query's position minus the key's.
fn is_visible<T: Element, M: Mask>(
    at: Pair,
    distance: i128,
    before_tree: usize,
    checked: &Checked<'_, T>,
    options: &Options<'_, T, M>,
) -> bool {
    let pair = [at.batch, at.head, at.query, at.key];
    let within = |length: Option<usize>, d: i128| length.is_none_or(|length| d <= length as i128);
    (!options.causal || distance >= 0)
        && within(options.window.left, distance)
        && within(options.window.right, -distance)
        && options.key_lengths.is_none_or(|lengths| at.key < lengths[at.batch])
        && checked.mask.is_none_or(|mask| mask[pair])
        && checked.bias.is_none_or(|bias| bias[pair].to_f64() != f64::NEG_INFINITY)
        && options.tree.is_none_or(|tree| {
            at.key < before_tree || tree.contains(at.query, at.key - before_tree)
        })
        && options.user_mask.visible(at)
}

fn check_inputs(q: &[usize], k: &[usize], v: &[usize]) -> Result<(), Error> {
    // The heads are axis 1 of a batch and of a packed batch alike.
    let size_axis = q.len() - 1;
    check_not_empty("q", q, size_axis, "head size")?;
    check_not_empty("v", v, size_axis, "value size")?;
    let like_k = |size| [&k[..size_axis], &[size]].concat();
    check_shape("k", k, &like_k(q[size_axis]))?;
    check_shape("v", v, &like_k(v[size_axis]))?;
    let (query_heads, key_heads) = (q[1], k[1]);
    if !query_heads.is_multiple_of(key_heads) {
        return Err(Error::HeadsNotDivisible { query_heads, key_heads });
    }
    Ok(())
}

/// The options that are arrays, broadcast.
struct Checked<'a, T: Element> {
    bias: Option<ArrayView4<'a, T>>,
    mask: Option<ArrayView4<'a, bool>>,
    slopes: Option<ArrayView2<'a, T::Acc>>,
}

/// `lengths` is `(N, M)` of a single sequence; `None` if there are many, which are checked one by
/// one.
fn check_options<'a, T: Element, M: Mask>(
    shape: [usize; 4],
    options: &'a Options<'_, T, M>,
    lengths: Option<(usize, usize)>,
) -> Result<Checked<'a, T>, Error> {
    let [batch, heads, ..] = shape;
    let rounded = |x: f64| T::Acc::from_f64(x).to_f64();
    if let Some(scale) = options.scale.filter(|&scale| !rounded(scale).is_finite()) {
        return option_error("scale", "finite in the compute type", scale);
    }
    let usable = |cap: f64| cap > 0.0 && cap.is_finite();
    if let Some(cap) = options.softcap.filter(|&cap| !usable(rounded(cap))) {
        return option_error("softcap", "finite and above 0 in the compute type", cap);
    }
    if let Some(sinks) = options.sinks {
        check_shape("sinks", &[sinks.len()], &[heads])?;
    }
    if let Some(key_lengths) = options.key_lengths {
        check_shape("key_lengths", &[key_lengths.len()], &[batch])?;
    }
    if let Some((n, m)) = lengths {
        let too_long = |lengths: &[usize]| lengths.iter().copied().find(|&length| length > m);
        if let Some(length) = options.key_lengths.and_then(too_long) {
            return option_error("key_lengths", &format!("at most {m} keys each"), length);
        }
        if let Some(tree) = options.tree.filter(|tree| tree.len() != n || n > m) {
            let expected = format!("a tree of the {n} queries, which are the last of {m} keys");
            return option_error("tree", &expected, format!("a tree of {} nodes", tree.len()));
        }
    }
    let slopes = options.alibi_slopes.as_ref().map(|slopes| {
        let rows = if slopes.nrows() == 1 { 1 } else { batch };
        check_shape("alibi_slopes", slopes.shape(), &[rows, heads])?;
        Ok::<_, Error>(slopes.broadcast((batch, heads)))
    });
    Ok(Checked {
        bias: options.bias.as_ref().map(|bias| broadcast_4d("bias", bias, shape)).transpose()?,
        mask: options.mask.as_ref().map(|mask| broadcast_4d("mask", mask, shape)).transpose()?,
        slopes: slopes.transpose()?.flatten(),
    })
}

fn check_offsets(arg: &'static str, offsets: &[usize], total: usize) -> Result<(), Error> {
    let ends = (offsets.first(), offsets.last());
    if ends != (Some(&0), Some(&total)) || !offsets.is_sorted() {
        return option_error(arg, &format!("ascending from 0 to {total}"), format!("{offsets:?}"));
    }
    Ok(())
}

fn option_error<R>(
    option: &'static str,
    expected: &str,
    got: impl std::fmt::Display,
) -> Result<R, Error> {
    Err(Error::Option { option, expected: expected.to_owned(), got: got.to_string() })
}

/// A sequence's part, `[1, H, N, M]`, of an option for the whole packed batch.
fn of_sequence<T>(
    padded: ArrayView4<'_, T>,
    sequence: usize,
    n: usize,
    m: usize,
) -> ArrayViewD<'_, T> {
    let padded = one(padded, sequence);
    let padded = padded.slice_axis_move(Axis(2), Slice::from(..n));
    padded.slice_axis_move(Axis(3), Slice::from(..m)).into_dyn()
}

/// The part at `index` of the first axis, which keeps length 1.
fn one<T, D: Dimension>(x: ArrayView<'_, T, D>, index: usize) -> ArrayView<'_, T, D> {
    x.slice_axis_move(Axis(0), Slice::from(index..=index))
}

/// `[rows, heads, size]` of a packed batch to `[1, heads, rows, size]`.
fn heads_first<T: Element>(x: ArrayView3<'_, T>, rows: &Range<usize>) -> Array4<T> {
    let x = x.slice_axis(Axis(0), Slice::from(rows.clone()));
    x.permuted_axes([1, 0, 2]).insert_axis(Axis(0)).to_owned()
}

/// The mask that a sequence of a packed batch sees.
#[derive(Debug)]
struct InSequence<'a, M> {
    mask: &'a M,
    sequence: usize,
}

impl<M: Mask> Mask for InSequence<'_, M> {
    fn visible(&self, at: Pair) -> bool {
        self.mask.visible(Pair { batch: self.sequence, ..at })
    }
}
