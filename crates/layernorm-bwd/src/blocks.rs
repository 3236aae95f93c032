//! A row as blocks of 16 columns, and vectors of a block.
//!
//! With blocks as arrays the compiler knows that a vector lies within its block, and loops over
//! blocks need no check. What is left of a row behind its whole blocks is padded with zeros.

use tensor_utils::simd::{Simd, SimdBase, SimdFrom};
use tensor_utils::{Element, Float, narrow, widen};

/// Columns of a block: the lanes of the widest vector. Rows of scratch memory are padded to it.
pub(crate) const BLOCK: usize = 16;

/// Blocks that are summed in the compute type before the sum goes on in f64.
const SUMMED: usize = 256;
/// Vectors of a block of the narrowest instruction set, or sums of the widest.
const CHAINS: usize = 8;

/// The native vector of compute type `A`.
pub(crate) type Vector<S, A> = <A as Float>::Vector<S>;

/// Lanes of a vector.
#[inline(always)]
pub(crate) fn lanes<S: Simd, A: Float>() -> usize {
    Vector::<S, A>::LEN
}

/// The same number in all lanes.
#[inline(always)]
pub(crate) fn splat<S: Simd, A: Float>(simd: S, x: A) -> Vector<S, A> {
    Vector::<S, A>::simd_from(simd, x)
}

/// Which block of a row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct At {
    /// Its index.
    pub(crate) block: usize,
    /// Whether it is the one behind the whole blocks.
    pub(crate) is_rest: bool,
}

/// Calls `f` for each block of a row of length `len`.
#[inline(always)]
pub(crate) fn for_each_block(len: usize, mut f: impl FnMut(At)) {
    let whole = len / BLOCK;
    for block in 0..whole {
        f(At { block, is_rest: false });
    }
    if whole * BLOCK < len {
        f(At { block: whole, is_rest: true });
    }
}

/// Calls `f` with the first lane of each vector of a block.
#[inline(always)]
pub(crate) fn for_each_vector<S: Simd, A: Float>(mut f: impl FnMut(usize)) {
    let lanes = lanes::<S, A>();
    let mut lane = 0;
    while lane < BLOCK {
        f(lane);
        lane += lanes;
    }
}

/// A row to read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blocks<'a, E> {
    whole: &'a [[E; BLOCK]],
    rest: [E; BLOCK],
    rest_len: usize,
}

impl<'a, E: Element> Blocks<'a, E> {
    /// The first `len` columns of a row; rows with the same `len` need one check for all.
    #[inline(always)]
    pub(crate) fn new(row: &'a [E], len: usize) -> Self {
        let (whole, partial) = row[..len].as_chunks();
        let mut rest = [E::default(); BLOCK];
        for (to, &from) in rest.iter_mut().zip(partial) {
            *to = from;
        }
        Self { whole, rest, rest_len: partial.len() }
    }

    #[inline(always)]
    pub(crate) fn get(&self, at: At) -> &[E; BLOCK] {
        if at.is_rest { &self.rest } else { &self.whole[at.block] }
    }

    /// The vector with 0 in the lanes behind the row.
    #[inline(always)]
    pub(crate) fn keep<S: Simd>(
        &self,
        simd: S,
        vector: Vector<S, E::Acc>,
        at: At,
        lane: usize,
    ) -> Vector<S, E::Acc> {
        if !at.is_rest {
            return vector;
        }
        let mut buffer = [E::Acc::ZERO; BLOCK];
        for i in 0..lanes::<S, E::Acc>() {
            if lane + i < self.rest_len {
                buffer[i] = vector.as_slice()[i];
            }
        }
        load(simd, &buffer, 0)
    }
}

/// A row to write.
#[derive(Debug)]
pub(crate) struct BlocksMut<'a, E> {
    whole: &'a mut [[E; BLOCK]],
    partial: &'a mut [E],
}

impl<'a, E: Element> BlocksMut<'a, E> {
    /// As [`Blocks::new`].
    #[inline(always)]
    pub(crate) fn new(row: &'a mut [E], len: usize) -> Self {
        let (whole, partial) = row[..len].as_chunks_mut();
        Self { whole, partial }
    }

    /// Lets `write` fill a block.
    #[inline(always)]
    pub(crate) fn write(&mut self, at: At, lane: usize, lanes: usize, values: &[E]) {
        if at.is_rest {
            for i in 0..lanes {
                if let Some(to) = self.partial.get_mut(lane + i) {
                    *to = values[i];
                }
            }
        } else {
            self.whole[at.block][lane..][..lanes].copy_from_slice(&values[..lanes]);
        }
    }

    /// Rounds a vector to the block at `lane`.
    #[inline(always)]
    pub(crate) fn store<S: Simd>(&mut self, vector: Vector<S, E::Acc>, at: At, lane: usize) {
        let lanes = lanes::<S, E::Acc>();
        let mut values = [E::default(); BLOCK];
        narrow(vector.as_slice(), &mut values[..lanes]);
        self.write(at, lane, lanes, &values);
    }
}

/// Widens a vector of a block.
#[inline(always)]
pub(crate) fn load<S: Simd, E: Element>(
    simd: S,
    block: &[E; BLOCK],
    lane: usize,
) -> Vector<S, E::Acc> {
    let mut buffer = [E::Acc::ZERO; BLOCK];
    widen(block, &mut buffer);
    Vector::<S, E::Acc>::from_slice(simd, &buffer[lane..][..lanes::<S, E::Acc>()])
}

/// Stores a vector to a block of scratch memory.
#[inline(always)]
pub(crate) fn store<S: Simd, A: Float>(vector: Vector<S, A>, block: &mut [A; BLOCK], lane: usize) {
    vector.store_slice(&mut block[lane..][..lanes::<S, A>()]);
}

/// Blocks of scratch memory.
#[inline(always)]
pub(crate) fn blocks<A>(padded: &[A]) -> &[[A; BLOCK]] {
    padded.as_chunks().0
}

/// Blocks of scratch memory to write.
#[inline(always)]
pub(crate) fn blocks_mut<A>(padded: &mut [A]) -> &mut [[A; BLOCK]] {
    padded.as_chunks_mut().0
}

/// `N` sums over a row of `len` columns; `add` adds the terms of a vector.
///
/// 256 blocks are summed in the compute type, in two or more vectors in turn so that one addition
/// need not wait for the last, and these sums are added in f64. The order depends on `len` alone.
#[inline(always)]
pub(crate) fn sum_row<S: Simd, A: Float, const N: usize>(
    simd: S,
    len: usize,
    mut add: impl FnMut(&mut [Vector<S, A>; N], At, usize),
) -> [f64; N] {
    let lanes = lanes::<S, A>();
    // A block of one vector alternates between two sums, one of more has a sum for each.
    let odd = usize::from(lanes == BLOCK);
    let whole = len / BLOCK;
    let mut totals = [0.0; N];
    let mut block = 0;
    loop {
        let mut sums = [[splat(simd, A::ZERO); N]; CHAINS];
        let end = whole.min(block + SUMMED);
        while block + 2 <= end {
            for_each_vector::<S, A>(
                #[inline(always)]
                |lane| add(&mut sums[lane / lanes], At { block, is_rest: false }, lane),
            );
            let next = At { block: block + 1, is_rest: false };
            for_each_vector::<S, A>(
                #[inline(always)]
                |lane| add(&mut sums[lane / lanes + odd], next, lane),
            );
            block += 2;
        }
        if block < end {
            for_each_vector::<S, A>(
                #[inline(always)]
                |lane| add(&mut sums[lane / lanes], At { block, is_rest: false }, lane),
            );
            block += 1;
        }
        if block == whole && whole * BLOCK < len {
            for_each_vector::<S, A>(
                #[inline(always)]
                |lane| add(&mut sums[lane / lanes + odd], At { block, is_rest: true }, lane),
            );
        }
        for i in 0..N {
            let mut sum = sums[0][i];
            for chain in 1..CHAINS {
                sum += sums[chain][i];
            }
            totals[i] += sum.reduce_sum().to_f64();
        }
        if block == whole {
            return totals;
        }
    }
}
