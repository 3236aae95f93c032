//! Attention of new queries over a cache of keys: grouped heads, causal, timed.
//!
//! Run with `cargo run --release -p attn-flash --example basic`.

use std::time::Instant;

use attn_flash::{Error, Options, attention, attention_reference};
use ndarray::Array4;

fn main() -> Result<(), Error> {
    // 8 query heads share 2 key/value heads; 512 new queries follow 1536 cached keys.
    let q = wave((1, 8, 512, 64), 0.37);
    let k = wave((1, 2, 2048, 64), 0.11);
    let v = wave((1, 2, 2048, 64), 0.05);
    let options = Options { causal: true, ..Options::default() };

    let start = Instant::now();
    let result = attention(q.view(), k.view(), v.view(), &options)?;
    let time = start.elapsed();

    println!("o {:?}, lse {:?} in {time:.1?}", result.o.dim(), result.lse.dim());
    println!("head 0, first query: o = {:.4} ..", result.o[[0, 0, 0, 0]]);
    // exp(lse) is the sum of the exponentials of the scores of the keys that a query sees.
    println!("its lse: {:.4}; ln of its 1537 keys: {:.4}", result.lse[[0, 0, 0]], 1537_f32.ln());

    let exact = attention_reference(q.view(), k.view(), v.view(), &options)?;
    let error = result.o.iter().zip(&exact.o).map(|(&o, exact)| (f64::from(o) - exact).abs());
    println!("largest error against f64: {:.1e}", error.fold(0.0, f64::max));
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
