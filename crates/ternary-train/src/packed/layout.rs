//! How a packed matrix lies in memory.
//!
//! Rows are taken 16 at a time, a *block*; columns 16 at a time, a *step*. A step of a block is 64
//! bytes, four for each row; byte `4 r + j` holds row `r` and the columns `j`, `4 + j`, `8 + j` and
//! `12 + j` of the step in its bits 0-1, 2-3, 4-5 and 6-7, each code plus 1. Shifted and masked, the 64
//! bytes are 16 rows of four consecutive columns, which is what `vpdpbusd` multiplies.
//!
//! ```text
//! codes   [blocks][steps][16 rows][4 bytes]     u8, the steps of a row one after the other
//! scales  [blocks][groups][16 rows]             f16 bits
//! ```

use ndarray::Array2;
use tensor_utils::{f16, try_vec};

use crate::{Error, Ternary};

/// Rows of a block: lanes of `i32` in the widest vector.
pub(super) const ROWS: usize = 16;
/// Columns of a step.
pub(super) const COLUMNS: usize = 16;
/// Bytes of a step of a block.
pub(super) const STEP: usize = ROWS * COLUMNS / 4;
/// A step of a block whose codes are 0.
const ZEROS: u8 = 0b01_01_01_01;

/// A ternary matrix `[rows, columns]` in 2 bits a weight and 16 bits a group: 2.125 bits for groups
/// of 128.
///
/// Rows are filled up to a multiple of 16, as are columns.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedMatrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) group: usize,
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<u16>,
}

impl PackedMatrix {
    /// Packs a ternary matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] if the scales do not fit the codes or there is no memory, [`Error::Option`]
    /// for a group size that is not a multiple of 32 up to 256, a code outside -1, 0 and 1, or a
    /// scale that f16 does not hold.
    pub fn new(ternary: &Ternary) -> Result<Self, Error> {
        ternary.check()?;
        let (rows, columns) = ternary.codes.dim();
        let (blocks, steps) = (rows.div_ceil(ROWS), columns.div_ceil(COLUMNS));
        let groups = columns.div_ceil(ternary.group);
        let mut codes = try_vec("codes", &[blocks, steps, STEP])?;
        codes.fill(ZEROS);
        let mut scales = try_vec("scales", &[blocks, groups, ROWS])?;
        for (i, row) in ternary.codes.outer_iter().enumerate() {
            let block = &mut codes[i / ROWS * steps * STEP..][..steps * STEP];
            for (j, &code) in row.iter().enumerate() {
                let (byte, shift) = place(i % ROWS, j);
                block[byte] ^= (ZEROS & (3 << shift)) ^ (((code + 1) as u8) << shift);
            }
            for (g, &scale) in ternary.scales.row(i).iter().enumerate() {
                scales[(i / ROWS * groups + g) * ROWS + i % ROWS] = f16::from_f32(scale).to_bits();
            }
        }
        Ok(Self { rows, columns, group: ternary.group, codes, scales })
    }

    /// The ternary matrix again: nothing is lost.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no memory.
    pub fn unpack(&self) -> Result<Ternary, Error> {
        let mut codes: Array2<i8> = tensor_utils::try_array("codes", self.dim())?;
        let mut scales = tensor_utils::try_array("scales", (self.rows, self.groups()))?;
        for i in 0..self.rows {
            for j in 0..self.columns {
                codes[[i, j]] = self.code(i, j);
            }
            for g in 0..self.groups() {
                scales[[i, g]] = self.scale(i, g);
            }
        }
        Ok(Ternary { codes, scales, group: self.group })
    }

    /// Rows and columns.
    pub fn dim(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Columns that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 2 * self.scales.len()
    }

    /// Writes row `i`, code times scale, to `out` `[columns]`: the embedding of a token.
    ///
    /// # Errors
    /// [`Error::Option`] if there is no such row, [`Error::Shape`] for the length of `out`.
    pub fn row_into(&self, out: &mut [f32], i: usize) -> Result<(), Error> {
        if i >= self.rows {
            return Err(Error::option("row", format!("below {}", self.rows), i));
        }
        tensor_utils::check_shape("out", &[out.len()], &[self.columns])?;
        for (g, part) in out.chunks_mut(self.group).enumerate() {
            let scale = self.scale(i, g);
            for (j, x) in (g * self.group..).zip(part) {
                *x = f32::from(self.code(i, j)) * scale;
            }
        }
        Ok(())
    }

    pub(super) fn steps(&self) -> usize {
        self.columns.div_ceil(COLUMNS)
    }

    pub(super) fn groups(&self) -> usize {
        self.columns.div_ceil(self.group)
    }

    fn code(&self, i: usize, j: usize) -> i8 {
        let (byte, shift) = place(i % ROWS, j);
        let bits = self.codes[i / ROWS * self.steps() * STEP + byte] >> shift & 3;
        bits as i8 - 1
    }

    fn scale(&self, i: usize, g: usize) -> f32 {
        f16::from_bits(self.scales[(i / ROWS * self.groups() + g) * ROWS + i % ROWS]).to_f32()
    }
}

/// Byte and bit of a weight in its block.
fn place(row: usize, column: usize) -> (usize, usize) {
    let (step, within) = (column / COLUMNS, column % COLUMNS);
    (step * STEP + row * 4 + within % 4, within / 4 * 2)
}
