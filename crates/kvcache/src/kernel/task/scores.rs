//! Scores: queries times the keys of a block.

use std::ops::Range;

use tensor_utils::simd::Simd;

use super::{Fragment, State};
use crate::Storage;
use crate::kernel::codes::{Codes, code_product};
use crate::kernel::factors::Groups;
use crate::kernel::floats::{Bf16, F16, F32, Numbers, product};
use crate::kernel::tile::{Mode, Panel, Results};
use crate::store::{Form, Slab};

impl<S: Simd> State<'_, '_, S> {
    /// Scores of all rows and the fragments' keys, `stride` apart.
    pub(super) fn score(&mut self, scores: &mut [f32], stride: usize) {
        let cache = self.cx.cache;
        let form = cache.keys;
        match (&cache.layers[self.cx.layer].keys, form.storage) {
            (Slab::F32(words), _) => self.score_floats::<F32>(words, scores, stride),
            (Slab::Words(words), Storage::Bf16) => self.score_floats::<Bf16>(words, scores, stride),
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
        let queries = &self.queries[rows.start * self.depth..];
        // What a vector reads and writes behind the last lane of a panel, the next one writes again.
        for panel in form.panels(fragment.row..fragment.row + fragment.len) {
            let work = rows.len() * panel.lanes.len() * form.columns;
            let x = Panel::new::<S>(record, &panel, self.scratch.ahead.share(work));
            let key = fragment.key + panel.lanes.start - fragment.row;
            let numbers = &mut scores[rows.start * stride + key..];
            let (range, mode) = ((0, form.columns), Mode::Replace);
            let mut to = Results { numbers, stride };
            product::<S, N>(self.simd, x, range, queries, self.depth, rows.len(), mode, &mut to);
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
        self.scratch.factors.make(self.simd, groups, queries, shape);
        let blocks = form.columns.div_ceil(2 * fields);
        let words = &numbers[form.head()..];
        for panel in form.panels(fragment.row..fragment.row + fragment.len) {
            let work = rows.len() * panel.lanes.len() * form.columns;
            let x = Panel::new::<S>(words, &panel, self.scratch.ahead.share(work));
            let codes = Codes { x, fields, first: 0, blocks, factors: &self.scratch.factors };
            let key = fragment.key + panel.lanes.start - fragment.row;
            let numbers = &mut scores[rows.start * stride + key..];
            code_product(self.simd, &codes, Mode::Replace, &mut Results { numbers, stride });
        }
    }
}
