//! What the tests of this crate share: a plain model of a cache, and random operations on both.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::BTreeMap;

use kvcache::{
    Cache, Config, Error, Layout, Options, Queries, Rows, SeqId, Storage, Window, attend_reference,
};
use ndarray::{Array2, Array3, ArrayView3, Axis, concatenate};
use proptest::prelude::*;
use tensor_utils::testing::Seeded;
use tensor_utils::{Element, bf16, f16};

/// A number as float storage keeps it.
pub(crate) fn stored(storage: Storage, x: f32) -> f32 {
    match storage {
        Storage::Bf16 => bf16::from_f32(x).to_f32(),
        Storage::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// The largest element-wise difference; NaN if one has a NaN that the other has not.
pub(crate) fn difference(got: &Array3<f32>, want: &Array3<f64>) -> f64 {
    assert_eq!(got.dim(), want.dim());
    let pairs = got.iter().zip(want);
    pairs
        .map(|(&got, &want)| (f64::from(got) - want).abs())
        .fold(0.0, |a, b| if b > a || b.is_nan() { b } else { a })
}

/// One operation; numbers choose among what exists.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Create,
    Append { seq: usize, rows: usize },
    AppendBatch { first: usize, second: usize, rows: usize },
    Fork { seq: usize },
    Truncate { seq: usize, back: usize },
    Compact { seq: usize, tail: usize, keep: u16 },
    Free { seq: usize },
    Register { seq: usize },
    Match { seq: usize, tokens: usize },
    Reimport { seq: usize },
    Stale,
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    let seq = 0..8_usize;
    prop_oneof![
        2 => Just(Op::Create),
        8 => (seq.clone(), 0..20_usize).prop_map(|(seq, rows)| Op::Append { seq, rows }),
        3 => (seq.clone(), seq.clone(), 1..3_usize)
            .prop_map(|(first, second, rows)| Op::AppendBatch { first, second, rows }),
        3 => seq.clone().prop_map(|seq| Op::Fork { seq }),
        3 => (seq.clone(), 0..24_usize).prop_map(|(seq, back)| Op::Truncate { seq, back }),
        3 => (seq.clone(), 0..12_usize, any::<u16>())
            .prop_map(|(seq, tail, keep)| Op::Compact { seq, tail, keep }),
        2 => seq.clone().prop_map(|seq| Op::Free { seq }),
        2 => seq.clone().prop_map(|seq| Op::Register { seq }),
        2 => (seq.clone(), 0..40_usize).prop_map(|(seq, tokens)| Op::Match { seq, tokens }),
        1 => seq.prop_map(|seq| Op::Reimport { seq }),
        1 => Just(Op::Stale),
    ]
}

/// A configuration with small pages, whose edges short sequences straddle.
pub(crate) fn config() -> impl Strategy<Value = Config> {
    let storage = || prop::sample::select(&Storage::ALL[..]);
    let window = prop::option::weighted(0.3, (1..20_usize, 0..6_usize));
    let layout = prop_oneof![
        3 => (1..24_usize).prop_map(|pages| Layout::Paged { pages }),
        1 => (1..5_usize, 1..60_usize)
            .prop_map(|(sequences, capacity)| Layout::Contiguous { sequences, capacity }),
    ];
    let sizes = (1..3_usize, 1..3_usize, 1..7_usize, 1..6_usize);
    let page_size = prop::sample::select(&[1_usize, 2, 3, 4, 8, 16][..]);
    (sizes, storage(), storage(), layout, page_size, 0..10_usize, window).prop_map(
        |((layers, key_heads, d, e), keys, values, layout, page_size, residual, window)| Config {
            value_size: e,
            keys,
            values,
            layout,
            page_size,
            residual,
            window: window.map(|(size, sinks)| Window { size, sinks }),
            ..Config::new(layers, key_heads, d)
        },
    )
}

/// A sequence of the model: everything that was ever appended, as plain arrays.
#[derive(Debug, Clone)]
pub(crate) struct Plain {
    /// Keys and values of each layer, `[rows, heads, size]`.
    pub(crate) layers: Vec<(Array3<f32>, Array3<f32>)>,
    pub(crate) tokens: Vec<u32>,
}

impl Plain {
    fn len(&self) -> usize {
        self.tokens.len()
    }

    fn keep(&mut self, rows: &[usize]) {
        for (k, v) in &mut self.layers {
            *k = k.select(Axis(0), rows);
            *v = v.select(Axis(0), rows);
        }
        self.tokens = rows.iter().map(|&row| self.tokens[row]).collect();
    }

    fn push(&mut self, layer: usize, k: ArrayView3<'_, f32>, v: ArrayView3<'_, f32>) {
        let (keys, values) = &mut self.layers[layer];
        *keys = concatenate![Axis(0), *keys, k];
        *values = concatenate![Axis(0), *values, v];
    }
}

/// A cache and the model of it.
pub(crate) struct Pair {
    pub(crate) cache: Cache,
    pub(crate) model: BTreeMap<SeqId, Plain>,
    /// What was registered, freed since or not.
    registered: Vec<Plain>,
    freed: Vec<SeqId>,
    seeded: Seeded,
    tokens: u32,
}

impl Pair {
    pub(crate) fn new(config: &Config, seed: u64) -> Self {
        let cache = Cache::new(config).unwrap();
        let (model, registered, freed) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { cache, model, registered, freed, seeded: Seeded::new(seed), tokens: 0 }
    }

    fn config(&self) -> Config {
        self.cache.config().clone()
    }

    fn pick(&self, number: usize) -> Option<SeqId> {
        self.model.keys().nth(number % self.model.len().max(1)).copied()
    }

    fn empty(&self) -> Plain {
        let c = self.config();
        let layer = (
            Array3::zeros((0, c.key_heads, c.head_size)),
            Array3::zeros((0, c.key_heads, c.value_size)),
        );
        Plain { layers: vec![layer; c.layers], tokens: Vec::new() }
    }

    /// Rows as a model would compute them: equal tokens after equal prefixes have equal rows, so
    /// forks that go on differently differ.
    fn rows(&mut self, n: usize) -> Vec<(Array3<f32>, Array3<f32>)> {
        let c = self.config();
        (0..c.layers)
            .map(|_| {
                let k = self.seeded.normal((n, c.key_heads, c.head_size));
                (k, self.seeded.normal((n, c.key_heads, c.value_size)))
            })
            .collect()
    }

    fn new_tokens(&mut self, n: usize) -> Vec<u32> {
        self.tokens += n as u32;
        (self.tokens - n as u32..self.tokens).collect()
    }

    /// Does it to both. An error must leave the cache as it was, which [`check`](Self::check) sees.
    pub(crate) fn apply(&mut self, op: &Op) {
        match *op {
            Op::Create => match self.cache.create() {
                Ok(seq) => {
                    let empty = self.empty();
                    assert!(self.model.insert(seq, empty).is_none(), "a handle came twice");
                }
                Err(error) => assert!(matches!(error, Error::OutOfRegions { .. }), "{error}"),
            },
            Op::Append { seq, rows } => {
                if let Some(seq) = self.pick(seq) {
                    self.append(&[seq], rows);
                }
            }
            Op::AppendBatch { first, second, rows } => {
                let (Some(first), Some(second)) = (self.pick(first), self.pick(second)) else {
                    return;
                };
                if first == second {
                    let c = self.config();
                    let k = Array3::<f32>::zeros((2, c.key_heads, c.head_size));
                    let v = Array3::<f32>::zeros((2, c.key_heads, c.value_size));
                    let error =
                        self.cache.append_batch(0, &[first, first], &[1, 1], k.view(), v.view());
                    assert_eq!(error, Err(Error::DuplicateSequence(first)));
                } else {
                    self.append(&[first, second], rows);
                }
            }
            Op::Fork { seq } => {
                let Some(seq) = self.pick(seq) else { return };
                match self.cache.fork(seq) {
                    Ok(fork) => {
                        let plain = self.model[&seq].clone();
                        assert!(self.model.insert(fork, plain).is_none(), "a handle came twice");
                    }
                    Err(error) => assert!(matches!(error, Error::OutOfRegions { .. }), "{error}"),
                }
            }
            Op::Truncate { seq, back } => {
                let Some(seq) = self.pick(seq) else { return };
                let len = self.model[&seq].len().saturating_sub(back);
                match self.cache.truncate(seq, len) {
                    Ok(()) => {
                        let rows: Vec<_> = (0..len).collect();
                        self.model.get_mut(&seq).unwrap().keep(&rows);
                    }
                    Err(error) => self.expect_irreversible(&error),
                }
            }
            Op::Compact { seq, tail, keep } => {
                let Some(seq) = self.pick(seq) else { return };
                let len = self.model[&seq].len();
                let base = len.saturating_sub(tail);
                let kept: Vec<_> = (0..len - base).filter(|i| keep >> i & 1 == 1).collect();
                match self.cache.compact(seq, base, &kept) {
                    Ok(()) => {
                        let rows: Vec<_> = (0..base).chain(kept.iter().map(|i| base + i)).collect();
                        self.model.get_mut(&seq).unwrap().keep(&rows);
                    }
                    Err(Error::OutOfPages { .. }) => assert!(self.is_paged()),
                    Err(error) => self.expect_irreversible(&error),
                }
            }
            Op::Free { seq } => {
                let Some(seq) = self.pick(seq) else { return };
                self.cache.free(seq).unwrap();
                self.model.remove(&seq);
                self.freed.push(seq);
            }
            Op::Register { seq } => {
                let Some(seq) = self.pick(seq) else { return };
                let tokens = self.model[&seq].tokens.clone();
                match self.cache.register_prefix(seq, 7, &tokens) {
                    Ok(pages) => {
                        assert!(pages <= tokens.len() / self.config().page_size);
                        self.registered.push(self.model[&seq].clone());
                    }
                    Err(error) => assert!(!self.is_paged(), "{error}"),
                }
            }
            Op::Match { seq, tokens } => self.match_prefix(seq, tokens),
            Op::Reimport { seq } => self.reimport(seq),
            Op::Stale => {
                for &seq in &self.freed {
                    assert_eq!(self.cache.free(seq), Err(Error::UnknownSequence(seq)));
                    assert_eq!(self.cache.fork(seq), Err(Error::UnknownSequence(seq)));
                    assert_eq!(self.cache.truncate(seq, 0), Err(Error::UnknownSequence(seq)));
                }
            }
        }
    }

    fn is_paged(&self) -> bool {
        matches!(self.config().layout, Layout::Paged { .. })
    }

    fn expect_irreversible(&self, error: &Error) {
        let c = self.config();
        let may = c.window.is_some() || c.keys.is_quantised() || c.values.is_quantised();
        assert!(may && matches!(error, Error::Irreversible { .. }), "{error}");
    }

    /// Appends to all layers; if it fails, in none.
    fn append(&mut self, seqs: &[SeqId], n: usize) {
        let total = n * seqs.len();
        let layers = self.rows(total);
        let counts = vec![n; seqs.len()];
        for (layer, (k, v)) in layers.iter().enumerate() {
            let result = self.cache.append_batch(layer, seqs, &counts, k.view(), v.view());
            match result {
                Ok(()) => {
                    for (i, seq) in seqs.iter().enumerate() {
                        let rows: Vec<_> = (i * n..(i + 1) * n).collect();
                        let (k, v) = (k.select(Axis(0), &rows), v.select(Axis(0), &rows));
                        self.model.get_mut(seq).unwrap().push(layer, k.view(), v.view());
                    }
                }
                Err(error) => {
                    assert_eq!(layer, 0, "only the first layer takes pages: {error}");
                    let full = Error::OutOfPages { needed: 0, available: 0, total: 0 };
                    let kind = std::mem::discriminant(&error);
                    let region = matches!(error, Error::RegionFull { .. });
                    assert!(region || kind == std::mem::discriminant(&full), "{error}");
                    return;
                }
            }
        }
        for seq in seqs {
            let tokens = self.new_tokens(n);
            self.model.get_mut(seq).unwrap().tokens.extend(tokens);
        }
    }

    fn match_prefix(&mut self, seq: usize, tokens: usize) {
        let sources = self.model.values().chain(&self.registered);
        let Some(mut plain) = sources.cycle().nth(seq).cloned() else { return };
        let mut wanted = plain.tokens.clone();
        wanted.truncate(tokens);
        wanted.push(u32::MAX);
        match self.cache.match_prefix(7, &wanted) {
            Ok((seq, rows)) => {
                assert!(rows < wanted.len() && rows.is_multiple_of(self.config().page_size));
                // The tokens are the same, so the rows must be.
                plain.keep(&(0..rows).collect::<Vec<_>>());
                self.model.insert(seq, plain);
            }
            Err(error) => assert!(!self.is_paged(), "{error}"),
        }
    }

    /// Writes a sequence out as foreign pages and reads it back into a cache of its own.
    fn reimport(&mut self, seq: usize) {
        let Some(seq) = self.pick(seq) else { return };
        let c = self.config();
        let Ok(tables) = self.cache.page_tables(&[seq]) else {
            assert!(c.window.is_some());
            return;
        };
        let plain = &self.model[&seq];
        assert_eq!(tables.lens(c.page_size).unwrap(), [plain.len()]);
        if !self.is_paged() {
            return;
        }
        let pages = self.cache.stats().pages;
        let layers: Vec<_> = plain
            .layers
            .iter()
            .map(|(k, v)| {
                let shape = (pages, c.page_size, c.key_heads);
                let mut foreign = (
                    ndarray::Array4::<f32>::zeros((shape.0, shape.1, shape.2, c.head_size)),
                    ndarray::Array4::<f32>::zeros((shape.0, shape.1, shape.2, c.value_size)),
                );
                for row in 0..plain.len() {
                    let page = tables.kv_indices[row / c.page_size] as usize;
                    let place = (page, row % c.page_size);
                    let to = |a: &mut ndarray::Array4<f32>, from: &Array3<f32>| {
                        let mut page = a.index_axis_mut(Axis(0), place.0);
                        page.index_axis_mut(Axis(0), place.1)
                            .assign(&from.index_axis(Axis(0), row));
                    };
                    to(&mut foreign.0, k);
                    to(&mut foreign.1, v);
                }
                foreign
            })
            .collect();
        let views: Vec<_> = layers.iter().map(|(k, v)| (k.view(), v.view())).collect();
        let mut other = Self::new(&c, 0);
        let imported = other.cache.import(&tables, &views).unwrap();
        assert_eq!(imported.len(), 1);
        other.model.insert(imported[0], plain.clone());
        other.check();
    }

    /// Compares everything that can be seen of the cache with the model.
    pub(crate) fn check(&mut self) {
        self.cache.check_invariants().unwrap();
        let c = self.config();
        let stats = self.cache.stats();
        assert_eq!(stats.free + stats.live + stats.reclaimable, stats.pages);
        assert_eq!(stats.sequences, self.model.len());
        assert!(stats.wasted_rows <= self.model.len() * c.page_size.saturating_sub(1));
        for (&seq, plain) in &self.model {
            assert_eq!(self.cache.len(seq), Ok(plain.len()));
            let held =
                |row: usize| c.window.is_none_or(|w| plain.len() - row < w.size || row < w.sinks);
            for (layer, (k, v)) in plain.layers.iter().enumerate() {
                for row in (0..plain.len()).filter(|&row| held(row)) {
                    let (keys, values) = self.cache.read(layer, seq, row, 1).unwrap();
                    check_row(&c, c.keys, &keys, k, row, true);
                    check_row(&c, c.values, &values, v, row, false);
                }
            }
        }
    }

    /// Attention of the last position of each sequence against the oracle on what the cache says it
    /// holds.
    pub(crate) fn check_attention(&mut self, options: &Options) {
        let c = self.config();
        let heads = 2 * c.key_heads;
        for (&seq, plain) in &self.model {
            if plain.len() == 0 {
                continue;
            }
            let layer = plain.len() % c.layers;
            let q: Array3<f32> = self.seeded.normal((1, heads, c.head_size));
            let batch = [Queries::last(seq, 1)];
            let got = match self.cache.attend(layer, q.view(), &batch, options) {
                Ok(got) => got,
                // After a truncation the last position may see rows that no later one does.
                Err(Error::Released { .. }) if c.window.is_some() => continue,
                Err(error) => panic!("{error}"),
            };
            let (mut k, mut v) = plain.layers[layer].clone();
            for row in 0..plain.len() {
                if let Ok((keys, values)) = self.cache.read(layer, seq, row, 1) {
                    k.index_axis_mut(Axis(0), row).assign(&keys.index_axis(Axis(0), 0));
                    v.index_axis_mut(Axis(0), row).assign(&values.index_axis(Axis(0), 0));
                }
            }
            let (o, lse) =
                attend_reference(q.view(), k.view(), v.view(), Rows::Last(1), options, c.window)
                    .unwrap();
            check_outputs(&c, &got.o, &got.lse, &o, &lse);
        }
    }
}

/// Rounding only: dot products of codes take queries and weights with 15 bits, outputs of 16 bits are rounded.
pub(crate) fn check_outputs<T: Element<Acc = f32>>(
    c: &Config,
    o: &Array3<T>,
    lse: &Array2<f32>,
    want_o: &Array3<f64>,
    want_lse: &Array2<f64>,
) {
    let quantised = c.keys.is_quantised() || c.values.is_quantised();
    let tolerance = if quantised { 1e-3 } else { 1e-5 };
    let rounding = if T::IS_COMPUTE_TYPE { 0.0 } else { T::EPSILON };
    let largest = want_o.iter().fold(0.0, |a: f64, x| a.max(x.abs()));
    let error = difference(&o.mapv(T::to_acc), want_o);
    assert!(error <= tolerance + rounding * largest, "o is off by {error}: {c:?}");
    for (got, want) in lse.iter().zip(want_lse) {
        let equal = f64::from(*got) == *want;
        let error = (f64::from(*got) - want).abs();
        assert!(equal || error <= tolerance * (1.0 + want.abs()), "lse {got}, expected {want}");
    }
}

/// Rounded by float storage, off by half a step at most in quantised storage.
fn check_row(
    c: &Config,
    storage: Storage,
    got: &Array3<f32>,
    all: &Array3<f32>,
    row: usize,
    is_keys: bool,
) {
    let first = row / c.page_size * c.page_size;
    let full = first + c.page_size <= all.dim().0;
    for ((_, head, column), &got) in got.indexed_iter() {
        let want = stored(storage, all[[row, head, column]]);
        if !storage.is_quantised() || !full {
            assert_eq!(got.to_bits(), want.to_bits());
            continue;
        }
        let group: Vec<f32> = if is_keys {
            (first..first + c.page_size).map(|row| all[[row, head, column]]).collect()
        } else {
            (0..all.dim().2).map(|column| all[[row, head, column]]).collect()
        };
        let max = group.iter().copied().fold(f32::MIN, f32::max);
        let min = group.iter().copied().fold(f32::MAX, f32::min);
        let levels = if storage == Storage::Int8 { 255.0 } else { 15.0 };
        // The minimum is rounded down and the scale up, both to 8 bits.
        let step = (max - min + min.abs() / 128.0) / levels * (1.0 + 1.0 / 128.0);
        let error = (got - want).abs();
        assert!(error <= 0.501 * step + 1e-6 * want.abs(), "{got} for {want}, step {step}");
    }
}
