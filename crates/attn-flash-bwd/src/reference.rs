//! The oracle: the gradients as their formulas read (`docs/derivation.md`), one row of scores at a
//! time, in plain loops.
//!
//! Shares no code with the fast path, and does not read what the forward pass saved: the softmax is
//! that of `attn_flash`'s own oracle. [`attention_backward_reference`] says what the gradients are;
//! [`attention_backward_naive`] says how precise a plain program is in the same type, the yardstick
//! that the error of the fast path is measured with.

use std::ops::Range;

use attn_flash::{
    Mask, Options, Pair, attention_naive, attention_reference, attention_varlen_reference,
};
use ndarray::{
    Array1, Array2, Array3, Array4, ArrayD, ArrayView1, ArrayView2, ArrayView3, ArrayView4,
    ArrayViewD, ArrayViewMut1, Axis, Slice,
};
use tensor_utils::{Element, Float, broadcast_4d, check_shape};

use crate::{Error, Gradients, Inputs, VarlenGradients, VarlenInputs};

/// The gradients of attention, computed in `f64` throughout and not rounded; `o` and `lse` of the
/// inputs are not read.
///
/// # Errors
/// [`Error`] names the argument that does not fit.
pub fn attention_backward_reference<T: Element, M: Mask>(
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Gradients<f64>, Error> {
    let forward = attention_reference(inputs.q.view(), inputs.k.view(), inputs.v.view(), options)?;
    plain(inputs, options, forward.lse.view())
}

/// The same with all arithmetic in the compute type of `T`, and the gradients rounded to `T`.
///
/// # Errors
/// [`Error`] names the argument that does not fit.
pub fn attention_backward_naive<T: Element, M: Mask>(
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<Gradients<T>, Error> {
    let forward = attention_naive(inputs.q.view(), inputs.k.view(), inputs.v.view(), options)?;
    let exact: Gradients<T::Acc> = plain(inputs, options, forward.lse.view())?;
    Ok(Gradients {
        dq: exact.dq.mapv(T::from_acc),
        dk: exact.dk.mapv(T::from_acc),
        dv: exact.dv.mapv(T::from_acc),
        delta: exact.delta,
        dbias: exact.dbias.map(|dbias| dbias.mapv(T::from_acc)),
        dsinks: exact.dsinks,
    })
}

/// [`attention_backward_reference`] of each sequence of a packed batch.
///
/// # Errors
/// [`Error`] names the argument that does not fit.
pub fn attention_varlen_backward_reference<T: Element, M: Mask>(
    inputs: &VarlenInputs<'_, T>,
    options: &Options<'_, T, M>,
) -> Result<VarlenGradients<f64>, Error> {
    let VarlenInputs { q, k, v, query_offsets, key_offsets, o, lse, d_o, d_lse } = inputs;
    let (q, k, v) = (q.view(), k.view(), v.view());
    let forward = attention_varlen_reference(q, k, v, query_offsets, key_offsets, options)?;
    check_shape("o", o.shape(), forward.o.shape())?;
    check_shape("lse", lse.shape(), forward.lse.shape())?;
    check_shape("d_o", d_o.shape(), forward.o.shape())?;
    if let Some(d_lse) = d_lse {
        check_shape("d_lse", d_lse.shape(), forward.lse.shape())?;
    }

    let (batch, heads) = (query_offsets.len() - 1, q.dim().1);
    let longest = |offsets: &[usize]| offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let padded = [batch, heads, longest(query_offsets), longest(key_offsets)];
    let bias = options.bias.as_ref().map(|bias| broadcast_4d("bias", bias, padded)).transpose()?;
    let mask = options.mask.as_ref().map(|mask| broadcast_4d("mask", mask, padded)).transpose()?;
    let mut all = VarlenGradients {
        dq: Array3::zeros(q.dim()),
        dk: Array3::zeros(k.dim()),
        dv: Array3::zeros(v.dim()),
        delta: Array2::zeros(forward.lse.dim()),
        dbias: options.bias.as_ref().map(|bias| ArrayD::zeros(bias.raw_dim())),
        dsinks: options.sinks.map(|sinks| Array1::zeros(sinks.len())),
    };
    for sequence in 0..batch {
        let queries = query_offsets[sequence]..query_offsets[sequence + 1];
        let keys = key_offsets[sequence]..key_offsets[sequence + 1];
        let (n, m) = (queries.len(), keys.len());
        let of_sequence = Options {
            scale: options.scale,
            causal: options.causal,
            query_offset: options.query_offset,
            window: options.window,
            softcap: options.softcap,
            bias: bias.map(|bias| part(bias, sequence, n, m)),
            mask: mask.map(|mask| part(mask, sequence, n, m)),
            key_lengths: options.key_lengths.map(|lengths| &lengths[sequence..=sequence]),
            alibi_slopes: options.alibi_slopes.as_ref().map(|slopes| {
                let row = if slopes.nrows() == 1 { 0 } else { sequence };
                slopes.slice_axis(Axis(0), Slice::from(row..=row))
            }),
            sinks: options.sinks,
            tree: options.tree,
            user_mask: InSequence { mask: &options.user_mask, sequence },
        };
        let inputs = Inputs {
            q: heads_first(q, &queries),
            k: heads_first(k, &keys),
            v: heads_first(v, &keys),
            o: heads_first(o.view(), &queries),
            lse: lse_heads_first(lse.view(), &queries),
            d_o: heads_first(d_o.view(), &queries),
            d_lse: d_lse.as_ref().map(|d_lse| lse_heads_first(d_lse.view(), &queries)),
        };
        let lse = lse_heads_first(forward.lse.view(), &queries);
        let one: Gradients<f64> = plain(&inputs, &of_sequence, lse)?;
        scatter(&one.dq, &mut all.dq, queries.start);
        scatter(&one.dk, &mut all.dk, keys.start);
        scatter(&one.dv, &mut all.dv, keys.start);
        for ((_, head, i), &delta) in one.delta.indexed_iter() {
            all.delta[[queries.start + i, head]] = delta;
        }
        if let (Some(all), Some(one)) = (&mut all.dbias, &one.dbias) {
            for (at, &x) in one.indexed_iter() {
                let at = source(all.shape(), [sequence, at[1], at[2], at[3]]);
                all[&at[..]] += x;
            }
        }
        if let (Some(all), Some(one)) = (&mut all.dsinks, &one.dsinks) {
            *all += one;
        }
    }
    Ok(all)
}

/// The gradients with all arithmetic in `A`, given the exact lse.
fn plain<T: Element, A: Float, M: Mask>(
    inputs: &Inputs<'_, T>,
    options: &Options<'_, T, M>,
    lse: ArrayView3<'_, A>,
) -> Result<Gradients<A>, Error> {
    let (batch, heads, n, d) = inputs.q.dim();
    let (_, key_heads, m, e) = inputs.v.dim();
    check_shape("o", inputs.o.shape(), &[batch, heads, n, e])?;
    check_shape("lse", inputs.lse.shape(), &[batch, heads, n])?;
    check_shape("d_o", inputs.d_o.shape(), &[batch, heads, n, e])?;
    if let Some(d_lse) = &inputs.d_lse {
        check_shape("d_lse", d_lse.shape(), &[batch, heads, n])?;
    }
    let number = |x: f64| A::from_f64(x);
    let widen = |x: &ArrayView4<'_, T>| x.mapv(|x| number(x.to_f64()));
    let (q, k, v, d_o) = (widen(&inputs.q), widen(&inputs.k), widen(&inputs.v), widen(&inputs.d_o));
    let scale = number(options.scale.unwrap_or(1.0 / (d as f64).sqrt()));
    let cap = options.softcap.map(number);
    let scores = Scores::new(options, [batch, heads, n, m])?;

    let mut g = Gradients {
        dq: Array4::from_elem(q.dim(), A::ZERO),
        dk: Array4::from_elem(k.dim(), A::ZERO),
        dv: Array4::from_elem(v.dim(), A::ZERO),
        delta: Array3::from_elem(lse.dim(), A::ZERO),
        dbias: options.bias.as_ref().map(|bias| ArrayD::from_elem(bias.raw_dim(), A::ZERO)),
        dsinks: options.sinks.map(|sinks| Array1::from_elem(sinks.len(), A::ZERO)),
    };
    for ((b, h, i), &lse) in lse.indexed_iter() {
        if lse == A::NEG_INFINITY {
            continue;
        }
        let key_head = h / (heads / key_heads);
        // Of every visible key: P, dP and the derivative of the softcap.
        let mut visible = Vec::new();
        for j in 0..m {
            let pair = Pair { batch: b, head: h, query: i, key: j };
            if !scores.is_visible(pair) {
                continue;
            }
            let mut score = scale * dot(row(&q, b, h, i), row(&k, b, key_head, j));
            let mut slope = A::ONE;
            if let Some(cap) = cap {
                let t = Float::tanh(score / cap);
                (score, slope) = (cap * t, A::ONE - t * t);
            }
            score += number(scores.bias(pair)) - number(scores.alibi(pair));
            if score != A::NEG_INFINITY {
                let dp = dot(row(&d_o, b, h, i), row(&v, b, key_head, j));
                visible.push((j, Float::exp(score - lse), dp, slope));
            }
        }
        let delta: A = visible.iter().map(|&(_, p, dp, _)| p * dp).sum();
        g.delta[[b, h, i]] = delta;
        let d_lse = inputs.d_lse.as_ref().map_or(A::ZERO, |d| number(d[[b, h, i]].to_f64()));
        let delta = delta - d_lse;
        for (j, p, dp, slope) in visible {
            let ds = p * (dp - delta);
            if let Some(dbias) = &mut g.dbias {
                let at = source(dbias.shape(), [b, h, i, j]);
                dbias[&at[..]] += ds;
            }
            let d_dot = scale * (ds * slope);
            add(row_mut(&mut g.dq, b, h, i), d_dot, row(&k, b, key_head, j));
            add(row_mut(&mut g.dk, b, key_head, j), d_dot, row(&q, b, h, i));
            add(row_mut(&mut g.dv, b, key_head, j), p, row(&d_o, b, h, i));
        }
        if let (Some(dsinks), Some(sinks)) = (&mut g.dsinks, options.sinks) {
            let sink = number(sinks[h].to_f64());
            // A sink of -inf is none.
            if sink != A::NEG_INFINITY {
                dsinks[h] += -Float::exp(sink - lse) * delta;
            }
        }
    }
    Ok(g)
}

/// What the options say of a pair.
struct Scores<'a, 'o, T: Element, M: Mask> {
    options: &'a Options<'o, T, M>,
    bias: Option<ArrayView4<'a, T>>,
    mask: Option<ArrayView4<'a, bool>>,
    n: usize,
    m: usize,
}

impl<'a, 'o, T: Element, M: Mask> Scores<'a, 'o, T, M> {
    fn new(options: &'a Options<'o, T, M>, shape: [usize; 4]) -> Result<Self, Error> {
        let bias = options.bias.as_ref().map(|bias| broadcast_4d("bias", bias, shape));
        let mask = options.mask.as_ref().map(|mask| broadcast_4d("mask", mask, shape));
        let [_, _, n, m] = shape;
        Ok(Self { options, bias: bias.transpose()?, mask: mask.transpose()?, n, m })
    }

    /// The query's position minus the key's.
    fn distance(&self, at: Pair) -> i128 {
        let (n, m) = (self.n as i128, self.m as i128);
        let first = self.options.query_offset.map_or(m - n, |offset| offset as i128);
        first + at.query as i128 - at.key as i128
    }

    fn bias(&self, at: Pair) -> f64 {
        self.bias.map_or(0.0, |bias| bias[[at.batch, at.head, at.query, at.key]].to_f64())
    }

    fn alibi(&self, at: Pair) -> f64 {
        self.options.alibi_slopes.as_ref().map_or(0.0, |slopes| {
            let row = if slopes.nrows() == 1 { 0 } else { at.batch };
            slopes[[row, at.head]].to_f64() * self.distance(at).abs() as f64
        })
    }

    /// Every condition but that the score is not -inf; a bias of -inf counts here, whatever it is
    /// added to.
    fn is_visible(&self, at: Pair) -> bool {
        let options = self.options;
        let distance = self.distance(at);
        let within = |length: Option<usize>, d: i128| length.is_none_or(|l| d <= l as i128);
        (!options.causal || distance >= 0)
            && within(options.window.left, distance)
            && within(options.window.right, -distance)
            && options.key_lengths.is_none_or(|lengths| at.key < lengths[at.batch])
            && self.mask.is_none_or(|mask| mask[[at.batch, at.head, at.query, at.key]])
            && self.bias(at) != f64::NEG_INFINITY
            && options.tree.is_none_or(|tree| {
                let context = self.m - self.n;
                at.key < context || tree.contains(at.query, at.key - context)
            })
            && options.user_mask.visible(at)
    }
}

fn dot<A: Float>(a: ArrayView1<'_, A>, b: ArrayView1<'_, A>) -> A {
    a.iter().zip(b).map(|(&a, &b)| a * b).sum()
}

/// `to += factor * row`.
fn add<A: Float>(to: ArrayViewMut1<'_, A>, factor: A, row: ArrayView1<'_, A>) {
    to.into_iter().zip(row).for_each(|(to, &x)| *to += factor * x);
}

/// Row `[a, b, c, ..]`.
fn row<A>(x: &Array4<A>, a: usize, b: usize, c: usize) -> ArrayView1<'_, A> {
    x.index_axis(Axis(0), a).index_axis_move(Axis(0), b).index_axis_move(Axis(0), c)
}

/// The same, to change.
fn row_mut<A>(x: &mut Array4<A>, a: usize, b: usize, c: usize) -> ArrayViewMut1<'_, A> {
    x.index_axis_mut(Axis(0), a).index_axis_move(Axis(0), b).index_axis_move(Axis(0), c)
}

/// The index of the element that stands for a pair in an array of a shape that broadcasts.
fn source(shape: &[usize], pair: [usize; 4]) -> Vec<usize> {
    let pair = &pair[4 - shape.len()..];
    pair.iter().zip(shape).map(|(&at, &length)| if length == 1 { 0 } else { at }).collect()
}

/// A sequence's part, `[1, H, N, M]`, of an option for the whole packed batch.
fn part<T>(padded: ArrayView4<'_, T>, sequence: usize, n: usize, m: usize) -> ArrayViewD<'_, T> {
    let padded = padded.slice_axis_move(Axis(0), Slice::from(sequence..=sequence));
    let padded = padded.slice_axis_move(Axis(2), Slice::from(..n));
    padded.slice_axis_move(Axis(3), Slice::from(..m)).into_dyn()
}

/// `[rows, heads, size]` of a packed batch as `[1, heads, rows, size]`.
fn heads_first<'a, T>(x: ArrayView3<'a, T>, rows: &Range<usize>) -> ArrayView4<'a, T> {
    let x = x.slice_axis_move(Axis(0), Slice::from(rows.clone()));
    x.permuted_axes([1, 0, 2]).insert_axis(Axis(0))
}

/// `[rows, heads]` of a packed batch as `[1, heads, rows]`.
fn lse_heads_first<'a, T>(x: ArrayView2<'a, T>, rows: &Range<usize>) -> ArrayView3<'a, T> {
    let x = x.slice_axis_move(Axis(0), Slice::from(rows.clone()));
    x.reversed_axes().insert_axis(Axis(0))
}

/// `[1, heads, rows, size]` into `[rows, heads, size]` of a packed batch.
fn scatter(from: &Array4<f64>, to: &mut Array3<f64>, first: usize) {
    for ((_, head, i, c), &x) in from.indexed_iter() {
        to[[first + i, head, c]] = x;
    }
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
