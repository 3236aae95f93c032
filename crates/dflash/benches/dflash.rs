//! What verification costs beside plain decoding, as ratios of alternating runs; then the
//! bookkeeping piece by piece: `<what>/<case>`.

use std::hint::black_box;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion};
use dflash::{TokenTree, accept_greedy, argmax, best_first_logits};
use kvcache::{Cache, Config, Layout, Options, Queries, SeqId, Workspace};
use ndarray::{Array1, Array2, Array3};
use tensor_utils::testing::Seeded;

const VOCABULARY: usize = 50257;
const NODES: usize = 64;
const TOKENS: usize = 4096;
const HEADS: usize = 32;
const KEY_HEADS: usize = 8;
const HEAD_SIZE: usize = 128;
/// Enough that the caches of the processor do not hold the keys and values of a step until the next one, as
/// in a model; one layer's may stay there.
const LAYERS: usize = 8;

fn main() {
    // `--test` runs everything once.
    let pairs = if std::env::args().any(|arg| arg == "--test") { 1 } else { 15 };
    println!("{TOKENS} tokens, {HEADS} heads on {KEY_HEADS}, head size {HEAD_SIZE}, f32:");
    for layers in [1, LAYERS] {
        ratios(layers, pairs);
    }
    println!();
    let mut criterion = Criterion::default().configure_from_args();
    verification(&mut criterion);
    pieces(&mut criterion);
    criterion.final_summary();
}

/// Two children for each node.
fn binary_tree() -> (Vec<u32>, Vec<i64>) {
    let parents = (0..NODES as i64).map(|node| if node < 2 { -1 } else { node / 2 - 1 });
    ((0..NODES as u32).collect(), parents.collect())
}

/// Logits by which the deepest node is accepted.
fn accepting_logits(tree: &TokenTree) -> Array2<f32> {
    let mut logits: Array2<f32> = Seeded::new(2).normal((tree.rows(), VOCABULARY));
    for node in 0..tree.len() {
        let row = (tree.parents()[node] + 1) as usize;
        logits[[row, tree.tokens()[node] as usize]] = 100.0 + node as f32;
    }
    logits
}

/// The attention of a model with 32 query heads on 8 key heads of size 128, after 4,096 tokens.
struct Attention {
    cache: Cache,
    seq: SeqId,
    q: Array3<f32>,
    k: Array3<f32>,
    v: Array3<f32>,
    o: Array3<f32>,
    lse: Array2<f32>,
    workspace: Workspace,
}

impl Attention {
    fn new(layers: usize) -> Self {
        let layout = Layout::Paged { pages: 80 };
        let config = Config::new(layers, KEY_HEADS, HEAD_SIZE).with_layout(layout);
        let mut cache = Cache::new(&config).expect("a cache");
        let seq = cache.create().expect("a sequence");
        let mut seeded = Seeded::new(1);
        let mut rows = |n, heads| seeded.normal::<f32, _>((n, heads, HEAD_SIZE));
        let (k, v) = (rows(TOKENS, KEY_HEADS), rows(TOKENS, KEY_HEADS));
        for layer in 0..layers {
            cache.append(layer, seq, k.view(), v.view()).expect("room");
        }
        let (q, k, v) = (rows(NODES, HEADS), rows(NODES, KEY_HEADS), rows(NODES, KEY_HEADS));
        let (o, lse) = (Array3::zeros(q.dim()), Array2::zeros((NODES, HEADS)));
        Self { cache, seq, q, k, v, o, lse, workspace: Workspace::new() }
    }

    /// Appends rows `from..to` and attends, layer after layer.
    fn attend(&mut self, from: usize, to: usize, queries: &Queries<'_>) {
        let Self { cache, seq, q, k, v, o, lse, workspace } = self;
        let rows = || (from..to).into();
        let axis = ndarray::Axis(0);
        let (k, v) = (k.slice_axis(axis, rows()), v.slice_axis(axis, rows()));
        let q = q.slice_axis(axis, rows());
        for layer in 0..cache.config().layers {
            cache.append(layer, *seq, k, v).expect("room");
            let (o, lse) = (o.slice_axis_mut(axis, rows()), lse.slice_axis_mut(axis, rows()));
            cache
                .attend_into(o, lse, layer, q, &[*queries], &Options::default(), workspace)
                .expect("arguments fit");
        }
    }

    /// All nodes at once, then back.
    fn verify(&mut self, parents: &[i64]) {
        self.attend(0, NODES, &Queries::tree(self.seq, parents));
        self.cache.truncate(self.seq, TOKENS).expect("rows of the last append");
    }

    /// `steps` tokens, one after the other, then back.
    fn decode(&mut self, steps: usize) {
        for step in 0..steps {
            self.attend(step, step + 1, &Queries::last(self.seq, 1));
        }
        self.cache.truncate(self.seq, TOKENS).expect("rows of the last appends");
    }

    /// The tree's rows, and the cache without the rejected ones.
    fn append_and_compact(&mut self, kept: &[usize]) -> f64 {
        let Self { cache, seq, k, v, .. } = self;
        for layer in 0..cache.config().layers {
            cache.append(layer, *seq, k.view(), v.view()).expect("room");
        }
        let seconds = time(|| cache.compact(*seq, TOKENS, kept).expect("rows of the tree"));
        cache.truncate(*seq, TOKENS).expect("rows of the last append");
        seconds
    }
}

fn time(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Prints what a pass over all layers takes, by the layer, and what the tree costs around it.
fn ratios(layers: usize, pairs: usize) {
    let mut attention = Attention::new(layers);
    let (tokens, parents) = binary_tree();
    let tree = TokenTree::new(&tokens, &parents).expect("a tree");
    let model_output = accepting_logits(&tree);
    let mut logits = model_output.clone();
    let accepted = accept_greedy(&tree, logits.view()).expect("logits fit");
    attention.verify(&parents);
    attention.decode(1);

    let (mut verify, mut decode, mut books) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..pairs {
        verify.push(time(|| attention.verify(&parents)));
        decode.push(time(|| attention.decode(NODES)) / NODES as f64);
        // Logits come from the model, so they have just been written.
        logits.assign(&model_output);
        let tree_and_path = time(|| {
            let tree = TokenTree::new(black_box(&tokens), &parents).expect("a tree");
            black_box((tree.pass_parents(), tree.positions(TOKENS), tree.ancestors().ok()));
            black_box(accept_greedy(&tree, logits.view()).expect("logits fit"));
        });
        books.push(tree_and_path + attention.append_and_compact(&accepted.nodes));
    }
    let speedup: Vec<f64> =
        verify.iter().zip(&decode).map(|(verify, decode)| NODES as f64 * decode / verify).collect();
    let share: Vec<f64> = books.iter().zip(&decode).map(|(books, decode)| books / decode).collect();
    let of_a_layer = |seconds| median(seconds) / layers as f64 * 1e6;
    let bookkeeping = median(books) * 1e6;
    println!("{layers} {}:", if layers == 1 { "layer" } else { "layers in turn" });
    println!("  decode one token         {:9.1} us a layer", of_a_layer(decode));
    println!("  verify {NODES} nodes at once  {:9.1} us a layer", of_a_layer(verify));
    println!("  {NODES} decode steps over one verification: {:.1}", median(speedup));
    println!("  bookkeeping of {NODES} nodes, vocabulary {VOCABULARY} (tree, mask, positions,");
    println!(
        "  acceptance of {} nodes, compaction): {bookkeeping:.1} us, {:.1} % of a step's attention",
        accepted.nodes.len(),
        100.0 * median(share)
    );
}

/// Ways to get the logits of 64 drafted tokens, one layer: `verification/<way>/64 nodes over 4096`.
fn verification(c: &mut Criterion) {
    let mut attention = Attention::new(1);
    let chain: Vec<i64> = (-1..NODES as i64 - 1).collect();
    let (_, tree) = binary_tree();
    let mut group = c.benchmark_group("verification");
    let label = format!("{NODES} nodes over {TOKENS}");
    for (name, parents) in [("tree", &tree), ("chain", &chain)] {
        group.bench_function(BenchmarkId::new(name, &label), |bencher| {
            bencher.iter(|| attention.verify(parents));
        });
    }
    group.bench_function(BenchmarkId::new("one token at a time", &label), |bencher| {
        bencher.iter(|| attention.decode(NODES));
    });
    group.finish();
}

fn pieces(c: &mut Criterion) {
    let row: Array1<f32> = Seeded::new(1).normal(VOCABULARY);
    c.bench_function("argmax/50257", |bencher| bencher.iter(|| argmax(black_box(row.view()), 0)));

    let chain: Vec<i64> = (-1..NODES as i64 - 1).collect();
    let (tokens, binary) = binary_tree();
    for (name, parents) in [("binary", &binary), ("chain", &chain)] {
        c.bench_function(&format!("tree/{name}"), |bencher| {
            bencher.iter(|| {
                let tree = TokenTree::new(black_box(&tokens), parents).expect("a tree");
                (tree.ancestors().expect("a tree"), tree.positions(TOKENS), tree)
            });
        });
        let tree = TokenTree::new(&tokens, parents).expect("a tree");
        let logits = accepting_logits(&tree);
        c.bench_function(&format!("accept/{name}"), |bencher| {
            bencher.iter(|| accept_greedy(&tree, black_box(logits.view())).expect("logits fit"));
        });
    }
    let draft: Array2<f32> = Seeded::new(3).normal((16, VOCABULARY));
    c.bench_function("best_first/64", |bencher| {
        bencher.iter(|| best_first_logits(black_box(draft.view()), NODES).expect("a tree"));
    });
}
