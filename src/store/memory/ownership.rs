//! Membership and ownership among nodes that share a store in memory.
//!
//! Not here: the rules (`store::ownership`). Faults: closed and failing reads fail these calls, too.

use async_trait::async_trait;

use super::MemoryStore;
use crate::{
    store::{
        Fence,
        ownership::{Claim, Error, Joining, Ownership, Renewal, View},
    },
    types::NodeId,
};

#[async_trait]
impl Ownership for MemoryStore {
    async fn join(&self, joining: &Joining) -> Result<View, Error> {
        self.read()?.cluster.join(joining, self.0.clock.now())
    }

    async fn renew(&self, node: &NodeId, renewal: Renewal) -> Result<View, Error> {
        self.read()?.cluster.renew(node, renewal, self.0.clock.now())
    }

    async fn view(&self) -> Result<View, Error> {
        Ok(self.read()?.cluster.view(self.0.clock.now()))
    }

    async fn gone(&self) -> Result<Vec<NodeId>, Error> {
        Ok(self.read()?.cluster.gone(self.0.clock.now()))
    }

    async fn take(&self, node: &NodeId, claims: &[Claim]) -> Result<Vec<Fence>, Error> {
        self.read()?.cluster.take(node, claims, self.0.clock.now())
    }

    async fn release(&self, node: &NodeId, fences: &[Fence]) -> Result<(), Error> {
        self.read()?.cluster.release(node, fences);
        Ok(())
    }

    async fn drain(&self, node: &NodeId) -> Result<bool, Error> {
        Ok(self.read()?.cluster.drain(node))
    }

    async fn leave(&self, node: &NodeId) -> Result<(), Error> {
        self.read()?.cluster.leave(node);
        Ok(())
    }
}
