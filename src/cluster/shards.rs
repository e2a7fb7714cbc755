//! The table of shards: which actor, on which thread; read without a lock by everyone who has something for an instance.
//!
//! Not here: what a shard does. Invariants: a shard that died is replaced on the arbiter it lived on, once.

use std::sync::{Arc, Mutex, PoisonError};

use actix::prelude::{Actor as _, Addr, SendError};
pub use actix_rt::ArbiterHandle;
use arc_swap::ArcSwap;
use tokio::sync::oneshot;

use super::shard::{ShardActor, To, What};
use crate::{
    instance::{Error, environment::Environment},
    store::Fence,
    types::InstanceKey,
};

/// All shards of this node. Cheap to clone.
#[derive(Clone)]
pub struct Shards(Arc<Inner>);

struct Inner {
    environment: Arc<Environment>,
    table: ArcSwap<Vec<Addr<ShardActor>>>,
    arbiters: Vec<ArbiterHandle>,
    /// One at a time replaces a shard that died.
    replacing: Mutex<()>,
}

impl Shards {
    /// Starts so many shards, pinned to arbiters: shard modulo arbiters.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when an arbiter does not answer.
    pub async fn start(environment: Arc<Environment>, count: u32, arbiters: Vec<ArbiterHandle>) -> Result<Self, Error> {
        let mut table = Vec::new();
        for shard in 0..count {
            table.push(start(&environment, &arbiters, shard).await?);
        }
        let table = ArcSwap::from_pointee(table);
        Ok(Self(Arc::new(Inner { environment, table, arbiters, replacing: Mutex::default() })))
    }

    /// Tells an instance something. What cannot be taken is answered with the reason, at once.
    pub fn tell(&self, key: &InstanceKey, what: What) {
        let table = self.0.table.load();
        let shard = (key.stable_hash() % table.len() as u64) as usize;
        match table[shard].try_send(To { key: key.clone(), what }) {
            Ok(()) => {}
            Err(SendError::Full(to)) => to.what.refuse(Error::Overloaded("the shard's mailbox is full")),
            Err(SendError::Closed(to)) => {
                tracing::error!(shard, "a shard died and is replaced");
                to.what.refuse(Error::Overloaded("its shard restarts"));
                let (shards, dead) = (self.clone(), table[shard].clone());
                if let Some(arbiter) = self.0.arbiters.get(shard % self.0.arbiters.len().max(1)) {
                    arbiter.spawn(async move { shards.replace(shard, &dead) });
                }
            }
        }
    }

    /// Runs on the shard's arbiter.
    fn replace(&self, shard: usize, dead: &Addr<ShardActor>) {
        let _one = self.0.replacing.lock().unwrap_or_else(PoisonError::into_inner);
        let table = self.0.table.load();
        if table[shard] != *dead {
            return;
        }
        let mut next = (**table).clone();
        next[shard] = ShardActor::new(self.0.environment.clone(), fence(shard as u32)).start();
        self.0.table.store(Arc::new(next));
    }
}

/// On one node every shard is owned in the first epoch.
const fn fence(shard: u32) -> Fence {
    Fence { shard, epoch: 0 }
}

async fn start(
    environment: &Arc<Environment>,
    arbiters: &[ArbiterHandle],
    shard: u32,
) -> Result<Addr<ShardActor>, Error> {
    let dead = || Error::Overloaded("an arbiter does not answer");
    let arbiter = arbiters.get(shard as usize % arbiters.len().max(1)).ok_or_else(dead)?;
    let (sender, address) = oneshot::channel();
    let environment = environment.clone();
    arbiter.spawn_fn(move || {
        drop(sender.send(ShardActor::new(environment, fence(shard)).start()));
    });
    address.await.map_err(|_| dead())
}
