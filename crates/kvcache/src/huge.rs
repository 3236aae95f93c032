//! Memory for the numbers of a cache: zeros that take room when they are first touched, beginning at a
//! multiple of 64 bytes, on pages of 2 MiB where the system grants them.
//!
//! A cache is far larger than what the processor's table of 4 KiB pages covers, and its records lie
//! scattered: with small pages every 64 lines would wait for an address.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::Pod;
use memmap2::MmapMut;
use tensor_utils::ShapeError;

/// A slice of fixed length.
pub(crate) struct Huge<T> {
    map: MmapMut,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Pod> Huge<T> {
    /// Zeros. The error names `arg` and the shape that was asked for.
    pub(crate) fn zeros(arg: &'static str, shape: &[usize]) -> Result<Self, ShapeError> {
        let error = || ShapeError::TooLarge { arg, got: shape.to_vec() };
        let len = shape.iter().try_fold(1_usize, |len, &axis| len.checked_mul(axis));
        let len = len.ok_or_else(error)?;
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(error)?;
        if isize::try_from(bytes).is_err() {
            return Err(error());
        }
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|_| error())?;
        // Advice only: small pages do as well. (Miri does not know it.)
        #[cfg(all(target_os = "linux", not(miri)))]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map, len, elements: PhantomData })
    }
}

impl<T: Pod> Deref for Huge<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[..self.len * size_of::<T>()])
    }
}

impl<T: Pod> DerefMut for Huge<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[..self.len * size_of::<T>()])
    }
}

impl<T> fmt::Debug for Huge<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Huge").field("len", &self.len).finish_non_exhaustive()
    }
}
