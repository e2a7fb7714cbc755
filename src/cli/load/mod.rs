//! `sophont load`: the load generator and the checker of what it was promised.
//!
//! Tests: at the foot of each file, and `tests/it/load.rs`.

pub mod verify;
