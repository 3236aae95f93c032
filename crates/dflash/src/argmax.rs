//! The token of a greedy step: the largest logit, the lowest id among equals.

use ndarray::ArrayView1;
use tensor_utils::simd::Simd;
use tensor_utils::{Element, Float, Isa, Kernel, check_not_empty, dispatch};

use crate::Error;
use crate::error::invalid;

/// Logits whose largest is found before it is known where it stands.
const BLOCK: usize = 2048;
/// Running maxima.
const LANES: usize = 64;

/// The token with the largest logit; of equal ones, -0 and +0 among them, the lowest. A row of -inf
/// gives token 0.
///
/// The rule of plain decoding and of verification: both must call this function, or ties part them.
///
/// # Errors
/// [`Error::Shape`] for an empty row, [`Error::Nan`] with the given `row` if there is a NaN
/// anywhere in it, and [`Error::Isa`].
pub fn argmax<T: Element>(logits: ArrayView1<'_, T>, row: usize) -> Result<u32, Error> {
    check_not_empty("logits", logits.shape(), 0, "vocabulary")?;
    let isa = Isa::active()?;
    let best = match logits.as_slice() {
        Some(slice) => dispatch(isa, Argmax(slice))?,
        None => dispatch(isa, Argmax(&logits.to_vec()))?,
    };
    let index = best.ok_or(Error::Nan { row })?;
    u32::try_from(index).map_err(|_| invalid("vocabulary", "at most 2^32 tokens", logits.len()))
}

/// One read of the row: the largest of each block, then a look for it in the first block that has
/// it. `None` if there is a NaN.
struct Argmax<'a, T>(&'a [T]);

impl<T: Element> Kernel for Argmax<'_, T> {
    type Output = Option<usize>;

    fn run<S: Simd>(self, simd: S) -> Option<usize> {
        simd.vectorize(
            #[inline(always)]
            || {
                let mut best = T::Acc::NEG_INFINITY;
                let mut best_block: &[T] = self.0;
                let mut start = 0;
                for (index, block) in self.0.chunks(BLOCK).enumerate() {
                    let largest = block_max(block)?;
                    if largest > best {
                        (best, best_block, start) = (largest, block, index * BLOCK);
                    }
                }
                best_block.iter().position(|x| x.to_acc() == best).map(|offset| start + offset)
            },
        )
    }
}

#[inline(always)]
fn block_max<T: Element>(block: &[T]) -> Option<T::Acc> {
    let mut lanes = [T::Acc::NEG_INFINITY; LANES];
    // Lanes of the same width as the logits, so that the loop stays in vectors.
    let mut nan = [T::Acc::ZERO; LANES];
    let mut groups = block.chunks_exact(LANES);
    for group in &mut groups {
        for lane in 0..LANES {
            let x = group[lane].to_acc();
            lanes[lane] = if x > lanes[lane] { x } else { lanes[lane] };
            nan[lane] = if x.is_nan() { x } else { nan[lane] };
        }
    }
    let mut largest = T::Acc::NEG_INFINITY;
    for x in groups.remainder().iter().map(|x| x.to_acc()).chain(lanes) {
        nan[0] = if x.is_nan() { x } else { nan[0] };
        largest = if x > largest { x } else { largest };
    }
    (!nan.iter().any(|x| x.is_nan())).then_some(largest)
}
