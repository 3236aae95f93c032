//! The forward pass over one row.

use ndarray::Axis;
use tensor_utils::simd::Simd;
use tensor_utils::{Element, Float};

use crate::call::Call;
use crate::finish::{RowMut, write, write_tokens};
use crate::mass::Mass;
use crate::rank::{write_ranks, write_ranks_with_nan};
use crate::schedule::for_each_segment;
use crate::source::Source;
use crate::sweep::{maxima, maxima_and_sum, sum};
use crate::workspace::Scratch;
use crate::{Error, Logit, NanPolicy, Passes, TopKMut, select};

/// How a row is swept.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) passes: Passes,
    /// Whether its segments are shared out over threads.
    pub(crate) parallel: bool,
}

/// The results of one row, `top`.
pub(crate) fn row<S: Simd, T: Logit>(
    simd: S,
    call: &Call<'_, '_, T>,
    row: usize,
    how: How,
    scratch: &mut Scratch<T::Acc>,
    top: TopKMut<'_, T::Acc>,
) -> Result<(), Error> {
    let source = Source::new(call, row, false);
    let mass = sweep(simd, &source, call.row_options(row).temperature, how, scratch);
    let is_regular = mass.sum.is_finite() && mass.max.to_f64() < f64::INFINITY;
    // Without a score above -inf, the maxima of two passes do not tell NaN from -inf.
    if is_regular && (mass.sum > 0.0 || how.passes == Passes::One) {
        finish(simd, call, row, &source, mass, scratch, top);
        return Ok(());
    }
    irregular_row(simd, call, row, how, scratch, top)
}

/// A row with NaN or +inf.
#[inline(never)]
fn irregular_row<S: Simd, T: Logit>(
    simd: S,
    call: &Call<'_, '_, T>,
    row: usize,
    how: How,
    scratch: &mut Scratch<T::Acc>,
    top: TopKMut<'_, T::Acc>,
) -> Result<(), Error> {
    let options = call.row_options(row);
    let mut source = Source::new(call, row, false);
    if let Some(token) = (0..source.len()).find(|&token| source.get(token).is_nan()) {
        match options.nan {
            NanPolicy::Error => return Err(Error::Nan { row, token }),
            NanPolicy::Greatest => {
                finish_with_nan(simd, call, row, &source, scratch, top);
                return Ok(());
            }
            NanPolicy::Ignore => source = Source::new(call, row, true),
        }
    }
    let mut mass = sweep(simd, &source, options.temperature, how, scratch);
    if mass.max.to_f64() == f64::INFINITY {
        let equal = (0..source.len()).filter(|&token| source.get(token) == mass.max).count();
        mass.sum = equal as f64;
    }
    finish(simd, call, row, &source, mass, scratch, top);
    Ok(())
}

/// Maxima and sum. In a row with NaN or +inf the sum is NaN, or it is 0 and +inf the maximum.
fn sweep<S: Simd, T: Logit>(
    simd: S,
    source: &Source<'_, T>,
    temperature: f64,
    how: How,
    scratch: &mut Scratch<T::Acc>,
) -> Mass<T::Acc> {
    let Scratch { maxima: all_maxima, masses, .. } = scratch;
    let all_maxima = &mut all_maxima[..source.stripes()];
    let merge = |left: Mass<T::Acc>, right: &Mass<T::Acc>| left.merge(*right, temperature);
    match how.passes {
        Passes::One => {
            let masses =
                for_each_segment(how.parallel, all_maxima, masses, &|stripes, to, mass| {
                    *mass = maxima_and_sum(simd, source, stripes, to, temperature);
                });
            masses.iter().fold(Mass::NONE, merge)
        }
        Passes::Two => {
            let of_segments =
                for_each_segment(how.parallel, all_maxima, masses, &|stripes, to, mass| {
                    *mass = Mass { max: maxima(simd, source, stripes, to), sum: 0.0 };
                });
            let max = of_segments.iter().fold(Mass::NONE, merge).max;
            if !max.is_finite() {
                return Mass { max, sum: 0.0 };
            }
            let masses = for_each_segment(how.parallel, all_maxima, masses, &|stripes, _, mass| {
                *mass = Mass { max, sum: sum(simd, source, stripes, max, temperature) };
            });
            masses.iter().fold(Mass { max, sum: 0.0 }, merge)
        }
    }
}

/// Selects the best of a row without NaN and writes its results.
fn finish<S: Simd, T: Logit>(
    simd: S,
    call: &Call<'_, '_, T>,
    row: usize,
    source: &Source<'_, T>,
    mass: Mass<T::Acc>,
    scratch: &mut Scratch<T::Acc>,
    top: TopKMut<'_, T::Acc>,
) {
    let options = call.row_options(row);
    let Scratch { maxima, groups, keys, shares, .. } = scratch;
    let maxima = &maxima[..source.stripes()];
    let keys = select::best(simd, source, maxima, call.k, groups, keys);
    let (to, tokens_to) = row_of(top);
    write(simd, keys, mass, options, shares, to);
    if let (Some(tokens), Some(to)) = (call.tokens(row), tokens_to) {
        write_tokens(source, tokens, mass, options.temperature, to, |own, ranks| {
            write_ranks(simd, source, maxima, tokens, own, ranks);
        });
    }
}

/// The same for a row with NaN, which comes first.
fn finish_with_nan<S: Simd, T: Logit>(
    simd: S,
    call: &Call<'_, '_, T>,
    row: usize,
    source: &Source<'_, T>,
    scratch: &mut Scratch<T::Acc>,
    top: TopKMut<'_, T::Acc>,
) {
    let options = call.row_options(row);
    let mass = Mass { max: T::Acc::from_f64(f64::NAN), sum: f64::NAN };
    let Scratch { keys, shares, .. } = scratch;
    let keys = select::best_with_nan(source, call.k, keys);
    let (to, tokens_to) = row_of(top);
    write(simd, keys, mass, options, shares, to);
    if let (Some(tokens), Some(to)) = (call.tokens(row), tokens_to) {
        write_tokens(source, tokens, mass, options.temperature, to, |_, ranks| {
            write_ranks_with_nan(source, tokens, ranks);
        });
    }
}

/// The only row of `top`.
fn row_of<A>(top: TopKMut<'_, A>) -> (RowMut<'_, A>, Option<crate::TokenScoresMut<'_, A>>) {
    let row = RowMut {
        indices: top.indices.index_axis_move(Axis(0), 0),
        probs: top.probs.index_axis_move(Axis(0), 0),
        lse: top.lse.index_axis_move(Axis(0), 0).into_scalar(),
        kept: top.kept.index_axis_move(Axis(0), 0).into_scalar(),
    };
    (row, top.tokens)
}
