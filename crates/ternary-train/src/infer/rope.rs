//! Rotary positions: Su et al., RoFormer (2021), in the half-split form of Qwen and Llama.

/// Cosines and sines of the tokens of a step.
#[derive(Debug)]
pub(super) struct Rope {
    half: usize,
    /// `[tokens][half]`: cosine and sine of `position * theta^(-2 i / head_dim)`.
    turns: Vec<[f32; 2]>,
}

impl Rope {
    /// Angles in f64, so that far positions lose nothing.
    pub(super) fn new(positions: &[usize], head_dim: usize, theta: f64) -> Self {
        let half = head_dim / 2;
        let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64);
        let frequencies: Vec<f64> = (0..half).map(frequency).collect();
        let angles = positions.iter().flat_map(|&position| {
            frequencies.iter().map(move |frequency| position as f64 * frequency)
        });
        Self { half, turns: angles.map(|a| [a.cos() as f32, a.sin() as f32]).collect() }
    }

    /// Turns every head of `x` `[tokens][heads][head_dim]` in place: element `i` with element
    /// `head_dim / 2 + i`.
    pub(super) fn turn(&self, x: &mut [f32], heads: usize) {
        let tokens = x.chunks_exact_mut(heads * 2 * self.half);
        for (token, turns) in tokens.zip(self.turns.chunks_exact(self.half)) {
            for head in token.chunks_exact_mut(2 * self.half) {
                let (low, high) = head.split_at_mut(self.half);
                for ((a, b), &[cos, sin]) in low.iter_mut().zip(high).zip(turns) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}
