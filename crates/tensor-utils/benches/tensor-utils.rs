//! Benches of the ground floor.

fn main() {}
