//! The records of all pages ([`Form`] has their layout), and rows on their way in, out and from one to another.
//!
//! Vectors may be loaded past the end of a row, and of the last record, so a slab has a little slack.

use tensor_utils::{Element, Isa, IsaError, ShapeError, bf16, dispatch, f16, narrow};

use crate::Storage;
use crate::form::{Form, Side};
use crate::huge::Huge;
use crate::quantise::{Affine, Quantise};

/// Elements after the last record that a vector may read.
pub(crate) const SLACK: usize = 64;

/// A row of one head on its way into the cache.
#[derive(Debug)]
pub(crate) struct RowBuffer {
    pub(crate) floats: Vec<f32>,
    /// The same as it is stored.
    words: Vec<u16>,
}

impl RowBuffer {
    pub(crate) fn new(columns: usize) -> Self {
        Self { floats: vec![0.0; columns], words: vec![0; columns] }
    }
}

/// A row that is copied: from a row of a page to another.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Move {
    pub(crate) from: (u32, usize),
    pub(crate) to: (u32, usize),
}

/// The records of one side of one layer.
#[derive(Debug)]
pub(crate) enum Slab {
    F32(Huge<f32>),
    /// bf16 and f16 bits, or codes and bf16 scales.
    Words(Huge<u16>),
}

impl Slab {
    /// Zeros, which the system hands out when they are first touched.
    pub(crate) fn new(form: Form) -> Result<Self, ShapeError> {
        let arg = "layout";
        let Form { heads, pages, record, .. } = form;
        let elements = pages
            .checked_mul(heads)
            .and_then(|records| records.checked_mul(record))
            .and_then(|elements| elements.checked_add(SLACK))
            .ok_or_else(|| ShapeError::TooLarge { arg, got: vec![heads, pages, record] })?;
        Ok(if form.storage == Storage::F32 {
            Self::F32(Huge::zeros(arg, &[elements])?)
        } else {
            Self::Words(Huge::zeros(arg, &[elements])?)
        })
    }

    /// Where the record of a page and head begins.
    #[inline(always)]
    pub(crate) fn start(form: Form, page: u32, head: usize) -> usize {
        (head * form.pages + page as usize) * form.record
    }

    /// Stores a row; quantised storage takes whole pages only ([`Self::quantise`]).
    pub(crate) fn write(
        &mut self,
        form: Form,
        (page, row): (u32, usize),
        head: usize,
        from: &mut RowBuffer,
    ) {
        let start = Self::start(form, page, head);
        let RowBuffer { floats, words } = from;
        let (floats, words) = (&floats[..form.columns], &mut words[..form.columns]);
        match (self, form.storage) {
            (Self::F32(to), _) => write_row(form, &mut to[start..], row, floats),
            (Self::Words(to), Storage::Bf16) => {
                narrow::<bf16>(floats, bytemuck::cast_slice_mut(words));
                write_row(form, &mut to[start..], row, words);
            }
            (Self::Words(to), Storage::F16) => {
                narrow::<f16>(floats, bytemuck::cast_slice_mut(words));
                write_row(form, &mut to[start..], row, words);
            }
            (Self::Words(_), _) => {}
        }
    }

    /// The numbers of a row as attention takes them; those of codes at most the largest of `f32`.
    pub(crate) fn read(&self, form: Form, page: u32, head: usize, row: usize, to: &mut [f32]) {
        let start = Self::start(form, page, head);
        match (self, form.storage) {
            (Self::F32(from), _) => read_row(form, &from[start..], row, to, |x| x),
            (Self::Words(from), Storage::Bf16) => {
                read_row(form, &from[start..], row, to, |bits| bf16::from_bits(bits).to_acc());
            }
            (Self::Words(from), Storage::F16) => {
                read_row(form, &from[start..], row, to, |bits| f16::from_bits(bits).to_f32());
            }
            (Self::Words(from), _) => {
                for (column, to) in to.iter_mut().enumerate() {
                    let (word, shift) = form.word_at(row, column);
                    let group = if form.side == Side::Keys { column } else { row };
                    let affine = Affine {
                        scale: bf16::from_bits(from[start + group]),
                        minimum: bf16::from_bits(from[start + form.groups + group]),
                    };
                    let code = from[start + form.head() + word] >> shift & form.field_mask();
                    *to = affine.value(code);
                }
            }
        }
    }

    /// Quantises a full record from the same record in full precision.
    pub(crate) fn quantise(
        &mut self,
        isa: Isa,
        form: Form,
        (page, head): (u32, usize),
        from: &[f32],
    ) -> Result<(), IsaError> {
        let Self::Words(words) = self else { return Ok(()) };
        let to = &mut words[Self::start(form, page, head)..][..form.record];
        dispatch(isa, Quantise { form, from, to })
    }

    /// Copies all heads of a page.
    pub(crate) fn copy_page(&mut self, form: Form, from: u32, to: u32) {
        for head in 0..form.heads {
            let (from, to) = (Self::start(form, from, head), Self::start(form, to, head));
            let range = from..from + form.record;
            match self {
                Self::F32(slab) => slab.copy_within(range, to),
                Self::Words(slab) => slab.copy_within(range, to),
            }
        }
    }

    /// Copies rows of all heads, one after the other; floats only.
    pub(crate) fn copy_rows(&mut self, form: Form, moves: impl Iterator<Item = Move> + Clone) {
        for head in 0..form.heads {
            for Move { from, to } in moves.clone() {
                let from = (Self::start(form, from.0, head), from.1);
                let to = (Self::start(form, to.0, head), to.1);
                match self {
                    Self::F32(slab) => copy_row(form, slab, from, to),
                    Self::Words(slab) => copy_row(form, slab, from, to),
                }
            }
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(slab) => bytemuck::cast_slice(slab),
            Self::Words(slab) => bytemuck::cast_slice(slab),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.as_bytes().len()
    }
}

/// Writes a row to a record of floats, which `to` begins with.
pub(crate) fn write_row<W: Copy>(form: Form, to: &mut [W], row: usize, from: &[W]) {
    for line in form.lines(row) {
        if let Some((columns, places)) = line.runs() {
            to[places].copy_from_slice(&from[columns]);
            continue;
        }
        for (column, place) in line.columns().zip(line.places()) {
            to[place] = from[column];
        }
    }
}

/// Reads a row of a record of floats, which `from` begins with.
pub(crate) fn read_row<W: Copy>(
    form: Form,
    from: &[W],
    row: usize,
    to: &mut [f32],
    widen: impl Fn(W) -> f32,
) {
    for line in form.lines(row) {
        for (column, place) in line.columns().zip(line.places()) {
            to[column] = widen(from[place]);
        }
    }
}

/// Copies a row between records of floats that begin at two elements of a slab.
fn copy_row<W: Copy>(
    form: Form,
    slab: &mut [W],
    (start, row): (usize, usize),
    (to_start, to_row): (usize, usize),
) {
    for (from, to) in form.lines(row).zip(form.lines(to_row)) {
        for (from, to) in from.places().zip(to.places()) {
            slab[to_start + to] = slab[start + from];
        }
    }
}
