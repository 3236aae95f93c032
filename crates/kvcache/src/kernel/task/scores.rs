//! Scores: queries times the keys of a block.

use std::ops::Range;

use tensor_utils::simd::Simd;

use super::{Fragment, Scratch, State};
use crate::Storage;
use crate::form::Form;
use crate::kernel::ahead::Ahead;
use crate::kernel::codes::{Codes, code_product};
use crate::kernel::factors::Groups;
use crate::kernel::floats::{Bf16, F16, F32, Numbers, product};
#[cfg(target_arch = "x86_64")]
use crate::kernel::pairs::{self, PairRows};
use crate::kernel::queries::Arithmetic;
use crate::kernel::tile::{Mode, Panel, Results};
use crate::store::Slab;

impl<S: Simd> State<'_, '_, S> {
    /// Scores of all rows and the fragments' keys, `stride` apart.
    pub(super) fn score(&mut self, scores: &mut [f32], stride: usize) {
        let cache = self.cx.cache;
        let form = cache.keys;
        match (&cache.layers[self.cx.layer].keys, form.storage) {
            (Slab::F32(words), _) => self.score_floats::<F32>(words, scores, stride),
            (Slab::Words(words), Storage::Bf16) => match self.cx.arithmetic {
                Arithmetic::F32 { .. } => self.score_floats::<Bf16>(words, scores, stride),
                #[cfg(target_arch = "x86_64")]
                Arithmetic::Bf16Pairs { dot, scale } => {
                    let rows = bytemuck::cast_slice(self.queries);
                    let queries = PairRows { dot, scale, rows, stride: self.depth };
                    self.score_pairs(queries, words, scores, stride);
                }
            },
            (Slab::Words(words), Storage::F16) => self.score_floats::<F16>(words, scores, stride),
            (Slab::Words(words), storage) => {
                for f in 0..self.scratch.fragments.len() {
                    let fragment = self.scratch.fragments[f];
                    let mut unit = 0;
                    while unit < self.task.units.len() {
                        let (end, coded) = self.alike(&fragment, unit, storage, false);
                        let units = unit..end;
                        if coded {
                            self.score_codes(words, &fragment, units, scores, stride);
                        } else {
                            self.score_raw(&fragment, units, scores, stride);
                        }
                        unit = end;
                    }
                }
            }
        }
    }

    fn score_floats<N: Numbers>(&mut self, words: &[N::Word], scores: &mut [f32], stride: usize) {
        for f in 0..self.scratch.fragments.len() {
            let fragment = self.scratch.fragments[f];
            let record = Slab::start(self.cx.cache.keys, fragment.page, self.task.head);
            let (form, units) = (self.cx.cache.keys, 0..self.task.units.len());
            self.multiply_keys::<N>(form, &words[record..], &fragment, units, scores, stride);
        }
    }

    fn score_raw(
        &mut self,
        fragment: &Fragment,
        units: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let cache = self.cx.cache;
        let record = cache.raw.record(cache.keys, fragment.raw, self.cx.layer, self.task.head);
        self.multiply_keys::<F32>(cache.keys.raw(), record, fragment, units, scores, stride);
    }

    /// Scores of some units and the keys of a fragment in `record`.
    fn multiply_keys<N: Numbers>(
        &mut self,
        form: Form,
        record: &[N::Word],
        fragment: &Fragment,
        units: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let Self { simd, queries, depth, .. } = *self;
        let (queries, range) = (&queries[rows.start * depth..], (0, form.columns));
        let work = rows.len() * form.columns;
        let to = &mut Results { numbers: &mut scores[rows.start * stride..], stride };
        let ahead = &mut self.scratch.ahead;
        for_each_panel::<S, _>(form, record, fragment, work, ahead, to, |x, to| {
            product::<S, N>(simd, x, range, queries, depth, rows.len(), Mode::Replace, to);
        });
    }

    /// Scores of all rows in bf16 and keys in bf16.
    #[cfg(target_arch = "x86_64")]
    fn score_pairs(
        &mut self,
        queries: PairRows<'_>,
        words: &[u16],
        scores: &mut [f32],
        stride: usize,
    ) {
        let (form, rows) = (self.cx.cache.keys, self.rows);
        let pairs = form.columns.div_ceil(2);
        let work = rows * self.cx.arithmetic.work(form.columns);
        let Scratch { fragments, ahead, .. } = &mut *self.scratch;
        for fragment in fragments.iter() {
            let record = &words[Slab::start(form, fragment.page, self.task.head)..];
            let to = &mut Results { numbers: scores, stride };
            for_each_panel::<S, _>(form, record, fragment, work, ahead, to, |x, to| {
                pairs::product(queries, x, (rows, pairs), to);
            });
        }
    }

    fn score_codes(
        &mut self,
        words: &[u16],
        fragment: &Fragment,
        units: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let form = self.cx.cache.keys;
        let record = Slab::start(form, fragment.page, self.task.head);
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let queries = &self.queries[rows.start * self.depth..];
        let numbers = &words[record..];
        let fields = form.fields;
        let [scales, minima] = form.affine(numbers, 0..form.groups);
        let groups = Groups { scales, minima, lead: 0, fields, terms: form.columns };
        let shape = (rows.len(), self.depth, self.depth);
        let Scratch { factors, ahead, .. } = &mut *self.scratch;
        factors.make(self.simd, groups, queries, shape);
        let blocks = form.columns.div_ceil(2 * fields);
        let words = &numbers[form.head()..];
        let work = rows.len() * form.columns;
        let to = &mut Results { numbers: &mut scores[rows.start * stride..], stride };
        for_each_panel::<S, _>(form, words, fragment, work, ahead, to, |x, to| {
            let codes = Codes { x, fields, first: 0, blocks, factors };
            code_product(self.simd, &codes, Mode::Replace, to);
        });
    }
}

/// Calls `product` with each panel of a fragment's keys, whose numbers `words` begins with, and their columns of
/// the scores `to`. A key takes `work`.
fn for_each_panel<S: Simd, W>(
    form: Form,
    words: &[W],
    fragment: &Fragment,
    work: usize,
    ahead: &mut Ahead,
    to: &mut Results<'_>,
    mut product: impl FnMut(Panel<'_, W>, &mut Results<'_>),
) {
    // What a vector reads and writes behind the last lane of a panel, the next one writes again.
    for panel in form.panels(fragment.row..fragment.row + fragment.len) {
        let x = Panel::new::<S>(words, &panel, ahead.share(work * panel.lanes.len()));
        let key = fragment.key + panel.lanes.start - fragment.row;
        product(x, &mut Results { numbers: &mut to.numbers[key..], stride: to.stride });
    }
}
