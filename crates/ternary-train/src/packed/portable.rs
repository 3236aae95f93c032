//! Products in plain loops, for every target.

use ndarray::ArrayViewMut2;
use tensor_utils::f16;

use super::Activations;
use super::block::{MAX_STEPS, Stripe, TOKENS, store};
use super::layout::{ROWS, STEP};

/// Writes the products of the stripe's rows with every token to `y` `[tokens, rows]`.
pub(super) fn product(stripe: Stripe<'_>, x: &Activations, mut y: ArrayViewMut2<'_, f32>) {
    let mut planes = [[[0_i16; 4]; ROWS]; 4 * MAX_STEPS];
    for (first_row, block) in stripe.blocks() {
        for first in (0..x.tokens()).step_by(TOKENS) {
            let tokens = first..x.tokens().min(first + TOKENS);
            let mut totals = [[0.0_f32; ROWS]; TOKENS];
            for (g, (codes, scales)) in block.groups(stripe.group_steps).enumerate() {
                let words = codes.len() / STEP * 4;
                unpack(codes, &mut planes);
                let scales = scales.map(|bits| f16::from_bits(bits).to_f32());
                for (token, total) in tokens.clone().zip(&mut totals) {
                    let token = x.token(token);
                    let x = &token.words[g * stripe.group_steps * 4..][..words];
                    let mut sums = [-token.sums[g]; ROWS];
                    for (plane, x) in planes.iter().zip(x) {
                        let x = x.map(i32::from);
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
            for (token, total) in tokens.zip(&totals) {
                let scale = x.token(token).scale;
                store(&mut y, token, first_row, &total.map(|total| total * scale));
            }
        }
    }
}

/// The codes plus 1 of a group: `[words][rows][4]`.
fn unpack(codes: &[u8], planes: &mut [[[i16; 4]; ROWS]]) {
    for (step, planes) in codes.as_chunks::<STEP>().0.iter().zip(planes.as_chunks_mut::<4>().0) {
        for (shift, plane) in (0..).step_by(2).zip(planes) {
            for (bytes, row) in step.as_chunks::<4>().0.iter().zip(plane) {
                *row = bytes.map(|byte| i16::from(byte >> shift & 3));
            }
        }
    }
}
