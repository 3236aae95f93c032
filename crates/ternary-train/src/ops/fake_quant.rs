//! Activations of 8 bits, as inference will see them.

use rayon::prelude::*;
use tensor_utils::Float;

/// The least largest magnitude of a row: rows of zeros stay zeros.
const SMALLEST: f64 = 1e-5;

/// Rounds each row of `width` to 255 levels: `round(x 127 / m) m / 127` with `m` the largest
/// magnitude of the row, at least 1e-5 (Ma et al., The era of 1-bit LLMs, 2024). The gradient passes
/// through unchanged. A `width` of 0 does nothing; NaN spoils its row.
pub fn fake_quantize_rows<A: Float>(x: &mut [A], width: usize) {
    if width == 0 {
        return;
    }
    x.par_chunks_mut(width.saturating_mul(64)).for_each(|rows| {
        for row in rows.chunks_mut(width) {
            let largest = row.iter().fold(A::from_f64(SMALLEST), |m, x| m.max_nan(x.abs()));
            let (scale, step) = (127.0 / largest.to_f64(), largest.to_f64() / 127.0);
            let levels = row.iter_mut();
            levels.for_each(|x| *x = A::from_f64((x.to_f64() * scale).round_ties_even() * step));
        }
    });
}
