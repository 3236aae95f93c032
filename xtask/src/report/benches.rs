//! What `cargo bench` has measured: the variants of a kernel side by side.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use walkdir::WalkDir;

/// Variants of one operation on one shape.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Group {
    /// The operation, and the shape.
    name: String,
    variants: Vec<Variant>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Variant {
    name: String,
    /// Median of the iterations.
    ms: f64,
    /// Times the fastest of the group.
    times: f64,
}

/// `benchmark.json` of criterion, as far as it is needed.
#[derive(Deserialize)]
struct Benchmark {
    group_id: String,
    function_id: Option<String>,
    value_str: Option<String>,
}

/// `estimates.json` of criterion.
#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    /// Nanoseconds.
    point_estimate: f64,
}

/// The groups with two variants and more, fastest variant first; none without `cargo bench`.
pub(super) fn read(folder: &Path) -> Vec<Group> {
    let mut groups = BTreeMap::<String, Vec<(String, f64)>>::new();
    for entry in WalkDir::new(folder).into_iter().flatten() {
        // The newest results; `base` holds those before, `change` the difference.
        if entry.file_name() != "benchmark.json" || !entry.path().parent().is_some_and(is_new) {
            continue;
        }
        let estimates = entry.path().with_file_name("estimates.json");
        let (Some(benchmark), Some(estimates)) =
            (json::<Benchmark>(entry.path()), json::<Estimates>(&estimates))
        else {
            continue;
        };
        let (Some(variant), Some(shape)) = (benchmark.function_id, benchmark.value_str) else {
            continue;
        };
        let name = format!("{} {shape}", benchmark.group_id);
        let ms = estimates.median.point_estimate / 1e6;
        groups.entry(name).or_default().push((variant, ms));
    }
    groups.retain(|_, variants| variants.len() > 1);
    groups.into_iter().map(|(name, variants)| Group::new(name, variants)).collect()
}

impl Group {
    fn new(name: String, mut variants: Vec<(String, f64)>) -> Self {
        variants.sort_by(|a, b| a.1.total_cmp(&b.1));
        let fastest = variants[0].1;
        let variant = |(name, ms)| Variant { name, ms, times: ms / fastest };
        Self { name, variants: variants.into_iter().map(variant).collect() }
    }
}

fn is_new(folder: &Path) -> bool {
    folder.file_name().is_some_and(|name| name == "new")
}

fn json<T: for<'a> Deserialize<'a>>(path: &Path) -> Option<T> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}
