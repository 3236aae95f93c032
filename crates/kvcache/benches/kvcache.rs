//! Attention over the cache, beside the same over plain arrays.
fn main() {}
