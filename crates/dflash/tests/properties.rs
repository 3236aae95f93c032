//! What holds for every tree and any logits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use common::{random_parts, trees};
use dflash::formats::{eagle, sglang};
use dflash::{
    TokenTree, accept_greedy, accept_greedy_reference, argmax, build_tree_mask, tree_mask_reference,
};
use proptest::prelude::*;
use tensor_utils::testing::property_cases;
use tensor_utils::{bf16, f16};

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
        tokens in prop::collection::vec(any::<u32>(), 0..9),
        parents in prop::collection::vec(-2..9_i64, 0..9),
        links in prop::collection::vec(-2..5_i64, 16),
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
