//! A checked call: options resolved against the shapes they came with.

use tensor_utils::{Element, Float, check_not_empty, check_shape};

use crate::blocks::Block;
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
        return Err(Error::Option { option: "eps", expected, got: options.eps.to_string() });
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
    let gamma = |j: usize| options.gamma.map_or(W::Acc::ONE, |gamma| factor(gamma[j], options));
    let beta = |j: usize| options.beta.map_or(W::Acc::ZERO, |beta| beta[j].to_acc());
    fill(parts.gamma, row_length, gamma);
    fill(parts.beta, row_length, beta);
}

/// Fills in the columns of a row, with 0 behind it.
fn fill<A: Float>(blocks: &mut [Block<A>], row_length: usize, column: impl Fn(usize) -> A) {
    for (j, to) in blocks.iter_mut().flat_map(|Block(columns)| columns).enumerate() {
        *to = if j < row_length { column(j) } else { A::ZERO };
    }
}

/// The factor of a column.
fn factor<W: Element>(gamma: W, options: &Options<'_, W>) -> W::Acc {
    if options.one_plus_gamma { W::Acc::ONE + gamma.to_acc() } else { gamma.to_acc() }
}
