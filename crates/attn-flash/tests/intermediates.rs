//! The states in between: what the recurrence promises of them, and that its factor is
//! `exp(m_old - m_new)` and not the inverse.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;

use attn_flash::{
    Attention, Observer, Options, Step, Tiling, Workspace, attention_observed, attention_reference,
};
use common::{Broadcast, Features, Setting, Sizes};
use ndarray::{Array3, Array4, ArrayView2, ArrayView4, Axis};
use tensor_utils::testing::{Seeded, isas};
use tensor_utils::{Float, Isa};

/// Keys between two steps.
const BLOCK: usize = 32;

/// A [`Step`] of one row that owns its sums.
#[derive(Debug)]
struct State {
    isa: Isa,
    keys_end: usize,
    correction: f64,
    m: f64,
    l: f64,
    o: Vec<f64>,
}

/// The states of each row (batch entry, head, query), in order.
#[derive(Debug, Default)]
struct Recorder(Mutex<BTreeMap<(usize, usize, usize), Vec<State>>>);

impl<A: Float> Observer<A> for Recorder {
    fn step(&self, step: &Step<'_, A>) {
        let state = State {
            isa: step.isa,
            keys_end: step.keys_end,
            correction: step.correction.to_f64(),
            m: step.m.to_f64(),
            l: step.l.to_f64(),
            o: step.o.iter().map(|x| x.to_f64()).collect(),
        };
        let mut rows = self.0.lock().unwrap();
        rows.entry((step.batch, step.head, step.query)).or_default().push(state);
    }
}

/// Scores `s[j]` for every query, as a call with head size 1, `q = 1` and `k = s`.
fn inputs(scores: &[f32], n: usize, e: usize) -> [Array4<f32>; 3] {
    let k = Array4::from_shape_fn((1, 1, scores.len(), 1), |(_, _, j, _)| scores[j]);
    [Array4::ones((1, 1, n, 1)), k, Seeded::new(1).normal((1, 1, scores.len(), e))]
}

/// The state that the definition gives a row that has seen some keys and the sink.
struct Definition {
    terms: usize,
    m: f64,
    l: f64,
    o: Vec<f64>,
    largest_value: f64,
}

impl Definition {
    fn new(keys: &[usize], scores: &[f32], values: ArrayView2<'_, f32>, sink: f64) -> Self {
        let score = |j: usize| f64::from(scores[j]);
        let m = keys.iter().map(|&j| score(j)).fold(sink, f64::max);
        let weight = |s: f64| if m == f64::NEG_INFINITY { 0.0 } else { (s - m).exp() };
        let mut o = vec![0.0; values.ncols()];
        let mut largest_value: f64 = 0.0;
        for &j in keys {
            for (o, &v) in o.iter_mut().zip(values.row(j)) {
                *o += weight(score(j)) * f64::from(v);
                largest_value = largest_value.max(f64::from(v.abs()));
            }
        }
        Self {
            terms: keys.len() + usize::from(sink > f64::NEG_INFINITY),
            m,
            l: keys.iter().map(|&j| weight(score(j))).sum::<f64>() + weight(sink),
            o,
            largest_value,
        }
    }
}

/// Checks every state of a row that sees the keys `seen`.
fn check_row(
    states: &[State],
    seen: &[usize],
    scores: &[f32],
    values: ArrayView2<'_, f32>,
    sink: f64,
) {
    // Every block with a visible key was observed, in order.
    let observed: Vec<usize> = states.iter().map(|state| (state.keys_end - 1) / BLOCK).collect();
    assert!(observed.is_sorted_by(|a, b| a < b), "{observed:?}");
    assert!(seen.iter().all(|j| observed.contains(&(j / BLOCK))), "{observed:?}");

    let mut m_old = sink;
    for state in states {
        let so_far = &seen[..seen.partition_point(|&j| j < state.keys_end)];
        let want = Definition::new(so_far, scores, values, sink);
        assert_eq!(state.m, want.m);
        assert!((0.0..=1.0).contains(&state.correction), "{state:?}");
        if want.m > f64::NEG_INFINITY {
            assert!((state.correction - (m_old - want.m).exp()).abs() < 1e-6, "{state:?}");
        }
        assert!((0.0..=want.terms as f64).contains(&state.l), "{state:?}");
        assert!((state.l - want.l).abs() <= 1e-5 * want.l, "{state:?}: l {}", want.l);
        let bound = state.l * want.largest_value * (1.0 + 1e-6);
        for (got, want) in state.o.iter().zip(&want.o) {
            assert!(got.abs() <= bound, "{state:?}: bound {bound}");
            assert!((got - want).abs() <= 1e-5 * bound, "{state:?}: o {want}");
        }
        m_old = want.m;
    }
}

/// Runs a call with head size 1, in which the scores of every query are `scores`, and checks every
/// state of every row.
fn check(name: &str, scores: &[f32], setting: &Setting<f32>, n: usize) {
    let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n, m: scores.len(), d: 1, e: 5 };
    let [q, k, v] = inputs(scores, n, 5);
    let values = v.index_axis(Axis(0), 0).index_axis_move(Axis(0), 0);
    let visible = setting.visible(sizes);
    let options = setting.options();
    let sink = options.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[0].into());
    for isa in isas() {
        let tiling = common::tiling((13, BLOCK), isa);
        let (rows, result) = observe(q.view(), k.view(), v.view(), &options, &tiling);
        for i in 0..n {
            println!("{name}, {isa}, {:?}, sink {sink}, row {i}", setting.features);
            let seen: Vec<usize> = (0..scores.len()).filter(|&j| visible[[0, 0, i, j]]).collect();
            let states = rows.get(&(0, 0, i)).map_or(&[][..], |states| states);
            assert!(states.iter().all(|state| state.isa == isa));
            check_row(states, &seen, scores, values, sink);
            if seen.is_empty() {
                continue;
            }
            // The result is the last state, divided by its sum.
            let last = states.last().unwrap();
            let lse = last.m + last.l.ln();
            assert!((f64::from(result.lse[[0, 0, i]]) - lse).abs() <= 1e-6 * (1.0 + lse.abs()));
            for (c, o) in last.o.iter().enumerate() {
                assert!((f64::from(result.o[[0, 0, i, c]]) - o / last.l).abs() < 1e-6);
            }
        }
    }
}

fn observe(
    q: ArrayView4<'_, f32>,
    k: ArrayView4<'_, f32>,
    v: ArrayView4<'_, f32>,
    options: &Options<'_, f32, &common::UserMask>,
    tiling: &Tiling,
) -> (BTreeMap<(usize, usize, usize), Vec<State>>, Attention<f32>) {
    let (b, h, n, d) = q.dim();
    let e = v.dim().3;
    let mut result = Attention { o: Array4::zeros((b, h, n, e)), lse: Array3::zeros((b, h, n)) };
    let mut workspace = Workspace::new(d, e, tiling).unwrap();
    let recorder = Recorder::default();
    let (o, lse) = (result.o.view_mut(), result.lse.view_mut());
    attention_observed(o, lse, q, k, v, options, &mut workspace, Some(&recorder)).unwrap();
    (recorder.0.into_inner().unwrap(), result)
}

/// Scores over several blocks of 32 keys.
fn score_lists() -> Vec<(&'static str, Vec<f32>)> {
    let list = |score: fn(usize) -> f32| (0..170).map(score).collect::<Vec<f32>>();
    vec![
        ("equal", list(|_| 0.5)),
        ("the maximum moves at every block", list(|j| (j / 32) as f32 * 2.5)),
        ("the maximum moves at every key", list(|j| j as f32 * 0.3)),
        ("the first block has it", list(|j| (j / 32) as f32 * -2.5)),
        ("far apart", list(|j| [-200.0, 3.0, 90.0, 2.0, 300.0, -1.0][j / 32])),
        ("1e30 here and there", list(|j| if j % 40 == 7 { 1e30 } else { -1e30 })),
        ("up to 1e30", list(|j| [-1e30, -1e20, -5.0, 1e10, 1e30, -1e30][j / 32])),
        ("-1e30 everywhere", list(|_| -1e30)),
        ("lowest", list(|j| if j == 100 { -3e38 } else { f32::MIN })),
    ]
}

#[test]
fn states_keep_their_bounds() {
    let settings = [
        Features::default(),
        Features { causal: true, ..Features::default() },
        // Blocks in which a row sees nothing, in front, in the middle and all of them.
        Features { mask: Some(Broadcast::Nothing), causal: true, ..Features::default() },
        Features { bias: Some(Broadcast::Nothing), bias_masks: true, ..Features::default() },
    ];
    let n = 30;
    for (name, scores) in score_lists() {
        let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n, m: scores.len(), d: 1, e: 5 };
        for features in &settings {
            let mut setting = Setting::<f32>::new(features, sizes, 3);
            if let Some(mask) = &mut setting.mask {
                let hidden = [0..64, 32..128, 0..170, 40..41, 140..170];
                mask.indexed_iter_mut()
                    .for_each(|(index, x)| *x = !hidden[index[2] % 5].contains(&index[3]));
            }
            if let Some(bias) = &mut setting.bias {
                bias.mapv_inplace(|x| if x == f32::NEG_INFINITY { x } else { 0.0 });
            }
            check(name, &scores, &setting, n);
            for sink in [0.7, -1e30, 40.0] {
                setting.sinks = Some(vec![sink]);
                check(name, &scores, &setting, n);
            }
        }
    }
}

/// After a block in which a row sees nothing it stands where it stood: nothing is NaN, although the
/// largest score so far is -inf.
#[test]
fn nothing_seen_yet() {
    let scores = vec![1.0; 96];
    let sizes = Sizes { batch: 1, key_heads: 1, group: 1, n: 1, m: 96, d: 1, e: 5 };
    let mut setting = Setting::<f32>::new(
        &Features { mask: Some(Broadcast::Nothing), ..Features::default() },
        sizes,
        1,
    );
    setting.mask.as_mut().unwrap().iter_mut().enumerate().for_each(|(j, x)| *x = j >= 70);
    let [q, k, v] = inputs(&scores, 1, 5);
    for isa in isas() {
        let tiling = common::tiling((1, 32), isa);
        let (rows, _) = observe(q.view(), k.view(), v.view(), &setting.options(), &tiling);
        let states = &rows[&(0, 0, 0)];
        assert_eq!(states.len(), 3);
        for state in &states[..2] {
            assert_eq!((state.m, state.l), (f64::NEG_INFINITY, 0.0));
            assert_eq!(state.o, [0.0; 5]);
        }
        assert_eq!((states[2].m, states[2].l), (1.0, 26.0));
    }
}

/// The online softmax over blocks of scores and values, with a factor of our choice.
fn online(scores: &[f64], values: &[f64], factor: fn(f64, f64) -> f64) -> f64 {
    let (mut m, mut l, mut o) = (f64::NEG_INFINITY, 0.0, 0.0);
    for (scores, values) in scores.chunks(32).zip(values.chunks(32)) {
        let m_new = scores.iter().fold(m, |m, &s| m.max(s));
        // At the first block there is nothing to correct.
        let correction = if m == f64::NEG_INFINITY { 0.0 } else { factor(m, m_new) };
        (l, o) = (l * correction, o * correction);
        for (s, v) in scores.iter().zip(values) {
            l += (s - m_new).exp();
            o += (s - m_new).exp() * v;
        }
        m = m_new;
    }
    o / l
}

/// Multiplying both sums by any factor leaves `o / l` as it is until the next block is added; that
/// block has the right weight against the old ones only if the factor is `exp(m_old - m_new)`.
#[test]
fn inverted_factor_is_wrong() {
    let right = |m_old: f64, m_new: f64| (m_old - m_new).exp();
    let inverted = |m_old: f64, m_new: f64| (m_new - m_old).exp();
    for (name, scores) in score_lists().into_iter().take(4) {
        let scores: Vec<f64> = scores.into_iter().map(f64::from).collect();
        let values: Vec<f64> =
            (0..scores.len()).map(|j| (j as f64 * 0.1).cos() + j as f64).collect();
        let column = |x: &[f64]| Array4::from_shape_fn((1, 1, x.len(), 1), |(_, _, j, _)| x[j]);
        let (q, k, v) = (Array4::ones((1, 1, 1, 1)), column(&scores), column(&values));
        let options = Options::default();
        let want = attention_reference(q.view(), k.view(), v.view(), &options).unwrap();
        let want = want.o[[0, 0, 0, 0]];
        assert!((online(&scores, &values, right) - want).abs() < 1e-10 * want, "{name}");
        let off = (online(&scores, &values, inverted) - want).abs();
        // It hides as long as the maximum stays where the first block put it.
        let moves = name.contains("moves");
        assert_eq!(off > 1.0, moves, "{name}: off by {off}");
        if !moves {
            assert!(off < 1e-10 * want, "{name}: off by {off}");
        }
    }
}
