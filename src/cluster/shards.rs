//! The table of shards this node has: which actor, on which thread, under which tenure; read without a lock by everyone who
//! has something for an instance.
//!
//! Not here: what a shard does (`shard`), who gets which (`membership`).
//! Invariants: a shard that died is replaced on the arbiter it lived on, once, under the same tenure; a shard that is closed
//! takes nothing new, finishes what it has, and only then is let go; two tenures of a shard never overlap on a node.
//! Tests: `tests/it/tenure.rs`, `tests/it/panic.rs`.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use actix::prelude::{Addr, SendError};
pub use actix_rt::ArbiterHandle;
use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use super::shard::{End, Settle, ShardActor, To, What};
use crate::{
    instance::{
        Error,
        environment::Environment,
        tenure::{Elsewhere, Tenure},
    },
    store::Fence,
    types::InstanceKey,
};

/// All shards of this node. Cheap to clone.
#[derive(Clone)]
pub struct Shards(Arc<Inner>);

struct Inner {
    environment: Arc<Environment>,
    count: u32,
    table: ArcSwap<Vec<Option<Here>>>,
    arbiters: Vec<ArbiterHandle>,
    /// One at a time changes the table.
    changing: Mutex<()>,
    /// Tenures that are over and not settled, and how many, read without the lock.
    leaving: Mutex<Vec<Arc<Tenure>>>,
    left: AtomicUsize,
}

/// A shard that lives here.
#[derive(Clone)]
struct Here {
    address: Addr<ShardActor>,
    tenure: Arc<Tenure>,
}

impl Shards {
    /// A table of so many shards of which none is here.
    pub fn new(environment: Arc<Environment>, count: u32, arbiters: Vec<ArbiterHandle>) -> Self {
        let table = ArcSwap::from_pointee(vec![None; count as usize]);
        Self(Arc::new(Inner {
            environment,
            count,
            table,
            arbiters,
            changing: Mutex::default(),
            leaving: Mutex::default(),
            left: AtomicUsize::new(0),
        }))
    }

    /// How many shards there are, here or elsewhere.
    pub fn count(&self) -> u32 {
        self.0.count
    }

    /// The shard of an instance.
    pub fn shard_of(&self, key: &InstanceKey) -> u32 {
        (key.stable_hash() % u64::from(self.count()).max(1)) as u32
    }

    /// The epoch under which a shard is here, and may be decided for.
    pub fn epoch(&self, shard: u32) -> Option<u64> {
        self.0
            .table
            .load()
            .get(shard as usize)?
            .as_ref()
            .filter(|here| !here.tenure.is_over())
            .map(|here| here.tenure.epoch)
    }

    /// Whether the instance's shard is here.
    pub fn has(&self, key: &InstanceKey) -> bool {
        self.epoch(self.shard_of(key)).is_some()
    }

    /// Whether something of an earlier tenure of this shard is still in hand here: what comes now must wait behind it.
    pub fn is_leaving(&self, shard: u32) -> bool {
        // An instance that was fenced ends the tenure before anybody takes the shard out of the table.
        let is_over = |here: &Here| here.tenure.is_over();
        self.has_left(shard)
            || self.0.table.load().get(shard as usize).is_some_and(|here| here.as_ref().is_some_and(is_over))
    }

    fn has_left(&self, shard: u32) -> bool {
        if self.0.left.load(Ordering::Acquire) == 0 {
            return false;
        }
        let mut leaving = self.0.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.retain(|tenure| !tenure.is_settled());
        self.0.left.store(leaving.len(), Ordering::Release);
        leaving.iter().any(|tenure| tenure.shard == shard)
    }

    /// A tenure ends. To be told before its shard leaves the table, so that nothing slips between.
    fn leave(&self, tenure: &Arc<Tenure>) {
        let mut leaving = self.0.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        leaving.push(tenure.clone());
        self.0.left.store(leaving.len(), Ordering::Release);
    }

    /// The shards that are here.
    pub fn here(&self) -> Vec<u32> {
        let table = self.0.table.load();
        (0..).zip(table.iter()).filter(|(_, here)| here.is_some()).map(|(shard, _)| shard).collect()
    }

    /// Opens a shard under the fence it was taken with, pinned to an arbiter: shard modulo arbiters.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when the arbiter does not answer.
    pub async fn open(&self, fence: Fence, elsewhere: Option<Arc<dyn Elsewhere>>) -> Result<(), Error> {
        let shard = fence.shard;
        let dead = || Error::Overloaded("an arbiter does not answer");
        let arbiter = self.arbiter(shard).ok_or_else(dead)?;
        let tenure = Arc::new(Tenure::new(shard, fence.epoch, elsewhere));
        // Whatever was lodged before it was taken is found when an instance is loaded.
        tenure.learn_lodged(fence.lodged);
        let (sender, address) = oneshot::channel();
        let (environment, for_shard) = (self.0.environment.clone(), tenure.clone());
        arbiter.spawn_fn(move || {
            drop(sender.send(ShardActor::new(environment, for_shard).begin()));
        });
        let address = address.await.map_err(|_| dead())?;
        if let Some(old) = self.change(shard, Some(Here { address, tenure })) {
            self.end(shard, old);
        }
        Ok(())
    }

    /// Closes a shard in good order: it takes nothing new, finishes what it has for at most so long, and hands over the rest.
    /// Cancelling it leaves the shard closed to new work, and its tenure running.
    pub async fn close(&self, shard: u32, patience: Duration) {
        let Some(Here { address, tenure }) = self.change(shard, None) else { return };
        let finished = async {
            let _ = address.send(Settle).await;
            tenure.busy.none().await;
        };
        if tokio::time::timeout(patience, finished).await.is_err() {
            tracing::info!(shard, instances = tenure.busy.count(), "work in hand is left to the next owner");
        }
        tenure.end();
        let _ = address.send(End).await;
    }

    /// Closes a shard at once: this node may not decide for it any more.
    pub fn drop_now(&self, shard: u32) {
        if let Some(old) = self.change(shard, None) {
            self.end(shard, old);
        }
    }

    /// Behind what stands in a full mailbox, too: until the shard has settled, nothing of its senders goes anywhere.
    fn end(&self, shard: u32, old: Here) {
        old.tenure.end();
        if let Some(arbiter) = self.arbiter(shard) {
            arbiter.spawn(async move {
                let _ = old.address.send(End).await;
            });
        }
    }

    /// The store told how much is lodged for a shard; whether that is news to the tenure it is about.
    pub fn learn_lodged(&self, fence: &Fence) -> bool {
        let table = self.0.table.load();
        let here = table.get(fence.shard as usize).and_then(Option::as_ref);
        here.filter(|here| here.tenure.epoch == fence.epoch).is_some_and(|here| here.tenure.learn_lodged(fence.lodged))
    }

    /// Returns when no shard here has work in hand, provided that nothing new comes. Cancel safe.
    pub async fn idle(&self) {
        let table = self.0.table.load_full();
        for here in table.iter().flatten() {
            let _ = here.address.send(Settle).await;
            here.tenure.busy.none().await;
        }
    }

    /// Instances with work in hand.
    pub fn busy(&self) -> usize {
        self.0.table.load().iter().flatten().map(|here| here.tenure.busy.count()).sum()
    }

    /// Tells an instance something. What cannot be taken is answered with the reason, at once.
    ///
    /// # Errors
    /// What was to be told, when the shard is not here.
    #[allow(clippy::result_large_err)] // it comes back only where it goes on to another node
    pub fn tell(&self, key: &InstanceKey, what: What) -> Result<(), What> {
        let table = self.0.table.load();
        let shard = self.shard_of(key);
        let here = table.get(shard as usize).and_then(Option::as_ref).filter(|here| !here.tenure.is_over());
        let Some(here) = here else { return Err(what) };
        match here.address.try_send(To { key: key.clone(), what }) {
            Ok(()) => {}
            Err(SendError::Full(to)) => to.what.refuse(Error::Overloaded("the shard's mailbox is full")),
            Err(SendError::Closed(to)) => {
                tracing::error!(shard, "a shard died and is replaced");
                to.what.refuse(Error::Overloaded("its shard restarts"));
                let (shards, dead) = (self.clone(), here.clone());
                if let Some(arbiter) = self.arbiter(shard) {
                    arbiter.spawn(async move { shards.replace(shard, &dead) });
                }
            }
        }
        Ok(())
    }

    fn arbiter(&self, shard: u32) -> Option<&ArbiterHandle> {
        self.0.arbiters.get(shard as usize % self.0.arbiters.len().max(1))
    }

    /// Puts something else in a shard's place; what stood there.
    fn change(&self, shard: u32, next: Option<Here>) -> Option<Here> {
        let _one = self.0.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = (**self.0.table.load()).clone();
        let old = std::mem::replace(table.get_mut(shard as usize)?, next);
        if let Some(old) = &old {
            self.leave(&old.tenure);
        }
        self.0.table.store(Arc::new(table));
        old
    }

    /// Runs on the shard's arbiter.
    fn replace(&self, shard: u32, dead: &Here) {
        let _one = self.0.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = (**self.0.table.load()).clone();
        let Some(place) = table.get_mut(shard as usize) else { return };
        if place.as_ref().is_none_or(|here| here.address != dead.address) {
            return;
        }
        let tenure = dead.tenure.clone();
        let address = ShardActor::new(self.0.environment.clone(), tenure.clone()).begin();
        *place = Some(Here { address, tenure });
        self.0.table.store(Arc::new(table));
    }
}
