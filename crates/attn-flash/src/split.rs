//! Shares a call out over threads: halves the outputs until the parts are small, and lets rayon
//! steal halves.
//!
//! How the work is cut has no influence on the result: a row is computed the same way in any part.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{ArrayViewMut2, ArrayViewMut3, ArrayViewMut4, Axis};
use tensor_utils::simd::Simd;
use tensor_utils::{Element, Instances, IsaError, Kernel, PerElement, bf16, dispatch};

use crate::arithmetic::{ComputeType, Scores};
use crate::batch::Batch;
use crate::call::{Call, Sequence};
use crate::observe::Observer;
use crate::tiled::{Inputs, Part, compute_part};
use crate::workspace::Workspace;

/// Parts a thread, so that one that falls behind has some taken away.
const PARTS_PER_THREAD: usize = 4;
/// Queries are cut at multiples of it from the start of the range, to keep register tiles whole.
const CUT: usize = 12;
/// What a row costs besides its keys, in keys.
const ROW_COST: usize = 16;

/// The outputs of some consecutive batch entries, in the layout of the call.
pub(crate) enum Outputs<'a, T: Element> {
    Dense { o: ArrayViewMut4<'a, T>, lse: ArrayViewMut3<'a, T::Acc> },
    Packed { o: ArrayViewMut3<'a, T>, lse: ArrayViewMut2<'a, T::Acc> },
}

impl<T: Element> Outputs<'_, T> {
    /// Whether there are no rows.
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::Dense { lse, .. } => lse.is_empty(),
            Self::Packed { lse, .. } => lse.is_empty(),
        }
    }
}

/// A call, ready to run on any instruction set.
pub(crate) struct Forward<'a, 'c, 'b, 'o, T: Element> {
    pub(crate) call: &'a Call<'c, T>,
    pub(crate) batch: &'a Batch<'b, T>,
    pub(crate) outputs: Outputs<'o, T>,
    pub(crate) workspace: &'a Workspace<T::Acc>,
    pub(crate) observer: Option<&'a dyn Observer<T::Acc>>,
}

/// [`Forward`] for each element type.
struct AnyForward<'a, 'c, 'b, 'o>(PhantomData<(&'a &'c (), &'a &'b (), &'o ())>);

impl<'a, 'c, 'b, 'o> PerElement for AnyForward<'a, 'c, 'b, 'o> {
    type Arguments<T: Element> = Forward<'a, 'c, 'b, 'o, T>;
    type Output = Result<(), IsaError>;
}

#[inline(never)]
fn instances<'a, 'c, 'b, 'o>() -> Instances<AnyForward<'a, 'c, 'b, 'o>> {
    Instances {
        f32: Forward::dispatch,
        f64: Forward::dispatch,
        bf16: Forward::dispatch_bf16,
        f16: Forward::dispatch,
    }
}

impl<T: Element> Forward<'_, '_, '_, '_, T> {
    /// Runs the call on the instruction set of its workspace.
    pub(crate) fn compute(self) -> Result<(), IsaError> {
        T::instance(&instances())(self)
    }

    fn dispatch(self) -> Result<(), IsaError> {
        dispatch(self.workspace.isa(), self)
    }
}

impl Forward<'_, '_, '_, '_, bf16> {
    /// With scores from pairs on the instruction set that has them.
    fn dispatch_bf16(self) -> Result<(), IsaError> {
        #[cfg(target_arch = "x86_64")]
        if let Some(dot) = self.workspace.isa().bf16_dot() {
            self.run_with(crate::arithmetic::Bf16Pairs(dot));
            return Ok(());
        }
        self.dispatch()
    }
}

impl<T: Element> Kernel for Forward<'_, '_, '_, '_, T> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        self.run_with(ComputeType(simd));
    }
}

impl<T: Element> Forward<'_, '_, '_, '_, T> {
    fn run_with<P: Scores<T>>(self, arithmetic: P) {
        let Self { call, batch, outputs, workspace, observer } = self;
        let cost = |entry| {
            let (queries, keys) = batch.lengths(entry);
            let sequence = call.sequence(entry, queries, keys);
            call.sizes.heads * call.cost(&sequence, 0..queries)
        };
        let total: usize = (0..call.sizes.batch).map(cost).sum();
        let splitter = Splitter {
            arithmetic,
            call,
            batch,
            workspace,
            observer,
            part_cost: total / (PARTS_PER_THREAD * rayon::current_num_threads()),
        };
        splitter.split_batch(0..call.sizes.batch, outputs);
    }
}

impl<T: Element> Call<'_, T> {
    /// Estimate of the time that one head needs for some queries, in keys.
    fn cost(&self, sequence: &Sequence, queries: Range<usize>) -> usize {
        queries.map(|query| self.interval(sequence, query).len() + ROW_COST).sum()
    }
}

struct Splitter<'a, 'c, 'b, P, T: Element> {
    arithmetic: P,
    call: &'a Call<'c, T>,
    batch: &'a Batch<'b, T>,
    workspace: &'a Workspace<T::Acc>,
    observer: Option<&'a dyn Observer<T::Acc>>,
    /// Cost below which a part is not cut for the sake of balance.
    part_cost: usize,
}

impl<P: Scores<T>, T: Element> Splitter<'_, '_, '_, P, T> {
    fn split_batch(&self, entries: Range<usize>, outputs: Outputs<'_, T>) {
        if entries.is_empty() {
            return;
        }
        if entries.len() == 1 {
            return self.entry(entries.start, outputs);
        }
        let middle = entries.start + entries.len() / 2;
        let (left, right) = match (outputs, self.batch) {
            (Outputs::Packed { o, lse }, Batch::Packed { query_offsets, .. }) => {
                let rows = query_offsets[middle] - query_offsets[entries.start];
                let (o, o_right) = o.split_at(Axis(0), rows);
                let (lse, lse_right) = lse.split_at(Axis(0), rows);
                (Outputs::Packed { o, lse }, Outputs::Packed { o: o_right, lse: lse_right })
            }
            (Outputs::Dense { o, lse }, _) => {
                let (o, o_right) = o.split_at(Axis(0), entries.len() / 2);
                let (lse, lse_right) = lse.split_at(Axis(0), entries.len() / 2);
                (Outputs::Dense { o, lse }, Outputs::Dense { o: o_right, lse: lse_right })
            }
            (Outputs::Packed { .. }, Batch::Dense { .. }) => {
                unreachable!("outputs have the layout of the inputs")
            }
        };
        rayon::join(
            || self.split_batch(entries.start..middle, left),
            || self.split_batch(middle..entries.end, right),
        );
    }

    /// One batch entry, as heads first arrays.
    fn entry(&self, entry: usize, outputs: Outputs<'_, T>) {
        let (queries, keys) = self.batch.lengths(entry);
        let sequence = self.call.sequence(entry, queries, keys);
        let (o, lse) = match outputs {
            Outputs::Dense { o, lse } => {
                (o.index_axis_move(Axis(0), 0), lse.index_axis_move(Axis(0), 0))
            }
            Outputs::Packed { o, lse } => (o.permuted_axes([1, 0, 2]), lse.reversed_axes()),
        };
        let [q, k, v] = self.batch.entry(entry);
        let tiling = self.workspace.tiling();
        let inputs = Inputs {
            call: self.call,
            isa: self.workspace.isa(),
            key_block: tiling.key_block,
            q,
            k,
            v,
        };
        self.split_heads(&inputs, sequence, 0..self.call.sizes.key_heads, o, lse);
    }

    fn split_heads(
        &self,
        inputs: &Inputs<'_, '_, T>,
        sequence: Sequence,
        key_heads: Range<usize>,
        o: ArrayViewMut3<'_, T>,
        lse: ArrayViewMut2<'_, T::Acc>,
    ) {
        if key_heads.is_empty() || sequence.queries == 0 {
            return;
        }
        let group = self.call.sizes.group();
        if key_heads.len() == 1 {
            let part = Part {
                sequence,
                key_head: key_heads.start,
                first_head: key_heads.start * group,
                queries: 0..sequence.queries,
            };
            return self.split_queries(inputs, part, o, lse);
        }
        let half = key_heads.len() / 2;
        let middle = key_heads.start + half;
        let (o, o_right) = o.split_at(Axis(0), half * group);
        let (lse, lse_right) = lse.split_at(Axis(0), half * group);
        rayon::join(
            || self.split_heads(inputs, sequence, key_heads.start..middle, o, lse),
            || self.split_heads(inputs, sequence, middle..key_heads.end, o_right, lse_right),
        );
    }

    fn split_queries(
        &self,
        inputs: &Inputs<'_, '_, T>,
        part: Part,
        o: ArrayViewMut3<'_, T>,
        lse: ArrayViewMut2<'_, T::Acc>,
    ) {
        let group = self.call.sizes.group();
        let cost = group * self.call.cost(&part.sequence, part.queries.clone());
        let rows = group * part.queries.len();
        let too_large = rows > self.workspace.tiling().query_block || cost > self.part_cost;
        if !too_large || part.queries.len() <= CUT {
            let scratch = &mut *self.workspace.slot();
            return compute_part(self.arithmetic, inputs, &part, o, lse, scratch, self.observer);
        }
        // As few parts of at most a block as there can be: each packs all keys once.
        let parts = rows.div_ceil(self.workspace.tiling().query_block).max(2);
        let middle = self.balanced_cut(&part, parts / 2, parts);
        let (o, o_right) = o.split_at(Axis(1), middle - part.queries.start);
        let (lse, lse_right) = lse.split_at(Axis(1), middle - part.queries.start);
        let left = Part { queries: part.queries.start..middle, ..part.clone() };
        let right = Part { queries: middle..part.queries.end, ..part };
        rayon::join(
            || self.split_queries(inputs, left, o, lse),
            || self.split_queries(inputs, right, o_right, lse_right),
        );
    }

    /// Where to cut the queries of a part so that the left side costs about `numerator / denominator` of it.
    fn balanced_cut(&self, part: &Part, numerator: usize, denominator: usize) -> usize {
        let Range { start, end } = part.queries;
        let share = self.call.cost(&part.sequence, start..end) / denominator * numerator;
        let mut cost = 0;
        let mut middle = start;
        while cost < share {
            cost += self.call.cost(&part.sequence, middle..middle + 1);
            middle += 1;
        }
        let whole_tiles = (middle - start).next_multiple_of(CUT);
        start + whole_tiles.clamp(CUT, (end - start - 1) / CUT * CUT)
    }
}
