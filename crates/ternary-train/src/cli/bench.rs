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

/// Measurements of one thing and another in turn; the first does not count.
struct Pairs<const N: usize> {
    is_warm: bool,
    values: [Vec<f64>; N],
}

impl<const N: usize> Default for Pairs<N> {
    fn default() -> Self {
        Self { is_warm: false, values: [const { Vec::new() }; N] }
    }
}

impl<const N: usize> Pairs<N> {
    fn add(&mut self, values: [f64; N]) {
        if self.is_warm {
            self.values.iter_mut().zip(values).for_each(|(list, value)| list.push(value));
        }
        self.is_warm = true;
    }

    /// The median of each value.
    fn medians(mut self) -> [f64; N] {
        self.values.each_mut().map(|list| {
            list.sort_unstable_by(f64::total_cmp);
            list[list.len() / 2]
        })
    }
}
