//! Trees and logits that the tests share.

#![allow(dead_code, reason = "not every test uses all of it")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub(crate) mod transformer;

use dflash::TokenTree;
use ndarray::Array2;
use proptest::prelude::*;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// Tokens and parents of a tree, siblings with equal tokens among them; `shape` 0 is a star, 1 a
/// chain, more a random tree.
pub(crate) fn random_parts(
    seed: u64,
    nodes: usize,
    shape: u8,
    vocabulary: u32,
) -> (Vec<u32>, Vec<i64>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let tokens = (0..nodes).map(|_| rng.random_range(0..vocabulary)).collect();
    let parents = (0..nodes as i64)
        .map(|node| match shape {
            0 => -1,
            1 => node - 1,
            _ => rng.random_range(-1..node),
        })
        .collect();
    (tokens, parents)
}

pub(crate) fn random_tree(seed: u64, nodes: usize, shape: u8, vocabulary: u32) -> TokenTree {
    let (tokens, parents) = random_parts(seed, nodes, shape, vocabulary);
    TokenTree::merged(&tokens, &parents).unwrap().0
}

/// Logits whose largest is often a child's token, with ties.
pub(crate) fn random_logits(seed: u64, tree: &TokenTree, vocabulary: usize) -> Array2<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
    let mut logits =
        Array2::from_shape_fn((tree.rows(), vocabulary), |_| f64::from(rng.random_range(-3..=3)));
    for row in 0..tree.rows() {
        let children = tree.children(row);
        if !children.is_empty() && rng.random_bool(0.7) {
            let node = children[rng.random_range(0..children.len())];
            logits[[row, tree.tokens()[node] as usize]] = f64::from(rng.random_range(3..5));
        }
    }
    logits
}

/// A tree and its logits.
pub(crate) fn trees() -> impl Strategy<Value = (TokenTree, Array2<f64>)> {
    (any::<u64>(), 0..90_usize, 0..5_u8, 1..12_u32).prop_map(|(seed, nodes, shape, vocabulary)| {
        let tree = random_tree(seed, nodes, shape, vocabulary);
        let logits = random_logits(seed, &tree, vocabulary as usize);
        (tree, logits)
    })
}
