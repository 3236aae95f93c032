//! The most memory that a process has had since it was last asked, as Linux counts it.

use std::fs;

/// Begins to measure: the peak of process `pid` is what it has now.
pub(super) fn forget_peak(pid: u32) {
    // Where the system cannot do this, the peak is that of the whole run.
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// The peak of process `pid` in MB; `None` where the system does not tell.
pub(super) fn peak_mb(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: f64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024.0 / 1e6)
}
