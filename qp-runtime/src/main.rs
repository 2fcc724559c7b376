//! The `qp` command.
fn main() {}
