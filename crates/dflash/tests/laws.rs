//! The output of each stochastic rule has the target's law: by enumeration of every decision, of
//! the drafter's draws and of the acceptance, in the shipped code.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;

use dflash::exact::{Outcomes, autoregressive, enumerate, extend, total_variation};
use dflash::{
    Choices, DrawnTree, Error, Law, Random, Sampling, Siblings, TokenTree, accept_drawn,
    accept_drawn_by, accept_matching, accept_matching_by,
};
use ndarray::{Array1, Array2};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// Total variation that is rounding.
const ROUNDING: f64 = 1e-12;

/// A law for every path, the same each time; some tokens have probability 0.
#[derive(Clone)]
struct Table {
    seed: u64,
    vocabulary: usize,
    zeros: bool,
}

impl Table {
    fn law(&self, path: &[u32]) -> Law {
        let hash = path.iter().fold(self.seed, |hash, &token| {
            hash.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(u64::from(token) + 1)
        });
        let mut rng = ChaCha8Rng::seed_from_u64(hash);
        let mut weights: Vec<f64> = (0..self.vocabulary)
            .map(|_| if self.zeros && rng.random_bool(0.4) { 0.0 } else { rng.random() })
            .collect();
        weights[rng.random_range(0..self.vocabulary)] += 0.2;
        let sum: f64 = weights.iter().sum();
        Law::from_probabilities(&weights.iter().map(|w| w / sum).collect::<Vec<_>>()).unwrap()
    }

    fn target(&self) -> impl FnMut(&[u32]) -> Result<Law, Error> + '_ {
        |path| Ok(self.law(path))
    }

    /// The law of the row of a tree.
    fn row<'a>(&'a self, tree: &'a TokenTree) -> impl FnMut(usize) -> Result<Law, Error> + 'a {
        |row| {
            let nodes = row.checked_sub(1).map_or_else(Vec::new, |node| tree.path(node));
            let path: Vec<u32> = nodes.iter().map(|&node| tree.tokens()[node]).collect();
            Ok(self.law(&path))
        }
    }
}

/// How far the law of `outcomes` is from that of `target` over `length` tokens.
fn distance(outcomes: &Outcomes<Vec<u32>>, length: usize, target: &Table) -> f64 {
    let got = extend(outcomes, length, target.target()).unwrap();
    total_variation(&got, &autoregressive(length, target.target()).unwrap())
}

#[test]
fn total_variation_counts_what_either_lacks() {
    let a = Outcomes::from([(1, 0.5), (2, 0.5)]);
    let b = Outcomes::from([(2, 0.25), (3, 0.75)]);
    assert_eq!((total_variation(&a, &b), total_variation(&b, &a)), (0.75, 0.75));
    assert_eq!(total_variation(&a, &a), 0.0);
}

/// Refuses whatever it may, and picks the likeliest.
struct Never;

impl Choices for Never {
    fn accept(&mut self, _: f64) -> bool {
        false
    }

    fn pick(&mut self, weights: &[f64]) -> usize {
        (0..weights.len()).max_by(|&a, &b| weights[a].total_cmp(&weights[b])).unwrap()
    }
}

/// Where the laws are equal nothing is left after a rejection: there was none, however the decision
/// was rounded.
#[test]
fn what_cannot_be_rejected_is_accepted() {
    let law = |_: &[u32]| Law::from_probabilities(&[0.25, 0.75]);
    let drawn = DrawnTree::draw(&[1, 1], Siblings::Distinct, 9, law, &mut Never).unwrap();
    let accepted = accept_drawn_by(&drawn, |_| law(&[]), &mut Never).unwrap();
    assert_eq!((accepted.nodes, accepted.tokens), (vec![0, 1], vec![1, 1, 1]));
}

/// The law of drawing a tree and accepting from it.
fn drawn_outcomes(
    widths: &[usize],
    siblings: Siblings,
    max_nodes: usize,
    (target, draft): (&Table, &Table),
) -> Outcomes<Vec<u32>> {
    enumerate(|choices| {
        let drawn = DrawnTree::draw(widths, siblings, max_nodes, draft.target(), choices)?;
        Ok(accept_drawn_by(&drawn, target.row(drawn.tree()), choices)?.tokens)
    })
    .unwrap()
}

fn tables(vocabulary: usize) -> Vec<(Table, Table)> {
    let table = |seed, zeros| Table { seed, vocabulary, zeros };
    vec![
        (table(1, false), table(2, false)),
        (table(3, true), table(4, false)),
        (table(5, false), table(6, true)),
        (table(7, true), table(8, true)),
        // The drafter is right.
        (table(9, true), table(9, true)),
    ]
}

#[test]
fn chain_rejection() {
    for vocabulary in [2, 3, 4] {
        for (target, draft) in tables(vocabulary) {
            for depth in 1..=3 {
                let widths = vec![1; depth];
                for siblings in [Siblings::Independent, Siblings::Distinct] {
                    let law = drawn_outcomes(&widths, siblings, 64, (&target, &draft));
                    let distance = distance(&law, depth + 1, &target);
                    assert!(distance < ROUNDING, "V {vocabulary}, depth {depth}: {distance:e}");
                }
            }
        }
    }
}

/// Leviathan et al., corollary 3.6: a draft is accepted with probability `sum min(p, q)`.
#[test]
fn chain_acceptance_rate() {
    for (target, draft) in tables(4) {
        let (p, q) = (target.law(&[]), draft.law(&[]));
        let want: f64 = (0..4).map(|t| p.probability(t).min(q.probability(t))).sum();
        let law = enumerate(|choices| {
            let drawn = DrawnTree::draw(&[1], Siblings::Independent, 1, draft.target(), choices)?;
            Ok(accept_drawn_by(&drawn, target.row(drawn.tree()), choices)?.nodes.len())
        })
        .unwrap();
        assert!((law.get(&1).copied().unwrap_or(0.0) - want).abs() < ROUNDING);
    }
}

#[test]
fn siblings_with_and_without_replacement() {
    for siblings in [Siblings::Independent, Siblings::Distinct] {
        for (vocabulary, widths) in [
            (3, &[2][..]),
            (3, &[3]),
            (4, &[4]),
            (5, &[3]),
            (3, &[2, 1]),
            (2, &[2, 2]),
            (3, &[1, 2]),
        ] {
            for (target, draft) in tables(vocabulary) {
                let law = drawn_outcomes(widths, siblings, 64, (&target, &draft));
                let distance = distance(&law, widths.len() + 1, &target);
                assert!(distance < ROUNDING, "{siblings:?} {vocabulary} {widths:?}: {distance:e}");
            }
        }
    }
}

/// A limit of nodes stops the drawing, and must not bend the law: it would if a token were drawn and
/// then found to be one too many.
#[test]
fn limited_trees() {
    for siblings in [Siblings::Independent, Siblings::Distinct] {
        for (target, draft) in tables(3) {
            for max_nodes in [0, 1, 2, 3] {
                let law = drawn_outcomes(&[2, 2], siblings, max_nodes, (&target, &draft));
                let distance = distance(&law, 3, &target);
                assert!(distance < ROUNDING, "{siblings:?} {max_nodes}: {distance:e}");
            }
        }
    }
}

#[test]
fn sample_and_match_on_any_tree() {
    let trees = [
        TokenTree::empty(),
        TokenTree::chain(&[2, 2, 0]).unwrap(),
        TokenTree::new(&[0, 1, 2], &[-1, -1, -1]).unwrap(),
        TokenTree::new(&[0, 1, 1, 2, 0, 1], &[-1, -1, 0, 1, 1, 3]).unwrap(),
    ];
    for tree in &trees {
        for (target, _) in tables(3) {
            let law =
                enumerate(
                    |choices| Ok(accept_matching_by(tree, target.row(tree), choices)?.tokens),
                )
                .unwrap();
            let distance = distance(&law, 4, &target);
            assert!(distance < ROUNDING, "{tree:?}: {distance:e}");
        }
    }
}

/// What these tests can see: mistakes that were made elsewhere move the law by far more than
/// rounding.
#[test]
fn wrong_rules_are_seen() {
    let (target, draft) = tables(5).remove(0);
    let law_of = |siblings, change: &dyn Fn(&DrawnTree) -> DrawnTree| {
        let law = enumerate(|choices| {
            let drawn = DrawnTree::draw(&[3], siblings, 9, draft.target(), choices)?;
            let drawn = change(&drawn);
            Ok(accept_drawn_by(&drawn, target.row(drawn.tree()), choices)?.tokens)
        });
        distance(&law.unwrap(), 1, &target)
    };
    let rebuild = |drawn: &DrawnTree, siblings, laws: Vec<Law>, repeats: bool| {
        let rows = 0..drawn.tree().rows();
        let draws = rows.map(|row| {
            let mut list = Vec::new();
            for &node in drawn.draws(row) {
                if repeats || !list.contains(&node) {
                    list.push(node);
                }
            }
            list
        });
        DrawnTree::from_draws(drawn.tree().clone(), siblings, laws, draws.collect()).unwrap()
    };
    let laws = |drawn: &DrawnTree| -> Vec<Law> {
        (0..drawn.tree().rows()).map(|row| drawn.law(row).unwrap().clone()).collect()
    };
    let (independent, distinct) = (Siblings::Independent, Siblings::Distinct);
    let same = law_of(independent, &|d| rebuild(d, independent, laws(d), true));
    assert!(same < ROUNDING, "{same:e}");
    // A token drawn twice counted once.
    let merged = law_of(independent, &|d| rebuild(d, independent, laws(d), false));
    assert!(merged > 1e-3, "{merged:e}");
    // Distinct draws judged as independent ones.
    let mixed = law_of(distinct, &|d| rebuild(d, independent, laws(d), true));
    assert!(mixed > 1e-3, "{mixed:e}");
    // The reverse is no mistake: the first appearances of independent draws are distinct draws.
    let first = law_of(independent, &|d| rebuild(d, distinct, laws(d), false));
    assert!(first < ROUNDING, "{first:e}");
    // The law of another position.
    let other = draft.law(&[1]);
    let shifted = law_of(independent, &|d| {
        let laws = vec![other.clone(); d.tree().rows()];
        rebuild(d, independent, laws, true)
    });
    assert!(shifted > 1e-3, "{shifted:e}");
    // Best tokens instead of drawn ones, judged as drawn.
    let greedy = enumerate(|choices| {
        let tree = TokenTree::new(&[0, 1], &[-1, -1])?;
        let laws = vec![draft.law(&[]), Law::default(), Law::default()];
        let draws = vec![vec![0, 1], Vec::new(), Vec::new()];
        let drawn = DrawnTree::from_draws(tree, Siblings::Distinct, laws, draws)?;
        Ok(accept_drawn_by(&drawn, target.row(drawn.tree()), choices)?.tokens)
    });
    assert!(distance(&greedy.unwrap(), 1, &target) > 1e-3);
}

/// Judged by its own row, not its parent's, a chain still looks right when every row has the same
/// law; a branching tree over a table does not.
#[test]
fn own_row_is_seen() {
    let (target, _) = tables(3).remove(0);
    let tree = TokenTree::new(&[0, 1, 1, 2], &[-1, -1, 0, 1]).unwrap();
    let law = enumerate(|choices| {
        let mut row_law = target.row(&tree);
        // The first child's row in place of the parent's.
        let own = |row: usize| row_law(tree.children(row).first().map_or(row, |&node| node + 1));
        Ok(accept_matching_by(&tree, own, choices)?.tokens)
    });
    assert!(distance(&law.unwrap(), 3, &target) > 1e-2);
}

/// With the same generator, sample and match gives the tokens of plain sampling, one by one.
#[test]
fn matching_takes_the_same_tokens_as_plain_sampling() {
    let vocabulary = 7;
    let sampling = Sampling { temperature: 0.8, top_p: Some(0.95), ..Sampling::default() };
    let logits = |context: &[u32]| -> Array1<f32> {
        let tail = &context[context.len().saturating_sub(3)..];
        let seed = tail.iter().fold(11_u64, |hash, &token| hash * 31 + u64::from(token));
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Array1::from_shape_fn(vocabulary, |_| 3.0 * rng.random::<f32>())
    };
    let mut plain = vec![1, 2, 3];
    let mut choices = Random(ChaCha8Rng::seed_from_u64(5));
    while plain.len() < 3000 {
        let law = Law::from_logits(logits(&plain).view(), 0, &sampling).unwrap();
        plain.push(law.draw(&mut choices).unwrap());
    }

    let mut text = vec![1, 2, 3];
    let mut choices = Random(ChaCha8Rng::seed_from_u64(5));
    let mut shapes = ChaCha8Rng::seed_from_u64(6);
    let mut accepted_nodes = 0;
    while text.len() < 3000 {
        let size = shapes.random_range(0..40);
        let tokens: Vec<u32> =
            (0..size).map(|_| shapes.random_range(0..vocabulary as u32)).collect();
        let parents: Vec<i64> = (0..size).map(|node| shapes.random_range(-1..node)).collect();
        let (tree, _) = TokenTree::merged(&tokens, &parents).unwrap();
        let mut rows = Array2::zeros((tree.rows(), vocabulary));
        for row in 0..tree.rows() {
            let nodes = row.checked_sub(1).map_or_else(Vec::new, |node| tree.path(node));
            let path = nodes.iter().map(|&node| tree.tokens()[node]);
            let context: Vec<u32> = text.iter().copied().chain(path).collect();
            rows.row_mut(row).assign(&logits(&context));
        }
        let accepted = accept_matching(&tree, rows.view(), &sampling, &mut choices).unwrap();
        accepted_nodes += accepted.nodes.len();
        text.extend(accepted.tokens);
    }
    assert!(accepted_nodes > 500, "only {accepted_nodes} drafts were accepted");
    assert_eq!(text[..3000], plain[..3000]);
}

/// The entry points over logits do what those over laws do.
#[test]
fn logits_and_laws_agree() {
    let sampling = Sampling { temperature: 1.7, top_k: Some(3), ..Sampling::default() };
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let draft = Table { seed: 2, vocabulary: 5, zeros: false };
    for seed in 0..50 {
        let [mut choices, mut other] = [seed; 2].map(|s| Random(ChaCha8Rng::seed_from_u64(s)));
        let drawn = [&mut choices, &mut other].map(|choices| {
            DrawnTree::draw(&[3, 2], Siblings::Distinct, 20, draft.target(), choices).unwrap()
        });
        let drawn = &drawn[0];
        let logits = Array2::from_shape_fn((drawn.tree().rows(), 5), |_| rng.random::<f64>() * 4.0);
        let law = |row: usize| Law::from_logits(logits.row(row), row, &sampling);
        let a = accept_drawn(drawn, logits.view(), &sampling, &mut choices).unwrap();
        assert_eq!(a, accept_drawn_by(drawn, law, &mut other).unwrap());
    }
}

#[test]
fn laws_of_logits() {
    let law = |logits: &[f32], sampling: &Sampling| {
        let law = Law::from_logits(Array1::from(logits.to_vec()).view(), 0, sampling).unwrap();
        assert!((law.probabilities().iter().sum::<f64>() - 1.0).abs() < 1e-15);
        law
    };
    let base = Sampling::default();
    let p = law(&[0.0, 1.0, 2.0, f32::NEG_INFINITY], &base);
    let z = 1.0 + 1_f64.exp() + 2_f64.exp();
    assert_eq!(p.tokens(), [0, 1, 2]);
    assert!((p.probability(1) - 1_f64.exp() / z).abs() < 1e-15);
    assert_eq!(p.probability(3), 0.0);
    // Ties at a cut: lower ids stay.
    let ties = [1.0, 2.0, 1.0, 1.0];
    assert_eq!(law(&ties, &Sampling { top_k: Some(2), ..base }).tokens(), [0, 1]);
    assert_eq!(law(&ties, &Sampling { top_k: Some(9), ..base }).tokens(), [0, 1, 2, 3]);
    // 0.475 + 0.175 reaches 0.5.
    assert_eq!(law(&ties, &Sampling { top_p: Some(0.5), ..base }).tokens(), [0, 1]);
    assert_eq!(law(&ties, &Sampling { top_p: Some(1e-9), ..base }).tokens(), [1]);
    assert_eq!(law(&ties, &Sampling { min_p: Some(0.4), ..base }).tokens(), [1]);
    assert_eq!(law(&ties, &Sampling { min_p: Some(0.3), ..base }).tokens(), [0, 1, 2, 3]);
    let cold = law(&ties, &Sampling { temperature: 1e-3, ..base });
    assert_eq!((cold.tokens(), cold.probabilities()), (&[1][..], &[1.0][..]));
    let infinite = law(&[0.0, f32::INFINITY, f32::INFINITY], &base);
    assert_eq!((infinite.tokens(), infinite.probabilities()), (&[1, 2][..], &[0.5, 0.5][..]));
}

/// `Random` follows its weights, and enumeration visits what it can take, and nothing else.
#[test]
fn choices() {
    let mut random = Random(ChaCha8Rng::seed_from_u64(1));
    let weights = [0.0, 1.0, 0.0, 3.0, 0.0];
    let mut counts = BTreeMap::new();
    for _ in 0..40_000 {
        *counts.entry(random.pick(&weights)).or_insert(0) += 1;
    }
    assert_eq!(counts.keys().copied().collect::<Vec<_>>(), [1, 3]);
    assert!((9_500..10_500).contains(&counts[&1]), "{counts:?}");
    assert!((0..1000).all(|_| random.accept(1.0) && random.accept(1.5) && !random.accept(0.0)));
    let law = enumerate(|choices| {
        let first = choices.pick(&weights);
        Ok((first, first == 3 && choices.accept(0.25), choices.accept(2.0)))
    });
    let want = [((1, false, true), 0.25), ((3, false, true), 0.5625), ((3, true, true), 0.1875)];
    assert_eq!(law.unwrap().into_iter().collect::<Vec<_>>(), want);
    // Without anything to choose from, the first.
    for nothing in [&[][..], &[0.0, 0.0]] {
        assert_eq!(random.pick(nothing), 0);
        let law = enumerate(|choices| Ok(choices.pick(nothing))).unwrap();
        assert_eq!(law.into_iter().collect::<Vec<_>>(), [(0, 1.0)]);
    }
}
