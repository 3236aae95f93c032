//! Runner.
fn main(){}
