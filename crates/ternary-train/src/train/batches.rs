//! Which window of the text each step sees.

use rand::rngs::ChaCha8Rng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};

/// Windows of `length` tokens and the one after, in random order: each token once an epoch. The
/// windows of an epoch begin at a random offset, so that they fall differently in each.
///
/// A function of the seed and the index of the window alone: there is no state to save.
#[derive(Debug)]
pub(super) struct Batches {
    seed: u64,
    length: usize,
    tokens: usize,
    epoch: Option<(u64, Vec<usize>)>,
}

impl Batches {
    /// For a text of `tokens`, more than `length`.
    pub(super) fn new(seed: u64, length: usize, tokens: usize) -> Self {
        Self { seed, length, tokens, epoch: None }
    }

    /// Whether it was made for a text of this size.
    pub(super) fn fits(&self, tokens: usize) -> bool {
        self.tokens == tokens
    }

    /// Windows of an epoch: their number is the same for every offset.
    fn windows(&self) -> usize {
        ((self.tokens - 1) / self.length - 1).max(1)
    }

    /// Where window `index` of the whole training begins.
    pub(super) fn start(&mut self, index: usize) -> usize {
        let windows = self.windows();
        let epoch = (index / windows) as u64;
        if self.epoch.as_ref().is_none_or(|(current, _)| *current != epoch) {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream(epoch + 1);
            let room = self.tokens - 1 - windows * self.length;
            let offset = rng.random_range(0..=room.min(self.length));
            let mut starts: Vec<usize> = (0..windows).map(|w| offset + w * self.length).collect();
            starts.shuffle(&mut rng);
            self.epoch = Some((epoch, starts));
        }
        self.epoch.as_ref().map_or(0, |(_, starts)| starts[index % windows])
    }

    /// Fills tokens and targets of `sequences` windows from `first` on.
    pub(super) fn fill(
        &mut self,
        text: &[u32],
        first: usize,
        tokens: &mut [u32],
        targets: &mut [u32],
    ) {
        let length = self.length;
        let rows = tokens.chunks_exact_mut(length).zip(targets.chunks_exact_mut(length));
        for (row, (tokens, targets)) in rows.enumerate() {
            let start = self.start(first + row);
            tokens.copy_from_slice(&text[start..][..length]);
            targets.copy_from_slice(&text[start + 1..][..length]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_covers_the_text_once_in_another_order() {
        let mut batches = Batches::new(3, 4, 4 * 50 + 3);
        let windows = batches.windows();
        assert_eq!(windows, 49);
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let order: Vec<usize> =
                (0..windows).map(|w| batches.start(epoch * windows + w)).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert!(sorted.windows(2).all(|pair| pair[1] == pair[0] + 4), "windows overlap");
            assert!(sorted[windows - 1] + 4 < 4 * 50 + 3);
            orders.push(order);
        }
        assert!(orders[0] != orders[1] && orders[1] != orders[2]);
        // No state: any window can be asked for at any time.
        let mut again = Batches::new(3, 4, 4 * 50 + 3);
        assert_eq!(again.start(2 * windows + 5), orders[2][5]);
        assert_eq!(again.start(7), orders[0][7]);
        assert_ne!(Batches::new(4, 4, 4 * 50 + 3).start(0), orders[0][0]);
    }

    #[test]
    fn the_shortest_text_has_one_window() {
        let mut batches = Batches::new(1, 4, 5);
        let (mut tokens, mut targets) = ([0; 8], [0; 8]);
        batches.fill(&[1, 2, 3, 4, 5], 0, &mut tokens, &mut targets);
        assert_eq!((tokens, targets), ([1, 2, 3, 4, 1, 2, 3, 4], [2, 3, 4, 5, 2, 3, 4, 5]));
    }
}
