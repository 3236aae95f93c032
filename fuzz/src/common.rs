//! What the harnesses share: files to be read, and the memory that reading takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;
use tensor_utils::testing::PeakAlloc;

/// Memory that a reader may take besides a multiple of its input: small tables, messages, buffers.
pub const SLACK: usize = 64 << 10;

/// A folder of this process, in memory where the system has such a place.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let make = || {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { TempDir::new_in(memory) } else { TempDir::new() };
        made.expect("a temporary folder")
    };
    FOLDER.get_or_init(make).path()
}

/// Writes a file to [`folder`].
pub fn file(name: &str, contents: &[u8]) -> PathBuf {
    let path = folder().join(name);
    fs::write(&path, contents).expect("a temporary file");
    path
}

/// What `read` returns, and the most memory it had in use at once.
pub fn peak_of<T>(alloc: &PeakAlloc, read: impl FnOnce() -> T) -> (T, usize) {
    alloc.reset_peak();
    let result = read();
    (result, alloc.peak_above_baseline())
}

/// Fails if a reader had more than four times the size of its input in use at once.
pub fn check_four_times(peak: usize, input: usize) {
    assert!(peak <= 4 * input + SLACK, "{peak} bytes in use for an input of {input}");
}
