//! Token trees: any tokens, parents, links, masks, paths and logits.

#![no_main]

use arbitrary::{Result, Unstructured};
use dflash::formats::{eagle, sglang};
use dflash::{
    TokenTree, accept_greedy, accept_greedy_reference, best_first, best_first_by,
    best_first_logits, build_tree_mask, tree_mask_reference,
};
use libfuzzer_sys::fuzz_target;
use ndarray::Array2;

fuzz_target!(|bytes: &[u8]| {
    let _ = run(&mut Unstructured::new(bytes));
});

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    match u.int_in_range(0..=5)? {
        0 => trees(u),
        1 => {
            let rows = u.int_in_range(0..=6)?;
            let trees = sglang::Trees {
                candidates: links(u, rows)?,
                retrieve_index: links(u, rows)?,
                retrieve_next_token: links(u, rows)?,
                retrieve_next_sibling: links(u, rows)?,
            };
            // Without rows there is nothing to tell the width by.
            if let Ok(found) = trees.to_trees()
                && !found.is_empty()
            {
                let (roots, found): (Vec<_>, Vec<_>) = found.into_iter().unzip();
                let again = sglang::Trees::from_trees(&roots, &found).expect("trees of one size");
                assert_eq!(again.candidates, trees.candidates);
            }
            Ok(())
        }
        2 => {
            let tokens: Vec<u32> = u.arbitrary()?;
            let width = u.int_in_range(0..=6)?;
            if let Ok(tree) = eagle::tree_of_paths(&tokens, links(u, width)?.view()) {
                let root = tokens[0];
                let buffers = eagle::Buffers::from_tree(root, &tree, eagle::PathOrder::Path).unwrap();
                assert_eq!(buffers.to_tree().expect("its own buffers"), (root, tree));
            }
            let choices: Vec<Vec<usize>> = u.arbitrary()?;
            let choices: Vec<&[usize]> = choices.iter().map(Vec::as_slice).collect();
            let _ = eagle::tree_of_choices(&choices, |path| path.len() as u32);
            Ok(())
        }
        3 => {
            let size = u.int_in_range(0..=9)?;
            let rows = if u.ratio(7, 8)? { size } else { 2 };
            let mask = array(u, rows, size, |u| u.arbitrary::<bool>())?;
            let tokens: Vec<u32> = (0..size.saturating_sub(1) as u32).collect();
            if let Ok(tree) = sglang::tree_of_mask(mask.view(), &tokens) {
                assert_eq!(sglang::tree_mask(&tree).unwrap(), mask);
            }
            Ok(())
        }
        4 => {
            let (list, selected) = (links(u, 6)?, links(u, 6)?);
            let selected: Vec<i64> = selected.into_iter().collect();
            let tokens = vec![0; selected.len()];
            let list: Vec<i64> = list.into_iter().collect();
            let topk = u.int_in_range(0..=4)?;
            let _ = sglang::tree_of_selection(&list, &selected, &tokens, topk);
            Ok(())
        }
        _ => drafts(u),
    }
}

/// A tree, its mask, and greedy acceptance beside the oracle.
fn trees(u: &mut Unstructured<'_>) -> Result<()> {
    let nodes = u.int_in_range(0..=40_usize)?;
    let vocabulary = u.int_in_range(0..=5_usize)?;
    let mut parents = Vec::new();
    for node in 0..nodes as i64 {
        parents.push(if u.ratio(63, 64)? {
            u.int_in_range(-1..=node - 1)?
        } else {
            u.arbitrary()?
        });
    }
    let token = |u: &mut Unstructured<'_>| {
        if u.ratio(63, 64)? { u.int_in_range(0..=5) } else { u.arbitrary() }
    };
    let tokens = (0..nodes).map(|_| token(u)).collect::<Result<Vec<u32>>>()?;
    let _ = TokenTree::new(&tokens, &parents);
    let Ok((tree, became)) = TokenTree::merged(&tokens, &parents) else { return Ok(()) };
    assert_eq!(became.len(), nodes);
    let prompt = u.int_in_range(0..=3)?;
    let mask = build_tree_mask(&tree, prompt).expect("a small mask");
    assert_eq!(mask, tree_mask_reference(tree.parents(), prompt));
    let _ = tree.children(u.arbitrary()?);
    let _ = tree.path(u.arbitrary()?);
    let _ = tree.positions(u.arbitrary()?);
    let rows = if u.ratio(15, 16)? { tree.rows() } else { u.int_in_range(0..=9)? };
    let logits = array(u, rows, vocabulary, logit)?;
    let got = accept_greedy(&tree, logits.view());
    // The oracle reads rows off the path too, where a NaN is no error.
    match accept_greedy_reference(tree.tokens(), tree.parents(), logits.view()) {
        Ok(want) => assert_eq!(got.expect("what the oracle accepts"), want),
        Err(_) if logits.iter().any(|x| x.is_nan()) => {}
        Err(_) => assert!(got.is_err()),
    }
    Ok(())
}

/// Drafts from any probabilities.
fn drafts(u: &mut Unstructured<'_>) -> Result<()> {
    let budget = u.int_in_range(0..=70)?;
    let (rows, columns) = (u.int_in_range(0..=5)?, u.int_in_range(0..=5)?);
    let table = array(u, rows, columns, logit)?;
    for scored in [best_first(table.view(), budget), best_first_logits(table.view(), budget)] {
        let Ok(scored) = scored else { continue };
        assert!(scored.tree.len() <= budget);
        assert!(scored.log_probabilities.is_sorted_by(|a, b| a >= b));
    }
    let mut lists = Vec::new();
    for _ in 0..3 {
        let pair = |u: &mut Unstructured<'_>| Ok((u.int_in_range(0..=5)?, logit(u)?));
        lists.push((0..u.int_in_range(0..=5)?).map(|_| pair(u)).collect::<Result<Vec<_>>>()?);
    }
    let _ = best_first_by(budget, |path| Ok(lists[path.len() % 3].clone()));
    Ok(())
}

/// Links of a few nodes, mostly within range.
fn links(u: &mut Unstructured<'_>, columns: usize) -> Result<Array2<i64>> {
    let rows = u.int_in_range(0..=3)?;
    array(
        u,
        rows,
        columns,
        |u| {
            if u.ratio(31, 32)? { u.int_in_range(-1..=6) } else { u.arbitrary() }
        },
    )
}

/// Small numbers with ties, and now and then anything.
fn logit(u: &mut Unstructured<'_>) -> Result<f64> {
    if u.ratio(31, 32)? { Ok(f64::from(u.int_in_range(-3..=0_i8)?)) } else { u.arbitrary() }
}

fn array<T>(
    u: &mut Unstructured<'_>,
    rows: usize,
    columns: usize,
    mut element: impl FnMut(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Array2<T>> {
    let elements = (0..rows * columns).map(|_| element(u)).collect::<Result<Vec<_>>>()?;
    Ok(Array2::from_shape_vec((rows, columns), elements).expect("as many as the shape says"))
}
