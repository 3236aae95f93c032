//! Acceptance, masks and trees beside their definitions, on small examples worked out by hand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use dflash::exact::{enumerate, extend};
use dflash::{
    Accepted, CostCurve, Law, TokenTree, accept_greedy, accept_greedy_batch,
    accept_greedy_reference, argmax, best_first, best_first_by, best_paths_reference,
    build_tree_mask, choose_budget, tree_mask_reference,
};
use ndarray::{Array1, Array2, array, s};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tensor_utils::{bf16, f16};

/// One-hot rows: `choices[r]` is the largest of row `r`.
fn rows(choices: &[u32], vocabulary: usize) -> Array2<f64> {
    Array2::from_shape_fn((choices.len(), vocabulary), |(row, token)| {
        f64::from(u8::from(choices[row] as usize == token))
    })
}

fn check(tree: &TokenTree, choices: &[u32], nodes: &[usize], tokens: &[u32]) {
    let logits = rows(choices, 10);
    let want = Accepted { nodes: nodes.to_vec(), tokens: tokens.to_vec() };
    assert_eq!(accept_greedy(tree, logits.view()).unwrap(), want);
    let reference = accept_greedy_reference(tree.tokens(), tree.parents(), logits.view());
    assert_eq!(reference.unwrap(), want);
}

#[test]
fn empty_single_chain_and_star() {
    check(&TokenTree::empty(), &[4], &[], &[4]);
    let single = TokenTree::chain(&[4]).unwrap();
    check(&single, &[4, 7], &[0], &[4, 7]);
    check(&single, &[5, 7], &[], &[5]);
    let chain = TokenTree::chain(&[1, 2, 3]).unwrap();
    check(&chain, &[1, 2, 3, 9], &[0, 1, 2], &[1, 2, 3, 9]);
    check(&chain, &[1, 2, 4, 9], &[0, 1], &[1, 2, 4]);
    // A later match does not help: 1 was rejected.
    check(&chain, &[5, 2, 3, 9], &[], &[5]);
    let star = TokenTree::new(&[3, 5, 1], &[-1, -1, -1]).unwrap();
    check(&star, &[5, 0, 8, 0], &[1], &[5, 8]);
    check(&star, &[2, 0, 8, 0], &[], &[2]);
}

/// Trees on which a node judged by its own row, by the row before it in the list, or by its parent's
/// give three different answers.
#[test]
fn the_parent_row_judges() {
    // prompt ─┬─ 0: 1 ─┬─ 2: 3
    //         │        └─ 4: 5
    //         └─ 1: 2 ─── 3: 4 ─── 5: 6
    let tree = TokenTree::new(&[1, 2, 3, 4, 5, 6], &[-1, -1, 0, 1, 0, 3]).unwrap();
    let own_row = |choices: &[u32]| {
        (0..tree.len()).filter(|&i| tree.tokens()[i] == choices[i + 1]).collect::<Vec<_>>()
    };
    let list_row = |choices: &[u32]| {
        (0..tree.len()).take_while(|&i| tree.tokens()[i] == choices[i]).collect::<Vec<_>>()
    };
    // Rows: prompt, after 1, after 2, after 1-3, after 2-4, after 1-5, after 2-4-6.
    let choices = [2, 9, 4, 9, 6, 9, 7];
    check(&tree, &choices, &[1, 3, 5], &[2, 4, 6, 7]);
    assert_ne!(own_row(&choices), [1, 3, 5]);
    assert_ne!(list_row(&choices), [1, 3, 5]);
    // The second branch fails at its end.
    check(&tree, &[2, 9, 4, 9, 5, 9, 7], &[1, 3], &[2, 4, 5]);
    // The other child of the first.
    check(&tree, &[1, 5, 0, 0, 0, 8, 0], &[0, 4], &[1, 5, 8]);
    // Everything below a rejected node matches, and nothing is accepted.
    check(&tree, &[9, 3, 4, 0, 6, 0, 0], &[], &[9]);
    // On a chain, the list's order and the tree's are the same: such tests see nothing.
    let chain = TokenTree::chain(&[1, 2, 3]).unwrap();
    check(&chain, &[1, 2, 3, 0], &[0, 1, 2], &[1, 2, 3, 0]);
}

#[test]
fn ties_go_to_the_lower_token() {
    let tree = TokenTree::new(&[1, 2], &[-1, -1]).unwrap();
    let logits = array![[0.0, 5.0, 5.0], [-0.0, 0.0, 0.0], [1.0, 1.0, 1.0]];
    let accepted = accept_greedy(&tree, logits.view()).unwrap();
    assert_eq!(accepted, Accepted { nodes: vec![0], tokens: vec![1, 0] });
}

#[test]
fn argmax_of_every_kind_of_row() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for len in [1, 2, 63, 64, 65, 127, 2047, 2048, 2049, 5000, 50257] {
        for round in 0..20 {
            // Few different values, so many ties.
            let row = Array1::from_shape_fn(len, |_| f32::from(rng.random_range(-9_i8..9)));
            let row = if round == 0 { row.mapv(|_| f32::NEG_INFINITY) } else { row };
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let want = row.iter().position(|&x| x == max).unwrap() as u32;
            assert_eq!(argmax(row.view(), 0).unwrap(), want);
            assert_eq!(argmax(row.mapv(f64::from).view(), 0).unwrap(), want);
            assert_eq!(argmax(row.mapv(bf16::from_f32).view(), 0).unwrap(), want);
            assert_eq!(argmax(row.mapv(f16::from_f32).view(), 0).unwrap(), want);
            let back = row.slice(s![..;-1]);
            let want = back.iter().position(|&x| x == max).unwrap() as u32;
            assert_eq!(argmax(back, 0).unwrap(), want);
            let mut bad = row.clone();
            bad[rng.random_range(0..len)] = f32::NAN;
            assert!(argmax(bad.view(), 3).unwrap_err().to_string().contains("row 3"));
        }
    }
    assert_eq!(argmax(array![1.0, f64::INFINITY, f64::INFINITY].view(), 0).unwrap(), 1);
}

/// The arrays of the reference may repeat a sibling, which a tree does not.
#[test]
fn the_reference_takes_the_first_of_equal_siblings() {
    let logits = array![[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]];
    let accepted = accept_greedy_reference(&[1, 1], &[-1, -1], logits.view()).unwrap();
    assert_eq!((accepted.nodes, accepted.tokens), (vec![0], vec![1, 0]));
}

#[test]
fn mask_and_positions_of_an_example() {
    let tree = TokenTree::new(&[1, 2, 3, 4], &[-1, -1, 0, 2]).unwrap();
    let (o, x) = (false, true);
    let want = array![
        [x, o, o, o, o, o],
        [x, x, o, o, o, o],
        [x, x, x, o, o, o],
        [x, x, o, x, o, o],
        [x, x, x, o, x, o],
        [x, x, x, o, x, x],
    ];
    assert_eq!(build_tree_mask(&tree, 2).unwrap(), want);
    assert_eq!(tree_mask_reference(tree.parents(), 2), want);
    // The prompt stands at 0 and 1.
    assert_eq!(tree.positions(1).unwrap(), [2, 2, 3, 4]);
    assert_eq!(tree.pass_parents(), [-1, 0, 0, 1, 3]);
    assert_eq!(tree.path(3), [0, 2, 3]);
    assert_eq!(tree.max_depth(), 3);
    assert!(!tree.is_empty() && TokenTree::empty().is_empty());
    assert!(tree.positions(usize::MAX).is_none());
}

#[test]
fn siblings_merge_like_a_trie() {
    // 7 ─ 1 and 7 ─ 2, with 7 twice.
    let (tree, became) = TokenTree::merged(&[7, 7, 1, 2, 1], &[-1, -1, 0, 1, 1]).unwrap();
    assert_eq!(tree.tokens(), [7, 1, 2]);
    assert_eq!(tree.parents(), [-1, 0, 0]);
    assert_eq!(became, [0, 0, 1, 2, 1]);
}

#[test]
fn truncation_at_eos_and_at_the_limit() {
    let path = Accepted { nodes: vec![4, 6, 9], tokens: vec![1, 2, 3, 4] };
    let cut = |eos: &[u32], limit| {
        let mut path = path.clone();
        let ended = path.truncate(eos, limit);
        assert_eq!(path.nodes.len() + 1, path.tokens.len());
        (path.tokens, ended)
    };
    assert_eq!(cut(&[], 9), (vec![1, 2, 3, 4], false));
    assert_eq!(cut(&[2, 3], 9), (vec![1, 2], true));
    assert_eq!(cut(&[4], 9), (vec![1, 2, 3, 4], true));
    assert_eq!(cut(&[3], 2), (vec![1, 2], true));
    assert_eq!(cut(&[], 4), (vec![1, 2, 3, 4], true));
    assert_eq!(cut(&[], 0), (vec![1], true));
}

#[test]
fn ragged_batches_are_single_trees() {
    let trees: Vec<_> = (0..7).map(|i| common::random_tree(i, 5 * i as usize, 2, 6)).collect();
    let logits: Vec<_> = trees
        .iter()
        .enumerate()
        .map(|(i, tree)| common::random_logits(i as u64, tree, 6))
        .collect();
    let all: Vec<_> = logits.iter().map(|logits| logits.view()).collect();
    let all = ndarray::concatenate(ndarray::Axis(0), &all).unwrap();
    let batch = accept_greedy_batch(&trees, all.view()).unwrap();
    for ((tree, logits), got) in trees.iter().zip(&logits).zip(batch) {
        assert_eq!(accept_greedy(tree, logits.view()).unwrap(), got);
    }
    assert_eq!(accept_greedy_batch(&[], Array2::<f32>::zeros((0, 5)).view()).unwrap(), []);
}

/// The best tree of every size, and in the order of its probabilities.
#[test]
fn best_first_is_best() {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    for _ in 0..60 {
        let (length, vocabulary) = (rng.random_range(1..5), rng.random_range(1..5));
        let positions: Vec<Vec<f64>> = (0..length)
            .map(|_| (0..vocabulary).map(|_| -f64::from(rng.random_range(0_u8..9)) / 2.0).collect())
            .collect();
        let array = Array2::from_shape_fn((length, vocabulary), |(d, v)| positions[d][v]);
        for budget in [0, 1, 2, 5, 17, 1000] {
            let scored = best_first(array.view(), budget).unwrap();
            let want = best_paths_reference(&positions, budget);
            assert_eq!(scored.log_probabilities.len(), want.len());
            for (got, want) in scored.log_probabilities.iter().zip(&want) {
                assert!((got - want).abs() < 1e-12, "{scored:?}\n{want:?}");
            }
            for node in 0..scored.tree.len() {
                let path = scored.tree.path(node);
                let sum: f64 = (0..path.len())
                    .map(|d| positions[d][scored.tree.tokens()[path[d]] as usize])
                    .sum();
                assert!((sum - scored.log_probabilities[node]).abs() < 1e-12);
            }
            let by_path = best_first_by(budget, |path| {
                let position = positions.get(path.len()).cloned().unwrap_or_default();
                Ok((0..vocabulary as u32).zip(position).rev().collect())
            });
            assert_eq!(by_path.unwrap(), scored);
            let first = best_first(array.view(), budget / 2).unwrap();
            assert_eq!(scored.prefix(budget / 2).unwrap(), first);
        }
    }
}

/// What came into the queue first: node 0 brings token 1 beside it before token 0 below it, and token 2 comes
/// only when token 1 is chosen.
#[test]
fn ties_of_trees_go_by_the_queue() {
    let rows = array![[0.0, -1.0, -1.0], [-1.0, -1.0, -1.0]];
    let scored = best_first(rows.view(), 4).unwrap();
    assert_eq!(scored.tree.tokens(), [0, 1, 0, 2]);
    assert_eq!(scored.tree.parents(), [-1, -1, 0, -1]);
    assert_eq!(scored.log_probabilities, [0.0, -1.0, -1.0, -1.0]);
}

#[test]
fn impossible_tokens_are_not_proposed() {
    let log_probabilities = array![[0.0, f64::NEG_INFINITY], [-1.0, f64::NEG_INFINITY]];
    assert_eq!(best_first(log_probabilities.view(), 50).unwrap().tree.len(), 2);
}

/// If the drafter's law is the target's, a tree yields its expected number of tokens.
#[test]
fn expected_tokens_are_what_comes_out() {
    let p = [0.5_f64, 0.3, 0.2];
    let law = Law::from_probabilities(&p).unwrap();
    let position = Array1::from(p.map(f64::ln).to_vec());
    let array = ndarray::stack![ndarray::Axis(0), position, position];
    let scored = best_first(array.view(), 6).unwrap();
    let outcomes = enumerate(|choices| {
        let accepted = dflash::accept_matching_by(&scored.tree, |_| Ok(law.clone()), choices)?;
        Ok(accepted.tokens)
    })
    .unwrap();
    let mean: f64 = outcomes.iter().map(|(tokens, p)| tokens.len() as f64 * p).sum();
    assert!((mean - scored.expected_tokens()).abs() < 1e-12);
    assert!(extend(&outcomes, 1, |_| Ok(law.clone())).unwrap().len() == 3);
}

#[test]
fn budgets_follow_the_cost_curve() {
    let p: Array2<f64> = array![[0.8, 0.2], [0.8, 0.2], [0.8, 0.2]].mapv(f64::ln);
    let scored = best_first(p.view(), 14).unwrap();
    // Free rows: everything. Rows that cost what the first does: nothing.
    let free = CostCurve::new(&[(1, 1.0), (100, 1.0 + 1e-9)]).unwrap();
    assert_eq!(choose_budget(&scored, &free, 0.0).unwrap().nodes, 14);
    let dear = CostCurve::new(&[(1, 1.0), (2, 2.0)]).unwrap();
    assert_eq!(choose_budget(&scored, &dear, 0.0).unwrap().nodes, 0);
    // A step at 4 rows: 3 nodes fit below it.
    let step = CostCurve::new(&[(1, 1.0), (4, 1.01), (5, 2.0), (15, 2.5)]).unwrap();
    let budget = choose_budget(&scored, &step, 0.0).unwrap();
    assert_eq!(budget.nodes, 3);
    assert!((budget.expected_tokens - (1.0 + 0.8 + 0.64 + 0.512)).abs() < 1e-12);
    assert!((budget.tokens_per_second - budget.expected_tokens / 1.01).abs() < 1e-12);
    // Slow drafting makes more nodes worth their cost.
    assert!(choose_budget(&scored, &step, 10.0).unwrap().nodes > 3);

    assert_eq!(step.seconds(0), 1.0);
    assert!((step.seconds(10) - 2.25).abs() < 1e-12);
    assert!((step.seconds(25) - 3.0).abs() < 1e-12);
    assert_eq!(CostCurve::new(&[(4, 2.0)]).unwrap().seconds(100), 2.0);
    // Measured curves may fall, by chance; beyond the last point they must not.
    assert_eq!(CostCurve::new(&[(1, 2.0), (2, 1.5)]).unwrap().seconds(100), 1.5);
    let measured = CostCurve::measure(&[1, 8], 3, |rows| {
        std::hint::black_box((0..rows * 100_000).sum::<usize>());
        Ok(())
    });
    assert!(measured.unwrap().seconds(1) > 0.0);
}
