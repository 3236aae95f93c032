//! Drawing a token from what the cuts kept.

use ndarray::{Array1, ArrayView1, ArrayView2, ArrayViewMut1, Axis};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tensor_utils::{Float, check_shape, try_array};

use crate::call::Call;
use crate::{Error, Logit, Options, Tiling, TopK, TopKMut, Workspace, softmax_topk_into};

/// Which random number a row is drawn with.
///
/// A sequence that keeps its seed and counts its steps gets the same tokens whatever else is in the
/// batch, in which row it is, and on any number of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Draw {
    /// Names the sequence of numbers.
    pub seed: u64,
    /// The place in it, such as the number of tokens so far.
    pub step: u64,
}

impl Draw {
    /// The random number, uniform in `[0, 1)`: the first of stream `step` of ChaCha8 with this seed.
    pub fn uniform(self) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(self.step);
        rng.random()
    }
}

/// The result of [`sample`], for `R` rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples<A> {
    /// `[R]`: the tokens drawn.
    pub tokens: Array1<u32>,
    /// `[R]`: their columns in `top`.
    pub columns: Array1<u32>,
    /// What they were drawn from.
    pub top: TopK<A>,
}

/// Draws a token of each row of `logits` `[R, V]` from the `k` most probable that the cuts
/// [`Options::top_p`] and [`Options::min_p`] keep, with their probabilities divided by their sum;
/// `draws` `[R]`.
///
/// The token is the first whose probability and those before it add up to more than [`Draw::uniform`]
/// times the sum of all that were kept.
///
/// # Errors
/// As [`softmax_topk`](crate::softmax_topk), and [`Error::NothingToDraw`] if no token of a row has a
/// probability.
///
/// # Examples
/// ```
/// use ndarray::{array, aview1};
/// use softmax_topk::{Draw, Options, PerRow, sample};
///
/// let logits = array![[0.0_f32, 3.0, 1.0, 3.0]];
/// let options = Options { temperature: PerRow::All(0.7), top_p: PerRow::All(0.9), ..Options::default() };
/// let drawn = sample(logits.view(), 3, &options, aview1(&[Draw { seed: 7, step: 0 }]))?;
/// assert!([1, 3].contains(&drawn.tokens[0]));
/// # Ok::<(), softmax_topk::Error>(())
/// ```
pub fn sample<T: Logit>(
    logits: ArrayView2<'_, T>,
    k: usize,
    options: &Options<'_, T::Acc>,
    draws: ArrayView1<'_, Draw>,
) -> Result<Samples<T::Acc>, Error> {
    let (rows, vocabulary) = logits.dim();
    // Before anything of size k is allocated.
    Call::new(logits.reborrow(), k, options)?;
    let mut samples = Samples {
        tokens: try_array("tokens", rows)?,
        columns: try_array("columns", rows)?,
        top: TopK::new(rows, k, options)?,
    };
    let mut workspace = Workspace::new(rows, vocabulary, k, &Tiling::default())?;
    let (tokens, columns) = (samples.tokens.view_mut(), samples.columns.view_mut());
    sample_into(tokens, columns, samples.top.view_mut(), logits, options, draws, &mut workspace)?;
    Ok(samples)
}

/// [`sample`] into the caller's arrays.
///
/// Allocates nothing. (Rayon's queues may, the first time a pool is entered.)
///
/// # Errors
/// As [`sample`]; [`Error::WorkspaceTooSmall`] if the workspace was made for fewer or shorter rows or
/// a smaller `k`. The outputs are untouched, except after [`Error::Nan`] and
/// [`Error::NothingToDraw`].
pub fn sample_into<T: Logit>(
    mut tokens: ArrayViewMut1<'_, u32>,
    mut columns: ArrayViewMut1<'_, u32>,
    mut top: TopKMut<'_, T::Acc>,
    logits: ArrayView2<'_, T>,
    options: &Options<'_, T::Acc>,
    draws: ArrayView1<'_, Draw>,
    workspace: &mut Workspace<T::Acc>,
) -> Result<(), Error> {
    let rows = logits.dim().0;
    check_shape("tokens", tokens.shape(), &[rows])?;
    check_shape("columns", columns.shape(), &[rows])?;
    check_shape("draws", draws.shape(), &[rows])?;
    softmax_topk_into(top.reborrow(), logits, options, workspace)?;
    for row in 0..rows {
        let probs = top.probs.row(row);
        let kept = probs.slice_axis(Axis(0), (..top.kept[row] as usize).into());
        let column = pick(kept, options.log, draws[row].uniform());
        let column = column.ok_or(Error::NothingToDraw { row })?;
        columns[row] = column as u32;
        tokens[row] = top.indices[[row, column]];
    }
    Ok(())
}

/// The column that the number `uniform` in `[0, 1)` picks, of the probabilities that were kept.
fn pick<A: Float>(kept: ArrayView1<'_, A>, log: bool, uniform: f64) -> Option<usize> {
    let prob = |prob: &A| if log { prob.to_f64().exp() } else { prob.to_f64() };
    let total: f64 = kept.iter().map(prob).sum();
    let target = uniform * total;
    let mut sum = 0.0;
    kept.iter().position(|kept| {
        sum += prob(kept);
        sum > target
    })
}
