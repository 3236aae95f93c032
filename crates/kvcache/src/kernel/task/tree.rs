//! The blocks that a token tree reaches into: each node sees a path of its own.

use tensor_utils::simd::Simd;

use super::{BLOCK, SCORES, State};

impl<S: Simd> State<'_, '_, S> {
    /// Positions `block..block + BLOCK` for the nodes of a tree: rows before the tree, then each node's
    /// own path. In the order of positions, and so with the bits of a sequence that is nothing but
    /// the path.
    pub(super) fn add_tree_block(&mut self, block: usize, from: usize) {
        let seen = self.look(block);
        let entry = *self.entry();
        let width = (entry.len - from).next_multiple_of(16) + 16;
        if block == from {
            // All rows against all nodes, once for the chunk.
            let mut tree = std::mem::take(&mut self.scratch.tree);
            tree.grow(self.rows * width);
            self.cut(from..entry.len, from);
            self.scratch.ahead.restart(0);
            self.score(&mut tree, width);
            self.scratch.tree = tree;
        }
        if seen.is_empty() {
            return;
        }
        let group = self.cx.group;
        self.scratch.ahead.restart(0);
        let mut scores = std::mem::take(&mut self.scratch.scores);
        for unit in 0..self.task.units.len() {
            self.find_path(unit);
            for row in unit * group..(unit + 1) * group {
                let tree = &self.scratch.tree[row * width..][..width];
                for (key, score) in scores[row * SCORES..][..BLOCK].iter_mut().enumerate() {
                    *score = match self.scratch.path.get((block + key).wrapping_sub(entry.base)) {
                        Some(node) => tree[entry.base + node - from],
                        None if block + key < entry.base => tree[block + key - from],
                        None => f32::NEG_INFINITY,
                    };
                }
            }
        }
        self.finish_scores(&mut scores);
        self.scratch.scores = scores;
        for unit in 0..self.task.units.len() {
            self.find_path(unit);
            for (a, b) in self.scratch.seen[unit] {
                let before = entry.base.clamp(block + a, block + b.max(a));
                self.cut(block + a..before, block);
                self.add_unit_values(unit);
                for position in before..(block + b).max(before) {
                    let row = entry.base + self.scratch.path[position - entry.base];
                    // The row's place among the keys of the block is that of its position.
                    self.cut(row..row + 1, row - (position - block));
                    self.add_unit_values(unit);
                }
            }
        }
    }

    fn add_unit_values(&mut self, unit: usize) {
        for f in 0..self.scratch.fragments.len() {
            let fragment = self.scratch.fragments[f];
            let quantised = self.cx.cache.values.storage.is_quantised();
            let coded = quantised && self.is_coded(&fragment, &self.units()[unit]);
            self.add_values(&fragment, unit..unit + 1, coded);
        }
    }

    /// The nodes from the root to a unit's own.
    fn find_path(&mut self, unit: usize) {
        let cx = self.cx;
        let unit = &cx.units[self.task.units.start + unit];
        let parents = &cx.parents[cx.entries[unit.entry].parents()];
        self.scratch.path.clear();
        let mut node = unit.query as i64;
        while node >= 0 {
            self.scratch.path.push(node as usize);
            node = parents[node as usize];
        }
        self.scratch.path.reverse();
    }
}
