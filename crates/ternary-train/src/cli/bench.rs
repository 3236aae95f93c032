//! `bench`: packed products and decoding against what the machine can do, in one run.

mod decoding;
mod machine;
mod products;

use anyhow::Result;
use clap::Args;

/// Measures packed products against the machine's limits, and packed against float decoding.
#[derive(Args)]
pub(crate) struct Bench {
    /// Leave out decoding with a random model of the shape of Qwen3-0.6B, which needs 6 GB.
    #[arg(long)]
    products_only: bool,
}

impl Bench {
    pub(crate) fn run(self) -> Result<()> {
        products::run()?;
        if !self.products_only {
            decoding::run()?;
        }
        Ok(())
    }
}

/// The median time of `count` calls, in seconds, after one that does not count.
fn median(count: usize, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    call()?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let start = std::time::Instant::now();
        call()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_unstable_by(f64::total_cmp);
    Ok(times[count / 2])
}
