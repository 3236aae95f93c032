//! Outputs that show what was written where.

use half::{bf16, f16};
use ndarray::{Array, ArrayViewMut, Dimension, IntoDimension, ShapeBuilder};
use thiserror::Error;

use crate::Element;

/// Elements before and after the view, and between its rows when they are set apart.
const MARGIN: usize = 64;

/// An output in the middle of a larger allocation that is filled with NaN.
///
/// Let the kernel write to [`view_mut`](Self::view_mut), then [`finish`](Self::finish): it fails if
/// an element was left unwritten, or one outside was overwritten, even by another NaN.
#[derive(Debug, Clone)]
pub struct Guarded<T, D: Dimension> {
    buffer: Vec<T>,
    shape: D,
    strides: D,
}

/// A kernel wrote too little or too much.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum GuardError {
    /// An element of the output still holds what the test put there.
    #[error("{count} elements of the output were not written; the first at {index:?}")]
    Unwritten {
        /// The number of such elements.
        count: usize,
        /// The first of them in logical order.
        index: Vec<usize>,
    },
    /// An element that is not part of the output was changed.
    #[error(
        "{count} elements outside the output were overwritten; \
         the first at offset {offset} from the output's first"
    )]
    Overwritten {
        /// The number of such elements.
        count: usize,
        /// The lowest of them, in elements from the first of the output; negative in front of it.
        offset: isize,
    },
}

impl<T: Poison, D: Dimension> Guarded<T, D> {
    /// An output in C order without gaps, with margins in front and behind.
    ///
    /// # Panics
    /// If the shape has more elements than memory can hold.
    pub fn contiguous(shape: impl IntoDimension<Dim = D>) -> Self {
        Self::with_gap(shape.into_dimension(), 0)
    }

    /// An output in C order with a margin after each row of the last axis: shows a vector that was
    /// stored over the end of a row, which the next row hides in a contiguous one.
    ///
    /// # Panics
    /// If the shape has more elements than memory can hold.
    pub fn padded(shape: impl IntoDimension<Dim = D>) -> Self {
        Self::with_gap(shape.into_dimension(), MARGIN)
    }

    fn with_gap(shape: D, gap: usize) -> Self {
        let mut strides = D::zeros(shape.ndim());
        let mut len = 1;
        for axis in (0..shape.ndim()).rev() {
            strides[axis] = len;
            len *= shape[axis];
            if axis + 1 == shape.ndim() {
                len += gap;
            }
        }
        if shape.size() == 0 {
            // Nothing to reach: with the strides of its gaps `to_owned` would reach beyond nothing.
            strides = D::zeros(shape.ndim());
        }
        Self { buffer: vec![T::POISON; len + 2 * MARGIN], shape, strides }
    }

    /// The output.
    pub fn view_mut(&mut self) -> ArrayViewMut<'_, T, D> {
        let shape = self.shape.clone().strides(self.strides.clone());
        ArrayViewMut::from_shape(shape, &mut self.buffer[MARGIN..])
            .unwrap_or_else(|error| unreachable!("the buffer was made for this shape: {error}"))
    }

    /// Checks that every element of the output was written and no other, and copies the output.
    ///
    /// # Errors
    /// [`GuardError`] otherwise.
    pub fn finish(mut self) -> Result<Array<T, D>, GuardError> {
        let output = self.view_mut().to_owned();
        let unwritten = |value: &T| value.bits() == T::POISON.bits();
        if let Some((index, _)) = output.indexed_iter().find(|(_, value)| unwritten(value)) {
            let count = output.iter().filter(|value| unwritten(value)).count();
            return Err(GuardError::Unwritten {
                count,
                index: index.into_dimension().slice().to_vec(),
            });
        }
        // With the output poisoned again, everything has to be poison.
        self.view_mut().fill(T::POISON);
        let overwritten = |value: &T| !unwritten(value);
        if let Some(position) = self.buffer.iter().position(overwritten) {
            return Err(GuardError::Overwritten {
                count: self.buffer.iter().filter(|value| overwritten(value)).count(),
                offset: position as isize - MARGIN as isize,
            });
        }
        Ok(output)
    }
}

/// A type with a NaN that no arithmetic produces.
pub trait Poison: Element {
    /// A quiet NaN with a payload of its own.
    const POISON: Self;
}

impl Poison for f32 {
    const POISON: Self = Self::from_bits(0x7fe5_a5a5);
}

impl Poison for f64 {
    const POISON: Self = Self::from_bits(0x7ffa_5a5a_5a5a_5a5a);
}

impl Poison for bf16 {
    const POISON: Self = Self::from_bits(0x7fe5);
}

impl Poison for f16 {
    const POISON: Self = Self::from_bits(0x7f5a);
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Ix2, array};

    fn both() -> [Guarded<f32, Ix2>; 2] {
        [Guarded::contiguous((2, 3)), Guarded::padded((2, 3))]
    }

    #[test]
    fn passes_when_all_of_the_output_and_nothing_else_was_written() {
        for mut guarded in both() {
            assert!(guarded.view_mut().iter().all(|value| value.is_nan()));
            guarded.view_mut().assign(&array![[1.0, 2.0, 3.0], [4.0, f32::NAN, 6.0]]);
            let output = guarded.finish().unwrap();
            assert_eq!((output[[0, 2]], output[[1, 0]]), (3.0, 4.0));
        }
        assert!(Guarded::<bf16, _>::contiguous((2, 0, 3)).finish().is_ok());
        assert!(Guarded::<f64, _>::padded([0]).finish().is_ok());
        for shape in [(0, 3), (3, 0), (0, 0)] {
            assert!(Guarded::<f32, _>::contiguous(shape).finish().is_ok(), "{shape:?}");
            assert!(Guarded::<f32, _>::padded(shape).finish().is_ok(), "{shape:?}");
        }
        for shape in [(0, 2, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)] {
            assert!(Guarded::<f32, _>::contiguous(shape).finish().is_ok(), "{shape:?}");
            assert!(Guarded::<f32, _>::padded(shape).finish().is_ok(), "{shape:?}");
        }
        let unwritten = Guarded::<f16, _>::padded(()).finish().unwrap_err();
        assert_eq!(unwritten, GuardError::Unwritten { count: 1, index: vec![] });
    }

    #[test]
    fn finds_what_was_not_written() {
        for mut guarded in both() {
            guarded.view_mut().row_mut(0).fill(0.0);
            let error = guarded.finish().unwrap_err();
            assert_eq!(error, GuardError::Unwritten { count: 3, index: vec![1, 0] });
        }
    }

    #[test]
    fn finds_what_was_written_outside() {
        for offset in [-64, -1, 6, 69_isize] {
            let [mut guarded, _] = both();
            guarded.view_mut().fill(0.0);
            guarded.buffer[(MARGIN as isize + offset) as usize] = f32::NAN;
            let error = guarded.finish().unwrap_err();
            assert_eq!(error, GuardError::Overwritten { count: 1, offset });
        }
    }

    #[test]
    fn padding_shows_a_store_over_the_end_of_a_row() {
        let [_, mut guarded] = both();
        guarded.view_mut().fill(0.0);
        guarded.buffer[MARGIN + 3] = 0.0;
        let error = guarded.finish().unwrap_err();
        assert_eq!(error, GuardError::Overwritten { count: 1, offset: 3 });
    }
}
