//! Sophont hosts consciousness instances: durable, addressable, stateful AI agents, one actor each.
//!
//! The house has rows that import downward only; `tests/tidy.rs` keeps them:
//!
//! | row | modules |
//! |---|---|
//! | 9 | [`cli`], [`node`] |
//! | 8 | [`gateway`] |
//! | 7 | [`cluster`] |
//! | 6 | [`instance`], [`delivery`] |
//! | 5 | [`memory`], [`cognition`] |
//! | 4 | [`store`] |
//! | 3 | [`scaling`] |
//! | 2 | [`runtime`] |
//! | 1 | [`telemetry`] |
//! | 0 | [`types`], then [`config`] |
//!
//! Read `docs/ARCHITECTURE.md` first, then `instance/turn.rs`, then `store/mod.rs`.

pub mod cli;
pub mod cluster;
pub mod cognition;
pub mod config;
pub mod delivery;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod gateway;
pub mod instance;
pub mod memory;
pub mod node;
pub mod runtime;
pub mod scaling;
pub mod store;
pub mod telemetry;
pub mod tools;
pub mod types;
