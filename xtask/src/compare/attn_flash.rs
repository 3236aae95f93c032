//! The forward pass of attention against `scaled_dot_product_attention`.

use anyhow::Result;
use attn_flash::{
    Options, Tiling, Workspace, attention_into, attention_naive, attention_reference,
};
use ndarray::{Array3, Array4, ArrayRef, Dimension};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tensor_utils::{Element, bf16, testing};

use super::duel::{Case, Contest};
use super::peer::{Input, Peer};
use super::precision::{Errors, PrecisionCase, Spread};
use crate::cases::Stored;

/// The sizes of a call; values are as wide as keys.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) key_heads: usize,
    pub(super) queries: usize,
    pub(super) keys: usize,
    pub(super) head_size: usize,
    pub(super) causal: bool,
}

impl Sizes {
    /// As many queries as keys, and a key/value head for every query head.
    pub(super) fn square(batch: usize, heads: usize, length: usize, head_size: usize) -> Self {
        let (queries, keys, causal) = (length, length, true);
        Self { batch, heads, key_heads: heads, queries, keys, head_size, causal }
    }

    pub(super) fn full(self) -> Self {
        Self { causal: false, ..self }
    }

    pub(super) fn name(&self) -> String {
        let Self { batch, heads, key_heads, queries, keys, head_size, causal } = *self;
        let mask = if causal { "causal" } else { "full" };
        if (heads, queries) == (key_heads, keys) {
            format!("[{batch},{heads},{queries},{head_size}] {mask}")
        } else {
            let kv = format!("[{batch},{key_heads},{keys},{head_size}]");
            format!("q [{batch},{heads},{queries},{head_size}] kv {kv} {mask}")
        }
    }

    /// A multiplication and an addition for each visible pair and element, in each of `products`.
    pub(super) fn flops(&self, products: usize) -> f64 {
        let pairs = if self.causal {
            self.queries as f64 * (self.keys as f64 + 1.0) / 2.0
        } else {
            self.queries as f64 * self.keys as f64
        };
        2.0 * (products * self.batch * self.heads * self.head_size) as f64 * pairs
    }

    /// `[batch, heads, length, head size]`, uniform with variance 1, the variance of queries and
    /// keys after a normalisation.
    pub(super) fn random<T: Element>(
        &self,
        rng: &mut ChaCha8Rng,
        heads: usize,
        length: usize,
    ) -> Array4<T> {
        let reach = 3.0_f64.sqrt();
        let shape = (self.batch, heads, length, self.head_size);
        Array4::from_shape_simple_fn(shape, || T::from_f64(rng.random_range(-reach..reach)))
    }

    /// Elements of q, k, v and o.
    pub(super) fn elements(&self) -> f64 {
        let rows = 2 * self.heads * self.queries + 2 * self.key_heads * self.keys;
        (self.batch * rows * self.head_size) as f64
    }
}

/// Training shapes, one head alone, and one step of decoding with grouped heads.
pub(super) fn cases() -> Vec<Case> {
    let decode = Sizes {
        batch: 8,
        heads: 32,
        key_heads: 8,
        queries: 1,
        keys: 4096,
        head_size: 128,
        causal: false,
    };
    vec![
        case::<f32>(Sizes::square(2, 8, 4096, 64), 1e-4),
        case::<f32>(Sizes::square(2, 8, 4096, 64).full(), 1e-4),
        case::<f32>(Sizes::square(1, 16, 2048, 128), 1e-4),
        case::<f32>(Sizes::square(8, 12, 512, 64), 1e-4),
        case::<bf16>(Sizes::square(2, 8, 4096, 64), 3e-2),
        case::<f32>(Sizes::square(1, 1, 8192, 64), 1e-4),
        case::<f32>(decode, 1e-4),
    ]
}

fn case<T: Element + Stored>(sizes: Sizes, tolerance: f64) -> Case {
    Case {
        package: "attn-flash",
        kernel: "attn-flash",
        name: sizes.name(),
        dtype: T::NAME,
        // Scores and output.
        flops: sizes.flops(2),
        bytes: sizes.elements() * size_of::<T>() as f64,
        tolerance,
        prepare: Box::new(move || Ok(Box::new(Forward::<T>::new(sizes)?))),
    }
}

/// Our side.
struct Forward<T: Element> {
    causal: bool,
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    o: Array4<T>,
    lse: Array3<T::Acc>,
    workspace: Workspace<T::Acc>,
}

impl<T: Element> Forward<T> {
    fn new(sizes: Sizes) -> Result<Self> {
        let Sizes { batch, heads, key_heads, queries, keys, head_size, causal } = sizes;
        let rng = &mut ChaCha8Rng::seed_from_u64(2);
        Ok(Self {
            causal,
            q: sizes.random(rng, heads, queries),
            k: sizes.random(rng, key_heads, keys),
            v: sizes.random(rng, key_heads, keys),
            o: Array4::default((batch, heads, queries, head_size)),
            lse: Array3::default((batch, heads, queries)),
            workspace: Workspace::new(head_size, head_size, &Tiling::default())?,
        })
    }
}

impl<T: Element + Stored> Contest for Forward<T> {
    fn peer_operation(&self) -> (&'static str, Value) {
        ("sdpa", json!({"causal": self.causal}))
    }

    fn inputs(&self) -> Vec<Input> {
        vec![Input::new("q", &self.q), Input::new("k", &self.k), Input::new("v", &self.v)]
    }

    fn run(&mut self) -> Result<()> {
        let options = Options { causal: self.causal, ..Options::default() };
        attention_into(
            self.o.view_mut(),
            self.lse.view_mut(),
            self.q.view(),
            self.k.view(),
            self.v.view(),
            &options,
            &mut self.workspace,
        )?;
        Ok(())
    }

    fn largest_difference(&self, peer: &mut Peer) -> Result<f64> {
        let theirs = peer.output::<T>("o")?.into_dimensionality()?;
        Ok(largest_difference(&self.o, &theirs))
    }
}

/// Scores of ordinary size, and scores that differ by hundreds.
pub(super) fn precision() -> Vec<PrecisionCase> {
    let sizes = Sizes::square(1, 4, 512, 64);
    [1.0, 8.0]
        .into_iter()
        .flat_map(|spread| {
            [precision_case::<f32>(sizes, spread), precision_case::<bf16>(sizes, spread)]
        })
        .collect()
}

/// Queries and keys of standard deviation `spread`.
fn precision_case<T: Element + Stored>(sizes: Sizes, spread: f64) -> PrecisionCase {
    PrecisionCase {
        package: "attn-flash",
        kernel: "attn-flash",
        name: format!("o, {}, q and k of deviation {spread}", sizes.name()),
        dtype: T::NAME,
        measure: Box::new(move |peer, pool| {
            let mut forward = Forward::<T>::new(sizes)?;
            for array in [&mut forward.q, &mut forward.k] {
                array.mapv_inplace(|x| T::from_f64(x.to_f64() * spread));
            }
            pool.install(|| forward.run())?;
            let options = Options { causal: sizes.causal, ..Options::default() };
            let (q, k, v) = (forward.q.view(), forward.k.view(), forward.v.view());
            let want = attention_reference(q, k, v, &options)?.o;
            let naive = attention_naive(q, k, v, &options)?.o;
            let theirs = peer.map(|peer| -> Result<Array4<T>> {
                peer.compute(&forward)?;
                Ok(peer.output("o")?.into_dimensionality()?)
            });
            Ok(Errors {
                ours: spread_of(&forward.o, &want),
                naive: spread_of(&naive, &want),
                peer: theirs.transpose()?.map(|o| spread_of(&o, &want)),
            })
        }),
    }
}

fn spread_of<A: Element, B: Element>(got: &Array4<A>, want: &Array4<B>) -> Spread {
    Spread::new(got.iter().copied().zip(want.iter().copied()))
}

/// NaN if either array has a NaN.
pub(super) fn largest_difference<A: Element, B: Element, D: Dimension>(
    ours: &ArrayRef<A, D>,
    theirs: &ArrayRef<B, D>,
) -> f64 {
    assert_eq!(ours.shape(), theirs.shape());
    let pairs = ours.iter().zip(theirs);
    testing::largest_difference(pairs.map(|(ours, theirs)| (ours.to_f64(), theirs.to_f64())))
}
