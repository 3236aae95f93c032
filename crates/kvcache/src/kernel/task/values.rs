//! Sums of values: weights times the values of a block.

use std::ops::Range;

use tensor_utils::simd::Simd;

use super::{Fragment, SCORES, Scratch, State};
use crate::Storage;
use crate::form::Form;
use crate::kernel::codes::{Codes, code_product};
use crate::kernel::factors::{Groups, PADDING};
use crate::kernel::floats::{Bf16, F16, F32, Numbers, product};
use crate::kernel::tile::{Mode, Panel, Results};
use crate::store::Slab;

impl<S: Simd> State<'_, '_, S> {
    /// Adds the weighted values of a fragment to the output of some units. The weights are in
    /// `scratch.scores`, from the fragment's key on.
    pub(super) fn add_values(&mut self, fragment: &Fragment, units: Range<usize>, coded: bool) {
        let cache = self.cx.cache;
        let (form, head) = (cache.values, self.task.head);
        let record = Slab::start(form, fragment.page, head);
        match (&cache.layers[self.cx.layer].values, form.storage) {
            (Slab::F32(words), _) => {
                self.add_floats::<F32>(form, &words[record..], fragment, units);
            }
            (Slab::Words(words), Storage::Bf16) => {
                self.add_floats::<Bf16>(form, &words[record..], fragment, units);
            }
            (Slab::Words(words), Storage::F16) => {
                self.add_floats::<F16>(form, &words[record..], fragment, units);
            }
            (Slab::Words(_), _) if !coded => {
                let words = cache.raw.record(form, fragment.raw, self.cx.layer, head);
                self.add_floats::<F32>(form.raw(), words, fragment, units);
            }
            (Slab::Words(words), _) => self.add_codes(words, record, fragment, units),
        }
    }

    fn add_floats<N: Numbers>(
        &mut self,
        form: Form,
        record: &[N::Word],
        fragment: &Fragment,
        units: Range<usize>,
    ) {
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let Scratch { scores, ahead, .. } = &mut *self.scratch;
        let weights = &scores[rows.start * SCORES + fragment.key..];
        for panel in form.panels(0..form.columns) {
            let work = rows.len() * fragment.len * panel.lanes.len();
            let x = Panel::new::<S>(record, &panel, ahead.share(work));
            let numbers = &mut self.o[rows.start * self.e + panel.lanes.start..];
            let mut to = Results { numbers, stride: self.e };
            let range = (fragment.row, fragment.len);
            product::<S, N>(self.simd, x, range, weights, SCORES, rows.len(), Mode::Add, &mut to);
        }
    }

    fn add_codes(
        &mut self,
        words: &[u16],
        record: usize,
        fragment: &Fragment,
        units: Range<usize>,
    ) {
        let form = self.cx.cache.values;
        let rows = units.start * self.cx.group..units.end * self.cx.group;
        let fields = form.fields;
        let first = fragment.row / (2 * fields);
        let blocks = (fragment.row + fragment.len).div_ceil(2 * fields) - first;
        // The weights begin in the middle of a block where the fragment does.
        let lead = fragment.row - first * 2 * fields;
        let padded = (blocks * 2 * fields).next_multiple_of(PADDING);
        let Scratch { factors, aligned, scores, ahead, .. } = &mut *self.scratch;
        let mut weights = (&scores[rows.start * SCORES + fragment.key..], SCORES);
        if fragment.len < padded {
            aligned.grow(rows.len() * padded);
            for (row, aligned) in aligned.chunks_exact_mut(padded).take(rows.len()).enumerate() {
                aligned[..lead].fill(0.0);
                aligned[lead..][..fragment.len]
                    .copy_from_slice(&weights.0[row * SCORES..][..fragment.len]);
                aligned[lead + fragment.len..].fill(0.0);
            }
            weights = (aligned, padded);
        }
        let used = fragment.row..fragment.row + fragment.len;
        let [scales, minima] = form.affine(&words[record..], used);
        let groups = Groups { scales, minima, lead, fields, terms: padded };
        factors.make(self.simd, groups, weights.0, (rows.len(), weights.1, padded));
        let words = &words[record + form.head()..];
        for panel in form.panels(0..form.columns) {
            let work = rows.len() * fragment.len * panel.lanes.len();
            let x = Panel::new::<S>(words, &panel, ahead.share(work));
            let codes = Codes { x, fields, first, blocks, factors };
            let numbers = &mut self.o[rows.start * self.e + panel.lanes.start..];
            code_product(self.simd, &codes, Mode::Add, &mut Results { numbers, stride: self.e });
        }
    }
}
