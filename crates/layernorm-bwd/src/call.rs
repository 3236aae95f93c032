//! A checked call: options resolved against the shapes they came with.

use ndarray::{ArrayView1, Axis};
use tensor_utils::{Element, Float, check_not_empty, check_shape};

use crate::blocks::{BLOCK, Block};
use crate::workspace::Parts;
use crate::{Error, Options};

/// Checks the options against rows of `arg`.
pub(crate) fn check_options<W: Element>(
    options: &Options<'_, W>,
    arg: &'static str,
    shape: &[usize],
) -> Result<(), Error> {
    check_not_empty(arg, shape, 1, "row length")?;
    if !(options.eps.is_finite() && options.eps >= 0.0) {
        let expected = "a finite number that is at least 0";
        return Err(Error::Option { option: "eps", expected, got: format!("{:?}", options.eps) });
    }
    if let Some(gamma) = &options.gamma {
        check_shape("gamma", gamma.shape(), &shape[1..])?;
    }
    if let Some(beta) = &options.beta {
        check_shape("beta", beta.shape(), &shape[1..])?;
    }
    Ok(())
}

/// Checks that `x_hat` can be recovered from `y`: no factor of a column is 0.
pub(crate) fn check_invertible<W: Element>(options: &Options<'_, W>) -> Result<(), Error> {
    let Some(gamma) = &options.gamma else { return Ok(()) };
    let zero = gamma.iter().position(|&gamma| factor(gamma, options) == W::Acc::ZERO);
    match zero {
        None => Ok(()),
        Some(column) => Err(Error::Option {
            option: "gamma",
            expected: "a factor other than 0 in every column, to recover x_hat from y",
            got: format!("{:?} in column {column}", gamma[column]),
        }),
    }
}

/// Widens gamma and beta into the workspace; 0 beyond the row.
pub(crate) fn widen_weights<W: Element>(
    options: &Options<'_, W>,
    row_length: usize,
    parts: &mut Parts<'_, W::Acc>,
) {
    let (zero, one) = (W::Acc::ZERO, W::Acc::ONE);
    fill(parts.gamma, row_length, &options.gamma, one, |gamma| factor(gamma, options));
    fill(parts.beta, row_length, &options.beta, zero, W::to_acc);
}

/// Fills in the columns of a row, from weights or with `otherwise`, and 0 behind it.
fn fill<W: Element>(
    blocks: &mut [Block<W::Acc>],
    row_length: usize,
    weights: &Option<ArrayView1<'_, W>>,
    otherwise: W::Acc,
    column: impl Fn(W) -> W::Acc,
) {
    blocks.iter_mut().for_each(|Block(to)| to.fill(W::Acc::ZERO));
    match weights {
        Some(weights) => {
            for (Block(to), from) in blocks.iter_mut().zip(weights.axis_chunks_iter(Axis(0), BLOCK))
            {
                to.iter_mut().zip(from).for_each(|(to, &weight)| *to = column(weight));
            }
        }
        None => {
            for (Block(to), start) in blocks.iter_mut().zip((0..row_length).step_by(BLOCK)) {
                to[..BLOCK.min(row_length - start)].fill(otherwise);
            }
        }
    }
}

/// The factor of a column.
fn factor<W: Element>(gamma: W, options: &Options<'_, W>) -> W::Acc {
    if options.one_plus_gamma { W::Acc::ONE + gamma.to_acc() } else { gamma.to_acc() }
}
