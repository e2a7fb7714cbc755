//! A batch of a lane on its way.
//!
//! Owns: where the batch is, what became of each of its stimuli so far, and the message it is sent as. Not here: what follows
//! from an answer ([`super::lanes`]).
//!
//! Tests: with the lanes.

use std::time::Duration;

use crate::{
    cluster::bus::message::{Item, Work},
    instance::{
        Until,
        inbox::{Waiter, Waiting},
    },
    types::{InstanceKey, NodeId},
};

/// A batch, and where it is.
#[derive(Debug)]
pub(super) struct Flight {
    /// 0 before it was anywhere.
    pub(super) call: u64,
    pub(super) stage: Stage,
    pub(super) slots: Vec<Slot>,
    /// How often an owner was asked.
    pub(super) asked: u32,
    /// Whether an owner may have it.
    pub(super) unsure: bool,
    /// What an owner said who refused.
    pub(super) told: Option<(NodeId, u64)>,
}

/// Where a batch is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// An owner has it.
    Asked(NodeId, u64),
    /// Nowhere yet. As the batch of a lane: an empty one, until this node has given the shard away.
    Parked,
    /// The shard's actor on this node has it.
    Delivered,
    /// The store has it.
    Lodging,
}

/// What became of a stimulus of a batch.
#[derive(Debug)]
pub(super) enum Slot {
    /// Nobody said yet.
    Open(Waiting),
    /// Its owner did not want it.
    Again(Waiting),
    /// It is durable, decided or refused.
    Done,
}

impl Flight {
    /// One that is nowhere yet.
    pub(super) const fn new(call: u64) -> Self {
        Self { call, stage: Stage::Parked, slots: Vec::new(), asked: 0, unsure: false, told: None }
    }

    /// Takes out what is not settled, in order.
    pub(super) fn open(&mut self) -> Vec<Waiting> {
        let open = |slot| match slot {
            Slot::Open(waiting) | Slot::Again(waiting) => Some(waiting),
            Slot::Done => None,
        };
        self.slots.drain(..).filter_map(open).collect()
    }

    /// As it is sent to the owner, who has `within` to answer.
    pub(super) fn work(&self, key: &InstanceKey, shard: u32, epoch: u64, after_lodged: bool, within: Duration) -> Work {
        let item = |slot: &Slot| match slot {
            Slot::Open(waiting) | Slot::Again(waiting) => Some(Item {
                stimulus: waiting.stimulus.clone(),
                expected: waiting.expected,
                decided: wants_decision(waiting),
            }),
            Slot::Done => None,
        };
        Work {
            call: self.call,
            key: key.clone(),
            shard,
            epoch,
            within_ms: u32::try_from(within.as_millis()).unwrap_or(u32::MAX),
            after_lodged,
            items: self.slots.iter().filter_map(item).collect(),
        }
    }
}

/// Whether somebody waits for its decision, not only for its acceptance.
pub(super) fn wants_decision(waiting: &Waiting) -> bool {
    waiting.waiters.iter().map(Waiter::until).any(|until| until == Until::Decided)
}
