//! Who owns which shard, and getting a stimulus there.
//!
//! Owns: [`Router`], the one way into instances for doors, timers and deliveries; shard actors pinned to arbiters. On one
//! node every shard is owned here. Not here: what an instance does with a stimulus (`instance`).
//! Tests: `tests/it/turn.rs`, `tests/it/activation.rs`.

use crate::types::Protocol;

pub mod bus;
pub mod calls;
pub mod forward;
pub mod lease;
pub mod member;
pub mod membership;
pub mod operations;
pub mod placement;
pub mod router;
pub mod shard;
pub mod shards;
pub mod watch;

/// The versions of the cluster's protocol this build speaks: rows, messages and stored formats that nodes share.
pub const PROTOCOL: Protocol = Protocol { min: 1, max: 1 };

pub use membership::Membership;
pub use operations::Operations;
pub use router::Router;
