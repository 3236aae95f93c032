//! The backward pass of attention against the one of `scaled_dot_product_attention`, without the
//! forward passes.

use anyhow::Result;
use attn_flash::{Options, attention};
use attn_flash_bwd::{
    GradientsMut, Inputs, Tiling, Workspace, attention_backward_into, attention_backward_naive,
    attention_backward_reference,
};
use ndarray::{Array3, Array4};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;
use serde_json::{Value, json};
use tensor_utils::{Element, bf16, testing};

use super::attn_flash::{Sizes, largest_difference};
use super::duel::{Case, Contest};
use super::peer::{Input, Peer};
use super::precision::{Errors, PrecisionCase, Spread};
use crate::cases::Stored;

/// Training shapes, and one head alone.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case::<f32>(Sizes::square(2, 8, 4096, 64), 1e-4),
        case::<f32>(Sizes::square(2, 8, 4096, 64).full(), 1e-4),
        case::<f32>(Sizes::square(8, 12, 512, 64), 1e-4),
        case::<bf16>(Sizes::square(2, 8, 4096, 64), 0.25),
        case::<f32>(Sizes::square(1, 16, 2048, 128), 1e-4),
        case::<f32>(Sizes::square(1, 1, 8192, 64), 1e-4),
    ]
}

fn case<T: Element + Stored>(sizes: Sizes, tolerance: f64) -> Case {
    Case {
        package: "attn-flash-bwd",
        kernel: "attn-flash-bwd",
        name: sizes.name(),
        dtype: T::NAME,
        // Scores, dP, dq, dk and dv.
        flops: sizes.flops(5),
        // q, k, v, o, do, dq, dk and dv.
        bytes: 2.0 * sizes.elements() * size_of::<T>() as f64,
        tolerance,
        prepare: Box::new(move || Ok(Box::new(Backward::<T>::new(sizes)?))),
    }
}

/// The gradients of queries, keys and values, whichever is the worst.
pub(super) fn precision() -> Vec<PrecisionCase> {
    let sizes = Sizes::square(1, 4, 384, 64);
    vec![precision_case::<f32>(sizes), precision_case::<bf16>(sizes)]
}

fn precision_case<T: Element + Stored>(sizes: Sizes) -> PrecisionCase {
    PrecisionCase {
        package: "attn-flash-bwd",
        kernel: "attn-flash-bwd",
        name: format!("dq, dk and dv, {}", sizes.name()),
        dtype: T::NAME,
        measure: Box::new(move |peer, pool| {
            let mut backward = Backward::<T>::new(sizes)?;
            pool.install(|| backward.run())?;
            let options = Options { causal: sizes.causal, ..Options::default() };
            let Backward { q, k, v, o, lse, d_o, .. } = &backward;
            let inputs = saved(q, k, v, o, lse, d_o);
            let want = attention_backward_reference(&inputs, &options)?;
            let want = [want.dq, want.dk, want.dv];
            let naive = attention_backward_naive(&inputs, &options)?;
            let Backward { dq, dk, dv, .. } = &backward;
            let theirs = peer.map(|peer| {
                peer.compute(&backward)?;
                gradients::<T>(peer)
            });
            Ok(Errors {
                ours: spread_of([dq, dk, dv], &want),
                naive: spread_of([&naive.dq, &naive.dk, &naive.dv], &want),
                peer: theirs.transpose()?.map(|theirs| spread_of(theirs.each_ref(), &want)),
            })
        }),
    }
}

/// Of the elements of three arrays.
fn spread_of<A: Element, B: Element>(got: [&Array4<A>; 3], want: &[Array4<B>; 3]) -> Spread {
    let pairs = got.into_iter().zip(want);
    Spread::new(pairs.flat_map(|(got, want)| got.iter().copied().zip(want.iter().copied())))
}

/// The largest difference of three arrays; NaN if one has a NaN.
fn worst<A: Element, B: Element>(got: [&Array4<A>; 3], want: &[Array4<B>; 3]) -> f64 {
    let differences = got.into_iter().zip(want).map(|(got, want)| largest_difference(got, want));
    testing::largest_difference(differences.map(|difference| (difference, 0.0)))
}

/// Our side.
struct Backward<T: Element> {
    causal: bool,
    q: Array4<T>,
    k: Array4<T>,
    v: Array4<T>,
    o: Array4<T>,
    lse: Array3<T::Acc>,
    d_o: Array4<T>,
    dq: Array4<T>,
    dk: Array4<T>,
    dv: Array4<T>,
    workspace: Workspace<T>,
}

impl<T: Element> Backward<T> {
    fn new(sizes: Sizes) -> Result<Self> {
        let Sizes { heads, key_heads, queries, keys, causal, .. } = sizes;
        let rng = &mut ChaCha8Rng::seed_from_u64(3);
        let q = sizes.random(rng, heads, queries);
        let k = sizes.random(rng, key_heads, keys);
        let v = sizes.random(rng, key_heads, keys);
        let d_o = sizes.random(rng, heads, queries);
        let options = Options { causal, ..Options::default() };
        let forward = attention(q.view(), k.view(), v.view(), &options)?;
        let (o, lse) = (forward.o, forward.lse);
        let workspace = Workspace::new(&saved(&q, &k, &v, &o, &lse, &d_o), &Tiling::default())?;
        let [dq, dk, dv] = [&q, &k, &v].map(|x| Array4::default(x.dim()));
        Ok(Self { causal, q, k, v, o, lse, d_o, dq, dk, dv, workspace })
    }
}

fn saved<'a, T: Element>(
    q: &'a Array4<T>,
    k: &'a Array4<T>,
    v: &'a Array4<T>,
    o: &'a Array4<T>,
    lse: &'a Array3<T::Acc>,
    d_o: &'a Array4<T>,
) -> Inputs<'a, T> {
    Inputs {
        q: q.view(),
        k: k.view(),
        v: v.view(),
        o: o.view(),
        lse: lse.view(),
        d_o: d_o.view(),
        d_lse: None,
    }
}

impl<T: Element + Stored> Contest for Backward<T> {
    fn peer_operation(&self) -> (&'static str, Value) {
        ("sdpa_backward", json!({"causal": self.causal}))
    }

    fn inputs(&self) -> Vec<Input> {
        vec![
            Input::new("q", &self.q),
            Input::new("k", &self.k),
            Input::new("v", &self.v),
            Input::new("do", &self.d_o),
        ]
    }

    fn run(&mut self) -> Result<()> {
        let Self { causal, q, k, v, o, lse, d_o, dq, dk, dv, workspace } = self;
        let gradients = GradientsMut {
            dq: dq.view_mut(),
            dk: dk.view_mut(),
            dv: dv.view_mut(),
            delta: None,
            dbias: None,
            dsinks: None,
        };
        let options = Options { causal: *causal, ..Options::default() };
        attention_backward_into(gradients, &saved(q, k, v, o, lse, d_o), &options, workspace)?;
        Ok(())
    }

    fn largest_difference(&self, peer: &mut Peer) -> Result<f64> {
        Ok(worst([&self.dq, &self.dk, &self.dv], &gradients::<T>(peer)?))
    }
}

/// The gradients that the peer has computed.
fn gradients<T: Stored>(peer: &mut Peer) -> Result<[Array4<T>; 3]> {
    let mut output = |name| -> Result<_> { Ok(peer.output(name)?.into_dimensionality()?) };
    Ok([output("dq")?, output("dk")?, output("dv")?])
}
