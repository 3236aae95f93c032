//! Attention over the cache: the public entry points.

use ndarray::{Array2, Array3, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use tensor_utils::simd::Simd;
use tensor_utils::tile::pack::narrow_row;
use tensor_utils::{
    Element, Isa, IsaError, Kernel, ShapeError, check_shape, dispatch, for_each_chunk, try_array,
};

use crate::cache::Cache;
use crate::error::{expected_heads, invalid};
use crate::kernel::queries::Arithmetic;
use crate::kernel::task::{self, Context};
use crate::options::NO_PAGE;
use crate::plan::{Plan, Task};
use crate::workspace::Slots;
use crate::{Error, Options, Queries, Window, Workspace};

/// The result of [`Cache::attend`].
#[derive(Debug, Clone, PartialEq)]
pub struct Attention<T: Element> {
    /// `[total queries, H, E]`: the softmax-weighted sums of the values.
    pub o: Array3<T>,
    /// `[total queries, H]`: the natural logarithm of the sum of `exp(score)` over the visible rows.
    pub lse: Array2<f32>,
}

impl Cache {
    /// Attention of queries over one layer of the cache: the queries of `batch[0]`, then those of
    /// `batch[1]`, and so on, in `q` `[total queries, H, D]`. A sequence may be there several times.
    ///
    /// `H` is a multiple of the cache's `G`: query head `h` uses key head `h / (H / G)`. What a query
    /// sees is said by [`Rows`](crate::Rows); rows that it does not see have no effect, whatever they hold, NaN
    /// included. A query that sees nothing (its window has no row, or all scores are `-inf`) gets
    /// `o = 0` and `lse = -inf`.
    ///
    /// The result for a sequence has the same bits whatever else is in the batch, however its rows
    /// were appended, whichever pages they are in, on any number of threads, and with float storage
    /// for any page size. With quantised storage that is so for queries of the rows of the last append; those
    /// before may see quantised what they saw in full precision then ([`Config::residual`]), as do queries
    /// near the end of a prefix from [`match_prefix`](Self::match_prefix).
    ///
    /// Sums are in `f32`, those with codes in whole numbers: queries times scales, and weights times scales, are
    /// rounded to 16 bits there (docs/derivation.md, section 2). With [`Isa::Avx512Bf16`] the scores of bf16
    /// queries and bf16 keys come from products of pairs, in which numbers below the smallest normal one are 0; they
    /// must be within the range of `f32` before the scale, too.
    /// Sums of values are divided by the sum of their weights in the end, so the largest value times the rows that
    /// a query sees must be a number of `f32`, or the output is not finite; with quantised values that
    /// spreads to all numbers of the row.
    ///
    /// [`Config::residual`]: crate::Config::residual
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::HeadsNotDivisible`] and [`Error::Option`] for arguments that do not fit,
    /// [`Error::UnknownSequence`], [`Error::Released`] for a query that sees rows that the cache's window has
    /// released, [`Error::Isa`].
    pub fn attend<T: Element<Acc = f32>>(
        &self,
        layer: usize,
        q: ArrayView3<'_, T>,
        batch: &[Queries<'_>],
        options: &Options,
    ) -> Result<Attention<T>, Error> {
        let (total, heads, _) = q.dim();
        let mut o = try_array("o", (total, heads, self.config.value_size))?;
        let mut lse = try_array("lse", (total, heads))?;
        let workspace = &mut Workspace::new();
        self.attend_into(o.view_mut(), lse.view_mut(), layer, q, batch, options, workspace)?;
        Ok(Attention { o, lse })
    }

    /// [`attend`](Self::attend) into outputs and scratch memory of the caller: `o`
    /// `[total queries, H, E]`, `lse` `[total queries, H]`.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn attend_into<T: Element<Acc = f32>>(
        &self,
        mut o: ArrayViewMut3<'_, T>,
        mut lse: ArrayViewMut2<'_, f32>,
        layer: usize,
        q: ArrayView3<'_, T>,
        batch: &[Queries<'_>],
        options: &Options,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scale = self.check_attend(&o, &lse, layer, &q, batch, options)?;
        let isa = Isa::resolve(options.isa)?;
        let group = q.dim().1 / self.config.key_heads;
        let windows = [options.window, self.config.window];
        workspace.prepare();
        let Workspace { plan, queries, .. } = workspace;
        plan.list(self, layer, batch);
        let arithmetic = Arithmetic::of::<T>(isa, self.config.keys, scale);
        arithmetic.pack(&q, plan, group, queries);
        let mut start = 0;
        while start < workspace.plan.units.len() {
            let wave = workspace.plan.wave(start, self, group);
            workspace.plan.divide(self, group, wave.clone(), windows);
            let softcap = options.softcap.map(|cap| cap as f32);
            let cache = self;
            run_wave(isa, Wave { cache, layer, group, arithmetic, softcap, windows, workspace })?;
            write(&mut o, &mut lse, self, group, wave.clone(), workspace);
            start = wave.end;
        }
        Ok(())
    }

    /// Checks all arguments; returns the scale.
    fn check_attend<T: Element<Acc = f32>>(
        &self,
        o: &ArrayViewMut3<'_, T>,
        lse: &ArrayViewMut2<'_, f32>,
        layer: usize,
        q: &ArrayView3<'_, T>,
        batch: &[Queries<'_>],
        options: &Options,
    ) -> Result<f32, Error> {
        self.check_layer(layer)?;
        let (total, heads, head_size) = q.dim();
        let config = &self.config;
        let expected_heads = expected_heads(heads, config.key_heads)?;
        let queries = batch.iter().map(Queries::len).fold(0, usize::saturating_add);
        if heads != expected_heads || head_size != config.head_size || total != queries {
            let expected = vec![queries, expected_heads, config.head_size];
            let got = q.shape().to_vec();
            return Err(ShapeError::Mismatch { arg: "q", expected, got }.into());
        }
        check_shape("o", o.shape(), &[total, heads, config.value_size])?;
        check_shape("lse", lse.shape(), &[total, heads])?;
        for queries in batch {
            let len = self.sequence(queries.seq)?.lens[layer];
            if queries.len() > len {
                let expected = format!("at most {len}, the rows of {:?}", queries.seq);
                return Err(invalid("batch", expected, format_args!("{} queries", queries.len())));
            }
            self.check_held(queries, len, options)?;
            queries.rows.check()?;
        }
        Ok(options.check(head_size)? as f32)
    }

    /// Checks that the window has not released what a query sees.
    fn check_held(
        &self,
        queries: &Queries<'_>,
        len: usize,
        options: &Options,
    ) -> Result<(), Error> {
        let Some(window) = self.config.window else { return Ok(()) };
        if queries.is_empty() {
            return Ok(());
        }
        let sequence = self.sequence(queries.seq)?;
        let page_size = self.config.page_size;
        let position = len - queries.len();
        let start = window.start(position);
        let (narrow, sinks) =
            options.window.map_or((0, 0), |window| (window.start(position), window.sinks));
        // What the first query sees beside the sinks of the cache, which are never released; of the rows
        // after it each is seen by the query of its own position.
        for rows in [start..sinks.min(len), start.max(narrow)..len] {
            let released = |&index: &usize| sequence.pages[index] == NO_PAGE;
            let end = rows.end.div_ceil(page_size).min(sequence.window_start);
            let first = (rows.start / page_size..end).find(released);
            if let Some(index) = first.filter(|_| !rows.is_empty()) {
                let row = rows.start.max(index * page_size);
                let position = position.max(row);
                return Err(Error::Released { sequence: queries.seq, row, position });
            }
        }
        Ok(())
    }
}

/// Not generic, so that the kernels are compiled in this crate and not in those that use it.
fn run_wave(isa: Isa, wave: Wave<'_>) -> Result<(), IsaError> {
    dispatch(isa, wave)
}

/// The tasks of a wave, on one instruction set.
struct Wave<'a> {
    cache: &'a Cache,
    layer: usize,
    group: usize,
    arithmetic: Arithmetic,
    softcap: Option<f32>,
    windows: [Option<Window>; 2],
    workspace: &'a mut Workspace,
}

impl Kernel for Wave<'_> {
    type Output = ();

    fn run<S: Simd>(self, simd: S) {
        let Self { cache, layer, group, arithmetic, softcap, windows, workspace } = self;
        let mut partials = std::mem::take(&mut workspace.partials);
        let mut merged = std::mem::take(&mut workspace.merged);
        let plan = &workspace.plan;
        partials.grow(plan.floats);
        let cx = Context {
            cache,
            layer,
            group,
            softcap,
            windows,
            entries: &plan.entries,
            units: &plan.units,
            parents: &plan.parents,
            arithmetic,
            queries: &workspace.queries,
        };
        let out = &mut partials[..plan.floats];
        let first = plan.tasks.iter().map(|task| task.units.start).min().unwrap_or(0);
        let end = plan.tasks.iter().map(|task| task.units.end).max().unwrap_or(0);
        let e = cache.config.value_size.next_multiple_of(16);
        let size = (end - first) * group * (e + 2);
        merged.grow(cache.config.key_heads * size);
        let merged_heads = &mut merged[..cache.config.key_heads * size];
        let slots = workspace.slots();
        // One entry into the pool for both steps: a thread from outside sleeps meanwhile.
        rayon::scope(|_| {
            run_tasks(simd, &cx, &plan.tasks, None, slots, out);
            for_each_chunk(merged_heads, size, |head, to| {
                simd.vectorize(
                    #[inline(always)]
                    || merge(plan, head, group, first, e, out, to),
                );
            });
        });
        workspace.partials = partials;
        workspace.merged = merged;
    }
}

/// Runs tasks whose results lie one after the other in `out`; `next` follows them.
fn run_tasks<S: Simd>(
    simd: S,
    cx: &Context<'_>,
    tasks: &[Task],
    next: Option<&Task>,
    slots: Slots<'_>,
    out: &mut [f32],
) {
    match tasks {
        [] => {}
        [task] => task::run(simd, cx, task, next, &mut slots.take(), out),
        _ => {
            let (left, right) = tasks.split_at(tasks.len() / 2);
            let (a, b) = out.split_at_mut(right[0].partial - left[0].partial);
            rayon::join(
                || run_tasks(simd, cx, left, right.first(), slots, a),
                || run_tasks(simd, cx, right, next, slots, b),
            );
        }
    }
}

/// Merges the chunks of each row in order and divides by the sum of the weights; `to` is `[row][o, lse, l]`
/// of one key head.
#[inline(always)]
fn merge(
    plan: &Plan,
    head: usize,
    group: usize,
    first: usize,
    e: usize,
    partials: &[f32],
    to: &mut [f32],
) {
    for row in to.chunks_exact_mut(e + 2) {
        row.fill(0.0);
        row[e] = f32::NEG_INFINITY;
    }
    for task in plan.tasks.iter().filter(|task| task.head == head) {
        let rows = task.units.len() * group;
        let partial = &partials[task.partial..][..rows * (e + 2)];
        let (o, rest) = partial.split_at(rows * e);
        let (m, l) = rest.split_at(rows);
        for row in 0..rows {
            let at = ((task.units.start - first) * group + row) * (e + 2);
            let (sums, state) = to[at..at + e + 2].split_at_mut(e);
            // NaN in either maximum reaches the sums, which are NaN then already.
            let max = state[0].max(m[row]);
            let factor = |m: f32| if m == max { 1.0 } else { (m - max).exp() };
            let (a, b) = (factor(state[0]), factor(m[row]));
            for (sum, &x) in sums.iter_mut().zip(&o[row * e..]) {
                *sum = *sum * a + x * b;
            }
            state[0] = max;
            state[1] = state[1] * a + l[row] * b;
        }
    }
    for row in to.chunks_exact_mut(e + 2) {
        let (sums, state) = row.split_at_mut(e);
        let (max, sum) = (state[0], state[1]);
        if sum == 0.0 {
            sums.fill(0.0);
            state[0] = f32::NEG_INFINITY;
        } else {
            let inverse = 1.0 / sum;
            sums.iter_mut().for_each(|x| *x *= inverse);
            state[0] = max + sum.ln();
        }
    }
}

/// Writes out what was merged.
fn write<T: Element<Acc = f32>>(
    o: &mut ArrayViewMut3<'_, T>,
    lse: &mut ArrayViewMut2<'_, f32>,
    cache: &Cache,
    group: usize,
    wave: std::ops::Range<usize>,
    workspace: &Workspace,
) {
    let Workspace { plan, merged, .. } = workspace;
    let first = plan.tasks.iter().map(|task| task.units.start).min().unwrap_or(0);
    let end = plan.tasks.iter().map(|task| task.units.end).max().unwrap_or(0);
    let e = cache.config.value_size.next_multiple_of(16);
    for index in wave {
        let row = plan.units[index].row;
        let mut o = o.index_axis_mut(Axis(0), row);
        let mut lse = lse.row_mut(row);
        // Units that see nothing may be in no task.
        if !(first..end).contains(&index) {
            o.fill(T::from_acc(0.0));
            lse.fill(f32::NEG_INFINITY);
            continue;
        }
        for (head, (o, lse)) in o.rows_mut().into_iter().zip(&mut lse).enumerate() {
            let unit = head / group * (end - first) + index - first;
            let result = &merged[(unit * group + head % group) * (e + 2)..][..e + 2];
            narrow_row(&result[..e], o);
            *lse = result[e];
        }
    }
}
