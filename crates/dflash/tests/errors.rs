//! Bad arguments give an error that names them, never a panic.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use dflash::formats::{eagle, sglang};
use dflash::{
    Accepted, CostCurve, DrawnTree, Error, Law, MAX_NODES, Random, Sampling, ScoredTree, Siblings,
    TokenTree, accept_drawn_by, accept_greedy, accept_greedy_batch, accept_greedy_reference,
    accept_matching, accept_matching_by, argmax, best_first, best_first_by, build_tree_mask,
    choose_budget,
};
use ndarray::{Array1, Array2, array};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

/// Checks that the message contains every part.
fn names<T: std::fmt::Debug>(result: Result<T, Error>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

#[test]
fn malformed_trees() {
    names(TokenTree::new(&[1, 2], &[-1]), &["`parents`", "[1]", "[2]"]);
    // Itself, forward, out of range, below -1; a cycle has a forward edge.
    names(TokenTree::new(&[1], &[0]), &["`parents[0]` is 0", "-1"]);
    names(TokenTree::new(&[1, 2], &[1, 0]), &["`parents[0]` is 1"]);
    names(TokenTree::new(&[1, 2], &[-1, 9]), &["`parents[1]` is 9"]);
    names(TokenTree::new(&[1, 2], &[-1, -2]), &["`parents[1]` is -2"]);
    names(TokenTree::new(&[1, 2], &[-1, i64::MIN]), &["`parents[1]`"]);
    names(TokenTree::merged(&[1, 2], &[-1, 1]), &["`parents[1]` is 1"]);
    names(TokenTree::merged(&[1, 2], &[-1]), &["`parents`"]);
    names(
        TokenTree::new(&[5, 6, 5], &[-1, -1, -1]),
        &["nodes 0 and 2", "prompt", "token 5", "merged"],
    );
    names(TokenTree::new(&[5, 6, 6], &[-1, 0, 0]), &["nodes 1 and 2", "node 0", "token 6"]);
    let long = vec![0; MAX_NODES + 1];
    names(TokenTree::chain(&long), &["65537", "65536"]);
    names(accept_greedy_reference(&[1], &[3], Array2::zeros((2, 2)).view()), &["`parents[0]`"]);
    names(build_tree_mask(&TokenTree::chain(&[1]).unwrap(), usize::MAX), &["tree mask"]);
    names(build_tree_mask(&TokenTree::empty(), 1 << 40), &["tree mask"]);
    // No tree has so many rows.
    assert_eq!(TokenTree::row_of(usize::MAX), usize::MAX);
    assert!(TokenTree::empty().children(TokenTree::row_of(usize::MAX)).is_empty());
}

#[test]
fn logits_that_do_not_fit() {
    let tree = TokenTree::chain(&[1]).unwrap();
    let sampling = Sampling::default();
    let mut choices = Random(ChaCha8Rng::seed_from_u64(1));
    let mut both = |logits: &Array2<f32>, parts: &[&str]| {
        names(accept_greedy(&tree, logits.view()), parts);
        names(accept_matching(&tree, logits.view(), &sampling, &mut choices), parts);
    };
    both(&Array2::zeros((1, 5)), &["`logits`", "[1, 5]", "[2, 5]"]);
    both(&Array2::zeros((3, 5)), &["`logits`"]);
    both(&Array2::zeros((2, 0)), &["`logits`", "vocabulary"]);
    both(&Array2::zeros((2, 1)), &["`tree`", "token 1", "vocabulary"]);
    both(&array![[0.0, f32::NAN], [0.0, 0.0]], &["NaN", "row 0"]);
    names(accept_greedy(&tree, array![[0.0, 1.0], [0.0, f32::NAN]].view()), &["NaN", "row 1"]);
    names(argmax(Array1::<f32>::zeros(0).view(), 0), &["`logits`", "vocabulary"]);

    let two = [tree.clone(), tree.clone()];
    names(accept_greedy_batch(&two, Array2::<f32>::zeros((3, 5)).view()), &["[3, 5]", "[4, 5]"]);
    let mut logits = Array2::<f32>::zeros((4, 5));
    logits.fill(f32::NAN);
    names(accept_greedy_batch(&two, logits.view()), &["NaN", "row 0"]);
}

#[test]
fn sampling_out_of_range() {
    let row = array![0.0, 1.0];
    let law = |sampling: Sampling| Law::from_logits(row.view(), 0, &sampling);
    let base = Sampling::default();
    for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        names(law(Sampling { temperature, ..base }), &["`temperature`", "positive"]);
    }
    names(law(Sampling { top_k: Some(0), ..base }), &["`top_k`"]);
    for p in [0.0, -0.5, 1.5, f64::NAN] {
        names(law(Sampling { top_p: Some(p), ..base }), &["`top_p`"]);
    }
    for p in [-0.5, 1.5, f64::NAN] {
        names(law(Sampling { min_p: Some(p), ..base }), &["`min_p`"]);
    }
    let none = array![f32::NEG_INFINITY, f32::NEG_INFINITY];
    names(Law::from_logits(none.view(), 4, &base), &["`logits`", "row 4", "-inf"]);
    names(Law::from_logits(array![0.0, f32::NAN].view(), 4, &base), &["NaN", "row 4"]);
    names(Law::from_logits(Array1::<f32>::zeros(0).view(), 0, &base), &["vocabulary"]);
    names(Law::from_probabilities(&[0.5, -0.5, 1.0]), &["`probabilities`", "-0.5", "token 1"]);
    names(Law::from_probabilities(&[0.5, f64::NAN]), &["`probabilities`", "NaN"]);
    names(Law::from_probabilities(&[0.5, 0.4]), &["sum is 0.9"]);
    names(Law::from_probabilities(&[]), &["sum is"]);
}

#[test]
fn drafts_that_do_not_fit() {
    let mut choices = Random(ChaCha8Rng::seed_from_u64(1));
    let law = || Law::from_probabilities(&[0.5, 0.5, 0.0]).unwrap();
    let drawn =
        DrawnTree::draw(&[1], Siblings::Distinct, MAX_NODES + 1, |_| Ok(law()), &mut choices);
    names(drawn, &["65537"]);
    let fails = || Error::Callback { who: "drafter", source: "no".into() };
    let drawn = DrawnTree::draw(&[1], Siblings::Distinct, 9, |_| Err(fails()), &mut choices);
    names(drawn, &["drafter failed: no"]);

    let tree = || TokenTree::new(&[0, 2], &[-1, -1]).unwrap();
    let wide = || Law::from_probabilities(&[0.4, 0.3, 0.3]).unwrap();
    let laws = || vec![wide(), Law::default(), Law::default()];
    let from = |laws, draws| DrawnTree::from_draws(tree(), Siblings::Distinct, laws, draws);
    names(from(vec![law()], vec![vec![]; 3]), &["`laws`", "[1]", "[3]"]);
    names(from(laws(), vec![vec![]; 2]), &["`draws`"]);
    names(from(laws(), vec![vec![0], vec![], vec![]]), &["`draws`", "[0, 1]", "[0]"]);
    names(from(laws(), vec![vec![0, 1, 1], vec![], vec![]]), &["`draws`", "[0, 1, 1]"]);
    names(from(laws(), vec![vec![0, 1], vec![9], vec![]]), &["`draws`", "row 1"]);
    let narrow = vec![law(), Law::default(), Law::default()];
    let zero = &["`laws`", "token 2", "probability 0"];
    names(from(narrow, vec![vec![1, 0], vec![], vec![]]), zero);

    // An empty law of the target.
    let empty = |_: usize| Ok(Law::default());
    names(accept_matching_by(&tree(), empty, &mut choices), &["`target`"]);
    let drawn = DrawnTree::draw(&[1], Siblings::Distinct, 1, |_| Ok(law()), &mut choices).unwrap();
    names(accept_drawn_by(&drawn, empty, &mut choices), &["`target`"]);
    names(accept_drawn_by(&drawn, |_| Err(fails()), &mut choices), &["drafter"]);
}

#[test]
fn budgets_and_scores_out_of_range() {
    let p = array![[0.0, -1.0]];
    names(best_first(p.view(), MAX_NODES + 1), &["65537"]);
    names(best_first(array![[0.5]].view(), 1), &["`log_probabilities`", "0.5"]);
    names(best_first(array![[0.0, f64::NAN]].view(), 2), &["`log_probabilities`", "NaN"]);
    names(best_first(array![[0.0, f64::INFINITY]].view(), 2), &["`log_probabilities`", "inf"]);
    names(best_first_by(5, |_| Ok(vec![(1, -0.5), (1, -0.7)])), &["siblings", "token 1"]);
    let fails = || Error::Callback { who: "drafter", source: "no".into() };
    names(best_first_by(5, |_| Err(fails())), &["drafter failed"]);
    // Without a budget nobody is asked.
    assert!(best_first_by(0, |_| Err(fails())).unwrap().tree.is_empty());

    names(CostCurve::new(&[]), &["`points`", "none"]);
    names(CostCurve::new(&[(2, 1.0), (2, 1.0)]), &["`points`", "ascending"]);
    for seconds in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        names(CostCurve::new(&[(1, seconds)]), &["`points`", "positive"]);
    }
    names(CostCurve::measure(&[1], 0, |_| Err(fails())), &["drafter failed"]);
    let curve = CostCurve::new(&[(1, 1.0)]).unwrap();
    let short =
        ScoredTree { tree: TokenTree::chain(&[1, 2]).unwrap(), log_probabilities: vec![-0.5] };
    names(short.prefix(2), &["`log_probabilities`", "[1]", "[2]"]);
    let scored = ScoredTree { tree: TokenTree::empty(), log_probabilities: Vec::new() };
    for seconds in [-1.0, f64::NAN, f64::INFINITY] {
        names(choose_budget(&scored, &curve, seconds), &["`draft_seconds`"]);
    }
}

#[test]
fn arrays_that_are_no_trees() {
    let trees = |next: Array2<i64>, sibling: Array2<i64>| sglang::Trees {
        candidates: array![[7, 1, 2]],
        retrieve_index: array![[0, 1, 2]],
        retrieve_next_token: next,
        retrieve_next_sibling: sibling,
    };
    let none = || array![[-1, -1, -1]];
    names(trees(array![[1, 3, -1]], none()).to_trees(), &["`retrieve_next_token`", "points to 3"]);
    names(trees(array![[0, 1, 2]], none()).to_trees(), &["points to 0"]);
    names(trees(array![[1, -2, -1]], none()).to_trees(), &["points to -2"]);
    names(trees(array![[1, -1, -1]], none()).to_trees(), &["node 2 has no parent"]);
    names(trees(array![[1, -1, -1]], array![[-1, 1, -1]]).to_trees(), &["node 1 is reached twice"]);
    names(trees(array![[1, -1]], none()).to_trees(), &["`retrieve_next_token`", "[1, 2]"]);
    // 2 is a child of the root, 1 of 2: a parent after its child.
    names(trees(array![[2, -1, 1]], none()).to_trees(), &["`parents[0]`"]);
    let mut bad = trees(array![[1, 2, -1]], none());
    bad.candidates[[0, 1]] = -4;
    names(bad.to_trees(), &["`candidates`", "-4"]);
    let empty = || Array2::zeros((1, 0));
    let bad = sglang::Trees {
        candidates: empty(),
        retrieve_index: empty(),
        retrieve_next_token: empty(),
        retrieve_next_sibling: empty(),
    };
    names(bad.to_trees(), &["`candidates`", "number of nodes"]);
    let none_accepted = || Accepted { nodes: Vec::new(), tokens: vec![1] };
    names(bad.outcome(&[none_accepted()], 1), &["`candidates`", "number of nodes"]);
    let chain = trees(array![[1, 2, -1]], none());
    names(chain.outcome(&[none_accepted()], usize::MAX), &["accept_index"]);
    let far = Accepted { nodes: vec![usize::MAX], tokens: vec![1, 2] };
    names(chain.outcome(&[far], 3), &["`accepted`", "2 nodes"]);
    let sizes = [TokenTree::empty(), TokenTree::chain(&[1]).unwrap()];
    names(sglang::Trees::from_trees(&[1, 2], &sizes), &["`trees`"]);
    names(sglang::Trees::from_trees(&[1], &sizes), &["`roots`"]);

    names(sglang::tree_of_selection(&[-1], &[0], &[1], 0), &["`topk`"]);
    names(sglang::tree_of_selection(&[-1], &[0], &[1, 2], 4), &["`draft_tokens`"]);
    names(sglang::tree_of_selection(&[-1], &[9], &[1], 4), &["`selected`", "node 1"]);
    names(sglang::tree_of_selection(&[-1], &[-9], &[1], 4), &["`selected`", "node 1"]);
    let mask = array![[true, false], [false, true]];
    names(sglang::tree_of_mask(mask.view(), &[1]), &["`mask`", "no parent"]);
    let mask = array![[true, true], [true, true]];
    names(sglang::tree_of_mask(mask.view(), &[1]), &["`mask`", "ancestors"]);
    names(sglang::tree_of_mask(mask.view(), &[1, 2]), &["`tokens`"]);
    names(sglang::tree_of_mask(Array2::default((0, 0)).view(), &[]), &["`mask`"]);

    let paths = |tokens: &[u32], paths: Array2<i64>| eagle::tree_of_paths(tokens, paths.view());
    names(paths(&[], Array2::zeros((0, 0))), &["`draft_tokens`"]);
    names(paths(&[7, 1], array![[1, 0]]), &["`retrieve_indices`", "[1, 0]"]);
    names(paths(&[7, 1], array![[0, -1, 1]]), &["`retrieve_indices`"]);
    names(paths(&[7, 1], array![[0, 2]]), &["2 is no node"]);
    names(paths(&[7, 1], array![[0, 0]]), &["0 is no node"]);
    names(paths(&[7, 1, 2], array![[0, 1, 2], [0, 2, -1]]), &["node 2 has two parents"]);
    names(paths(&[7, 1, 2], array![[0, 1, -1]]), &["node 2 has no parent"]);
    let tree = TokenTree::chain(&[1]).unwrap();
    let buffers = eagle::Buffers::from_tree(7, &tree, eagle::PathOrder::Leaf).unwrap();
    let accepted = Accepted { nodes: vec![3], tokens: vec![1, 2] };
    names(buffers.outcome(&accepted), &["`accepted`"]);
}
