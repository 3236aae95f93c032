//! A mask as a Rust type: documents packed one after the other, none of which looks into another.
//! Tiles between two documents are skipped, so the work is that of the documents alone.
//!
//! Run with `cargo run --release -p attn-flash --example custom_mask`.

use std::time::Instant;

use attn_flash::{Coverage, Error, Mask, Options, Pair, Tile, attention};
use ndarray::Array4;

/// The document of each position, in ascending order.
#[derive(Debug)]
struct Documents(Vec<usize>);

impl Mask for Documents {
    fn visible(&self, at: Pair) -> bool {
        self.0[at.query] == self.0[at.key]
    }

    // The documents are in order: the first and the last position of a range tell about all of it.
    fn coverage(&self, tile: Tile) -> Coverage {
        let (first_query, last_query) = (self.0[tile.queries.start], self.0[tile.queries.end - 1]);
        let (first_key, last_key) = (self.0[tile.keys.start], self.0[tile.keys.end - 1]);
        if last_query < first_key || last_key < first_query {
            Coverage::Skip
        } else if first_query == last_query && first_key == last_key {
            Coverage::Full
        } else {
            Coverage::Partial
        }
    }
}

/// The same mask without an answer for tiles: every pair is asked.
#[derive(Debug)]
struct PairByPair(Documents);

impl Mask for PairByPair {
    fn visible(&self, at: Pair) -> bool {
        self.0.visible(at)
    }
}

fn main() -> Result<(), Error> {
    let lengths = [1024, 300, 2000, 700, 72];
    let documents: Vec<usize> =
        lengths.iter().enumerate().flat_map(|(i, &length)| vec![i; length]).collect();
    let n = documents.len();
    let (q, k, v) =
        (wave((1, 4, n, 64), 0.37), wave((1, 4, n, 64), 0.11), wave((1, 4, n, 64), 0.05));
    let plain = Options { causal: true, ..Options::default() };
    let with_tiles = plain.clone().with_user_mask(Documents(documents.clone()));
    let by_pairs = plain.clone().with_user_mask(PairByPair(Documents(documents)));

    let start = Instant::now();
    attention(q.view(), k.view(), v.view(), &plain)?;
    println!("causal over all {n} positions: {:.1?}", start.elapsed());
    let start = Instant::now();
    let skipped = attention(q.view(), k.view(), v.view(), &with_tiles)?;
    println!("causal in {} documents, tiles skipped: {:.1?}", lengths.len(), start.elapsed());
    let start = Instant::now();
    let asked = attention(q.view(), k.view(), v.view(), &by_pairs)?;
    println!("the same, every pair asked: {:.1?}", start.elapsed());
    println!("same result: {}", skipped == asked);

    let share: usize = lengths.iter().map(|length| length * length).sum();
    println!(
        "{:.0} % of the pairs are inside of a document",
        100.0 * share as f64 / (n * n) as f64
    );
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
