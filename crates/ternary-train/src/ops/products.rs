//! Matrix products, several in one parallel region.
//!
//! The rows of each result are cut into tasks. In a task the right operand is packed a few panels at a
//! time and multiplied with register tiles ([`tensor_utils::tile`]); the packing costs a few
//! per cent, since a panel serves all rows of the task.

use std::borrow::Cow;

use ndarray::{ArrayView, ArrayView2, ArrayViewMut, ArrayViewMut2, Dimension};
use rayon::prelude::*;
use tensor_utils::simd::{Simd, SimdBase};
use tensor_utils::tile::pack::{copy_rows, pack_transposed, panel_depth};
use tensor_utils::tile::{
    Sums, UNROLL, lanes, load, panel_width, product_columns, product_rows, row_stride, store, tiles,
};
use tensor_utils::{Float, Isa, check_shape};

use super::{OpError, Real};

/// Rows of a result in one task, at least. A task packs the right operand for itself.
const FEWEST_ROWS: usize = 96;
/// Numbers of the right operand that are packed at once, about: half of a small level-2 cache.
const PACKED: usize = 1 << 16;
/// Panels that are packed at once, at most, so that a row of the operand is read in long pieces.
const PANELS: usize = 4;
/// Columns of the widest panel.
const MAX_WIDTH: usize = 32;
/// Common dimension that is summed in registers before it is added to the result, along columns.
const DEPTH: usize = 256;

/// A term of a [`Product`]; the operands are in standard layout.
#[derive(Debug, Clone, Copy)]
pub enum Term<'a, A> {
    /// `A B^T` for `[M, K]` and `[N, K]`: a linear layer, `x W^T`.
    Nt(ArrayView2<'a, A>, ArrayView2<'a, A>),
    /// `A B` for `[M, K]` and `[K, N]`: the gradient of its input, `dy W`.
    Nn(ArrayView2<'a, A>, ArrayView2<'a, A>),
    /// `A^T B` for `[K, M]` and `[K, N]`: the gradient of its weight, `dy^T x`.
    Tn(ArrayView2<'a, A>, ArrayView2<'a, A>),
}

/// `C = sum of terms`, or `C +=` it.
#[derive(Debug)]
pub struct Product<'a, A> {
    /// `[M, N]`, in standard layout.
    pub c: ArrayViewMut2<'a, A>,
    /// What is summed, in this order.
    pub terms: Vec<Term<'a, A>>,
    /// Whether the sum is added to what `c` holds.
    pub add: bool,
}

/// Some rows of a [`Product`].
#[derive(Debug)]
pub struct Task<'a, 't, A> {
    /// The rows, one after the other.
    c: &'a mut [A],
    /// Columns of the result.
    columns: usize,
    /// The first row.
    first: usize,
    terms: &'t [Operands<'a, A>],
    add: bool,
}

/// A term as slices.
#[derive(Debug, Clone, Copy)]
struct Operands<'a, A> {
    form: Form,
    a: &'a [A],
    b: &'a [A],
    /// Columns of `a`.
    a_columns: usize,
    /// The common dimension.
    depth: usize,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Form {
    Nt,
    Nn,
    Tn,
}

/// Computes products on all threads of the pool, as one parallel region.
///
/// Each element is one sum in the order of the common dimension (of sums of 256, for
/// [`Term::Tn`]), so a row has the same bits alone and among others, and on any number of threads.
///
/// # Errors
/// [`OpError`] if shapes do not fit or a matrix is not in standard layout. Nothing is written then.
pub fn products<A: Real>(products: Vec<Product<'_, A>>) -> Result<(), OpError> {
    let isa = Isa::active()?;
    let mut checked = Vec::with_capacity(products.len());
    for Product { c, terms, add } in products {
        let dim = c.dim();
        let terms: Vec<_> =
            terms.iter().map(|term| term.operands(dim)).collect::<Result<_, _>>()?;
        checked.push((slice_mut("c", c)?, dim, terms, add));
    }
    let mut tasks = Vec::new();
    for (c, (rows, columns), terms, add) in &mut checked {
        let along_columns = terms.iter().any(|term| term.form == Form::Tn);
        let chunk = rows_of_a_task(*rows, along_columns);
        let (columns, add) = (*columns, *add);
        for (index, c) in c.chunks_mut((chunk * columns).max(1)).enumerate() {
            tasks.push(Task { c, columns, first: index * chunk, terms, add });
        }
    }
    if let [_] = &*tasks {
        return tasks.into_iter().try_for_each(|task| A::compute(isa, task));
    }
    tasks.into_par_iter().with_max_len(1).try_for_each(|task| A::compute(isa, task))
}

/// Rows of a result in one task, a multiple of the tallest tile: a function of the shape alone.
/// Results with a common dimension along the columns are computed beside others, so a few tasks do.
fn rows_of_a_task(rows: usize, along_columns: bool) -> usize {
    let (tasks, most) = if along_columns { (4, 2 * FEWEST_ROWS) } else { (8, 4 * FEWEST_ROWS) };
    rows.div_ceil(tasks).next_multiple_of(12).clamp(FEWEST_ROWS, most)
}

impl<'a, A> Term<'a, A> {
    /// Checks the term for a result `[m, n]`.
    fn operands(&self, (m, n): (usize, usize)) -> Result<Operands<'a, A>, OpError> {
        let (form, a, b) = match *self {
            Self::Nt(a, b) => (Form::Nt, a, b),
            Self::Nn(a, b) => (Form::Nn, a, b),
            Self::Tn(a, b) => (Form::Tn, a, b),
        };
        let depth = if form == Form::Tn { a.nrows() } else { a.ncols() };
        let want_a = if form == Form::Tn { [depth, m] } else { [m, depth] };
        let want_b = if form == Form::Nt { [n, depth] } else { [depth, n] };
        check_shape("a", a.shape(), &want_a)?;
        check_shape("b", b.shape(), &want_b)?;
        let a_columns = a.ncols();
        Ok(Operands { form, a: slice("a", a)?, b: slice("b", b)?, a_columns, depth })
    }
}

/// The elements of an array in standard layout.
pub(crate) fn slice<'a, A, D: Dimension>(
    arg: &'static str,
    view: ArrayView<'a, A, D>,
) -> Result<&'a [A], OpError> {
    let strides = view.strides().to_vec();
    view.to_slice().ok_or(OpError::Strides { arg, strides })
}

/// The elements of an array in standard layout.
pub(crate) fn slice_mut<'a, A, D: Dimension>(
    arg: &'static str,
    view: ArrayViewMut<'a, A, D>,
) -> Result<&'a mut [A], OpError> {
    let strides = view.strides().to_vec();
    view.into_slice().ok_or(OpError::Strides { arg, strides })
}

/// Computes the rows of a task.
pub(super) fn compute<S: Simd, A: Float>(simd: S, task: Task<'_, '_, A>) {
    let Task { c, columns, first, terms, mut add } = task;
    if columns == 0 {
        return;
    }
    if terms.is_empty() && !add {
        c.fill(A::ZERO);
    }
    for term in terms {
        match term.form {
            Form::Nt | Form::Nn => along_rows(simd, c, columns, first, term, add),
            Form::Tn => along_columns(simd, c, columns, first, term, add),
        }
        add = true;
    }
}

/// `C (+)= A B` or `A B^T`: panels of `B` packed in full depth.
fn along_rows<S: Simd, A: Float>(
    simd: S,
    c: &mut [A],
    columns: usize,
    first: usize,
    term: &Operands<'_, A>,
    add: bool,
) {
    let rows = c.len() / columns;
    let depth = term.depth;
    if depth == 0 {
        if !add {
            c.fill(A::ZERO);
        }
        return;
    }
    let width = panel_width::<S, A>();
    let padded_depth = panel_depth(depth);
    let a = &term.a[first * depth..][..rows * depth];
    let (a, a_stride) = if depth.is_multiple_of(UNROLL) {
        (Cow::Borrowed(a), depth)
    } else {
        let stride = row_stride::<S, A>(depth);
        let mut padded = vec![A::ZERO; rows * stride];
        copy_rows(simd, matrix(a, depth), A::ONE, &mut padded, stride);
        (Cow::Owned(padded), stride)
    };
    let count = panels_at_once(padded_depth * width);
    let mut panels = vec![A::ZERO; count * padded_depth * width];
    let mut scratch = vec![A::ZERO; lanes::<S, A>() * depth.next_multiple_of(lanes::<S, A>())];
    for block in (0..columns).step_by(count * width) {
        let filled = (count * width).min(columns - block);
        if term.form == Form::Nt {
            let b = matrix(&term.b[block * depth..][..filled * depth], depth);
            pack_transposed(simd, b, &mut panels, &mut scratch);
        } else {
            copy_panels(simd, term.b, columns, block, filled, &mut panels, padded_depth);
        }
        for (panel, column) in
            panels.chunks_exact(padded_depth * width).zip((block..block + filled).step_by(width))
        {
            let filled = width.min(columns - column);
            simd.vectorize(
                #[inline(always)]
                || {
                    for (row, height) in tiles::<S, A>(rows) {
                        let a = &a[row * a_stride..];
                        let c = &mut c[row * columns + column..];
                        macro_rules! tile {
                            ($height:literal) => {{
                                let sums: Sums<S, A, $height, 2> =
                                    product_rows(simd, padded_depth, a, a_stride, panel);
                                put(simd, sums, c, columns, filled, add);
                            }};
                        }
                        match height {
                            12 => tile!(12),
                            6 => tile!(6),
                            4 => tile!(4),
                            2 => tile!(2),
                            _ => tile!(1),
                        }
                    }
                },
            );
        }
    }
}

/// `C (+)= A^T B`: blocks of the common dimension, in each of them panels of `B`.
fn along_columns<S: Simd, A: Float>(
    simd: S,
    c: &mut [A],
    columns: usize,
    first: usize,
    term: &Operands<'_, A>,
    add: bool,
) {
    let rows = c.len() / columns;
    let width = panel_width::<S, A>();
    let most = DEPTH.min(term.depth).max(1);
    let count = panels_at_once(most * width);
    let mut panels = vec![A::ZERO; count * most * width];
    if term.depth == 0 && !add {
        c.fill(A::ZERO);
    }
    for start in (0..term.depth).step_by(DEPTH) {
        let depth = DEPTH.min(term.depth - start);
        let a = &term.a[start * term.a_columns + first..];
        let b = &term.b[start * columns..][..depth * columns];
        let add = add || start > 0;
        for block in (0..columns).step_by(count * width) {
            let filled = (count * width).min(columns - block);
            copy_panels(simd, b, columns, block, filled, &mut panels, most);
            for (panel, column) in
                panels.chunks_exact(most * width).zip((block..block + filled).step_by(width))
            {
                let filled = width.min(columns - column);
                simd.vectorize(
                    #[inline(always)]
                    || {
                        for (row, height) in tiles::<S, A>(rows) {
                            let a = &a[row..];
                            let c = &mut c[row * columns + column..];
                            macro_rules! tile {
                                ($height:literal) => {{
                                    let sums: Sums<S, A, $height, 2> = product_columns(
                                        simd,
                                        depth,
                                        a,
                                        term.a_columns,
                                        panel,
                                        width,
                                    );
                                    put(simd, sums, c, columns, filled, add);
                                }};
                            }
                            match height {
                                12 => tile!(12),
                                6 => tile!(6),
                                4 => tile!(4),
                                2 => tile!(2),
                                _ => tile!(1),
                            }
                        }
                    },
                );
            }
        }
    }
}

/// How many panels of `size` numbers are packed at once.
fn panels_at_once(size: usize) -> usize {
    (PACKED / size.max(1)).clamp(1, PANELS)
}

/// Copies `filled` columns of a matrix, from `column` on, to panels of `depth` rows; rows that the
/// matrix does not have are left as they are.
fn copy_panels<S: Simd, A: Float>(
    simd: S,
    b: &[A],
    columns: usize,
    column: usize,
    filled: usize,
    panels: &mut [A],
    depth: usize,
) {
    let (width, lanes) = (panel_width::<S, A>(), lanes::<S, A>());
    simd.vectorize(
        #[inline(always)]
        || {
            for (k, row) in b.chunks_exact(columns).enumerate() {
                let from = row[column..][..filled].chunks(width);
                for (from, panel) in from.zip(panels.chunks_exact_mut(depth * width)) {
                    let to = &mut panel[k * width..][..width];
                    if from.len() == width {
                        let (low, high) = from.split_at(lanes);
                        A::Vector::<S>::from_slice(simd, low).store_slice(&mut to[..lanes]);
                        A::Vector::<S>::from_slice(simd, high).store_slice(&mut to[lanes..]);
                    } else {
                        to[..from.len()].copy_from_slice(from);
                        to[from.len()..].fill(A::ZERO);
                    }
                }
            }
        },
    );
}

/// Writes or adds the first `filled` columns of sums to rows `stride` apart.
///
/// The loops over `sums` are short enough to be unrolled; otherwise the sums would have an address, and
/// every turn of the product's loop would store them there.
#[inline(always)]
fn put<S: Simd, A: Float, const ROWS: usize>(
    simd: S,
    sums: Sums<S, A, ROWS, 2>,
    c: &mut [A],
    stride: usize,
    filled: usize,
    add: bool,
) {
    let width = panel_width::<S, A>();
    if filled < width {
        let mut rows = [[A::ZERO; MAX_WIDTH]; ROWS];
        for i in 0..ROWS {
            store(&sums[i], &mut rows[i][..width]);
        }
        for (row, c) in rows.iter().zip(c.chunks_mut(stride)) {
            for (c, &sum) in c[..filled].iter_mut().zip(row) {
                *c = if add { *c + sum } else { sum };
            }
        }
    } else if add {
        for i in 0..ROWS {
            let c = &mut c[i * stride..][..width];
            let old = load::<S, A, 2>(simd, c);
            store(&[old[0] + sums[i][0], old[1] + sums[i][1]], c);
        }
    } else {
        for i in 0..ROWS {
            store(&sums[i], &mut c[i * stride..][..width]);
        }
    }
}

/// A slice as a matrix.
fn matrix<A>(rows: &[A], columns: usize) -> ArrayView2<'_, A> {
    let count = rows.len().checked_div(columns).unwrap_or(0);
    ArrayView2::from_shape((count, columns), rows).expect("whole rows")
}
