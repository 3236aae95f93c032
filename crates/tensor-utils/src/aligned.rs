//! Buffers that begin at a line of the caches.

use std::ops::{Deref, DerefMut};

use crate::alloc::elements;
use crate::{ShapeError, try_vec};

/// Bytes of a line of the caches, and of the widest vector.
const LINE: usize = 64;

/// A buffer whose first element begins a line of the caches, as a slice. A vector of 64 bytes in it lies
/// within one line if its index is a multiple of its lanes; one that crosses two takes two loads or stores.
/// What the allocator returns begins 16 bytes off where it is large. For elements whose size divides a line.
#[derive(Debug, Default)]
pub struct Aligned<T> {
    /// Up to a line longer than the buffer.
    room: Vec<T>,
    /// Where the buffer begins.
    start: usize,
    len: usize,
}

impl<T: Clone + Default> Aligned<T> {
    /// `T::default()` (0 for the element types) in room for an array of shape `shape`.
    ///
    /// # Errors
    /// [`ShapeError::TooLarge`] if there is no memory of that size.
    pub fn try_new(arg: &'static str, shape: &[usize]) -> Result<Self, ShapeError> {
        let error = || ShapeError::TooLarge { arg, got: shape.to_vec() };
        let len = elements(shape).ok_or_else(error)?;
        let room = len.checked_add(Self::slack(len)).ok_or_else(error)?;
        let room = try_vec(arg, &[room]).map_err(|_| error())?;
        Ok(Self::of(room, len))
    }

    /// Makes it at least so long, and at least twice as long as it was if it must grow. What was in it is
    /// lost then.
    ///
    /// # Panics
    /// If there is no memory of that size.
    pub fn grow(&mut self, len: usize) {
        if self.len < len {
            let len = len.max(2 * self.len);
            *self = Self::try_new("len", &[len]).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    /// Bytes it takes, those before and after the buffer included.
    pub fn bytes(&self) -> usize {
        self.room.capacity() * size_of::<T>()
    }

    fn of(room: Vec<T>, len: usize) -> Self {
        let start = room.as_ptr().align_offset(LINE).min(room.len() - len);
        Self { room, start, len }
    }

    /// How many elements the allocator's result may be away from a line.
    fn slack(len: usize) -> usize {
        if len == 0 { 0 } else { (LINE / size_of::<T>().max(1)).saturating_sub(1) }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.room[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.room[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enough sizes that the allocator returns every alignment it has.
    #[test]
    fn begins_at_a_line_whatever_its_size() {
        fn check<T: Clone + Default + PartialEq + std::fmt::Debug>(value: T) {
            let mut kept = Vec::new();
            for len in (1..200).chain([100_000]) {
                let mut buffer = Aligned::<T>::try_new("a", &[len]).unwrap();
                assert_eq!((buffer.len(), buffer.as_ptr().align_offset(LINE)), (len, 0));
                assert!(buffer.iter().all(|x| *x == T::default()));
                buffer.fill(value.clone());
                assert!(buffer.bytes() < LINE + size_of::<T>() * len);
                kept.push(buffer);
            }
            assert!(kept.iter().all(|buffer| buffer.iter().all(|x| *x == value)));
        }
        check(1_u8);
        check(1.0_f32);
        check(1.0_f64);
        check((1_usize, 2_usize));
    }

    #[test]
    fn grows_and_does_not_shrink() {
        let mut buffer = Aligned::<f32>::default();
        assert!(buffer.is_empty() && buffer.bytes() == 0);
        buffer.grow(100);
        buffer[99] = 1.0;
        buffer.grow(50);
        assert_eq!((buffer.len(), buffer[99]), (100, 1.0));
        buffer.grow(101);
        assert_eq!((buffer.len(), buffer[99], buffer.as_ptr().align_offset(LINE)), (200, 0.0, 0));
    }

    #[test]
    #[should_panic(expected = "`len`")]
    fn grows_no_further_than_memory() {
        Aligned::<f32>::default().grow(usize::MAX);
    }

    #[test]
    fn sizes_that_do_not_fit() {
        assert_eq!(Aligned::<f32>::try_new("a", &[0, usize::MAX, usize::MAX]).unwrap().len(), 0);
        for shape in [vec![usize::MAX, 2], vec![usize::MAX], vec![usize::MAX / 16]] {
            let got = shape.clone();
            let error = Aligned::<f32>::try_new("a", &shape).unwrap_err();
            assert_eq!(error, ShapeError::TooLarge { arg: "a", got });
        }
    }
}
