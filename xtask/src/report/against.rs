//! What changed since another report.

use std::fmt;

use serde::Serialize;

use super::Report;

/// The cases that both reports have compared with a peer.
#[derive(Debug, Serialize)]
pub(super) struct Changes {
    /// The commit of the report before.
    before: String,
    same_machine: bool,
    rows: Vec<Change>,
}

/// A case.
#[derive(Debug, Serialize)]
struct Change {
    title: String,
    peer: String,
    /// Ratios to the peer: they carry over from run to run, times do not.
    before: f64,
    after: f64,
    /// Half the spread of the ratios of both runs.
    noise: f64,
    /// Whether the difference is above the noise.
    real: bool,
}

impl Changes {
    pub(super) fn new(before: &Report, after: &Report) -> Self {
        let mut rows = Vec::new();
        for new in &after.compared.rows {
            let old = before.compared.rows.iter().find(|old| {
                let same = (&old.kernel, &old.case) == (&new.kernel, &new.case);
                same && old.dtype == new.dtype && library(&old.peer) == library(&new.peer)
            });
            let Some(old) = old else { continue };
            let (Some(before), Some(after)) = (old.ratio, new.ratio) else { continue };
            let spread =
                |quartiles: Option<[f64; 2]>| quartiles.map_or(0.0, |[low, high]| high - low);
            let noise = (spread(old.ratio_quartiles) + spread(new.ratio_quartiles)) / 2.0;
            rows.push(Change {
                title: format!("{} {} {}", new.kernel, new.case, new.dtype),
                peer: new.peer.clone().unwrap_or_default(),
                before,
                after,
                noise,
                real: (after - before).abs() > noise,
            });
        }
        Self {
            before: before.verified.commit.clone(),
            same_machine: before.compared.machine.cpu == after.compared.machine.cpu,
            rows,
        }
    }
}

/// The name without the version.
fn library(peer: &Option<String>) -> Option<&str> {
    peer.as_deref().and_then(|peer| peer.split(' ').next())
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "speed ratio to the peer, since {}:", self.before)?;
        if !self.same_machine {
            writeln!(f, "(another processor: the ratios do not tell what the change did)")?;
        }
        for row in &self.rows {
            let Change { title, peer, before, after, noise, real } = row;
            let verdict = match (real, after > before) {
                (false, _) => "within noise",
                (true, true) => "faster",
                (true, false) => "slower",
            };
            let figures = format!("{before:5.2} -> {after:5.2} (noise {noise:.2})");
            writeln!(f, "  {figures} {verdict:<12} {title}, {peer}")?;
        }
        Ok(())
    }
}
