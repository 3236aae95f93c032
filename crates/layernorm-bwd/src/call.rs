//! A checked call: options resolved against the shapes they came with.

use ndarray::ArrayView1;
use tensor_utils::{Element, Float, check_not_empty, check_shape};

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
    let fill =
        |to: &mut [W::Acc], from: &Option<ArrayView1<'_, W>>, default, map: &dyn Fn(W) -> _| {
            to.fill(W::Acc::ZERO);
            match from {
                None => to[..row_length].fill(default),
                Some(from) => to.iter_mut().zip(from).for_each(|(to, &from)| *to = map(from)),
            }
        };
    fill(parts.gamma, &options.gamma, W::Acc::ONE, &|gamma| factor(gamma, options));
    fill(parts.beta, &options.beta, W::Acc::ZERO, &|beta| beta.to_acc());
}

/// The factor of a column.
fn factor<W: Element>(gamma: W, options: &Options<'_, W>) -> W::Acc {
    if options.one_plus_gamma { W::Acc::ONE + gamma.to_acc() } else { gamma.to_acc() }
}
