//! Rotary positions (Su et al., RoFormer, 2021) in the half-split layout of Llama and Qwen: element
//! `i` of a head is rotated with element `i + D / 2`.

use rayon::prelude::*;
use tensor_utils::{Float, check_shape};

use super::{OpError, elements};

/// Rows of one task.
const ROWS: usize = 64;

/// Cosines and sines of some positions.
#[derive(Debug, Clone)]
pub struct Rope<A> {
    half: usize,
    /// `[positions][D / 2]`.
    cos: Vec<A>,
    /// The same.
    sin: Vec<A>,
}

/// Which way to turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// As the model does.
    Forward,
    /// Back: the gradient of a rotation is the rotation by the opposite angle.
    Backward,
}

impl<A: Float> Rope<A> {
    /// Angles `position * theta^(-2 i / head_size)`, computed in `f64`, for positions below
    /// `positions`. The last element of an odd head stays where it is.
    pub fn new(head_size: usize, theta: f64, positions: usize) -> Self {
        Self::at(head_size, theta, 0..positions)
    }

    /// As [`new`](Self::new), for these positions, in this order.
    pub fn at(head_size: usize, theta: f64, positions: impl IntoIterator<Item = usize>) -> Self {
        let half = head_size / 2;
        let frequency = |i| theta.powf(-2.0 * i as f64 / head_size as f64);
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let angles = positions.into_iter().flat_map(|position| {
            frequencies.iter().map(move |frequency| position as f64 * frequency)
        });
        Self::from_turns(
            half,
            angles.map(|angle| (A::from_f64(angle.cos()), A::from_f64(angle.sin()))),
        )
    }

    /// From the cosines and sines of each position, `half` of them.
    pub(crate) fn from_turns(half: usize, turns: impl Iterator<Item = (A, A)>) -> Self {
        let (cos, sin) = turns.unzip();
        Self { half, cos, sin }
    }

    /// The cosines and the sines of the position with this number.
    pub(crate) fn turns(&self, number: usize) -> (&[A], &[A]) {
        let turns = number * self.half..(number + 1) * self.half;
        (&self.cos[turns.clone()], &self.sin[turns])
    }

    /// How many positions there are.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(usize::MAX)
    }
}

/// Rotates every head of `x: [tokens, heads, head_size]` in place; token `t` stands at the position
/// with the number `t % length`, as in a batch of sequences of `length`. Without heads, positions or a
/// `head_size` of at least 2 nothing is rotated.
///
/// # Errors
/// [`OpError::Shape`] if a token is too large, `x` is not whole tokens, or `rope` has another head size or fewer positions.
pub fn rotate<A: Float>(
    x: &mut [A],
    heads: usize,
    head_size: usize,
    length: usize,
    rope: &Rope<A>,
    direction: Direction,
) -> Result<(), OpError> {
    let width = elements("x", [heads, head_size])?;
    check_shape("x", &[x.len()], &[x.len() / width.max(1) * width])?;
    check_shape("rope", &[rope.half], &[head_size / 2])?;
    if length > rope.positions() {
        check_shape("rope", &[rope.positions()], &[length])?;
    }
    let half = rope.half;
    if half == 0 || width == 0 || length == 0 {
        return Ok(());
    }
    x.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, rows)| {
        for (row, x) in rows.chunks_exact_mut(width).enumerate() {
            let position = (chunk * ROWS + row) % length;
            let (cos, sin) = rope.turns(position);
            for head in x.chunks_exact_mut(head_size) {
                let (low, high) = head.split_at_mut(half);
                let high = &mut high[..half];
                for i in 0..half {
                    let sin = if direction == Direction::Forward { sin[i] } else { -sin[i] };
                    let (x, y) = (low[i], high[i]);
                    low[i] = x * cos[i] - y * sin;
                    high[i] = y * cos[i] + x * sin;
                }
            }
        }
    });
    Ok(())
}
