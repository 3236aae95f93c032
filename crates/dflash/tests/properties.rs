//! What holds for every tree and any logits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{random_parts, trees};
use dflash::formats::{eagle, sglang};
use dflash::{
    Law, Sampling, TokenTree, accept_greedy, accept_greedy_reference, argmax, build_tree_mask,
    tree_mask_reference,
};
use ndarray::Array1;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use tensor_utils::testing::property_cases;
use tensor_utils::{bf16, f16};

/// The tokens that the cuts leave, by id, with their probabilities.
fn cut(logits: &Array1<f64>, sampling: &Sampling) -> (Vec<u32>, Vec<f64>) {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weight = |x: &f64| ((x - max) / sampling.temperature).exp();
    let mut order: Vec<(u32, f64)> = (0..).zip(logits.iter().map(weight)).collect();
    // Stable: of equal ones the lower id.
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    order.truncate(sampling.top_k.unwrap_or(usize::MAX));
    let (all, mut cumulative) = (order.iter().map(|(_, p)| p).sum::<f64>(), 0.0);
    let mut kept = Vec::new();
    for (token, p) in order {
        let is_reached = sampling.top_p.is_some_and(|top_p| cumulative >= top_p * all);
        cumulative += p;
        if !is_reached && sampling.min_p.is_none_or(|min_p| p >= min_p) {
            kept.push((token, p));
        }
    }
    kept.sort_by_key(|(token, _)| *token);
    let sum: f64 = kept.iter().map(|(_, p)| p).sum();
    kept.into_iter().map(|(token, p)| (token, p / sum)).unzip()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(property_cases(256)))]

    #[test]
    fn greedy_is_its_definition((tree, logits) in trees()) {
        let want = accept_greedy_reference(tree.tokens(), tree.parents(), logits.view()).unwrap();
        prop_assert_eq!(&accept_greedy(&tree, logits.view()).unwrap(), &want);
        // These values are exact in every type.
        prop_assert_eq!(&accept_greedy(&tree, logits.mapv(|x| x as f32).view()).unwrap(), &want);
        prop_assert_eq!(&accept_greedy(&tree, logits.mapv(bf16::from_f64).view()).unwrap(), &want);
        prop_assert_eq!(&accept_greedy(&tree, logits.mapv(f16::from_f64).view()).unwrap(), &want);
    }

    /// The accepted tokens are what plain decoding takes, step by step, and the path ends where the
    /// tree has no such child.
    #[test]
    fn greedy_is_plain_decoding((tree, logits) in trees()) {
        let accepted = accept_greedy(&tree, logits.view()).unwrap();
        let mut row = 0;
        for (step, &token) in accepted.tokens.iter().enumerate() {
            prop_assert_eq!(argmax(logits.row(row), row).unwrap(), token);
            match tree.child(row, token) {
                Some(node) => {
                    prop_assert_eq!(accepted.nodes[step], node);
                    row = TokenTree::row_of(node);
                }
                None => prop_assert_eq!(step, accepted.nodes.len()),
            }
        }
    }

    /// Rows off the accepted path have no effect, NaN included.
    #[test]
    fn other_rows_are_not_read((tree, mut logits) in trees()) {
        let accepted = accept_greedy(&tree, logits.view()).unwrap();
        for row in 1..tree.rows() {
            if !accepted.nodes.contains(&(row - 1)) {
                logits.row_mut(row).fill(f64::NAN);
            }
        }
        prop_assert_eq!(accept_greedy(&tree, logits.view()).unwrap(), accepted);
    }

    /// The cuts as they read, one token at a time; to the bit, ties included.
    #[test]
    fn cuts_are_their_definition(
        logits in prop_oneof![vec(-4..=4_i32, 1..60), vec(-30..=4_i32, 200..700)],
        top_k in option::of(1..700_usize),
        top_p in option::of(prop_oneof![0.01..1.0_f64, Just(0.5), Just(1.0)]),
        min_p in option::of(prop_oneof![0.0..1.0_f64, Just(0.0), Just(1.0)]),
    ) {
        let sampling = Sampling { temperature: 0.5, top_k, top_p, min_p };
        let logits = Array1::from_iter(logits.into_iter().map(f64::from));
        let law = Law::from_logits(logits.view(), 0, &sampling).unwrap();
        let (tokens, probabilities) = cut(&logits, &sampling);
        prop_assert_eq!(law.tokens(), tokens);
        prop_assert_eq!(law.probabilities(), probabilities);
    }

    /// What is left of one law after another, a token at a time.
    #[test]
    fn residuals_are_their_definition(a in vec(0..4_u8, 1..30), b in vec(0..4_u8, 1..30)) {
        let [a, b] = [a, b].map(|weights| {
            let sum: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
            let shares = weights.iter().map(|&weight| f64::from(weight) / sum.max(1.0));
            Law::from_probabilities(&Vec::from_iter(shares)).unwrap_or_default()
        });
        let left = (0..30).map(|token| (token, a.probability(token) - b.probability(token)));
        let left = Vec::from_iter(left.filter(|&(_, p)| p > 0.0));
        let sum: f64 = left.iter().map(|(_, p)| p).sum();
        let residual = a.residual(&b);
        prop_assert_eq!(residual.tokens(), Vec::from_iter(left.iter().map(|(token, _)| *token)));
        prop_assert_eq!(residual.probabilities(), Vec::from_iter(left.iter().map(|(_, p)| p / sum)));
    }

    #[test]
    fn masks_are_their_definition((tree, _) in trees(), prompt in 0..9_usize) {
        let dense = build_tree_mask(&tree, prompt).unwrap();
        prop_assert_eq!(&dense, &tree_mask_reference(tree.parents(), prompt));
        let bits = tree.ancestors().unwrap();
        for node in 0..tree.len() {
            let path = tree.path(node);
            prop_assert_eq!(path.len(), tree.depths()[node]);
            prop_assert_eq!(path.last(), Some(&node));
            let seen = (0..tree.len()).filter(|&other| bits.contains(node, other));
            prop_assert_eq!(seen.collect::<Vec<_>>(), path);
            for other in 0..tree.len() {
                prop_assert_eq!(bits.contains(node, other), dense[[prompt + node, prompt + other]]);
            }
        }
    }

    #[test]
    fn children_are_the_inverse_of_parents((tree, _) in trees()) {
        let mut seen = Vec::new();
        for row in 0..tree.rows() {
            for &node in tree.children(row) {
                prop_assert_eq!(tree.parents()[node], row as i64 - 1);
                seen.push(node);
            }
            prop_assert!(tree.children(row).is_sorted());
        }
        seen.sort_unstable();
        prop_assert_eq!(seen, (0..tree.len()).collect::<Vec<_>>());
    }

    /// Merging changes no text: the same set of paths, and greedy acceptance is that of the
    /// longest path of the unmerged tree.
    #[test]
    fn merging_keeps_the_texts(seed: u64, nodes in 0..60_usize, vocabulary in 1..5_u32) {
        let (tokens, parents) = random_parts(seed, nodes, 2, vocabulary);
        let (tree, became) = TokenTree::merged(&tokens, &parents).unwrap();
        for node in 0..nodes {
            let mut text = Vec::new();
            let mut at = node as i64;
            while at >= 0 {
                text.push(tokens[at as usize]);
                at = parents[at as usize];
            }
            text.reverse();
            let path: Vec<_> =
                tree.path(became[node]).iter().map(|&node| tree.tokens()[node]).collect();
            prop_assert_eq!(path, text);
        }
        prop_assert!((0..tree.len()).all(|node| became.contains(&node)));
    }

    #[test]
    fn formats_go_there_and_back((tree, logits) in trees(), root in 0..9_u32) {
        let batch = [tree.clone(), tree.clone()];
        let trees = sglang::Trees::from_trees(&[root, root + 1], &batch).unwrap();
        prop_assert_eq!(trees.to_trees().unwrap(), [(root, tree.clone()), (root + 1, tree.clone())]);
        for order in [eagle::PathOrder::Leaf, eagle::PathOrder::Path] {
            let buffers = eagle::Buffers::from_tree(root, &tree, order).unwrap();
            prop_assert_eq!(buffers.to_tree().unwrap(), (root, tree.clone()));
            let accepted = accept_greedy(&tree, logits.view()).unwrap();
            let (best, length) = buffers.outcome(&accepted).unwrap();
            prop_assert_eq!(length, accepted.nodes.len());
            for (step, &node) in accepted.nodes.iter().enumerate() {
                prop_assert_eq!(buffers.retrieve_indices[[best, step + 1]], node as i64 + 1);
            }
        }
        let mask = sglang::tree_mask(&tree).unwrap();
        prop_assert_eq!(sglang::tree_of_mask(mask.view(), tree.tokens()).unwrap(), tree);
    }

    /// Whatever the arrays hold, an error or a tree comes out.
    #[test]
    fn nothing_panics(
        tokens in vec(any::<u32>(), 0..9),
        parents in vec(-2..9_i64, 0..9),
        links in vec(-2..5_i64, 16),
    ) {
        if let Ok(tree) = TokenTree::new(&tokens, &parents) {
            prop_assert_eq!(tree.len(), tokens.len());
        }
        let _ = TokenTree::merged(&tokens, &parents);
        let table = |at: usize| ndarray::Array2::from_shape_fn((2, 4), |(i, j)| links[at + 4 * i + j]);
        let trees = sglang::Trees {
            candidates: table(0),
            retrieve_index: table(0),
            retrieve_next_token: table(8),
            retrieve_next_sibling: table(4),
        };
        let _ = trees.to_trees();
        let _ = eagle::tree_of_paths(&tokens, table(0).view());
        let _ = sglang::tree_of_selection(&parents, &links, &[0; 16], 3);
        let mask = table(0).mapv(|x| x > 0);
        let _ = sglang::tree_of_mask(mask.view(), &tokens);
    }
}
