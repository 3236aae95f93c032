//! Pages in full precision, for the rows that quantised storage still has to keep so.

use std::ops::Range;

use tensor_utils::{ShapeError, try_vec};

use crate::form::{Form, Side};
use crate::store::{Move, SLACK, read_row, write_row};

/// Free pages in full precision that are kept beside as many as there are in use.
const SPARE: usize = 8;

/// The pages. Each holds all layers; the pool grows when it must, and gives back the memory of most pages
/// that are free.
#[derive(Debug, Default)]
pub(crate) struct RawPool {
    pages: Vec<RawPage>,
    pub(crate) refs: Vec<u32>,
    pub(crate) free: Vec<u32>,
    /// Places of pages whose memory was given back.
    pub(crate) places: Vec<u32>,
}

#[derive(Debug, Default)]
struct RawPage {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl RawPage {
    fn side(&self, side: Side) -> &[f32] {
        match side {
            Side::Keys => &self.keys,
            Side::Values => &self.values,
        }
    }

    fn side_mut(&mut self, side: Side) -> &mut [f32] {
        match side {
            Side::Keys => &mut self.keys,
            Side::Values => &mut self.values,
        }
    }
}

/// The record of a layer and head in a raw page.
fn raw_record(form: Form, layer: usize, head: usize) -> Range<usize> {
    let record = form.raw().record;
    let start = (layer * form.heads + head) * record;
    start..start + record
}

impl RawPool {
    /// Makes sure that `count` pages are free. `forms`: of keys and of values.
    pub(crate) fn reserve(
        &mut self,
        count: usize,
        forms: [Form; 2],
        layers: usize,
    ) -> Result<(), ShapeError> {
        while self.free.len() < count {
            let new = |form: Form| {
                let record = form.raw().record;
                let size = if form.storage.is_quantised() { layers * form.heads } else { 0 };
                let slack = if size > 0 { SLACK } else { 0 };
                let mut vec = try_vec("residual", &[size, record])?;
                vec.resize(vec.len() + slack, 0.0);
                Ok(vec)
            };
            let page = RawPage { keys: new(forms[0])?, values: new(forms[1])? };
            match self.places.pop() {
                Some(place) => {
                    self.pages[place as usize] = page;
                    self.free.push(place);
                }
                None => {
                    self.free.push(self.pages.len() as u32);
                    self.pages.push(page);
                    self.refs.push(0);
                }
            }
        }
        Ok(())
    }

    /// A page of one's own; [`reserve`](Self::reserve) came before.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let page = self.free.pop()?;
        self.refs[page as usize] = 1;
        Some(page)
    }

    pub(crate) fn share(&mut self, page: u32) {
        self.refs[page as usize] += 1;
    }

    pub(crate) fn release(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        if *refs == 0 {
            self.free.push(page);
        }
    }

    /// Gives back the memory of free pages, but for as many as are in use and [`SPARE`].
    pub(crate) fn trim(&mut self) {
        let kept = self.used() + SPARE;
        for page in self.free.drain(kept.min(self.free.len())..) {
            self.pages[page as usize] = RawPage::default();
            self.places.push(page);
        }
    }

    /// Pages in use.
    pub(crate) fn used(&self) -> usize {
        self.pages.len() - self.free.len() - self.places.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        let bytes = |page: &RawPage| 4 * (page.keys.len() + page.values.len());
        self.pages.iter().map(bytes).sum()
    }

    /// From the record of a layer and head to the end of the page.
    #[inline(always)]
    pub(crate) fn record(&self, form: Form, page: u32, layer: usize, head: usize) -> &[f32] {
        let range = raw_record(form, layer, head);
        &self.pages[page as usize].side(form.side)[range.start..]
    }

    pub(crate) fn write(
        &mut self,
        form: Form,
        page: u32,
        (layer, head): (usize, usize),
        row: usize,
        from: &[f32],
    ) {
        let range = raw_record(form, layer, head);
        let to = &mut self.pages[page as usize].side_mut(form.side)[range];
        write_row(form.raw(), to, row, &from[..form.columns]);
    }

    pub(crate) fn read(
        &self,
        form: Form,
        page: u32,
        (layer, head): (usize, usize),
        row: usize,
        to: &mut [f32],
    ) {
        read_row(form.raw(), self.record(form, page, layer, head), row, to, |x| x);
    }

    pub(crate) fn copy_page(&mut self, from: u32, to: u32) {
        let (from, to) = (from as usize, to as usize);
        let [a, b] = match self.pages.get_disjoint_mut([from, to]) {
            Ok(pages) => pages,
            Err(_) => return,
        };
        b.keys.copy_from_slice(&a.keys);
        b.values.copy_from_slice(&a.values);
    }

    /// Copies rows of all layers and heads, one after the other.
    pub(crate) fn copy_rows(
        &mut self,
        form: Form,
        layers: usize,
        moves: impl Iterator<Item = Move> + Clone,
    ) {
        let raw = form.raw();
        for (layer, head) in (0..layers).flat_map(|layer| (0..form.heads).map(move |h| (layer, h)))
        {
            let start = raw_record(form, layer, head).start;
            for Move { from, to } in moves.clone() {
                for (a, b) in raw.lines(from.1).zip(raw.lines(to.1)) {
                    for (a, b) in a.places().zip(b.places()) {
                        let x = self.pages[from.0 as usize].side(form.side)[start + a];
                        self.pages[to.0 as usize].side_mut(form.side)[start + b] = x;
                    }
                }
            }
        }
    }
}
