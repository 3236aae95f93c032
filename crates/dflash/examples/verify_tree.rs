//! A tree from a drafter's log-probabilities, its mask, and its verification: `cargo run --release
//! -p dflash --example verify_tree`.

use dflash::{CostCurve, TokenTree, accept_greedy, best_first, build_tree_mask, choose_budget};
use ndarray::Array2;

fn main() -> Result<(), dflash::Error> {
    let words = ["the", "cat", "sat", "on", "mat", "."];
    // A drafter's opinion of the next four tokens, all at once, as a block-diffusion model has it.
    let draft = [
        [0.05, 0.60, 0.20, 0.05, 0.05, 0.05],
        [0.05, 0.05, 0.70, 0.10, 0.05, 0.05],
        [0.05, 0.05, 0.05, 0.55, 0.10, 0.20],
        [0.70, 0.05, 0.05, 0.05, 0.10, 0.05],
    ];
    let log_probabilities = Array2::from_shape_fn((4, 6), |(d, v)| f64::ln(draft[d][v]));
    let scored = best_first(log_probabilities.view(), 12)?;

    // Passes of up to 8 rows cost about the same on this imagined machine.
    let curve = CostCurve::new(&[(1, 10e-3), (8, 11e-3), (16, 16e-3)])?;
    let budget = choose_budget(&scored, &curve, 1e-3)?;
    println!(
        "{} of {} nodes are worth verifying: {:.2} tokens a cycle, {:.0} a second",
        budget.nodes,
        scored.tree.len(),
        budget.expected_tokens,
        budget.tokens_per_second,
    );
    let tree = scored.prefix(budget.nodes)?.tree;
    show(&tree, &words, 0);

    println!("\nthe mask, behind a prompt of two tokens:");
    for row in build_tree_mask(&tree, 2)?.rows() {
        println!(
            "  {}",
            row.iter().map(|&seen| if seen { " x" } else { " ." }).collect::<String>()
        );
    }

    // The target goes on with "cat sat .", whatever comes before.
    let next = |path: &[u32]| [1, 2, 5, 0][path.len().min(3)];
    let logits = Array2::from_shape_fn((tree.rows(), words.len()), |(row, token)| {
        let nodes = row.checked_sub(1).map_or_else(Vec::new, |node| tree.path(node));
        let path: Vec<u32> = nodes.iter().map(|&node| tree.tokens()[node]).collect();
        f32::from(u8::from(next(&path) == token))
    });
    let accepted = accept_greedy(&tree, logits.view())?;
    let text: Vec<_> = accepted.tokens.iter().map(|&token| words[token as usize]).collect();
    println!("\naccepted nodes {:?}; text: {}", accepted.nodes, text.join(" "));
    Ok(())
}

fn show(tree: &TokenTree, words: &[&str], row: usize) {
    for &node in tree.children(row) {
        let indent = "  ".repeat(tree.depths()[node]);
        println!("{indent}{node}: {}", words[tree.tokens()[node] as usize]);
        show(tree, words, TokenTree::row_of(node));
    }
}
