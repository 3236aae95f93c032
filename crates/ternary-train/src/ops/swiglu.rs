//! SwiGLU (Shazeer, GLU variants improve transformer, 2020): `h = silu(gate) up`.

use rayon::prelude::*;
use tensor_utils::simd::{Simd, SimdFloat, SimdFrom};
use tensor_utils::{Float, Isa, Kernel, check_shape, dispatch};

use super::{OpError, for_vectors};

/// Elements of one task.
const CHUNK: usize = 1 << 14;

/// `h = silu(gate) up`, element by element, with `silu(x) = x / (1 + exp(-x))`. NaN gives NaN.
///
/// # Errors
/// [`OpError::Shape`] if the lengths differ.
pub fn swiglu<A: Float>(h: &mut [A], gate: &[A], up: &[A]) -> Result<(), OpError> {
    check_shape("gate", &[gate.len()], &[h.len()])?;
    check_shape("up", &[up.len()], &[h.len()])?;
    let isa = Isa::active()?;
    let chunks = h.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    chunks.try_for_each(|((h, gate), up)| Ok(dispatch(isa, Forward { h, gate, up })?))
}

/// The gradients with respect to gate and up, from that of `h`:
/// `dgate = dh up s (1 + gate (1 - s))` with `s = 1 / (1 + exp(-gate))`, and `dup = dh silu(gate)`.
///
/// # Errors
/// [`OpError::Shape`] if the lengths differ.
pub fn swiglu_backward<A: Float>(
    d_gate: &mut [A],
    d_up: &mut [A],
    dh: &[A],
    gate: &[A],
    up: &[A],
) -> Result<(), OpError> {
    for (arg, len) in [("d_gate", d_gate.len()), ("d_up", d_up.len())] {
        check_shape(arg, &[len], &[dh.len()])?;
    }
    check_shape("gate", &[gate.len()], &[dh.len()])?;
    check_shape("up", &[up.len()], &[dh.len()])?;
    let isa = Isa::active()?;
    let outputs = d_gate.par_chunks_mut(CHUNK).zip(d_up.par_chunks_mut(CHUNK));
    let inputs = dh.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    outputs.zip(inputs).try_for_each(|((d_gate, d_up), ((dh, gate), up))| {
        Ok(dispatch(isa, Backward { d_gate, d_up, dh, gate, up })?)
    })
}

struct Forward<'a, A> {
    h: &'a mut [A],
    gate: &'a [A],
    up: &'a [A],
}

impl<A: Float> Kernel for Forward<'_, A> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        let Self { h, gate, up } = self;
        simd.vectorize(
            #[inline(always)]
            || {
                for_vectors(
                    simd,
                    [gate, up],
                    [h],
                    #[inline(always)]
                    |[gate, up], _| [gate * sigmoid::<S, A>(simd, gate) * up],
                );
            },
        );
    }
}

struct Backward<'a, A> {
    d_gate: &'a mut [A],
    d_up: &'a mut [A],
    dh: &'a [A],
    gate: &'a [A],
    up: &'a [A],
}

impl<A: Float> Kernel for Backward<'_, A> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        let Self { d_gate, d_up, dh, gate, up } = self;
        let one = A::Vector::<S>::simd_from(simd, A::ONE);
        simd.vectorize(
            #[inline(always)]
            || {
                for_vectors(
                    simd,
                    [dh, gate, up],
                    [d_gate, d_up],
                    #[inline(always)]
                    |[dh, gate, up], _| {
                        let s = sigmoid::<S, A>(simd, gate);
                        let slope = s * gate.mul_add(one - s, one);
                        [dh * up * slope, dh * gate * s]
                    },
                );
            },
        );
    }
}

#[inline(always)]
fn sigmoid<S: Simd, A: Float>(simd: S, x: A::Vector<S>) -> A::Vector<S> {
    let one = A::Vector::<S>::simd_from(simd, A::ONE);
    one / (one + A::exp_vector(simd, -x))
}
