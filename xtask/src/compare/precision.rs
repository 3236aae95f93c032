//! Errors against `f64`: ours, those of the naive algorithm and those of the peer.

use anyhow::Result;
use rayon::ThreadPool;
use serde::Serialize;

use tensor_utils::Element;

use super::peer::Peer;
use super::report::quantile_of_sorted;

/// Something whose error both sides can be asked for.
pub(super) struct PrecisionCase {
    pub(super) package: &'static str,
    pub(super) kernel: &'static str,
    /// The output and what is hard about the input.
    pub(super) name: String,
    pub(super) dtype: &'static str,
    pub(super) measure: Measure,
}

type Measure = Box<dyn Fn(Option<&mut Peer>, &ThreadPool) -> Result<Errors>>;

impl PrecisionCase {
    /// What tells it from the others.
    pub(super) fn title(&self) -> String {
        format!("{} {} {}", self.kernel, self.name, self.dtype)
    }

    pub(super) fn row(&self, peer: Option<&mut Peer>, pool: &ThreadPool) -> Result<PrecisionRow> {
        let errors = (self.measure)(peer, pool)?;
        Ok(PrecisionRow { kernel: self.kernel, case: self.name.clone(), dtype: self.dtype, errors })
    }
}

/// Absolute errors of every element of the outputs.
#[derive(Debug, Serialize)]
pub(super) struct Errors {
    pub(super) ours: Spread,
    /// Of the formula in plain loops, with all arithmetic in the compute type.
    pub(super) naive: Spread,
    /// `None` without a peer.
    pub(super) peer: Option<Spread>,
}

/// How errors are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) largest: f64,
    /// The 99th percentile.
    pub(super) p99: f64,
    pub(super) median: f64,
}

impl Spread {
    /// Of pairs `(got, want)`. A NaN is the largest of errors.
    pub(super) fn new<A: Element, B: Element>(pairs: impl Iterator<Item = (A, B)>) -> Self {
        let mut errors: Vec<_> =
            pairs.map(|(got, want)| (got.to_f64() - want.to_f64()).abs()).collect();
        errors.sort_by(f64::total_cmp);
        let at = |q| quantile_of_sorted(&errors, q);
        Self { largest: at(1.0), p99: at(0.99), median: at(0.5) }
    }
}

/// One case.
#[derive(Debug, Serialize)]
pub(super) struct PrecisionRow {
    pub(super) kernel: &'static str,
    pub(super) case: String,
    pub(super) dtype: &'static str,
    #[serde(flatten)]
    pub(super) errors: Errors,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_is_the_largest_error() {
        let pairs = [(1.0_f32, 1.0_f64), (f32::NAN, 0.0), (3.0, 1.0)];
        let spread = Spread::new(pairs.into_iter());
        assert!(spread.largest.is_nan() && spread.median == 2.0, "{spread:?}");
    }
}
