//! What tests need that plant values and look where they show.

use ndarray::{Array3, Array4, Axis};

use crate::common::Sizes;

/// Calls a generic function with one of the element types.
macro_rules! with_type {
    ($index:expr, $function:ident($($argument:expr),*)) => {
        match $index {
            0 => $function::<f64>($($argument),*),
            1 => $function::<bf16>($($argument),*),
            2 => $function::<f16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}

/// Who sees and who is seen.
pub(crate) struct Seen {
    /// `[B, H, N]`.
    pub(crate) queries: Array3<bool>,
    /// `[B, G, M]`.
    pub(crate) keys: Array3<bool>,
}

impl Seen {
    /// Through the pairs for which `counts` holds.
    pub(crate) fn new(
        sizes: Sizes,
        visible: &Array4<bool>,
        counts: impl Fn([usize; 4]) -> bool,
    ) -> Self {
        let Sizes { batch, key_heads, n, m, .. } = sizes;
        let mut seen = Self {
            queries: Array3::from_elem((batch, sizes.heads(), n), false),
            keys: Array3::from_elem((batch, key_heads, m), false),
        };
        for ((b, h, i, j), &visible) in visible.indexed_iter() {
            if visible && counts([b, h, i, j]) {
                seen.queries[[b, h, i]] = true;
                seen.keys[[b, h / sizes.group, j]] = true;
            }
        }
        seen
    }
}

pub(crate) fn row_mut<T>(
    x: &mut Array4<T>,
    (a, b, c): (usize, usize, usize),
) -> impl Iterator<Item = &mut T> {
    let row = x.index_axis_mut(Axis(0), a).index_axis_move(Axis(0), b).index_axis_move(Axis(0), c);
    row.into_iter()
}

/// The index of the element that stands for a pair in an array of a shape that broadcasts.
pub(crate) fn source_index(shape: &[usize], pair: [usize; 4]) -> Vec<usize> {
    let pair = &pair[4 - shape.len()..];
    pair.iter().zip(shape).map(|(&at, &length)| if length == 1 { 0 } else { at }).collect()
}
