//! Many conversations that begin with the same prompt: the keys of the prompt are read once, in one
//! call for all conversations, and the result is joined with that over each one's own keys.
//!
//! Run with `cargo run --release -p attn-flash --example prefix_sharing`.

use std::time::Instant;

use attn_flash::{Error, Options, attention, merge_states};
use ndarray::{Array4, Axis, concatenate};

const CONVERSATIONS: usize = 32;
const PROMPT: usize = 4096;
const OWN: usize = 50;
const HEADS: usize = 8;
const SIZE: usize = 64;

fn main() -> Result<(), Error> {
    let q = wave((CONVERSATIONS, HEADS, 1, SIZE), 0.37);
    let prompt_k = wave((1, HEADS, PROMPT, SIZE), 0.11);
    let prompt_v = wave((1, HEADS, PROMPT, SIZE), 0.05);
    let own_k = wave((CONVERSATIONS, HEADS, OWN, SIZE), 0.13);
    let own_v = wave((CONVERSATIONS, HEADS, OWN, SIZE), 0.07);
    let options = Options::default();

    let start = Instant::now();
    // For the prompt the conversations are queries of one batch entry: [1, H, conversations, D].
    let together = q.view().permuted_axes([2, 1, 0, 3]);
    let prompt = attention(together, prompt_k.view(), prompt_v.view(), &options)?;
    let own = attention(q.view(), own_k.view(), own_v.view(), &options)?;
    let merged = merge_states(
        prompt.o.view().permuted_axes([2, 1, 0, 3]),
        prompt.lse.view().permuted_axes([2, 1, 0]),
        own.o.view(),
        own.lse.view(),
    )?;
    let shared_time = start.elapsed();

    // The same without sharing: every conversation has its copy of the prompt.
    let copies = |prompt: &Array4<f32>, own: &Array4<f32>| {
        let prompt = prompt.broadcast((CONVERSATIONS, HEADS, PROMPT, SIZE));
        prompt.and_then(|prompt| concatenate(Axis(2), &[prompt, own.view()]).ok())
    };
    let (Some(k), Some(v)) = (copies(&prompt_k, &own_k), copies(&prompt_v, &own_v)) else {
        unreachable!("the shapes agree in all axes but the keys");
    };
    let start = Instant::now();
    let whole = attention(q.view(), k.view(), v.view(), &options)?;
    let whole_time = start.elapsed();

    let difference = merged.o.iter().zip(&whole.o).map(|(a, b)| (a - b).abs());
    println!("{CONVERSATIONS} conversations, {PROMPT} shared keys, {OWN} keys of their own");
    println!("prompt shared: {shared_time:.1?}; prompt copied: {whole_time:.1?}");
    println!("largest difference: {:.1e}", difference.fold(0.0, f32::max));
    Ok(())
}

/// Something to attend to.
fn wave(shape: (usize, usize, usize, usize), step: f32) -> Array4<f32> {
    let mut phase = 0.0;
    Array4::from_shape_simple_fn(shape, || {
        phase = (phase + step) % 7.1;
        f32::sin(phase * phase)
    })
}
