//! Rows of the embedding, and their gradient.

use rayon::prelude::*;
use tensor_utils::{Float, check_shape};

use super::{OpError, elements};

/// Columns of one task of the gradient: a cache line of `f32` or more.
const COLUMNS: usize = 32;

/// Checks the tokens against a table `[vocabulary, width]`.
fn check<A>(x: &[A], table: &[A], tokens: &[u32], width: usize) -> Result<(), OpError> {
    check_shape("x", &[x.len()], &[elements("x", [tokens.len(), width])?])?;
    let vocabulary = table.len().checked_div(width).unwrap_or(0);
    match tokens.iter().position(|&token| token as usize >= vocabulary) {
        None => Ok(()),
        Some(position) => Err(OpError::Token { token: tokens[position], position, vocabulary }),
    }
}

/// `x[t] = table[tokens[t]]` for `x: [tokens, width]` and `table: [vocabulary, width]`.
///
/// # Errors
/// [`OpError::Token`] if a token is not in the table, [`OpError::Shape`] if `x` has another size.
pub fn embed<A: Float>(
    x: &mut [A],
    table: &[A],
    tokens: &[u32],
    width: usize,
) -> Result<(), OpError> {
    check(x, table, tokens, width)?;
    for (x, &token) in x.chunks_exact_mut(width.max(1)).zip(tokens) {
        x.copy_from_slice(&table[token as usize * width..][..width]);
    }
    Ok(())
}

/// `d_table[tokens[t]] += dx[t]`, in the order of the tokens.
///
/// # Errors
/// As [`embed`].
pub fn embed_backward<A: Float>(
    d_table: &mut [A],
    dx: &[A],
    tokens: &[u32],
    width: usize,
) -> Result<(), OpError> {
    check(dx, d_table, tokens, width)?;
    // By columns, so that threads never share an element and the order of each sum is fixed.
    let mut columns: Vec<Vec<&mut [A]>> = Vec::new();
    columns.resize_with(width.div_ceil(COLUMNS), Vec::new);
    for row in d_table.chunks_exact_mut(width.max(1)) {
        row.chunks_mut(COLUMNS).zip(&mut columns).for_each(|(part, column)| column.push(part));
    }
    columns.into_par_iter().enumerate().for_each(|(index, mut column)| {
        for (dx, &token) in dx.chunks_exact(width).zip(tokens) {
            let dx = &dx[index * COLUMNS..];
            column[token as usize].iter_mut().zip(dx).for_each(|(sum, &dx)| *sum += dx);
        }
    });
    Ok(())
}
