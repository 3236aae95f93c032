//! Loops over vectors, with a last one that may be filled up.

use std::array;

use tensor_utils::Float;
use tensor_utils::simd::{Simd, SimdBase, SimdFrom};

/// Lanes of the widest vector.
const MAX_LANES: usize = 16;

/// `outputs[o][i] = f(inputs[..][i], outputs[..][i])[o]` for every index, vector by vector. The
/// slices have the same length; lanes past the end hold 0.
#[inline(always)]
pub(crate) fn for_vectors<S: Simd, A: Float, const IN: usize, const OUT: usize>(
    simd: S,
    inputs: [&[A]; IN],
    outputs: [&mut [A]; OUT],
    f: impl Fn([A::Vector<S>; IN], [A::Vector<S>; OUT]) -> [A::Vector<S>; OUT],
) {
    let lanes = <A::Vector<S> as SimdBase<S>>::LEN;
    let len = outputs[0].len();
    let whole = len / lanes * lanes;
    let inputs = inputs.map(|input| &input[..len]);
    let outputs = outputs.map(|output| &mut output[..len]);
    for at in (0..whole).step_by(lanes) {
        let from = array::from_fn(|i| A::Vector::<S>::from_slice(simd, &inputs[i][at..][..lanes]));
        let old = array::from_fn(|o| A::Vector::<S>::from_slice(simd, &outputs[o][at..][..lanes]));
        let new = f(from, old);
        for o in 0..OUT {
            new[o].store_slice(&mut outputs[o][at..][..lanes]);
        }
    }
    if whole < len {
        let pad = |slice: &[A]| {
            let mut vector = [A::ZERO; MAX_LANES];
            vector[..len - whole].copy_from_slice(&slice[whole..]);
            A::Vector::<S>::from_slice(simd, &vector[..lanes])
        };
        let from = array::from_fn(|i| pad(inputs[i]));
        let old = array::from_fn(|o| pad(outputs[o]));
        let new = f(from, old);
        for o in 0..OUT {
            let mut vector = [A::ZERO; MAX_LANES];
            new[o].store_slice(&mut vector[..lanes]);
            outputs[o][whole..].copy_from_slice(&vector[..len - whole]);
        }
    }
}

/// Folds a slice vector by vector; lanes past the end hold `fill`.
#[inline(always)]
pub(crate) fn scan_vectors<S: Simd, A: Float>(
    simd: S,
    slice: &[A],
    fill: A,
    start: A,
    mut f: impl FnMut(A::Vector<S>, A::Vector<S>) -> A::Vector<S>,
) -> [A; MAX_LANES] {
    let lanes = <A::Vector<S> as SimdBase<S>>::LEN;
    let mut state = A::Vector::<S>::simd_from(simd, start);
    let mut chunks = slice.chunks_exact(lanes);
    for chunk in &mut chunks {
        state = f(state, A::Vector::<S>::from_slice(simd, chunk));
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        let mut vector = [fill; MAX_LANES];
        vector[..rest.len()].copy_from_slice(rest);
        state = f(state, A::Vector::<S>::from_slice(simd, &vector[..lanes]));
    }
    let mut out = [start; MAX_LANES];
    state.store_slice(&mut out[..lanes]);
    out
}
