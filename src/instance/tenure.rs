//! A node's right to a shard for the time it has it, as the shard's instances see it: the epoch they write under, the work
//! they have in hand, and where what they may no longer decide goes.
//!
//! Not here: who gets a shard (`cluster`). Invariants: a tenure that is over never becomes valid again; its shard's next
//! tenure on this node has a higher epoch.
//! Tests: `tests/it/tenure.rs`, `tests/it/panic.rs`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

use tokio::sync::Notify;

use super::inbox::Waiting;
use crate::{store::Fence, types::InstanceKey};

/// Port: takes what this node may not decide to the node that may. Implemented by `cluster`.
pub trait Elsewhere: Send + Sync + 'static {
    /// Takes one stimulus with those who wait for it. One that is `accepted` stands in the store's inbox and is not sent
    /// again: its waiters are told what becomes of it. Must not block.
    fn take(&self, key: &InstanceKey, waiting: Waiting);

    /// The store refused this epoch of the shard: another node has it.
    fn lost(&self, shard: u32, epoch: u64);
}

/// A node's right to a shard.
pub struct Tenure {
    /// The shard.
    pub shard: u32,
    /// The epoch it was taken with.
    pub epoch: u64,
    /// Instances of the shard with work in hand.
    pub busy: Busy,
    over: AtomicBool,
    settled: AtomicBool,
    /// Stimuli lodged for the shard that are known of.
    lodged: AtomicU64,
    elsewhere: Option<Arc<dyn Elsewhere>>,
}

impl Tenure {
    /// A tenure that begins. Without `elsewhere`, what cannot be decided here is refused.
    pub fn new(shard: u32, epoch: u64, elsewhere: Option<Arc<dyn Elsewhere>>) -> Self {
        Self {
            shard,
            epoch,
            busy: Busy::default(),
            over: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            lodged: AtomicU64::new(0),
            elsewhere,
        }
    }

    /// The right under which an instance writes that has read what waits for it when so many were lodged.
    pub const fn fence(&self, lodged: u64) -> Fence {
        Fence { shard: self.shard, epoch: self.epoch, lodged }
    }

    /// Stimuli lodged for the shard that are known of. What is loaded from now on holds them.
    pub fn lodged(&self) -> u64 {
        self.lodged.load(Ordering::Acquire)
    }

    /// The store told that so many are lodged; whether that is more than was known.
    pub fn learn_lodged(&self, lodged: u64) -> bool {
        self.lodged.fetch_max(lodged, Ordering::AcqRel) < lodged
    }

    /// Ends it: nothing more is submitted under it.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Nothing is in hand any more of what came before the end.
    pub fn settle(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Whether nothing is in hand any more. What comes for the shard meanwhile must wait, or it would overtake.
    pub fn is_settled(&self) -> bool {
        self.settled.load(Ordering::Acquire)
    }

    /// The store refused the epoch: ends it and says so.
    pub fn lose(&self) {
        self.end();
        if let Some(elsewhere) = &self.elsewhere {
            elsewhere.lost(self.shard, self.epoch);
        }
    }

    /// Hands a stimulus over; gives it back when there is nobody to hand it to.
    ///
    /// # Errors
    /// The stimulus, on a node that is alone.
    pub fn hand_over(&self, key: &InstanceKey, waiting: Waiting) -> Result<(), Box<Waiting>> {
        match &self.elsewhere {
            Some(elsewhere) => {
                elsewhere.take(key, waiting);
                Ok(())
            }
            None => Err(Box::new(waiting)),
        }
    }
}

/// Counts instances with work in hand, so that a drain or a hand-off can wait for them.
#[derive(Debug, Clone, Default)]
pub struct Busy(Arc<BusyInner>);

#[derive(Debug, Default)]
struct BusyInner {
    count: AtomicUsize,
    none: Notify,
}

impl Busy {
    /// One more, until the token is dropped.
    pub fn enter(&self) -> BusyToken {
        self.0.count.fetch_add(1, Ordering::AcqRel);
        BusyToken(self.clone())
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.count.load(Ordering::Acquire)
    }

    /// Returns when there is none. Cancel safe.
    pub async fn none(&self) {
        loop {
            let notified = self.0.none.notified();
            if self.count() == 0 {
                return;
            }
            notified.await;
        }
    }
}

/// Work in hand.
#[derive(Debug)]
pub struct BusyToken(Busy);

impl Drop for BusyToken {
    fn drop(&mut self) {
        if self.0.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.0.none.notify_waiters();
        }
    }
}
