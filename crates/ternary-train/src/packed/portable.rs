//! Products in plain loops, for every target.

use ndarray::ArrayViewMut2;
use tensor_utils::f16;

use super::Activations;
use super::activations::TileGroup;
use super::block::{MAX_WORDS, Stripe, Totals, each_panel};
use super::layout::{ROWS, STEP};

/// The codes plus 1 of a group: `[words][rows][4]`.
type Planes = [[[i16; 4]; ROWS]; MAX_WORDS];

/// Writes the products of the stripe's rows with every token to `y` `[tokens, rows]`.
pub(super) fn product(stripe: Stripe<'_>, x: &Activations, y: ArrayViewMut2<'_, f32>) {
    each_panel(stripe, x, y, [[[0; 4]; ROWS]; MAX_WORDS], unpack, |planes, scales, x, totals| {
        for ((planes, scales), totals) in planes.iter().zip(scales).zip(totals) {
            add(planes, scales, x, totals);
        }
    });
}

fn unpack(codes: &[u8], planes: &mut Planes) {
    for (step, planes) in codes.as_chunks::<STEP>().0.iter().zip(planes.as_chunks_mut::<4>().0) {
        for (shift, plane) in (0..).step_by(2).zip(planes) {
            for (bytes, row) in step.as_chunks::<4>().0.iter().zip(plane) {
                *row = bytes.map(|byte| i16::from(byte >> shift & 3));
            }
        }
    }
}

/// Adds one group of a block for a tile of tokens.
fn add(planes: &Planes, scales: &[u16; ROWS], x: TileGroup<'_>, totals: &mut Totals) {
    let tokens = x.sums.len();
    let scales = scales.map(|bits| f16::from_bits(bits).to_f32());
    for (token, (total, &sum)) in totals.iter_mut().zip(x.sums).enumerate() {
        let mut sums = [-sum; ROWS];
        for (plane, words) in planes.iter().zip(x.words.chunks_exact(tokens)) {
            let x = words[token].map(i32::from);
            for (sum, codes) in sums.iter_mut().zip(plane) {
                let codes = codes.map(i32::from);
                *sum += codes[0] * x[0] + codes[1] * x[1];
                *sum += codes[2] * x[2] + codes[3] * x[3];
            }
        }
        for ((total, scale), sum) in total.iter_mut().zip(scales).zip(sums) {
            *total += scale * sum as f32;
        }
    }
}
