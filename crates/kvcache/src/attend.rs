//! Attention over the cache: the public entry points.

use ndarray::{Array2, Array3, ArrayView3, ArrayViewMut2, ArrayViewMut3};
use tensor_utils::{Element, ShapeError, check_shape, try_array};

use crate::cache::Cache;
use crate::error::invalid;
use crate::options::NO_PAGE;
use crate::{Error, Options, Queries, Rows, Workspace};

/// The result of [`Cache::attend`].
#[derive(Debug, Clone, PartialEq)]
pub struct Attention<T: Element> {
    /// `[total queries, H, E]`: the softmax-weighted sums of the values.
    pub o: Array3<T>,
    /// `[total queries, H]`: the natural logarithm of the sum of `exp(score)` over the visible rows.
    pub lse: Array2<f32>,
}

impl Cache {
    /// Attention of queries over one layer of the cache: the queries of `batch[0]`, then those of
    /// `batch[1]`, and so on, in `q` `[total queries, H, D]`.
    ///
    /// `H` is a multiple of the cache's `G`: query head `h` uses key head `h / (H / G)`. What a query
    /// sees is said by [`Rows`]; rows that it does not see have no effect, whatever they hold, NaN
    /// included. A query that sees nothing (its window has no row, or all scores are `-inf`) gets
    /// `o = 0` and `lse = -inf`.
    ///
    /// The result for a sequence has the same bits whatever else is in the batch, however its rows
    /// were appended, whichever pages they are in, on any number of threads, and with float storage
    /// for any page size.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Option`] for arguments that do not fit, [`Error::UnknownSequence`],
    /// [`Error::Isa`].
    pub fn attend<T: Element<Acc = f32>>(
        &self,
        layer: usize,
        q: ArrayView3<'_, T>,
        batch: &[Queries<'_>],
        options: &Options,
    ) -> Result<Attention<T>, Error> {
        let (total, heads, _) = q.dim();
        let mut o = try_array("o", (total, heads, self.config.value_size))?;
        let mut lse = try_array("lse", (total, heads))?;
        let workspace = &mut Workspace::new();
        self.attend_into(o.view_mut(), lse.view_mut(), layer, q, batch, options, workspace)?;
        Ok(Attention { o, lse })
    }

    /// [`attend`](Self::attend) into outputs and scratch memory of the caller: `o`
    /// `[total queries, H, E]`, `lse` `[total queries, H]`.
    ///
    /// # Errors
    /// As [`attend`](Self::attend).
    pub fn attend_into<T: Element<Acc = f32>>(
        &self,
        mut o: ArrayViewMut3<'_, T>,
        mut lse: ArrayViewMut2<'_, f32>,
        layer: usize,
        q: ArrayView3<'_, T>,
        batch: &[Queries<'_>],
        options: &Options,
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let scale = self.check_attend(&o, &lse, layer, &q, batch, options)?;
        let heads = q.dim().1;
        let mut first = 0;
        for queries in batch {
            for i in 0..queries.len() {
                for head in 0..heads {
                    let at = (first, i, head);
                    self.attend_simply(
                        &mut o, &mut lse, layer, &q, queries, options, scale, at, workspace,
                    )?;
                }
            }
            first += queries.len();
        }
        Ok(())
    }

    /// Checks all arguments; returns the scale.
    fn check_attend<T: Element<Acc = f32>>(
        &self,
        o: &ArrayViewMut3<'_, T>,
        lse: &ArrayViewMut2<'_, f32>,
        layer: usize,
        q: &ArrayView3<'_, T>,
        batch: &[Queries<'_>],
        options: &Options,
    ) -> Result<f32, Error> {
        self.check_layer(layer)?;
        let (total, heads, head_size) = q.dim();
        let config = &self.config;
        let expected_heads = heads.max(1).next_multiple_of(config.key_heads);
        let queries: usize = batch.iter().map(Queries::len).sum();
        if heads != expected_heads || head_size != config.head_size || total != queries {
            let expected = vec![queries, expected_heads, config.head_size];
            let got = q.shape().to_vec();
            return Err(ShapeError::Mismatch { arg: "q", expected, got }.into());
        }
        check_shape("o", o.shape(), &[total, heads, config.value_size])?;
        check_shape("lse", lse.shape(), &[total, heads])?;
        for queries in batch {
            let len = self.sequence(queries.seq)?.lens[layer];
            if queries.len() > len {
                let expected = format!("at most {len} queries, the rows of {:?}", queries.seq);
                return Err(invalid("batch", expected, queries.len()));
            }
            self.check_held(queries, len, options)?;
            if let Rows::Tree(parents) = queries.rows {
                for (node, &parent) in parents.iter().enumerate() {
                    if parent < -1 || parent >= node as i64 {
                        let expected =
                            format!("an earlier node or -1 as the parent of node {node}");
                        return Err(invalid("parents", expected, parent));
                    }
                }
            }
        }
        if let Some(window) = options.window {
            window.check("window")?;
        }
        if let Some(cap) = options.softcap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
            return Err(invalid("softcap", "positive and finite", cap));
        }
        let scale = options.scale.unwrap_or(1.0 / (head_size as f64).sqrt());
        if !scale.is_finite() {
            return Err(invalid("scale", "finite", scale));
        }
        Ok(scale as f32)
    }

    /// Checks that the window has not released what the first query sees.
    fn check_held(
        &self,
        queries: &Queries<'_>,
        len: usize,
        options: &Options,
    ) -> Result<(), Error> {
        let Some(window) = self.config.window else { return Ok(()) };
        if queries.is_empty() {
            return Ok(());
        }
        let sequence = self.sequence(queries.seq)?;
        let page_size = self.config.page_size;
        let position = len - queries.len();
        let narrow = options.window.map_or(0, |window| window.start(position));
        let first = window.start(position).max(narrow).max(window.sinks);
        let end = sequence.window_start * page_size;
        for row in (first..end.min(position + 1)).step_by(page_size) {
            if sequence.pages[row / page_size] == NO_PAGE {
                return Err(Error::Released { sequence: queries.seq, row, position });
            }
        }
        Ok(())
    }

    fn attend_simply<T: Element<Acc = f32>>(
        &self,
        o: &mut ArrayViewMut3<'_, T>,
        lse: &mut ArrayViewMut2<'_, f32>,
        layer: usize,
        q: &ArrayView3<'_, T>,
        queries: &Queries<'_>,
        options: &Options,
        scale: f32,
        (first, i, head): (usize, usize, usize),
        workspace: &mut Workspace,
    ) -> Result<(), Error> {
        let sequence = self.sequence(queries.seq)?;
        let len = sequence.lens[layer];
        let n = queries.len();
        let base = len - n;
        let mut keys: Vec<(usize, usize)> = Vec::new();
        match queries.rows {
            Rows::Last(_) => keys.extend((0..=base + i).map(|j| (j, j))),
            Rows::Tree(parents) => {
                let mut path = Vec::new();
                let mut node = i as i64;
                while node >= 0 {
                    path.push(node as usize);
                    node = parents[node as usize];
                }
                keys.extend((0..base).map(|j| (j, j)));
                keys.extend(path.iter().rev().enumerate().map(|(d, j)| (base + j, base + d)));
            }
        }
        let position = keys.last().map_or(0, |key| key.1);
        let key_head = head / (q.dim().1 / self.config.key_heads);
        let d = self.config.head_size;
        let (mut m, mut l) = (f32::NEG_INFINITY, 0.0_f32);
        let e = self.config.value_size;
        let mut sums = vec![0.0_f32; e];
        let page_size = self.config.page_size;
        for (row, at) in keys {
            let windows = [options.window, self.config.window];
            if windows.iter().flatten().any(|w| position - at >= w.size && at >= w.sinks) {
                continue;
            }
            let (index, r) = (row / page_size, row % page_size);
            let page = sequence.pages[index];
            if page == NO_PAGE {
                continue;
            }
            let in_tree = matches!(queries.rows, Rows::Tree(_)) && row >= base;
            let raw =
                sequence.raw_page(index).filter(|_| in_tree || !self.is_coded(index, position));
            let load = |form: crate::store::Form, slab: &crate::store::Slab, row: &mut Vec<f32>| {
                row.resize(form.columns, 0.0);
                match raw {
                    Some(raw) if form.storage.is_quantised() => {
                        self.raw.read(form, raw, (layer, key_head), r, row);
                    }
                    _ => slab.read(form, page, key_head, r, row),
                }
            };
            load(self.keys, &self.layers[layer].keys, &mut workspace.row);
            let mut s = 0.0;
            for c in 0..d {
                s += q[[first + i, head, c]].to_acc() * workspace.row[c];
            }
            s *= scale;
            if let Some(cap) = options.softcap {
                s = cap as f32 * (s / cap as f32).tanh();
            }
            let new = if s > m || s.is_nan() { s } else { m };
            if new == f32::NEG_INFINITY {
                continue;
            }
            let correction = (m - new).exp();
            let p = (s - new).exp();
            m = new;
            l = l * correction + p;
            load(self.values, &self.layers[layer].values, &mut workspace.row);
            for (sum, &x) in sums.iter_mut().zip(&workspace.row) {
                *sum = *sum * correction + p * x;
            }
        }
        for c in 0..e {
            o[[first + i, head, c]] = T::from_acc(if l == 0.0 { 0.0 } else { sums[c] / l });
        }
        lse[[first + i, head]] = if l == 0.0 { f32::NEG_INFINITY } else { m + l.ln() };
        Ok(())
    }
}
