//! Who owns what, as the lanes of forwarded work ask for it.
//!
//! Owns: the answer [`Owner`] and the port [`Owners`]. Not here: the table itself (`cluster::placement`).
//!
//! Tests: with the lanes.

use crate::types::{InstanceKey, NodeId};

/// Who has a shard, as far as this node knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This node.
    Here,
    /// This node, which gives it away: what is in hand is being finished, what is new waits for a moment.
    Leaving,
    /// Another node.
    Node {
        /// Which.
        node: NodeId,
        /// Since which epoch.
        epoch: u64,
    },
    /// Nobody at present.
    Nobody,
}

/// Port: who owns what. Read for each batch, so it must be quick.
pub trait Owners: Send + Sync + 'static {
    /// The shard of an instance.
    fn shard_of(&self, key: &InstanceKey) -> u32;
    /// Who has it.
    fn owner(&self, shard: u32) -> Owner;
    /// The epoch under which this node last knew somebody to have it.
    fn epoch(&self, shard: u32) -> u64;
    /// Another node says that somebody else has it: the table may be old.
    fn doubt(&self, shard: u32);
}
