//! Errors against `f64`: ours, those of the naive algorithm and those of the peer.

use anyhow::Result;
use rayon::ThreadPool;
use serde::Serialize;

use super::peer::Peer;

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

/// The largest absolute errors.
#[derive(Debug, Serialize)]
pub(super) struct Errors {
    pub(super) ours: f64,
    /// Of the formula in plain loops, with all arithmetic in the compute type.
    pub(super) naive: f64,
    /// `None` without a peer.
    pub(super) peer: Option<f64>,
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
