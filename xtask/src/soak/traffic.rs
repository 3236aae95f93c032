//! Sequences that arrive, share, fork, speculate and end over one cache, which runs out of pages now and
//! then.
//!
//! There is no model: the keys and values of a row are a function of the tokens up to it, so whatever has
//! happened to a sequence, its tokens say what the cache must hold.

use std::ops::AddAssign;

use anyhow::{Result, bail, ensure};
use dflash::{TokenTree, accept_greedy};
use kvcache::{
    Cache, Config, Error, Layout, Options, Queries, Rows, SeqId, Storage, attend_reference,
};
use ndarray::{Array2, Array3};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use tensor_utils::testing::largest_difference;

/// Ways to store numbers; epochs take them in turn.
pub(super) const STORAGES: usize = Storage::ALL.len();

const EVENTS: usize = 1500;
const VOCABULARY: u32 = 8;
const PAGES: usize = 48;
const PAGE_SIZE: usize = 8;
/// Key/value heads, and query heads for each.
const HEADS: usize = 2;
const GROUP: usize = 2;
const SIZE: usize = 16;
const LAYERS: usize = 2;
const MOST_SEQUENCES: usize = 12;

/// What happened.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    arrived: usize,
    reused: usize,
    appended: usize,
    forked: usize,
    drafted: usize,
    pub(super) accepted: usize,
    attended: usize,
    ended: usize,
    /// Times that the cache was full and went on after sequences had been given up.
    pub(super) recovered: usize,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.arrived += other.arrived;
        self.reused += other.reused;
        self.appended += other.appended;
        self.forked += other.forked;
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.attended += other.attended;
        self.ended += other.ended;
        self.recovered += other.recovered;
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            arrived,
            reused,
            appended,
            forked,
            drafted,
            accepted,
            attended,
            ended,
            recovered,
        } = self;
        write!(
            f,
            "{arrived} sequences arrived ({reused} rows found in the cache), {forked} forked, {ended} ended; \
             {appended} rows appended, {accepted} of {drafted} drafted tokens accepted; \
             {attended} attentions checked; {recovered} times full and recovered"
        )
    }
}

/// Serves a number of events over a new cache, and gives everything back.
pub(super) fn serve(epoch: usize, seed: u64) -> Result<Counts> {
    let storage = Storage::ALL[epoch % STORAGES];
    let config = Config { page_size: PAGE_SIZE, ..Config::new(LAYERS, HEADS, SIZE) };
    let config = config.stored_as(storage).with_layout(Layout::Paged { pages: PAGES });
    let mut traffic = Traffic {
        cache: Cache::new(&config)?,
        live: Vec::new(),
        rng: ChaCha8Rng::seed_from_u64(seed),
        counts: Counts::default(),
    };
    for _ in 0..EVENTS {
        traffic.event()?;
        traffic.check()?;
    }
    while !traffic.live.is_empty() {
        traffic.end()?;
    }
    let stats = traffic.cache.stats();
    ensure!(stats.sequences == 0 && stats.live == 0, "not everything was given back: {stats:?}");
    Ok(traffic.counts)
}

struct Traffic {
    cache: Cache,
    live: Vec<Live>,
    rng: ChaCha8Rng,
    counts: Counts,
}

/// A sequence that is being served.
struct Live {
    seq: SeqId,
    tokens: Vec<u32>,
}

impl Traffic {
    fn event(&mut self) -> Result<()> {
        match self.rng.random_range(0..16) {
            _ if self.live.is_empty() => self.arrive(),
            0 | 1 if self.live.len() < MOST_SEQUENCES => self.arrive(),
            2 if self.live.len() < MOST_SEQUENCES => self.fork(),
            3 => self.end(),
            4 => self.take_back(),
            5..=8 => self.speculate(),
            _ => self.decode(),
        }
    }

    /// A prompt, often one that begins like others.
    fn arrive(&mut self) -> Result<()> {
        let family = self.rng.random_range(0..4_u32);
        let shared = self.rng.random_range(0..4 * PAGE_SIZE);
        let mut prompt: Vec<u32> =
            (0..shared).map(|i| (i as u32 * (family + 1)) % VOCABULARY).collect();
        let own = self.rng.random_range(1..20);
        prompt.extend((0..own).map(|_| self.rng.random_range(0..VOCABULARY)));
        let (seq, found) = self.cache.match_prefix(0, &prompt)?;
        self.live.push(Live { seq, tokens: prompt[..found].to_vec() });
        self.counts.arrived += 1;
        self.counts.reused += found;
        let at = self.live.len() - 1;
        self.append(&[at], &[prompt[found..].to_vec()])
    }

    /// One token more for some sequences, in one step.
    fn decode(&mut self) -> Result<()> {
        let chosen: Vec<usize> =
            (0..self.live.len()).filter(|_| self.rng.random_bool(0.6)).collect();
        let tokens: Vec<_> =
            chosen.iter().map(|_| vec![self.rng.random_range(0..VOCABULARY)]).collect();
        self.append(&chosen, &tokens)
    }

    fn fork(&mut self) -> Result<()> {
        let at = self.rng.random_range(0..self.live.len());
        let seq = self.cache.fork(self.live[at].seq)?;
        let tokens = self.live[at].tokens.clone();
        self.live.push(Live { seq, tokens });
        self.counts.forked += 1;
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let at = self.rng.random_range(0..self.live.len());
        let Live { seq, tokens } = self.live.swap_remove(at);
        if self.rng.random_bool(0.5) {
            self.cache.register_prefix(seq, 0, &tokens)?;
        }
        self.cache.free(seq)?;
        self.counts.ended += 1;
        ensure!(self.cache.free(seq) == Err(Error::UnknownSequence(seq)), "a stale handle works");
        Ok(())
    }

    /// The last few tokens turn out to be wrong.
    fn take_back(&mut self) -> Result<()> {
        let at = self.rng.random_range(0..self.live.len());
        let back = self.rng.random_range(0..6);
        let live = &mut self.live[at];
        let len = live.tokens.len().saturating_sub(back).max(1);
        match self.cache.truncate(live.seq, len) {
            Ok(()) => live.tokens.truncate(len),
            // Full precision of pages that were quantised is gone.
            Err(Error::Irreversible { .. }) => {}
            Err(error) => bail!(error),
        }
        Ok(())
    }

    /// A tree of drafts: appended, attended to, the accepted path kept.
    fn speculate(&mut self) -> Result<()> {
        let at = self.rng.random_range(0..self.live.len());
        let nodes = self.rng.random_range(1..8_usize);
        let drafted: Vec<u32> = (0..nodes).map(|_| self.rng.random_range(0..VOCABULARY)).collect();
        let parents: Vec<i64> = (0..nodes as i64).map(|i| self.rng.random_range(-1..i)).collect();
        let (tree, _) = TokenTree::merged(&drafted, &parents)?;
        let base = self.live[at].tokens.len();
        let before = hash(&self.live[at].tokens);
        let mut hashes: Vec<u64> = Vec::new();
        for (&token, &parent) in tree.tokens().iter().zip(tree.parents()) {
            let above = usize::try_from(parent).map_or(before, |parent| hashes[parent]);
            hashes.push(next_hash(above, token));
        }
        let seq = self.live[at].seq;
        if !self.append_rows(&[at], &[hashes])? {
            return Ok(());
        }
        let mut q = Array3::zeros((tree.len(), GROUP * HEADS, SIZE));
        q.map_inplace(|x| *x = self.rng.random_range(-1.0..1.0_f32));
        let batch = [Queries::tree(seq, tree.parents())];
        let all = self.cache.attend(0, q.view(), &batch, &Options::default())?;
        ensure!(all.o.iter().all(|x| x.is_finite()), "attention over a tree is not finite");
        let logits = Array2::from_shape_fn((tree.rows(), VOCABULARY as usize), |_| {
            self.rng.random_range(0..4_u8) as f32
        });
        let accepted = accept_greedy(&tree, logits.view())?;
        self.cache.compact(seq, base, &accepted.nodes)?;
        // The token after the path has no row yet: it is decoded like any other.
        let (kept, _) = accepted.tokens.split_at(accepted.nodes.len());
        let Some(live) = self.live.iter_mut().find(|live| live.seq == seq) else { return Ok(()) };
        live.tokens.extend(kept);
        self.counts.drafted += tree.len();
        self.counts.accepted += kept.len();
        Ok(())
    }

    /// Appends tokens to the sequences at these places; sequences may be given up for it.
    fn append(&mut self, places: &[usize], tokens: &[Vec<u32>]) -> Result<()> {
        let hashes: Vec<Vec<u64>> = places
            .iter()
            .zip(tokens)
            .map(|(&at, tokens)| {
                let mut hash = hash(&self.live[at].tokens);
                tokens
                    .iter()
                    .map(|&token| {
                        hash = next_hash(hash, token);
                        hash
                    })
                    .collect()
            })
            .collect();
        let seqs: Vec<SeqId> = places.iter().map(|&at| self.live[at].seq).collect();
        if self.append_rows(places, &hashes)? {
            for (seq, tokens) in seqs.iter().zip(tokens) {
                if let Some(live) = self.live.iter_mut().find(|live| live.seq == *seq) {
                    live.tokens.extend(tokens);
                }
            }
        }
        Ok(())
    }

    /// Appends rows to all layers. If the cache is full, other sequences are given up; if there is none
    /// left, so is one of these, and nothing is appended.
    fn append_rows(&mut self, places: &[usize], hashes: &[Vec<u64>]) -> Result<bool> {
        let seqs: Vec<SeqId> = places.iter().map(|&at| self.live[at].seq).collect();
        let counts: Vec<usize> = hashes.iter().map(Vec::len).collect();
        let rows: Vec<u64> = hashes.iter().flatten().copied().collect();
        let mut full = false;
        for layer in 0..LAYERS {
            let (k, v) = (rows_of(&rows, layer, 0), rows_of(&rows, layer, 1));
            loop {
                match self.cache.append_batch(layer, &seqs, &counts, k.view(), v.view()) {
                    Ok(()) => break,
                    Err(Error::OutOfPages { .. }) if layer == 0 => {
                        full = true;
                        let other = self.live.iter().position(|live| !seqs.contains(&live.seq));
                        let Some(at) = other.or((!self.live.is_empty()).then_some(0)) else {
                            bail!("the cache is full of nothing");
                        };
                        let Live { seq, .. } = self.live.swap_remove(at);
                        self.cache.free(seq)?;
                        self.counts.ended += 1;
                        if other.is_none() {
                            self.counts.recovered += 1;
                            return Ok(false);
                        }
                    }
                    Err(error) => bail!(error),
                }
            }
        }
        self.counts.recovered += usize::from(full);
        self.counts.appended += rows.len();
        Ok(true)
    }

    /// The cache is whole, and one sequence holds what its tokens say and is attended to as it should.
    fn check(&mut self) -> Result<()> {
        self.cache.check_invariants().map_err(anyhow::Error::msg)?;
        ensure!(self.cache.stats().sequences == self.live.len(), "sequences were lost");
        if self.live.is_empty() {
            return Ok(());
        }
        let at = self.rng.random_range(0..self.live.len());
        let Live { seq, tokens } = &self.live[at];
        ensure!(self.cache.len(*seq)? == tokens.len(), "a sequence has another length");
        if tokens.is_empty() {
            return Ok(());
        }
        let layer = self.rng.random_range(0..LAYERS);
        let (keys, values) = self.cache.read(layer, *seq, 0, tokens.len())?;
        let mut hash = hash(&[]);
        let hashes: Vec<u64> = tokens
            .iter()
            .map(|&token| {
                hash = next_hash(hash, token);
                hash
            })
            .collect();
        for (got, side) in [(&keys, 0), (&values, 1)] {
            let want = rows_of(&hashes, layer, side);
            let quantised = self.cache.config().keys.is_quantised();
            // A step of 4 bits over values from -2 to 2, and its rounding.
            let bound = if quantised { 0.15 } else { 0.0 };
            let close = got.iter().zip(&want).all(|(got, want)| (got - want).abs() <= bound);
            ensure!(close, "the cache holds other rows than were appended");
        }
        // The oracle is slow.
        if self.rng.random_bool(0.1) {
            let mut q = Array3::zeros((1, GROUP * HEADS, SIZE));
            q.map_inplace(|x| *x = self.rng.random_range(-1.0..1.0_f32));
            let options = Options::default();
            let batch = [Queries::last(*seq, 1)];
            let got = self.cache.attend(layer, q.view(), &batch, &options)?;
            // Near the end quantised storage is read in full precision.
            let full = self.cache.read(layer, *seq, 0, tokens.len())?;
            let (o, _) = attend_reference(
                q.view(),
                full.0.view(),
                full.1.view(),
                Rows::Last(1),
                &options,
                None,
            )?;
            let bound = if self.cache.config().keys.is_quantised() { 0.2 } else { 1e-5 };
            ensure!(got.o.dim() == o.dim(), "attention has another shape");
            let pairs = got.o.iter().zip(&o).map(|(&got, &want)| (f64::from(got), want));
            let worst = largest_difference(pairs);
            ensure!(worst <= bound, "attention is off by {worst}");
            self.counts.attended += 1;
        }
        Ok(())
    }
}

/// Stands for all tokens up to a row.
fn hash(tokens: &[u32]) -> u64 {
    tokens.iter().fold(0x9e37_79b9_7f4a_7c15, |hash, &token| next_hash(hash, token))
}

fn next_hash(hash: u64, token: u32) -> u64 {
    mix(hash.wrapping_mul(31).wrapping_add(u64::from(token) + 1))
}

/// Steele et al., SplitMix64 (2014).
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Keys (side 0) or values (side 1): multiples of 1/8 from -2 to 2, which every float storage holds.
fn rows_of(hashes: &[u64], layer: usize, side: usize) -> Array3<f32> {
    Array3::from_shape_fn((hashes.len(), HEADS, SIZE), |(row, head, column)| {
        let place = ((layer * 2 + side) * HEADS + head) * SIZE + column;
        (mix(hashes[row] ^ (place as u64) << 40) % 32) as f32 / 8.0 - 2.0
    })
}
