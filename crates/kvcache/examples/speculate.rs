//! One cycle of speculative decoding over the cache: a tree of guesses is appended, attended to in one
//! call, and compacted to the path that was accepted.
//!
//! ```sh
//! cargo run --release -p kvcache --example speculate
//! ```

use kvcache::{Cache, Config, Error, Options, Queries, Storage};
use ndarray::Array3;

fn main() -> Result<(), Error> {
    let config = Config::new(1, 2, 64).stored_as(Storage::Bf16);
    let mut cache = Cache::new(&config)?;
    let seq = cache.create()?;
    let rows = |n: usize, seed: usize| {
        Array3::from_shape_fn((n, 2, 64), |(i, g, d)| ((seed + 7 * i + 3 * g + d) as f32).sin())
    };
    cache.append(0, seq, rows(100, 0).view(), rows(100, 1).view())?;

    // Two guesses for the next token, the first with two continuations.
    let parents = [-1, -1, 0, 0];
    cache.append(0, seq, rows(4, 2).view(), rows(4, 3).view())?;
    let q = Array3::<f32>::ones((4, 8, 64));
    let result = cache.attend(0, q.view(), &[Queries::tree(seq, &parents)], &Options::default())?;
    println!("{} nodes verified, output {:?}", parents.len(), result.o.dim());

    // The model agrees with node 0 and its second child.
    cache.compact(seq, 100, &[0, 3])?;
    println!("{} rows: the prompt and the accepted path", cache.len(seq)?);
    Ok(())
}
