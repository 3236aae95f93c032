//! Decoding over the cache against `scaled_dot_product_attention` with one query.

use anyhow::Result;
use kvcache::{Cache, Config, Layout, Options, Queries, SeqId, Storage, Workspace};
use ndarray::{Array2, Array3, Array4, Axis};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde_json::{Value, json};
use tensor_utils::{Element, bf16};

use super::attn_flash::{Sizes, largest_difference};
use super::duel::{Case, Contest};
use super::peer::{Input, Peer};
use crate::cases::Stored;

/// Rows of a page.
const PAGE: usize = 64;

/// Batches and a single long sequence, grouped heads and not, each storage against the peer's bf16 where
/// it has none of its own.
pub(super) fn cases() -> Vec<Case> {
    let sizes = |batch, key_heads, keys| Sizes {
        batch,
        heads: 32,
        key_heads,
        queries: 1,
        keys,
        head_size: 128,
        causal: false,
    };
    let batch = sizes(8, 8, 4096);
    vec![
        case::<f32>(batch, Storage::F32, false, 1e-4),
        case::<bf16>(batch, Storage::Bf16, false, 1e-2),
        case::<bf16>(batch, Storage::Int8, false, 3e-2),
        case::<bf16>(batch, Storage::Int4, false, 0.2),
        case::<f32>(batch, Storage::F32, true, 1e-4),
        case::<bf16>(batch, Storage::Bf16, true, 1e-2),
        case::<bf16>(sizes(1, 8, 32768), Storage::Bf16, false, 1e-2),
        case::<f32>(sizes(8, 32, 4096), Storage::F32, false, 1e-4),
    ]
}

fn case<T>(sizes: Sizes, storage: Storage, shared: bool, tolerance: f64) -> Case
where
    T: Element<Acc = f32> + Stored,
{
    let prefix = if shared { ", one prefix" } else { "" };
    let sequences = if shared { 1 } else { sizes.batch };
    let numbers = 2 * sequences * sizes.key_heads * sizes.keys * sizes.head_size;
    Case {
        package: "kvcache",
        kernel: "kvcache",
        name: format!("{}, stored {}{prefix}", sizes.name(), storage.name()),
        dtype: T::NAME,
        flops: sizes.flops(2),
        bytes: (numbers * storage.bits() / 8) as f64,
        tolerance,
        prepare: Box::new(move || Ok(Box::new(Decode::<T>::new(sizes, storage, shared)?))),
    }
}

/// Our side, and the rows as the peer takes them.
struct Decode<T: Element> {
    cache: Cache,
    seqs: Vec<SeqId>,
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    packed: Array3<T>,
    o: Array3<T>,
    lse: Array2<f32>,
    workspace: Workspace,
}

impl<T: Element<Acc = f32>> Decode<T> {
    fn new(sizes: Sizes, storage: Storage, shared: bool) -> Result<Self> {
        let Sizes { batch, heads, key_heads, queries, keys, head_size, .. } = sizes;
        let rng = &mut ChaCha8Rng::seed_from_u64(2);
        let q = sizes.random::<T>(rng, heads, queries);
        let (mut k, mut v) =
            (sizes.random::<T>(rng, key_heads, keys), sizes.random::<T>(rng, key_heads, keys));
        let pages = batch * keys.div_ceil(PAGE);
        let config = Config { page_size: PAGE, ..Config::new(1, key_heads, head_size) }
            .stored_as(storage)
            .with_layout(Layout::Paged { pages });
        let mut cache = Cache::new(&config)?;
        let mut seqs: Vec<SeqId> = Vec::new();
        for entry in 0..batch {
            if shared && entry > 0 {
                for rows in [&mut k, &mut v] {
                    let first = rows.index_axis(Axis(0), 0).to_owned();
                    rows.index_axis_mut(Axis(0), entry).assign(&first);
                }
                seqs.push(cache.fork(seqs[0])?);
                continue;
            }
            let seq = cache.create()?;
            let rows =
                |x: &Array4<T>| x.index_axis(Axis(0), entry).permuted_axes([1, 0, 2]).to_owned();
            cache.append(0, seq, rows(&k).view(), rows(&v).view())?;
            seqs.push(seq);
        }
        let packed = q.index_axis(Axis(2), 0).to_owned();
        Ok(Self {
            cache,
            seqs,
            packed,
            o: Array3::default((batch, heads, head_size)),
            lse: Array2::default((batch, heads)),
            q,
            k,
            v,
            workspace: Workspace::new(),
        })
    }
}

impl<T: Element<Acc = f32> + Stored> Contest for Decode<T> {
    fn peer_operation(&self) -> (&'static str, Value) {
        ("sdpa", json!({"causal": false}))
    }

    fn inputs(&self) -> Vec<Input> {
        vec![Input::new("q", &self.q), Input::new("k", &self.k), Input::new("v", &self.v)]
    }

    fn run(&mut self) -> Result<()> {
        let batch: Vec<_> = self.seqs.iter().map(|&seq| Queries::last(seq, 1)).collect();
        self.cache.attend_into(
            self.o.view_mut(),
            self.lse.view_mut(),
            0,
            self.packed.view(),
            &batch,
            &Options::default(),
            &mut self.workspace,
        )?;
        Ok(())
    }

    fn largest_difference(&self, peer: &mut Peer) -> Result<f64> {
        let theirs = peer.output::<T>("o")?.into_dimensionality()?;
        let ours = self.o.clone().insert_axis(Axis(2));
        Ok(largest_difference(&ours, &theirs))
    }
}
