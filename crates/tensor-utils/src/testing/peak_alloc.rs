//! An allocator that remembers how much memory was in use at once.

#![allow(unsafe_code, reason = "an allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The system's allocator with counters: bytes in use, their peak, and the number of allocations,
/// over all threads.
///
/// Make it the global allocator of a test binary that holds a single test, so that no other test
/// allocates meanwhile:
///
/// ```
/// use tensor_utils::testing::PeakAlloc;
///
/// #[global_allocator]
/// static ALLOC: PeakAlloc = PeakAlloc::new();
///
/// ALLOC.reset_peak();
/// drop(vec![0_u8; 1000]);
/// drop(vec![0_u8; 500]);
/// assert_eq!(ALLOC.peak_above_baseline(), 1000);
/// assert_eq!(ALLOC.allocations_since_reset(), 2);
/// ```
#[derive(Debug, Default)]
pub struct PeakAlloc {
    in_use: AtomicUsize,
    baseline: AtomicUsize,
    peak: AtomicUsize,
    allocations: AtomicUsize,
}

impl PeakAlloc {
    /// An allocator with all counters at 0.
    pub const fn new() -> Self {
        Self {
            in_use: AtomicUsize::new(0),
            baseline: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            allocations: AtomicUsize::new(0),
        }
    }

    /// Makes the memory in use now the baseline, and starts to measure.
    pub fn reset_peak(&self) {
        let in_use = self.in_use.load(Ordering::SeqCst);
        self.baseline.store(in_use, Ordering::SeqCst);
        self.peak.store(in_use, Ordering::SeqCst);
        self.allocations.store(0, Ordering::SeqCst);
    }

    /// Bytes in use now.
    pub fn bytes_in_use(&self) -> usize {
        self.in_use.load(Ordering::SeqCst)
    }

    /// The most bytes in use at once since the reset, less those in use at the reset.
    pub fn peak_above_baseline(&self) -> usize {
        self.peak.load(Ordering::SeqCst).saturating_sub(self.baseline.load(Ordering::SeqCst))
    }

    /// The number of allocations since the reset; a reallocation counts as one.
    pub fn allocations_since_reset(&self) -> usize {
        self.allocations.load(Ordering::SeqCst)
    }

    fn grow(&self, bytes: usize) {
        self.allocations.fetch_add(1, Ordering::SeqCst);
        let in_use = self.in_use.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.peak.fetch_max(in_use, Ordering::SeqCst);
    }

    fn shrink(&self, bytes: usize) {
        self.in_use.fetch_sub(bytes, Ordering::SeqCst);
    }
}

// SAFETY: every method passes its arguments unchanged to the same method of `System`, which keeps
// the contract of `GlobalAlloc`, and returns what it returned. The counters are atomic and neither
// allocate nor panic.
unsafe impl GlobalAlloc for PeakAlloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of this method, which is that of `System`'s.
        let pointer = unsafe { System.alloc(layout) };
        if !pointer.is_null() {
            self.grow(layout.size());
        }
        pointer
    }

    // Without this the zeros would be written here, and pages be touched that are never used.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        if !pointer.is_null() {
            self.grow(layout.size());
        }
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`; `pointer` came from `System` through one of these methods.
        unsafe { System.dealloc(pointer, layout) };
        self.shrink(layout.size());
    }

    // The old and the new block count as in use together, since they may be while the contents
    // move: a peak is rather overstated than missed.
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as in `dealloc`.
        let new = unsafe { System.realloc(pointer, layout, new_size) };
        if !new.is_null() {
            self.grow(new_size);
            self.shrink(layout.size());
        }
        new
    }
}
