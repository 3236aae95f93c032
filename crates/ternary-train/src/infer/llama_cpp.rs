//! The operations of a step in the order in which llama.cpp adds and rounds, to check an exported file
//! with, token for token.
//!
//! llama.cpp rounds activations to int8 before it multiplies them with `Q2_0`. A number that another
//! order of additions moves in its last bit can lie at the edge between two integers; one step of int8
//! more or less goes on into all later layers and tokens, and where two tokens are nearly equal the
//! other one is chosen. So only the same order throughout finds the same tokens of any model.
//!
//! The order is that of ggml's processor backend (`ggml/src/ggml-cpu`: `quants.c`, `vec.h`, `ops.cpp`,
//! `llamafile/sgemm.cpp`) as it runs with AVX-512: vectors of 16, multiplications fused with the
//! additions after them unless a comment says otherwise, keys and values in f32, no flash attention,
//! one sequence, its prompt in one piece. Plain loops: speed is no concern here.

use std::iter;

use ndarray::{Array2, Array3, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use rayon::prelude::*;
use tensor_utils::{f16, try_array};

use crate::ops::Rope;
use crate::{Error, Ternary};

/// Elements of a vector.
const LANES: usize = 16;
/// Activations that share a scale (`Q8_0`).
const ACTIVATIONS: usize = 32;
/// Weights that share a scale (`Q2_0`).
const WEIGHTS: usize = 64;
/// Rows of the cache that are read together; those beyond the sequence count with probability 0.
const CACHE_ROWS: usize = 256;

/// Weights of a type that exported files have.
#[derive(Debug, Clone, PartialEq)]
pub enum Weights {
    /// `F32`.
    Float(Array2<f32>),
    /// `Q2_0`: blocks of 64 divide the columns and the groups.
    Ternary(Ternary),
}

impl Weights {
    /// Rows and columns.
    pub(super) fn dim(&self) -> (usize, usize) {
        match self {
            Self::Float(w) => w.dim(),
            Self::Ternary(w) => w.codes.dim(),
        }
    }

    /// Bytes here, where codes take a byte each.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Float(w) => 4 * w.len(),
            Self::Ternary(w) => w.codes.len() + 4 * w.scales.len(),
        }
    }

    /// Element `[i, j]`.
    pub(super) fn at(&self, i: usize, j: usize) -> f32 {
        match self {
            Self::Float(w) => w[[i, j]],
            Self::Ternary(w) => f32::from(w.codes[[i, j]]) * w.scales[[i, j / w.group]],
        }
    }

    /// Writes `y = x W^T` `[tokens, rows]`, for `x` `[tokens, columns]`.
    pub(super) fn product_into(
        &self,
        mut y: ArrayViewMut2<'_, f32>,
        x: ArrayView2<'_, f32>,
    ) -> Result<(), Error> {
        let outputs: Vec<_> = y.axis_iter_mut(Axis(1)).collect();
        let outputs = outputs.into_par_iter().enumerate();
        match self {
            Self::Float(w) => {
                let dot = if x.nrows() > 1 && w.nrows().is_multiple_of(4) { dot_tile } else { dot };
                outputs.for_each(|(row, mut y)| {
                    let w = w.row(row);
                    let tokens = x.outer_iter().zip(&mut y);
                    tokens.for_each(|(x, y)| *y = dot(slice(&x), slice(&w)));
                });
            }
            Self::Ternary(w) => {
                let x = Blocks::new(x)?;
                outputs.for_each(|(row, mut y)| {
                    let (codes, scales) = (w.codes.row(row), w.scales.row(row));
                    for (token, y) in y.iter_mut().enumerate() {
                        *y = x.product(token, slice(&codes), slice(&scales), w.group);
                    }
                });
            }
        }
        Ok(())
    }
}

/// A row that is contiguous because its matrix is.
fn slice<'a, T>(row: &'a ndarray::ArrayView1<'_, T>) -> &'a [T] {
    row.as_slice().expect("a row of a matrix in standard layout")
}

/// Activations as `Q8_0`: each 32 elements of a row have the scale `d = max |x| / 127`, rounded to f16
/// after `q = round(x / d)` are known.
struct Blocks {
    /// `[tokens, columns]`.
    q: Array2<i8>,
    /// `[tokens, ceil(columns / 32)]`.
    scales: Array2<f32>,
}

impl Blocks {
    fn new(x: ArrayView2<'_, f32>) -> Result<Self, Error> {
        let (tokens, columns) = x.dim();
        let mut q = try_array("q", (tokens, columns))?;
        let mut scales = try_array("scales", (tokens, columns.div_ceil(ACTIVATIONS)))?;
        for (token, x) in x.outer_iter().enumerate() {
            for (block, x) in slice(&x).chunks(ACTIVATIONS).enumerate() {
                let most = x.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                let inverse = if most == 0.0 { 0.0 } else { 127.0 / most };
                scales[[token, block]] = f16::from_f32(most / 127.0).to_f32();
                for (i, x) in x.iter().enumerate() {
                    q[[token, block * ACTIVATIONS + i]] = (x * inverse).round_ties_even() as i8;
                }
            }
        }
        Ok(Self { q, scales })
    }

    /// The product of a token and a row: integers within a block of activations, its two blocks of
    /// activations within a block of weights, then block after block.
    fn product(&self, token: usize, codes: &[i8], scales: &[f32], group: usize) -> f32 {
        let (q, x_scales) = (self.q.row(token), self.scales.row(token));
        let halves = WEIGHTS / ACTIVATIONS;
        let blocks = slice(&q).chunks(WEIGHTS).zip(codes.chunks(WEIGHTS)).enumerate();
        blocks.fold(0.0, |sum, (block, (q, codes))| {
            let parts = q.chunks(ACTIVATIONS).zip(codes.chunks(ACTIVATIONS)).enumerate();
            let part = parts.fold(0.0, |sum: f32, (half, (q, codes))| {
                let products = q.iter().zip(codes).map(|(&q, &c)| i32::from(q) * i32::from(c));
                x_scales[halves * block + half].mul_add(products.sum::<i32>() as f32, sum)
            });
            scales[block * WEIGHTS / group].mul_add(part, sum)
        })
    }
}

/// RMSNorm of each `width` elements, then times `gamma`; the sum of squares in f64.
pub(super) fn rms_norm(x: &mut [f32], gamma: &[f32], eps: f64) {
    for x in x.chunks_mut(gamma.len().max(1)) {
        let sum: f64 = x.iter().map(|x| f64::from(x * x)).sum();
        let mean = (sum / x.len() as f64) as f32;
        let scale = 1.0 / (mean + eps as f32).sqrt();
        x.iter_mut().zip(gamma).for_each(|(x, gamma)| *x = *x * scale * gamma);
    }
}

/// The table of [`rotate`], in f32: each angle is the one before times `theta^(-2 / D)`.
pub(super) fn rope(head_size: usize, theta: f64, positions: &[usize]) -> Rope<f32> {
    let half = head_size / 2;
    let ratio = (theta as f32).powf(-2.0 / head_size as f32);
    let turns = positions.iter().flat_map(|&position| {
        let angles = iter::successors(Some(position as f32), move |angle| Some(angle * ratio));
        angles.take(half).map(|angle| (angle.cos(), angle.sin()))
    });
    Rope::from_turns(half, turns)
}

/// Rotates the heads of each token of `x` `[tokens, heads, head_size]` to its position.
pub(super) fn rotate(x: &mut [f32], width: usize, head_size: usize, rope: &Rope<f32>) {
    for (token, x) in x.chunks_mut(width.max(1)).enumerate() {
        let (cos, sin) = rope.turns(token);
        for head in x.chunks_mut(head_size) {
            let (low, high) = head.split_at_mut(head_size / 2);
            for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                let (x, y) = (*low, *high);
                *low = x.mul_add(*cos, -(y * sin));
                *high = x.mul_add(*sin, y * cos);
            }
        }
    }
}

/// Writes to `o` the attention of the rows of `q` `[tokens, heads, D]` over the keys `[len, G, D]` and values
/// `[len, G, D]` of one sequence. `sees(row, key)` is the mask.
pub(super) fn attention_into(
    mut o: ArrayViewMut3<'_, f32>,
    q: ArrayView3<'_, f32>,
    (k, v): (Array3<f32>, Array3<f32>),
    sees: impl Fn(usize, usize) -> bool + Sync,
) -> Result<(), Error> {
    let (tokens, heads, size) = q.dim();
    let (len, key_heads, _) = k.dim();
    let scale = 1.0 / (size as f32).sqrt();
    // A row for each element of a head.
    let mut v_rows = try_array("v", (key_heads, size, len.next_multiple_of(CACHE_ROWS)))?;
    v_rows.slice_axis_mut(Axis(2), (..len).into()).assign(&v.permuted_axes([1, 2, 0]));
    let mix = if tokens > 1 && size.is_multiple_of(4) { dot_tile } else { dot };
    let rows: Vec<_> = o.axis_iter_mut(Axis(0)).collect();
    rows.into_par_iter().enumerate().for_each(|(row, mut o)| {
        for (head, mut o) in o.outer_iter_mut().enumerate() {
            let key_head = head * key_heads / heads;
            let q = q.index_axis(Axis(0), row);
            let q = q.row(head);
            let mut p = vec![f32::NEG_INFINITY; v_rows.len_of(Axis(2))];
            for (key, p) in p[..len].iter_mut().enumerate().filter(|(key, _)| sees(row, *key)) {
                let k = k.index_axis(Axis(0), key);
                *p = dot(slice(&k.row(key_head)), slice(&q)) * scale;
            }
            softmax(&mut p);
            for (o, v) in o.iter_mut().zip(v_rows.index_axis(Axis(0), key_head).rows()) {
                *o = mix(slice(&v), &p);
            }
        }
    });
    Ok(())
}

/// Softmax in place; the sum of each vector in f32, their sum in f64.
fn softmax(x: &mut [f32]) {
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.chunks_mut(LANES) {
        x.iter_mut().for_each(|x| *x = exp(*x - most));
        let mut lanes = [0.0; LANES];
        lanes[..x.len()].copy_from_slice(x);
        sum += f64::from(reduce(lanes));
    }
    let inverse = (1.0 / sum) as f32;
    x.iter_mut().for_each(|x| *x *= inverse);
}

/// `gate = silu(gate) * up`.
pub(super) fn swiglu(gate: &mut [f32], up: &[f32]) {
    gate.iter_mut().zip(up).for_each(|(x, up)| *x = *x / (1.0 + exp(-*x)) * up);
}

/// `exp(x) = 2^n exp(x - n ln 2)` with a polynomial of degree 5, as in `ggml_v_expf`; the coefficients
/// are those of Arm's Optimized Routines (`expf`, 1.45 ULP).
fn exp(x: f32) -> f32 {
    const TO_INTEGER: f32 = 12_582_912.0;
    let n = x.mul_add(std::f32::consts::LOG2_E, TO_INTEGER) - TO_INTEGER;
    if n.abs() > 192.0 {
        return if n <= 0.0 { 0.0 } else { f32::INFINITY };
    }
    let b = n.mul_add(-0.693_145_75, x);
    let b = n.mul_add(-1.428_606_8e-6, b);
    let square = b * b;
    let high = 0.008_247_39_f32.mul_add(b, 0.041_899_767);
    let middle = 0.166_683_96_f32.mul_add(b, 0.499_991_27);
    let low = 0.999_999_4_f32.mul_add(b, 1.0);
    let p = high.mul_add(square, middle).mul_add(square, low);
    // Exact but for the one rounding to a subnormal.
    (f64::from(p) * f64::from(n).exp2()) as f32
}

/// A product alone: four accumulators for each 64 elements. The rest is added one by one, groups of 8
/// after they were multiplied, and only the last few fused.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    const STEP: usize = 4 * LANES;
    let whole = x.len() / STEP * STEP;
    let mut sums = [[0.0_f32; LANES]; 4];
    for (x, y) in x[..whole].chunks(STEP).zip(y[..whole].chunks(STEP)) {
        for (i, (x, y)) in x.iter().zip(y).enumerate() {
            let sum = &mut sums[i / LANES][i % LANES];
            *sum = x.mul_add(*y, *sum);
        }
    }
    let [a, b, c, d] = sums;
    let sums = std::array::from_fn(|i| (a[i] + c[i]) + (b[i] + d[i]));
    let eights = x.len() / 8 * 8;
    let products = x[whole..eights].iter().zip(&y[whole..eights]).map(|(x, y)| x * y);
    let sum = products.fold(reduce(sums), |sum, product| sum + product);
    x[eights..].iter().zip(&y[eights..]).fold(sum, |sum, (x, y)| x.mul_add(*y, sum))
}

/// A product among others, of a multiple of 16 elements: one accumulator.
fn dot_tile(x: &[f32], y: &[f32]) -> f32 {
    if !x.len().is_multiple_of(LANES) {
        return dot(x, y);
    }
    let mut sums = [0.0_f32; LANES];
    for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum = x.mul_add(*y, *sum);
        }
    }
    reduce(sums)
}

/// The sum of a vector, halves upon each other.
fn reduce(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}
