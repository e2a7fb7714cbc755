//! Who owns which shard, and getting a stimulus there.
//!
//! Owns: [`Router`], the one way into instances for doors, timers and deliveries; shard actors pinned to arbiters. On one
//! node every shard is owned here. Not here: what an instance does with a stimulus (`instance`).
//! Tests: `tests/it/turn.rs`, `tests/it/activation.rs`.

use crate::types::Protocol;

pub mod balancer;
pub mod bus;
pub mod calls;
pub mod copies;
pub mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod gauge;
pub mod hearing;
pub mod lease;
pub mod member;
pub mod membership;
pub mod operations;
pub mod placement;
pub mod router;
pub mod routing;
pub mod shard;
pub mod shards;
pub mod watch;

/// The versions of the cluster's protocol this build speaks: rows, messages and stored formats that nodes share.
///
/// - 1: the first.
/// - 2: nodes tell each other now and then how busy they are.
/// - 3: nodes ask the owner of an instance whether what they hold of its state is the newest.
/// - 4: nodes tell the owner of an instance who at their doors listens to which answer.
pub const PROTOCOL: Protocol = Protocol { min: 1, max: 5 };

pub use membership::Membership;
pub use operations::Operations;
pub use router::Router;
