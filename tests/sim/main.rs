//! Simulation: the parts that decide about ownership under every order of events, without a machine's clock, disk or
//! network. One binary.
//!
//! - `protocol`: all orders of events in a small cluster, by model checking.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod protocol;
