//! Conversions beside the vectors that the other systems publish.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use dflash::formats::{eagle, sglang};
use dflash::{Accepted, TokenTree, accept_greedy};
use ndarray::{Array2, array};

/// SGLang, `test_eagle_utils.py` (`verify_tree_greedy`): two trees of six nodes with the root.
#[test]
fn sglang_verification() {
    let trees = sglang::Trees {
        candidates: array![[0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 11, 12]],
        retrieve_index: array![[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]],
        retrieve_next_token: array![[1, 2, -1, 4, 5, -1], [4, 2, 3, -1, 5, -1]],
        retrieve_next_sibling: array![[-1, 3, -1, -1, -1, -1], [-1, -1, -1, -1, 1, -1]],
    };
    let parsed = trees.to_trees().unwrap();
    assert_eq!(parsed[0].1.parents(), [-1, 0, -1, 2, 3]);
    assert_eq!(parsed[1].1.parents(), [-1, 0, 1, -1, 3]);
    assert_eq!((parsed[0].0, parsed[1].0), (0, 7));

    let targets = [[3, 18, 18, 4, 5, 18], [11, 18, 18, 18, 12, 18]];
    let accepted: Vec<_> = parsed
        .iter()
        .zip(targets)
        .map(|((_, tree), target)| {
            let logits = Array2::from_shape_fn((6, 20), |(row, token)| {
                f32::from(u8::from(target[row] == token))
            });
            accept_greedy(tree, logits.view()).unwrap()
        })
        .collect();
    let outcome = trees.outcome(&accepted, 4).unwrap();
    assert_eq!(outcome.predicts, array![3, -1, -1, 4, 5, 18, 11, -1, -1, -1, 12, 18]);
    assert_eq!(outcome.accept_index, array![[0, 3, 4, 5], [6, 10, 11, -1]]);
    assert_eq!(outcome.accept_token_num, array![3, 2]);
    // A path that does not fit the table.
    assert!(trees.outcome(&accepted, 3).is_err());
    assert!(trees.outcome(&accepted[..1], 4).is_err());
    // Five nodes, so there is no node 5.
    let beyond = Accepted { nodes: vec![5], tokens: vec![1, 2] };
    assert!(trees.outcome(&[beyond, accepted[1].clone()], 4).is_err());
}

/// SGLang, `test_build_eagle_tree.py`: what drafting selected, top 4 of depth 4, 8 nodes.
#[test]
fn sglang_building() {
    let parent_lists = [
        [-1, 0, 1, 2, 3, 4, 8, 9, 10, 20, 24, 21, 28],
        [-1, 0, 1, 2, 3, 4, 5, 6, 7, 24, 28, 20, 21],
    ];
    let selected = [[0, 1, 4, 8, 20, 24, 36], [0, 4, 5, 6, 7, 24, 36]];
    let tokens = [
        [29896, 29906, 29889, 29974, 29946, 29896, 29946],
        [13, 22550, 4136, 16492, 8439, 29871, 29941],
    ];
    let trees: Vec<_> = (0..2)
        .map(|b| sglang::tree_of_selection(&parent_lists[b], &selected[b], &tokens[b], 4).unwrap())
        .collect();
    let positions: Vec<usize> = trees
        .iter()
        .zip([5, 10])
        .flat_map(|(tree, root)| [vec![root], tree.positions(root).unwrap()].concat())
        .collect();
    assert_eq!(positions, [5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, 12, 12, 12, 13, 14]);

    let arrays = sglang::Trees::from_trees(&[29974, 13], &trees).unwrap();
    let index = array![[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]];
    assert_eq!(arrays.retrieve_index, index);
    let next = array![[1, 3, 4, 5, 6, 7, -1, -1], [1, 2, -1, 6, -1, -1, 7, -1]];
    assert_eq!(arrays.retrieve_next_token, next);
    let sibling = array![[-1, 2, -1, -1, -1, -1, -1, -1], [-1, -1, 3, 4, 5, -1, -1, -1]];
    assert_eq!(arrays.retrieve_next_sibling, sibling);
    assert_eq!(arrays.candidates.row(0)[0], 29974);
}

/// SGLang, `test_reconstruct_indices_from_tree_mask` of the n-gram drafter: four nodes after 12
/// tokens.
#[test]
fn sglang_mask() {
    let mask = array![[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]].mapv(|x| x == 1);
    let tree = sglang::tree_of_mask(mask.view(), &[5, 6, 7]).unwrap();
    let arrays = sglang::Trees::from_trees(&[4], std::slice::from_ref(&tree)).unwrap();
    assert_eq!(arrays.retrieve_index, array![[0, 1, 2, 3]]);
    assert_eq!(arrays.retrieve_next_token, array![[1, -1, 3, -1]]);
    assert_eq!(arrays.retrieve_next_sibling, array![[-1, 2, -1, -1]]);
    assert_eq!(tree.positions(12).unwrap(), [13, 13, 14]);
    assert_eq!(sglang::tree_mask(&tree).unwrap(), mask);
    assert_eq!(sglang::tree_mask_bits(&tree).unwrap(), [0b0001, 0b0011, 0b0101, 0b1101]);
    assert!(sglang::tree_mask_bits(&TokenTree::chain(&[1; 64]).unwrap()).is_err());
}

/// EAGLE, `mc_sim_7b_63` of `choices.py` and the `retrieve_indices` that its
/// `generate_tree_buffers` makes of it.
#[test]
fn eagle_choices() {
    let choices: [&[usize]; 25] = [
        &[0],
        &[1],
        &[2],
        &[3],
        &[0, 0],
        &[0, 1],
        &[0, 2],
        &[1, 0],
        &[1, 1],
        &[2, 0],
        &[2, 1],
        &[3, 0],
        &[0, 0, 0],
        &[0, 0, 1],
        &[0, 0, 2],
        &[0, 1, 0],
        &[0, 1, 1],
        &[0, 2, 0],
        &[0, 2, 1],
        &[1, 0, 0],
        &[0, 0, 0, 0],
        &[0, 0, 0, 1],
        &[0, 0, 0, 2],
        &[0, 0, 0, 0, 0],
        &[0, 0, 0, 0, 1],
    ];
    let mut shuffled = choices;
    shuffled.reverse();
    let token = |choice: &[usize]| choice.iter().fold(0, |token, &rank| token * 10 + rank as u32);
    let tree = eagle::tree_of_choices(&shuffled, token).unwrap();
    let buffers = eagle::Buffers::from_tree(99, &tree, eagle::PathOrder::Path).unwrap();
    let want = array![
        [0, 1, 5, 13, 21, 24],
        [0, 1, 5, 13, 21, 25],
        [0, 1, 5, 13, 22, -1],
        [0, 1, 5, 13, 23, -1],
        [0, 1, 5, 14, -1, -1],
        [0, 1, 5, 15, -1, -1],
        [0, 1, 6, 16, -1, -1],
        [0, 1, 6, 17, -1, -1],
        [0, 1, 7, 18, -1, -1],
        [0, 1, 7, 19, -1, -1],
        [0, 2, 8, 20, -1, -1],
        [0, 2, 9, -1, -1, -1],
        [0, 3, 10, -1, -1, -1],
        [0, 3, 11, -1, -1, -1],
        [0, 4, 12, -1, -1, -1],
    ];
    assert_eq!(buffers.retrieve_indices, want);
    let depths = [vec![0], vec![1; 4], vec![2; 8], vec![3; 8], vec![4; 3], vec![5; 2]].concat();
    assert_eq!(buffers.tree_position_ids, depths);
    assert!(eagle::tree_of_choices(&[&[0, 1]], token).is_err());
    assert!(eagle::tree_of_choices(&[&[]], token).is_err());
}

/// The buffers of a seven-node EAGLE-3 tree, as a published test of a tree pruner has them.
#[test]
fn eagle_buffers() {
    let buffers = eagle::Buffers {
        draft_tokens: vec![100, 200, 300, 400, 500, 600, 700],
        retrieve_indices: array![[0, 1, 4, -1], [0, 2, 5, -1], [0, 1, 3, 6]],
        tree_mask: array![
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0, 0],
            [1, 1, 0, 1, 0, 0, 0],
            [1, 1, 0, 0, 1, 0, 0],
            [1, 0, 1, 0, 0, 1, 0],
            [1, 1, 0, 1, 0, 0, 1],
        ]
        .mapv(|x| x == 1),
        tree_position_ids: vec![0, 1, 1, 2, 2, 2, 3],
    };
    let (root, tree) = buffers.to_tree().unwrap();
    assert_eq!((root, tree.parents()), (100, &[-1, -1, 0, 0, 1, 2][..]));
    assert_eq!(eagle::Buffers::from_tree(100, &tree, eagle::PathOrder::Leaf).unwrap(), buffers);

    // 200, 400, then something else: path 2, two tokens.
    let logits = Array2::from_shape_fn((7, 800), |(row, token)| {
        f32::from(u8::from([200, 400, 0, 5, 0, 0, 0][row] == token))
    });
    let accepted = accept_greedy(&tree, logits.view()).unwrap();
    assert_eq!(buffers.outcome(&accepted).unwrap(), (2, 2));
    // Nothing accepted: the first path, as `argmax` of equal lengths has it.
    let rejected = accept_greedy(&tree, Array2::<f32>::zeros((7, 800)).view()).unwrap();
    assert_eq!(buffers.outcome(&rejected).unwrap(), (0, 0));
}
