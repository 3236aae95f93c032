//! How rows are shared out over threads, and summed over for the gradients of the weights.
//!
//! The rows are cut into segments whose number depends on the shape alone. A segment is summed by
//! one thread, and the segments' sums are added in their order: the threads have no influence.

/// The most segments: enough to keep that many threads busy, few enough that adding up their sums
/// costs little.
const SEGMENTS: usize = 32;
/// The least rows of a segment, so that its sums are small beside it.
const LEAST_ROWS: usize = 32;
/// The least elements of a segment, so that it is worth another thread.
const LEAST_ELEMENTS: usize = 1 << 14;

/// Rows of each segment but the last.
pub(crate) fn segment_rows(rows: usize, row_length: usize) -> usize {
    rows.div_ceil(SEGMENTS).max(least_rows(row_length))
}

/// Segments of a matrix.
pub(crate) fn segments(rows: usize, row_length: usize) -> usize {
    rows.div_ceil(segment_rows(rows, row_length))
}

/// The most segments of any matrix with up to so many rows of up to such a length.
pub(crate) fn most_segments(rows: usize, row_length: usize) -> usize {
    rows.div_ceil(least_rows(row_length)).min(SEGMENTS)
}

fn least_rows(row_length: usize) -> usize {
    LEAST_ELEMENTS.div_ceil(row_length.max(1)).max(LEAST_ROWS)
}

/// Runs both, on two threads if the work is worth it.
pub(crate) fn join(worth_it: bool, left: impl FnOnce() + Send, right: impl FnOnce() + Send) {
    if worth_it {
        rayon::join(left, right);
    } else {
        left();
        right();
    }
}
