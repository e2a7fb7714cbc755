//! Who owns which shard, and getting a stimulus there.
//!
//! Owns: [`Router`], the one way into instances for doors, timers and deliveries; shard actors pinned to arbiters. On one
//! node every shard is owned here. Not here: what an instance does with a stimulus (`instance`).
//! Tests: `tests/it/turn.rs`, `tests/it/activation.rs`.

pub mod router;
pub mod shard;
pub mod shards;

pub use router::Router;
