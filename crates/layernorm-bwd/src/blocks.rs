//! A row as blocks of 16 columns, and vectors of a block.
//!
//! With blocks as arrays the compiler knows that a vector lies within its block, and loops over
//! blocks need no check. What is left of a row behind its whole blocks is padded with zeros.

use tensor_utils::simd::{Simd, SimdBase, SimdFrom};
use tensor_utils::{Element, Float, narrow, prefetch, widen};

/// Columns of a block: the lanes of the widest vector.
pub(crate) const BLOCK: usize = 16;

/// Blocks that are summed in the compute type before the sum goes on in f64.
const SUMMED: usize = 64;
/// Columns of them: what a long row is gone over by.
pub(crate) const PIECE: usize = SUMMED * BLOCK;
/// The most vectors of a block: of 128 bits with two `f64`.
const CHAINS: usize = 8;

/// How many blocks ahead of its use memory is asked for.
const NEAR: usize = 16;

/// A block of scratch memory, aligned so that no vector of it lies across two cache lines.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct Block<A>(pub(crate) [A; BLOCK]);

/// A block of sums over rows for dgamma, and one for dbeta.
///
/// Side by side, since one behind the other they can lie so that a load from one seems to the
/// processor to depend on the last store to the other, which has the same low bits of its address.
pub(crate) type WeightSums<A> = [Block<A>; 2];

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

    /// Asks for the memory of a block that comes after this one; behind the end of the row that is in the
    /// rows below, if rows follow each other. The processor's own prefetching ends at the page.
    #[inline(always)]
    pub(crate) fn ask_ahead(&self, at: At) {
        prefetch(self.whole, at.block + NEAR);
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
    let lanes = lanes::<S, E::Acc>();
    let mut buffer = [E::Acc::ZERO; BLOCK];
    widen(&block[lane..][..lanes], &mut buffer[..lanes]);
    Vector::<S, E::Acc>::from_slice(simd, &buffer[..lanes])
}

impl<A: Float> Block<A> {
    /// A vector of it.
    #[inline(always)]
    pub(crate) fn load<S: Simd>(&self, simd: S, lane: usize) -> Vector<S, A> {
        Vector::<S, A>::from_slice(simd, &self.0[lane..][..lanes::<S, A>()])
    }

    /// Replaces a vector of it.
    #[inline(always)]
    pub(crate) fn store<S: Simd>(&mut self, vector: Vector<S, A>, lane: usize) {
        vector.store_slice(&mut self.0[lane..][..lanes::<S, A>()]);
    }
}

/// Calls `f` for each block of a row of length `len`, and `fold` after every [`SUMMED`] of them and
/// at the end. `state` is what both work on.
#[inline(always)]
pub(crate) fn for_each_block_folded<T>(
    len: usize,
    state: &mut T,
    mut f: impl FnMut(&mut T, At),
    mut fold: impl FnMut(&mut T),
) {
    let (whole, all) = (len / BLOCK, len.div_ceil(BLOCK));
    let mut start = 0;
    loop {
        let end = all.min(start + SUMMED);
        for block in start..end.min(whole) {
            f(state, At { block, is_rest: false });
        }
        if end > whole {
            f(state, At { block: whole, is_rest: true });
        }
        fold(state);
        if end == all {
            return;
        }
        start = end;
    }
}

/// `N` sums over a row.
///
/// 64 blocks are summed in the compute type, every lane of a block by itself, then folded to one
/// number that is added in f64. The order depends on the length of the row alone.
#[derive(Debug)]
pub(crate) struct RowSums<S: Simd, A: Float, const N: usize> {
    simd: S,
    lanes: [[Vector<S, A>; N]; CHAINS],
    totals: [f64; N],
}

impl<S: Simd, A: Float, const N: usize> RowSums<S, A, N> {
    #[inline(always)]
    pub(crate) fn new(simd: S) -> Self {
        Self { simd, lanes: [[splat(simd, A::ZERO); N]; CHAINS], totals: [0.0; N] }
    }

    /// The sums of the vectors that begin at `lane` of their block.
    #[inline(always)]
    pub(crate) fn at(&mut self, lane: usize) -> &mut [Vector<S, A>; N] {
        &mut self.lanes[lane / lanes::<S, A>()]
    }

    /// Adds the lanes to the totals and begins anew.
    #[inline(always)]
    pub(crate) fn fold(&mut self) {
        for i in 0..N {
            let mut sum = self.lanes[0][i];
            for chain in 1..BLOCK / lanes::<S, A>() {
                sum += self.lanes[chain][i];
            }
            self.totals[i] += sum.reduce_sum().to_f64();
        }
        self.lanes = [[splat(self.simd, A::ZERO); N]; CHAINS];
    }

    #[inline(always)]
    pub(crate) fn totals(&self) -> [f64; N] {
        self.totals
    }
}
