//! Gradients against finite differences, in f64: every operation, and the whole model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use ndarray::{Array1, Array2, ArrayView2};
use tensor_utils::testing::{GradCheck, Seeded};
use ternary_train::ops::{
    Attention, CrossEntropy, Direction, Norm, Product, Rope, Term, attention, attention_backward,
    cross_entropy, embed, embed_backward, products, rms_norm, rms_norm_backward, rotate, swiglu,
    swiglu_backward,
};
use ternary_train::{Config, Model, Preset, View};

fn random(len: usize, seed: u64) -> Array1<f64> {
    Seeded::new(seed).normal(len)
}

/// The function whose gradient is checked: a weighted sum of all outputs.
fn dot(x: &[f64], w: &Array1<f64>) -> f64 {
    assert_eq!(x.len(), w.len());
    x.iter().zip(w).map(|(x, w)| x * w).sum()
}

fn view(x: &Array1<f64>, columns: usize) -> ArrayView2<'_, f64> {
    x.view().into_shape_with_order((x.len() / columns, columns)).unwrap()
}

fn product(rows: usize, columns: usize, term: Term<'_, f64>) -> Vec<f64> {
    let mut c = Array2::from_elem((rows, columns), f64::NAN);
    let term = match &term {
        Term::Nt(a, b) => Term::Nt(a.view(), b.view()),
        Term::Nn(a, b) => Term::Nn(a.view(), b.view()),
        Term::Tn(a, b) => Term::Tn(a.view(), b.view()),
    };
    products(vec![Product { c: c.view_mut(), terms: vec![term], add: false }]).unwrap();
    c.into_raw_vec_and_offset().0
}

#[test]
fn linear() {
    let (t, n, k) = (7, 5, 6);
    let (x, w, dy) = (random(t * k, 1), random(n * k, 2), random(t * n, 3));
    let forward = |x: &Array1<f64>, w: &Array1<f64>| {
        dot(&product(t, n, Term::Nt(view(x, k), view(w, k))), &dy)
    };
    let dx = Array1::from(product(t, k, Term::Nn(view(&dy, n), view(&w, k))));
    let dw = Array1::from(product(n, k, Term::Tn(view(&dy, n), view(&x, k))));
    GradCheck::default().check(|x| forward(x, &w), &x, &dx).unwrap();
    GradCheck::default().check(|w| forward(&x, w), &w, &dw).unwrap();
}

#[test]
fn embedding() {
    let (vocabulary, width, tokens) = (5, 3, [4, 0, 4, 2]);
    let (table, dx) = (random(vocabulary * width, 1), random(tokens.len() * width, 2));
    let forward = |table: &Array1<f64>| {
        let mut x = vec![f64::NAN; tokens.len() * width];
        embed(&mut x, table.as_slice().unwrap(), &tokens, width).unwrap();
        dot(&x, &dx)
    };
    let mut d_table = Array1::zeros(table.len());
    embed_backward(d_table.as_slice_mut().unwrap(), dx.as_slice().unwrap(), &tokens, width)
        .unwrap();
    GradCheck::default().check(forward, &table, &d_table).unwrap();
}

#[test]
fn norm_with_a_residual() {
    let (rows, width) = (4, 6);
    let (x, weight, dy) = (random(rows * width, 1), random(width, 2), random(rows * width, 3));
    let residual = random(rows * width, 4);
    let mut norm = Norm::new(rows, width, 1e-6).unwrap();
    let mut rstd = vec![0.0; rows];
    let mut forward = |x: &Array1<f64>, weight: &Array1<f64>| {
        let mut y = vec![f64::NAN; rows * width];
        let (x, weight) = (x.as_slice().unwrap(), weight.as_slice().unwrap());
        rms_norm(&mut y, &mut rstd, x, weight, &mut norm).unwrap();
        // The stream goes on past the norm.
        dot(&y, &dy) + dot(x, &residual)
    };
    forward(&x, &weight);
    GradCheck::default()
        .check(|x| forward(x, &weight), &x, &{
            let (dx, _) = norm_gradients(&x, &weight, &dy, &residual, width);
            dx
        })
        .unwrap();
    let (_, d_weight) = norm_gradients(&x, &weight, &dy, &residual, width);
    GradCheck::default().check(|weight| forward(&x, weight), &weight, &d_weight).unwrap();
}

fn norm_gradients(
    x: &Array1<f64>,
    weight: &Array1<f64>,
    dy: &Array1<f64>,
    residual: &Array1<f64>,
    width: usize,
) -> (Array1<f64>, Array1<f64>) {
    let rows = x.len() / width;
    let mut norm = Norm::new(rows, width, 1e-6).unwrap();
    let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; rows]);
    let (x, weight) = (x.as_slice().unwrap(), weight.as_slice().unwrap());
    rms_norm(&mut y, &mut rstd, x, weight, &mut norm).unwrap();
    let (mut dx, mut d_weight) = (vec![f64::NAN; x.len()], vec![0.0; width]);
    rms_norm_backward(
        &mut dx,
        &mut d_weight,
        dy.as_slice().unwrap(),
        residual.as_slice(),
        x,
        &rstd,
        weight,
        &mut norm,
    )
    .unwrap();
    (Array1::from(dx), Array1::from(d_weight))
}

#[test]
fn rotation() {
    let (heads, size, length) = (2, 6, 3);
    let rope = Rope::new(size, 100.0, length);
    let (x, dy) = (random(2 * length * heads * size, 1), random(2 * length * heads * size, 2));
    let turn = |x: &Array1<f64>, direction| {
        let mut y = x.to_vec();
        rotate(&mut y, heads, size, length, &rope, direction).unwrap();
        y
    };
    let dx = Array1::from(turn(&dy, Direction::Backward));
    GradCheck::default().check(|x| dot(&turn(x, Direction::Forward), &dy), &x, &dx).unwrap();

    // Positions begin anew with each sequence, however many the table has.
    let longer = Rope::new(size, 100.0, 2 * length);
    let mut y = x.to_vec();
    rotate(&mut y, heads, size, length, &longer, Direction::Forward).unwrap();
    assert_eq!(y, turn(&x, Direction::Forward));
}

#[test]
fn gated_unit() {
    let (gate, up, dh) = (random(37, 1), random(37, 2), random(37, 3));
    let forward = |gate: &Array1<f64>, up: &Array1<f64>| {
        let mut h = vec![f64::NAN; 37];
        swiglu(&mut h, gate.as_slice().unwrap(), up.as_slice().unwrap()).unwrap();
        dot(&h, &dh)
    };
    let (mut d_gate, mut d_up) = (vec![0.0; 37], vec![0.0; 37]);
    let [gates, ups, dhs] = [&gate, &up, &dh].map(|x| x.as_slice().unwrap());
    swiglu_backward(&mut d_gate, &mut d_up, dhs, gates, ups).unwrap();
    GradCheck::default().check(|gate| forward(gate, &up), &gate, &Array1::from(d_gate)).unwrap();
    GradCheck::default().check(|up| forward(&gate, up), &up, &Array1::from(d_up)).unwrap();
}

#[test]
fn causal_attention() {
    let (sequences, length, heads, key_heads, size) = (2, 5, 4, 2, 3);
    let tokens = sequences * length;
    let mut sizes = Attention::new(sequences, length, heads, key_heads, size).unwrap();
    let (q, k) = (random(tokens * heads * size, 1), random(tokens * key_heads * size, 2));
    let (v, d_o) = (random(tokens * key_heads * size, 3), random(tokens * heads * size, 4));
    let [qs, ks, vs, d_os] = [&q, &k, &v, &d_o].map(|x| x.as_slice().unwrap());
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![0.0; tokens * heads]);
    attention(&mut o, &mut lse, qs, ks, vs, &mut sizes).unwrap();
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let gradients = [&mut dq[..], &mut dk, &mut dv];
    attention_backward(gradients, d_os, [qs, ks, vs], &o, &lse, &mut sizes).unwrap();
    let mut forward = |q: &Array1<f64>, k: &Array1<f64>, v: &Array1<f64>| {
        let [q, k, v] = [q, k, v].map(|x| x.as_slice().unwrap());
        attention(&mut o, &mut lse, q, k, v, &mut sizes).unwrap();
        dot(&o, &d_o)
    };
    GradCheck::default().check(|q| forward(q, &k, &v), &q, &Array1::from(dq)).unwrap();
    GradCheck::default().check(|k| forward(&q, k, &v), &k, &Array1::from(dk)).unwrap();
    GradCheck::default().check(|v| forward(&q, &k, v), &v, &Array1::from(dv)).unwrap();
}

#[test]
fn fused_cross_entropy() {
    let (vocabulary, width, targets) = (21, 4, [3, 20, 0, 3, 7]);
    let (x, head) = (random(targets.len() * width, 1), random(vocabulary * width, 2));
    let mut losses = vec![0.0; targets.len()];
    let (mut dx, mut d_head) = (vec![0.0; x.len()], vec![0.0; head.len()]);
    let gradients = CrossEntropy { dx: &mut dx, d_head: &mut d_head, scale: 0.5 };
    let (xs, heads) = (x.as_slice().unwrap(), head.as_slice().unwrap());
    cross_entropy(&mut losses, xs, heads, &targets, width, Some(gradients)).unwrap();
    let mut forward = |x: &Array1<f64>, head: &Array1<f64>| {
        let (x, head) = (x.as_slice().unwrap(), head.as_slice().unwrap());
        cross_entropy(&mut losses, x, head, &targets, width, None).unwrap();
        0.5 * losses.iter().sum::<f64>()
    };
    GradCheck::default().check(|x| forward(x, &head), &x, &Array1::from(dx)).unwrap();
    GradCheck::default().check(|head| forward(&x, head), &head, &Array1::from(d_head)).unwrap();
}

fn check_model(config: &Config) {
    let (sequences, length) = (2, 5);
    let mut model = Model::<f64>::new(config, sequences, length, false).unwrap();
    let layout = model.layout().clone();
    let mut weights = random(layout.matrices + layout.norms, 7) * 0.4;
    weights.iter_mut().skip(layout.matrices).for_each(|norm| *norm += 1.0);
    let ids: Vec<u32> = (0..10).map(|i| (i * 7 + i * i) % config.vocab_size as u32).collect();
    let targets: Vec<u32> = ids.iter().map(|&id| (id * 3 + 1) % config.vocab_size as u32).collect();
    let mut gradients = vec![0.0; weights.len()];
    fn split(all: &Array1<f64>, at: usize) -> View<'_, f64> {
        let (matrices, norms) = all.as_slice().unwrap().split_at(at);
        View { matrices, norms }
    }
    let at = layout.matrices;
    let loss =
        model.loss_and_gradients(split(&weights, at), &ids, &targets, 0.1, &mut gradients).unwrap();
    assert_eq!(loss, model.loss(split(&weights, at), &ids, &targets).unwrap());
    let function = |w: &Array1<f64>| 0.1 * model.loss(split(w, at), &ids, &targets).unwrap().sum;
    GradCheck { max_elements: 400, ..GradCheck::default() }
        .check(function, &weights, &Array1::from(gradients))
        .unwrap();
}

#[test]
fn whole_model() {
    let small = Config {
        hidden_size: 6,
        intermediate_size: 10,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        ..Preset::Nano.config(11)
    };
    check_model(&small);
    check_model(&Config { tie_word_embeddings: false, ..small });
}
