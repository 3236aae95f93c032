//! The figures, as a table and as JSON.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use super::duel::Case;
use super::machine::{Machine, Roof};
use super::precision::{Errors, PrecisionRow};
use crate::workspace;

/// Everything one run has measured.
#[derive(Serialize)]
pub(super) struct Report {
    commit: String,
    /// Not only a crate or some cases.
    whole: bool,
    machine: Machine,
    /// Names and versions.
    peers: Vec<String>,
    notes: &'static [&'static str],
    rows: Vec<Row>,
    precision: Vec<PrecisionRow>,
}

const NOTES: &[&str] = &[
    "ours and a peer took turns in one run, on the same arrays and as many threads; times are medians",
    "ratio: peer_ms / ours_ms, above 1 we are faster; median and quartiles are over the pairs of turns",
    "ours writes to arrays that exist, with a workspace that exists, unless the case says allocating",
    "PyTorch allocates its result (no_grad; a backward pass alone is autograd.grad on a graph that is kept)",
    "gflops: operations the result needs, so half of them with a causal mask; gb_s: inputs and outputs once",
    "fraction_of_peak: of the peak of arithmetic or of reading memory, whichever is nearer, measured after each of our turns; median",
    "peak MB: memory of the whole process during the case, code and libraries included",
    "fraction_of_stream: of the bandwidth of a[i] = b[i] + c[i], measured and counted the same way",
    "the peak and the bandwidths above the table are the best of the whole run, which no turn beside them may have seen",
];

/// One case.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    kernel: &'static str,
    case: String,
    dtype: &'static str,
    threads: usize,
    ours_ms: f64,
    /// Peak of the process in MB.
    ours_mb: Option<f64>,
    #[serde(flatten)]
    against: Option<Against>,
    gflops: f64,
    gb_s: f64,
    fraction_of_peak: f64,
    fraction_of_stream: f64,
}

/// The peer's side of a case.
#[derive(Debug, Serialize)]
pub(super) struct Against {
    peer: String,
    peer_ms: f64,
    /// Median of the ratios of the pairs.
    ratio: f64,
    /// First and third quartile of the ratios of the pairs.
    ratio_quartiles: [f64; 2],
    pairs: usize,
    /// Largest difference between the two results.
    max_error: f64,
    /// Peak of its process in MB.
    peer_mb: Option<f64>,
}

impl Against {
    /// From the seconds of each turn.
    pub(super) fn new(
        peer: String,
        max_error: f64,
        peer_mb: Option<f64>,
        ours: &[f64],
        theirs: &[f64],
    ) -> Self {
        let ratios: Vec<_> = ours.iter().zip(theirs).map(|(ours, theirs)| theirs / ours).collect();
        Self {
            peer,
            peer_ms: quantile(theirs, 0.5) * 1e3,
            ratio: quantile(&ratios, 0.5),
            ratio_quartiles: [quantile(&ratios, 0.25), quantile(&ratios, 0.75)],
            pairs: ours.len(),
            max_error,
            peer_mb,
        }
    }
}

impl Row {
    /// From the seconds of each of our turns, and what the machine could do right after it.
    pub(super) fn new(
        case: &Case,
        threads: usize,
        ours: &[f64],
        roofs: &[Roof],
        ours_mb: Option<f64>,
        against: Option<Against>,
    ) -> Self {
        let our_time = quantile(ours, 0.5);
        let of = |work: f64, roof: fn(&Roof) -> f64| {
            let pairs = ours.iter().zip(roofs);
            let fractions: Vec<_> =
                pairs.map(|(seconds, at)| work / seconds / 1e9 / roof(at)).collect();
            quantile(&fractions, 0.5)
        };
        let of_arithmetic = of(case.flops, |roof| roof.peak_gflops);
        Self {
            kernel: case.kernel,
            case: case.name.clone(),
            dtype: case.dtype,
            threads,
            ours_ms: our_time * 1e3,
            ours_mb,
            against,
            gflops: case.flops / our_time / 1e9,
            gb_s: case.bytes / our_time / 1e9,
            fraction_of_peak: of_arithmetic.max(of(case.bytes, |roof| roof.read_gb_s)),
            fraction_of_stream: of(case.bytes, |roof| roof.stream_gb_s),
        }
    }
}

impl Report {
    pub(super) fn new(
        whole: bool,
        machine: Machine,
        peers: Vec<String>,
        rows: Vec<Row>,
        precision: Vec<PrecisionRow>,
    ) -> Self {
        let commit = workspace::commit();
        Self { commit, whole, machine, peers, notes: NOTES, rows, precision }
    }

    /// Writes the figures as JSON.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            "kernel",
            "case",
            "dtype",
            "peer",
            "ours ms",
            "peer ms",
            "ratio",
            "quartiles",
            "GFLOP/s",
            "GB/s",
            "of peak",
            "of stream",
            "max error",
            "peak MB, ours / peer",
        ]);
        for row in &self.rows {
            let measured = |show: fn(&Against) -> String| {
                row.against.as_ref().map_or_else(|| "not measured".to_owned(), show)
            };
            let figures = [
                row.against.as_ref().map_or_else(String::new, |against| against.peer.clone()),
                format!("{:.3}", row.ours_ms),
                measured(|against| format!("{:.3}", against.peer_ms)),
                measured(|against| format!("{:.2}x", against.ratio)),
                measured(|against| {
                    let [low, high] = against.ratio_quartiles;
                    format!("{low:.2} to {high:.2}")
                }),
                format!("{:.0}", row.gflops),
                format!("{:.1}", row.gb_s),
                format!("{:.0} %", row.fraction_of_peak * 100.0),
                format!("{:.0} %", row.fraction_of_stream * 100.0),
                measured(|against| format!("{:.0e}", against.max_error)),
                [row.ours_mb, row.against.as_ref().and_then(|against| against.peer_mb)]
                    .map(|mb| mb.map_or_else(|| "?".to_owned(), |mb| format!("{mb:.0}")))
                    .join(" / "),
            ];
            let names = [row.kernel, &row.case, row.dtype].map(Cell::new);
            let right = |text| Cell::new(text).set_alignment(CellAlignment::Right);
            table.add_row(names.into_iter().chain(figures.map(right)));
        }
        let peers = if self.peers.is_empty() { "not measured" } else { &self.peers.join(", ") };
        writeln!(f, "{}\npeers: {peers}", self.machine)?;
        if !self.rows.is_empty() {
            writeln!(f, "{table}")?;
        }
        if !self.precision.is_empty() {
            writeln!(f, "largest error against f64\n{}", precision_table(&self.precision))?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "- {note}"))
    }
}

fn precision_table(rows: &[PrecisionRow]) -> Table {
    let mut table = Table::new();
    let header = ["kernel", "case", "dtype", "ours", "naive", "peer", "ours p99", "ours median"];
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header);
    for row in rows {
        let Errors { ours, naive, peer } = row.errors;
        let names = [row.kernel, &row.case, row.dtype].map(Cell::new);
        let peer = peer.map(|peer| peer.largest);
        let figures =
            [Some(ours.largest), Some(naive.largest), peer, Some(ours.p99), Some(ours.median)];
        let figures = figures.map(|error| match error {
            Some(error) => format!("{error:.1e}"),
            None => "not measured".to_owned(),
        });
        let right = |text| Cell::new(text).set_alignment(CellAlignment::Right);
        table.add_row(names.into_iter().chain(figures.map(right)));
    }
    table
}

/// The `q`-quantile, between neighbours by linear interpolation.
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile_of_sorted(&sorted, q)
}

/// [`quantile`] of values in order.
pub(super) fn quantile_of_sorted(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    if low == high {
        return sorted[low];
    }
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[4.0, 1.0, 2.0, 3.0], 0.5), 2.5);
        assert_eq!(quantile(&[5.0, 1.0, 2.0, 3.0, 4.0], 0.25), 2.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}
