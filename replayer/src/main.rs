//! Replayer.
fn main() {}
