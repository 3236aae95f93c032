//! Asking for memory ahead of its use.

/// Asks the processor to bring the element at `index` into its caches. Any index may be passed; one
/// outside the slice has no effect that can be seen. Does nothing where there is no such instruction.
///
/// A loop that computes a lot between its reads, over rows longer than a page, gains: the processor's
/// own prefetching stops at the end of each page.
#[inline(always)]
pub fn prefetch<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    ask::<{ core::arch::x86_64::_MM_HINT_T0 }>(slice.as_ptr().wrapping_add(index).cast());
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}

/// The same, into the second cache only: for what is needed later than the first has room, or than the
/// processor can keep track of there (some 20 lines, too few for the latency of memory).
#[inline(always)]
pub fn prefetch_far<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    ask::<{ core::arch::x86_64::_MM_HINT_T1 }>(slice.as_ptr().wrapping_add(index).cast());
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}

/// [`prefetch_far`] of an address, that of any pointer: for lists of what lies in several slices.
#[inline(always)]
pub fn prefetch_far_address(address: usize) {
    #[cfg(target_arch = "x86_64")]
    ask::<{ core::arch::x86_64::_MM_HINT_T1 }>(core::ptr::without_provenance(address));
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// The instruction, with the cache that `HINT` names.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn ask<const HINT: i32>(address: *const i8) {
    // SAFETY: the instruction reads nothing into the program and never faults, whatever the
    // address; the address is made without leaving an allocation by `add`.
    #[allow(unsafe_code, reason = "the intrinsic takes a raw pointer")]
    unsafe {
        core::arch::x86_64::_mm_prefetch::<HINT>(address);
    }
}
