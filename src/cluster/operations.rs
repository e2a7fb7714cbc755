//! What an operator sees and asks of a cluster: its nodes, its shards, a drain. The doors show it; one node is a cluster, too.
//!
//! Not here: how nodes come by shards (`membership`). Tests: `tests/it/cluster_calls.rs`.

use std::sync::Arc;

use super::{balancer::Balancer, routing::Routing};
use crate::{
    store::ownership::{self, NodeRow, Ownership, View},
    types::{Fault, Kind, NodeId},
};

/// Why an operator's wish is not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Nobody goes by this name or id.
    #[error("there is no node '{0}' in the cluster")]
    NoNode(String),
    /// The rows cannot be read or changed.
    #[error(transparent)]
    Ownership(#[from] ownership::Error),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::NoNode(_) => Kind::NotFound,
            Error::Ownership(error) => error.kind(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::NoNode(_) => "NODE_NOT_FOUND",
            Error::Ownership(error) => error.code(),
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Error::NoNode(_) => Some(String::from("GET /v1/cluster/nodes (or `sophont nodes`) lists them")),
            Error::Ownership(error) => error.hint(),
        }
    }
}

/// The operator's side of a node. Cheap to clone.
#[derive(Clone)]
pub struct Operations {
    ownership: Arc<dyn Ownership>,
    me: NodeId,
    balancer: Balancer,
}

impl Operations {
    /// Of the node with this id.
    pub const fn new(ownership: Arc<dyn Ownership>, me: NodeId, balancer: Balancer) -> Self {
        Self { ownership, me, balancer }
    }

    /// Who is there and how busy, as this node believes. Lock-free.
    pub fn routing(&self) -> arc_swap::Guard<Arc<Routing>> {
        self.balancer.routing()
    }

    /// This node.
    pub const fn me(&self) -> &NodeId {
        &self.me
    }

    /// The cluster at this moment.
    ///
    /// # Errors
    /// [`Error::Ownership`].
    pub async fn view(&self) -> Result<View, Error> {
        Ok(self.ownership.view().await?)
    }

    /// Asks a node, by its id or its name, to give its shards away and take none. It may be this one. Returns its id; the
    /// hand-off goes on behind it.
    ///
    /// # Errors
    /// [`Error::NoNode`], [`Error::Ownership`].
    pub async fn drain(&self, node: &str) -> Result<NodeId, Error> {
        let view = self.ownership.view().await?;
        let unknown = || Error::NoNode(node.to_owned());
        let id = called(&view.nodes, node).ok_or_else(unknown)?.node.clone();
        if self.ownership.drain(&id).await? { Ok(id) } else { Err(unknown()) }
    }
}

/// The member with this id, or the newest life of the node with this name; one that lives before one that does not.
fn called<'a>(nodes: &'a [NodeRow], name: &str) -> Option<&'a NodeRow> {
    let named = nodes.iter().filter(|row| row.node.as_str() == name || row.node.name() == name);
    named.max_by_key(|row| (row.node.as_str() == name, row.holds(), row.node.clone()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{Load, Protocol, Roles};

    fn row(node: &NodeId, lease_left: i64) -> NodeRow {
        NodeRow {
            node: node.clone(),
            addresses: Vec::new(),
            roles: Roles::default(),
            weight: 100,
            protocol: Protocol { min: 1, max: 1 },
            lease_left,
            load: Load::default(),
            draining: false,
            alive: true,
        }
    }

    #[test]
    fn a_name_means_the_life_that_lives_and_an_id_exactly_one() {
        let [old, new, other] = ["a", "a", "b"].map(NodeId::generate);
        let rows = [row(&old, 1), row(&new, -1), row(&other, 1)];
        assert_eq!(called(&rows, "a").unwrap().node, old);
        assert_eq!(called(&rows, new.as_str()).unwrap().node, new);
        assert!(called(&rows, "c").is_none());
        let rows = [row(&old, 1), row(&new, 1)];
        assert_eq!(called(&rows, "a").unwrap().node, new);
    }
}
