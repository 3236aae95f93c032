//! Allocations that fail with an error instead of a panic or an abort.

use bytemuck::Zeroable;
use bytemuck::allocation::try_zeroed_vec;
use ndarray::{Array, Dimension, IntoDimension};

use crate::ShapeError;

/// Bytes from which on memory is asked for in pages of 2 MiB: one lies in it wherever it begins.
const LARGE: usize = 4 << 20;

/// An array of zeros.
///
/// The system hands memory out when it is first touched, page by page; where there are many, on pages of 2 MiB
/// if it grants them: 4 KiB at a time it can take several times as long as the kernel that fills the array.
///
/// # Errors
/// [`ShapeError::TooLarge`] if there is no memory of that size.
pub fn try_array<T: Zeroable, I: IntoDimension>(
    arg: &'static str,
    shape: I,
) -> Result<Array<T, I::Dim>, ShapeError> {
    let shape = shape.into_dimension();
    let error = || ShapeError::TooLarge { arg, got: shape.slice().to_vec() };
    let len = elements(shape.slice()).ok_or_else(error)?;
    let mut zeros = try_zeroed_vec(len).map_err(|()| error())?;
    ask_for_large_pages(&mut zeros);
    let error = error();
    Array::from_shape_vec(shape, zeros).map_err(|_| error)
}

/// A buffer of `T::default()` with room for an array of shape `shape`. Of numbers of 32 and 64 bits it is untouched
/// and on large pages as an array of [`try_array`] is; others are written one by one.
///
/// # Errors
/// [`ShapeError::TooLarge`] if there is no memory of that size.
pub fn try_vec<T: Clone + Default>(
    arg: &'static str,
    shape: &[usize],
) -> Result<Vec<T>, ShapeError> {
    let error = || ShapeError::TooLarge { arg, got: shape.to_vec() };
    let len = elements(shape).ok_or_else(error)?;
    // The probe is given back at once: `vec!` gets zeroed pages, which resizing would touch.
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| error())?;
    let mut buffer = vec![T::default(); len];
    ask_for_large_pages(&mut buffer);
    Ok(buffer)
}

/// For memory of at least [`LARGE`]. Advice only: small pages do as well. (Miri does not know it.)
fn ask_for_large_pages<T>(memory: &mut [T]) {
    #[cfg(all(target_os = "linux", not(miri)))]
    if size_of_val(memory) >= LARGE {
        const PAGE: usize = 2 << 20;
        let start: *mut u8 = memory.as_mut_ptr().cast();
        let before = start.align_offset(PAGE);
        let whole = (size_of_val(memory) - before) / PAGE * PAGE;
        // SAFETY: whole pages of any size within memory that is borrowed here; the advice changes nothing that is in them.
        #[allow(unsafe_code, reason = "the call takes an address")]
        unsafe {
            libc::madvise(start.wrapping_add(before).cast(), whole, libc::MADV_HUGEPAGE);
        }
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    let _ = memory;
}

/// How many elements an array of shape `shape` has, if so many can be counted.
pub(crate) fn elements(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1_usize, |len, &axis| len.checked_mul(axis))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bf16;

    #[test]
    fn sizes_that_fit_and_sizes_that_do_not() {
        assert_eq!(try_array::<f32, _>("a", (2, 3)).unwrap().dim(), (2, 3));
        assert_eq!(try_vec::<f32>("a", &[0, usize::MAX, usize::MAX]).unwrap().len(), 0);
        for shape in [[usize::MAX, 1], [1 << 40, 1 << 30], [isize::MAX as usize, 1]] {
            let got = shape.to_vec();
            assert_eq!(try_vec::<f32>("a", &shape), Err(ShapeError::TooLarge { arg: "a", got }));
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no advice to test, and is slow to clear memory")]
    fn large_arrays_are_zeros_from_end_to_end() {
        for len in [LARGE / 2, LARGE / 2 + 1, 3 * LARGE + 7] {
            let array = try_array::<bf16, _>("a", len).unwrap();
            assert!(array.len() == len && array.iter().all(|x| x.to_bits() == 0));
            let buffer = try_vec::<f32>("a", &[len]).unwrap();
            assert!(buffer.len() == len && buffer.iter().all(|x| x.to_bits() == 0));
        }
    }
}
