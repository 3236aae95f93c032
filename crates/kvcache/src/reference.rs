//! The oracle: attention over plain arrays, by the formula, in `f64`.

use ndarray::{Array2, Array3, ArrayView3};
use tensor_utils::{Element, check_not_empty, check_shape, try_array};

use crate::error::{expected_heads, invalid};
use crate::{Error, Options, Rows, Window};

/// What the queries of one sequence should give: `o` `[N, H, E]` and `lse` `[N, H]`.
///
/// `q` `[N, H, D]`, `k` `[L, G, D]`, `v` `[L, G, E]`: all rows of the sequence, as plain arrays. What a
/// query sees is said by `rows`, `options.window` and `window` (that of the cache).
///
/// # Errors
/// [`Error::Shape`], [`Error::HeadsNotDivisible`] and [`Error::Option`] for arguments that do not fit; the
/// options and the parents of a tree are checked as in [`Cache::attend`](crate::Cache::attend).
pub fn attend_reference<Q: Element, T: Element>(
    q: ArrayView3<'_, Q>,
    k: ArrayView3<'_, T>,
    v: ArrayView3<'_, T>,
    rows: Rows<'_>,
    options: &Options,
    window: Option<Window>,
) -> Result<(Array3<f64>, Array2<f64>), Error> {
    let (n, heads, head_size) = q.dim();
    let (len, key_heads, value_size) = v.dim();
    check_shape("k", k.shape(), &[len, key_heads, head_size])?;
    check_not_empty("k", k.shape(), 1, "heads")?;
    check_not_empty("k", k.shape(), 2, "head size")?;
    let expected_heads = expected_heads(heads, key_heads)?;
    check_shape("q", q.shape(), &[rows.len(), expected_heads, head_size])?;
    if n > len {
        let expected = format!("at most {len} queries, the rows of `k`");
        return Err(invalid("rows", expected, n));
    }
    rows.check()?;
    if let Some(window) = window {
        window.check("window")?;
    }
    let scale = options.check(head_size)?;
    let mut o = try_array("o", (n, heads, value_size))?;
    let mut lse = try_array("lse", (n, heads))?;
    for i in 0..n {
        let keys = visible(rows, [options.window, window], i, n, len);
        for head in 0..heads {
            let key_head = head / (heads / key_heads);
            let score = |&j: &usize| {
                let mut sum = 0.0;
                for d in 0..head_size {
                    sum += q[[i, head, d]].to_f64() * k[[j, key_head, d]].to_f64();
                }
                let score = sum * scale;
                options.softcap.map_or(score, |cap| cap * (score / cap).tanh())
            };
            let scores: Vec<f64> = keys.iter().map(score).collect();
            let max = scores
                .iter()
                .fold(f64::NEG_INFINITY, |a, &b| if b > a || b.is_nan() { b } else { a });
            if max == f64::NEG_INFINITY {
                lse[[i, head]] = f64::NEG_INFINITY;
                continue;
            }
            let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
            let sum: f64 = weights.iter().sum();
            lse[[i, head]] = max + sum.ln();
            for e in 0..value_size {
                let terms = keys.iter().zip(&weights);
                let weighted: f64 = terms.map(|(&j, w)| w * v[[j, key_head, e]].to_f64()).sum();
                o[[i, head, e]] = weighted / sum;
            }
        }
    }
    Ok((o, lse))
}

/// The rows that query `i` of `n` sees, in the order of their positions.
fn visible(
    rows: Rows<'_>,
    windows: [Option<Window>; 2],
    i: usize,
    n: usize,
    len: usize,
) -> Vec<usize> {
    // (Row, position), the query's own last.
    let mut seen: Vec<(usize, usize)> = Vec::new();
    match rows {
        Rows::Last(_) => seen.extend((0..=len - n + i).map(|j| (j, j))),
        Rows::Tree(parents) => {
            let base = len - n;
            let mut path = Vec::new();
            let mut node = i as i64;
            while node >= 0 {
                path.push(node as usize);
                node = parents[node as usize];
            }
            seen.extend((0..base).map(|j| (j, j)));
            seen.extend(
                path.iter().rev().enumerate().map(|(depth, node)| (base + node, base + depth)),
            );
        }
    }
    let own = seen.last().map_or(0, |&(_, position)| position);
    seen.retain(|&(_, position)| {
        windows
            .iter()
            .flatten()
            .all(|window| own - position < window.size || position < window.sinks)
    });
    seen.into_iter().map(|(row, _)| row).collect()
}
