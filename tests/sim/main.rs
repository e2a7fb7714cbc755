//! Simulation: the parts that decide about ownership and order, under every order of events or under many thousands of
//! random ones, without a machine's clock, disk or network. One binary; `docs/cluster.md` says what is real in it.
//!
//! - `protocol`: all orders of events in a small cluster, by model checking.
//! - `seeds`: histories from seeds, with negative controls; `world`, `instance` and `history` are what they stand on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod history;
mod instance;
mod protocol;
mod random;
mod seeds;
mod world;
