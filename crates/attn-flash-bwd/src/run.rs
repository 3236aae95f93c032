//! A checked call: shares the batch out over threads, head group by head group.

use std::marker::PhantomData;
use std::ops::Range;

use attn_flash::internals::{Call, Sequence, Sizes, sequence};
use attn_flash::{Mask, Options};
use ndarray::{
    ArrayView2, ArrayView3, ArrayViewMut, ArrayViewMut1, ArrayViewMut3, ArrayViewMut4,
    ArrayViewMutD, Axis, Dimension, Ix3, Ix4, RemoveAxis, Zip,
};
use tensor_utils::simd::Simd;
use tensor_utils::{
    Element, Float, Instances, IsaError, Kernel, PerElement, bf16, check_shape, dispatch,
};

use crate::arithmetic::{ComputeType, Products};
use crate::bias_gradient::BiasGradient;
use crate::block::{Head, Target};
use crate::delta::{saved_output_delta, sink_gradients, two_pass_delta};
use crate::schedule::Schedule;
use crate::workspace::{Room, Slots};
use crate::{Error, Inputs, VarlenInputs, Workspace};

/// What a call reads, in either layout.
pub(crate) enum Saved<'a, 'i, T: Element> {
    Dense(&'a Inputs<'i, T>),
    Packed(&'a VarlenInputs<'i, T>),
}

/// One batch entry, heads first.
pub(crate) struct Entry<'a, T: Element> {
    /// `[H, N, D]`.
    pub(crate) q: ArrayView3<'a, T>,
    /// `[G, M, D]`.
    pub(crate) k: ArrayView3<'a, T>,
    /// `[G, M, E]`.
    pub(crate) v: ArrayView3<'a, T>,
    /// `[H, N, E]`.
    pub(crate) o: ArrayView3<'a, T>,
    /// `[H, N, E]`.
    pub(crate) d_o: ArrayView3<'a, T>,
    /// `[H, N]`.
    pub(crate) lse: ArrayView2<'a, T::Acc>,
    /// `[H, N]`.
    pub(crate) d_lse: Option<ArrayView2<'a, T::Acc>>,
}

impl<T: Element> Saved<'_, '_, T> {
    /// Queries and keys of an entry.
    pub(crate) fn lengths(&self, entry: usize) -> (usize, usize) {
        match self {
            Self::Dense(inputs) => (inputs.q.dim().2, inputs.k.dim().2),
            Self::Packed(inputs) => (
                inputs.query_offsets[entry + 1] - inputs.query_offsets[entry],
                inputs.key_offsets[entry + 1] - inputs.key_offsets[entry],
            ),
        }
    }

    pub(crate) fn entry(&self, entry: usize) -> Entry<'_, T> {
        match self {
            Self::Dense(inputs) => Entry {
                q: inputs.q.index_axis(Axis(0), entry),
                k: inputs.k.index_axis(Axis(0), entry),
                v: inputs.v.index_axis(Axis(0), entry),
                o: inputs.o.index_axis(Axis(0), entry),
                d_o: inputs.d_o.index_axis(Axis(0), entry),
                lse: inputs.lse.index_axis(Axis(0), entry),
                d_lse: inputs.d_lse.as_ref().map(|d_lse| d_lse.index_axis(Axis(0), entry)),
            },
            Self::Packed(inputs) => {
                let (queries, keys) = (inputs.query_offsets, inputs.key_offsets);
                let rows = queries[entry]..queries[entry + 1];
                Entry {
                    q: sequence(&inputs.q, queries, entry),
                    k: sequence(&inputs.k, keys, entry),
                    v: sequence(&inputs.v, keys, entry),
                    o: sequence(&inputs.o, queries, entry),
                    d_o: sequence(&inputs.d_o, queries, entry),
                    lse: sequence_rows(&inputs.lse, rows.clone()),
                    d_lse: inputs.d_lse.as_ref().map(|d_lse| sequence_rows(d_lse, rows.clone())),
                }
            }
        }
    }
}

/// `[total, H]` to `[H, N]` of one sequence.
fn sequence_rows<'a, A>(array: &'a ArrayView2<'_, A>, rows: Range<usize>) -> ArrayView2<'a, A> {
    array.slice_axis(Axis(0), rows.into()).reversed_axes()
}

/// dq, dk and dv in the layout of the call.
pub(crate) enum Outputs<'a, T> {
    Dense([ArrayViewMut4<'a, T>; 3]),
    Packed([ArrayViewMut3<'a, T>; 3]),
}

impl<T: Element> Outputs<'_, T> {
    fn fill_zero(self) {
        match self {
            Self::Dense(gradients) => gradients.map(|mut array| array.fill(T::default())),
            Self::Packed(gradients) => gradients.map(|mut array| array.fill(T::default())),
        };
    }
}

/// A gradient on its way: where it adds up, and where the sums are rounded to in the end, if that
/// is another array.
struct Sums<'a, T: Element, D> {
    sums: ArrayViewMut<'a, T::Acc, D>,
    rounded: Option<ArrayViewMut<'a, T, D>>,
}

impl<'a, T: Element, D: RemoveAxis> Sums<'a, T, D> {
    /// Adds up in `output` itself if it is of the compute type, else in `buffer`.
    fn new(output: ArrayViewMut<'a, T, D>, buffer: &'a mut [T::Acc]) -> Self {
        let shape = output.raw_dim();
        match T::as_acc_mut(output) {
            Ok(sums) => Self { sums, rounded: None },
            Err(output) => {
                let buffer = &mut buffer[..output.len()];
                let sums = ArrayViewMut::from_shape(shape, buffer).expect("as long as the shape");
                Self { sums, rounded: Some(output) }
            }
        }
    }

    fn split(self, axis: Axis, at: usize) -> (Self, Self) {
        let (sums, sums_right) = self.sums.split_at(axis, at);
        let (rounded, rounded_right) = match self.rounded {
            None => (None, None),
            Some(rounded) => {
                let (left, right) = rounded.split_at(axis, at);
                (Some(left), Some(right))
            }
        };
        (Self { sums, rounded }, Self { sums: sums_right, rounded: rounded_right })
    }

    /// The only entry along the first axis.
    fn first(self) -> Sums<'a, T, D::Smaller> {
        Sums {
            sums: self.sums.index_axis_move(Axis(0), 0),
            rounded: self.rounded.map(|rounded| rounded.index_axis_move(Axis(0), 0)),
        }
    }
}

impl<'a, T: Element> Sums<'a, T, Ix3> {
    /// `[N, H, D]` to `[H, N, D]`.
    fn heads_first(self) -> Self {
        Self {
            sums: self.sums.permuted_axes([1, 0, 2]),
            rounded: self.rounded.map(|rounded| rounded.permuted_axes([1, 0, 2])),
        }
    }
}

impl<T: Element, D: Dimension> Sums<'_, T, D> {
    fn round(self) {
        if let Some(rounded) = self.rounded {
            Zip::from(rounded).and(&self.sums).for_each(|to, &sum| *to = T::from_acc(sum));
        }
    }
}

/// [`Sums`] of dq, dk and dv of some consecutive batch entries.
enum Batch<'a, T: Element> {
    Dense([Sums<'a, T, Ix4>; 3]),
    Packed([Sums<'a, T, Ix3>; 3]),
}

impl<'a, T: Element> Batch<'a, T> {
    /// Cuts after some entries, which have `queries` and `keys` rows if the batch is packed.
    fn split(self, entries: usize, queries: usize, keys: usize) -> (Self, Self) {
        match self {
            Self::Dense([dq, dk, dv]) => {
                let (dq, dq_right) = dq.split(Axis(0), entries);
                let (dk, dk_right) = dk.split(Axis(0), entries);
                let (dv, dv_right) = dv.split(Axis(0), entries);
                (Self::Dense([dq, dk, dv]), Self::Dense([dq_right, dk_right, dv_right]))
            }
            Self::Packed([dq, dk, dv]) => {
                let (dq, dq_right) = dq.split(Axis(0), queries);
                let (dk, dk_right) = dk.split(Axis(0), keys);
                let (dv, dv_right) = dv.split(Axis(0), keys);
                (Self::Packed([dq, dk, dv]), Self::Packed([dq_right, dk_right, dv_right]))
            }
        }
    }

    /// The only entry, heads first.
    fn entry(self) -> [Sums<'a, T, Ix3>; 3] {
        match self {
            Self::Dense(sums) => sums.map(Sums::first),
            Self::Packed(sums) => sums.map(Sums::heads_first),
        }
    }
}

/// Runs a call whose shapes have been checked.
pub(crate) fn run<T: Element, M: Mask>(
    saved: &Saved<'_, '_, T>,
    sizes: Sizes,
    room: Room,
    outputs: Outputs<'_, T>,
    dbias: Option<ArrayViewMutD<'_, T>>,
    dsinks: Option<ArrayViewMut1<'_, T::Acc>>,
    options: &Options<'_, T, M>,
    workspace: &mut Workspace<T>,
) -> Result<(), Error> {
    workspace.check(room)?;
    let call = Call::new(options, sizes)?;
    call.check_sequences(|entry| saved.lengths(entry))?;
    if let Some(dbias) = &dbias {
        let missing = Error::NoInput { gradient: "dbias", option: "bias" };
        let bias = options.bias.as_ref().ok_or(missing)?;
        check_shape("dbias", dbias.shape(), bias.shape())?;
    }
    if let Some(dsinks) = &dsinks {
        let missing = Error::NoInput { gradient: "dsinks", option: "sinks" };
        let sinks = options.sinks.ok_or(missing)?;
        check_shape("dsinks", dsinks.shape(), &[sinks.len()])?;
    }
    // Without queries there is nothing to walk over, however large the other axes are.
    if room.rows == 0 {
        outputs.fill_zero();
        dbias.into_iter().for_each(|mut dbias| dbias.fill(T::default()));
        dsinks.into_iter().for_each(|mut dsinks| dsinks.fill(T::Acc::ZERO));
        return Ok(());
    }
    Backward { call: &call, saved, outputs, dbias, workspace }.compute()?;
    if let (Some(dsinks), Some(sinks)) = (dsinks, call.sinks) {
        sink_gradients(saved, sizes, sinks, &workspace.delta, dsinks);
    }
    Ok(())
}

/// A call, ready to run on any instruction set.
struct Backward<'a, 'c, 'o, 'd, 's, 'i, T: Element> {
    call: &'a Call<'c, T>,
    saved: &'a Saved<'s, 'i, T>,
    outputs: Outputs<'o, T>,
    dbias: Option<ArrayViewMutD<'d, T>>,
    workspace: &'a mut Workspace<T>,
}

/// [`Backward`] for each element type.
struct AnyBackward<'a, 'c, 'o, 'd, 's, 'i>(
    PhantomData<(&'a &'c (), &'a &'s &'i (), &'o (), &'d ())>,
);

impl<'a, 'c, 'o, 'd, 's, 'i> PerElement for AnyBackward<'a, 'c, 'o, 'd, 's, 'i> {
    type Arguments<T: Element> = Backward<'a, 'c, 'o, 'd, 's, 'i, T>;
    type Output = Result<(), IsaError>;
}

#[inline(never)]
fn instances<'a, 'c, 'o, 'd, 's, 'i>() -> Instances<AnyBackward<'a, 'c, 'o, 'd, 's, 'i>> {
    Instances {
        f32: Backward::dispatch,
        f64: Backward::dispatch,
        bf16: Backward::dispatch_bf16,
        f16: Backward::dispatch,
    }
}

impl<T: Element> Backward<'_, '_, '_, '_, '_, '_, T> {
    /// Runs the call on the instruction set of its workspace.
    fn compute(self) -> Result<(), IsaError> {
        T::instance(&instances())(self)
    }

    fn dispatch(self) -> Result<(), IsaError> {
        dispatch(self.workspace.isa(), self)
    }
}

impl Backward<'_, '_, '_, '_, '_, '_, bf16> {
    /// With products of pairs on the instruction set that has them.
    fn dispatch_bf16(self) -> Result<(), IsaError> {
        #[cfg(target_arch = "x86_64")]
        if let Some(dot) = self.workspace.isa().bf16_dot() {
            self.run_with(crate::arithmetic::Bf16Pairs(dot));
            return Ok(());
        }
        self.dispatch()
    }
}

impl<T: Element> Kernel for Backward<'_, '_, '_, '_, '_, '_, T> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        self.run_with(ComputeType(simd));
    }
}

impl<T: Element> Backward<'_, '_, '_, '_, '_, '_, T> {
    fn run_with<P: Products<T>>(self, products: P) {
        let Self { call, saved, outputs, dbias, workspace } = self;
        let (query_block, key_block) =
            (workspace.tiling().query_block, workspace.tiling().key_block);
        let two_pass = workspace.two_pass();
        let Workspace { slots, delta, sums: [dq_sums, dk_sums, dv_sums], .. } = workspace;
        let batch = match outputs {
            Outputs::Dense([dq, dk, dv]) => Batch::Dense([
                Sums::new(dq, dq_sums),
                Sums::new(dk, dk_sums),
                Sums::new(dv, dv_sums),
            ]),
            Outputs::Packed([dq, dk, dv]) => Batch::Packed([
                Sums::new(dq, dq_sums),
                Sums::new(dk, dk_sums),
                Sums::new(dv, dv_sums),
            ]),
        };
        let pass = Pass { products, call, saved, slots, query_block, key_block, two_pass };
        pass.split_batch(0..call.sizes.batch, batch, delta);
        if let Some(dbias) = dbias {
            BiasGradient::run(&pass, delta, dbias);
        }
    }
}

/// What all parts of the pass have in common.
pub(crate) struct Pass<'a, 'c, 's, 'i, P, T: Element> {
    pub(crate) products: P,
    pub(crate) call: &'a Call<'c, T>,
    pub(crate) saved: &'a Saved<'s, 'i, T>,
    pub(crate) slots: &'a Slots<T::Acc>,
    pub(crate) query_block: usize,
    pub(crate) key_block: usize,
    two_pass: bool,
}

impl<'c, P: Products<T>, T: Element> Pass<'_, 'c, '_, '_, P, T> {
    /// Where delta of a head of an entry begins: entry by entry, head by head.
    pub(crate) fn delta_start(&self, entry: usize, head: usize) -> usize {
        let heads = self.call.sizes.heads;
        let (queries, _) = self.saved.lengths(entry);
        let before = match self.saved {
            Saved::Dense(_) => entry * queries,
            Saved::Packed(inputs) => inputs.query_offsets[entry],
        };
        before * heads + head * queries
    }

    /// Batch entry `entry` as the options see it.
    pub(crate) fn sequence(&self, entry: usize) -> Sequence {
        let (queries, keys) = self.saved.lengths(entry);
        self.call.sequence(entry, queries, keys)
    }

    /// One query head of an entry.
    pub(crate) fn head<'e>(
        &'e self,
        entry: &'e Entry<'_, T>,
        sequence: Sequence,
        head: usize,
        target: Target,
    ) -> Head<'e, 'c, P, T> {
        let key_head = head / self.call.sizes.group();
        Head {
            products: self.products,
            call: self.call,
            sequence,
            head,
            q: entry.q.index_axis(Axis(0), head),
            k: entry.k.index_axis(Axis(0), key_head),
            v: entry.v.index_axis(Axis(0), key_head),
            d_o: entry.d_o.index_axis(Axis(0), head),
            lse: entry.lse.row(head),
            d_lse: entry.d_lse.as_ref().map(|d_lse| d_lse.row(head)),
            key_block: self.key_block,
            target,
        }
    }

    fn split_batch(&self, entries: Range<usize>, batch: Batch<'_, T>, delta: &mut [T::Acc]) {
        if entries.is_empty() {
            return;
        }
        if entries.len() == 1 {
            let key_heads = 0..self.call.sizes.key_heads;
            return self.split_heads(entries.start, key_heads, batch.entry(), delta);
        }
        let middle = entries.start + entries.len() / 2;
        let (queries, keys) = match self.saved {
            Saved::Dense(_) => (0, 0),
            Saved::Packed(inputs) => (
                inputs.query_offsets[middle] - inputs.query_offsets[entries.start],
                inputs.key_offsets[middle] - inputs.key_offsets[entries.start],
            ),
        };
        let rows = self.delta_start(middle, 0) - self.delta_start(entries.start, 0);
        let (left, right) = batch.split(entries.len() / 2, queries, keys);
        let (delta, delta_right) = delta.split_at_mut(rows);
        rayon::join(
            || self.split_batch(entries.start..middle, left, delta),
            || self.split_batch(middle..entries.end, right, delta_right),
        );
    }

    fn split_heads(
        &self,
        entry: usize,
        key_heads: Range<usize>,
        gradients: [Sums<'_, T, Ix3>; 3],
        delta: &mut [T::Acc],
    ) {
        if key_heads.is_empty() {
            return;
        }
        if key_heads.len() == 1 {
            return self.head_group(entry, key_heads.start, gradients, delta);
        }
        let group = self.call.sizes.group();
        let half = key_heads.len() / 2;
        let middle = key_heads.start + half;
        let (queries, _) = self.saved.lengths(entry);
        let [dq, dk, dv] = gradients;
        let (dq, dq_right) = dq.split(Axis(0), half * group);
        let (dk, dk_right) = dk.split(Axis(0), half);
        let (dv, dv_right) = dv.split(Axis(0), half);
        let (delta, delta_right) = delta.split_at_mut(half * group * queries);
        let right = [dq_right, dk_right, dv_right];
        rayon::join(
            || self.split_heads(entry, key_heads.start..middle, [dq, dk, dv], delta),
            || self.split_heads(entry, middle..key_heads.end, right, delta_right),
        );
    }

    /// The query heads of one key head, one after the other: they add up in the same dk and dv.
    fn head_group(
        &self,
        entry: usize,
        key_head: usize,
        [mut dq, dk, dv]: [Sums<'_, T, Ix3>; 3],
        delta: &mut [T::Acc],
    ) {
        let (mut dk, mut dv) = (dk.first(), dv.first());
        dq.sums.fill(T::Acc::ZERO);
        dk.sums.fill(T::Acc::ZERO);
        dv.sums.fill(T::Acc::ZERO);
        let sequence = self.sequence(entry);
        let views = self.saved.entry(entry);
        let group = self.call.sizes.group();
        for i in 0..group {
            let index = key_head * group + i;
            let head = self.head(&views, sequence, index, Target::DotProduct);
            let delta = &mut delta[i * sequence.queries..][..sequence.queries];
            if self.two_pass {
                let head = self.head(&views, sequence, index, Target::Score);
                two_pass_delta(&head, self.query_block, self.slots, delta);
            } else {
                let o = views.o.index_axis(Axis(0), index);
                let sink = self.call.sinks.map(|sinks| sinks[index]);
                saved_output_delta(o, head.d_o, head.lse, sink, delta);
            }
            let schedule =
                Schedule { head: &head, delta, query_block: self.query_block, slots: self.slots };
            let dq = dq.sums.index_axis_mut(Axis(0), i);
            schedule.run(dq, dk.sums.view_mut(), dv.sums.view_mut());
        }
        dq.round();
        dk.round();
        dv.round();
    }
}
