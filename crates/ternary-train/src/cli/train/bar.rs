//! The progress bar.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over the steps; hidden if it is not wanted.
pub(super) fn bar(steps: usize, done: usize, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(steps as u64).with_position(done as u64);
    let style = "{bar:24} {pos}/{len} {msg} eta {eta}";
    bar.set_style(
        ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
    );
    bar
}
