//! Who takes part in a cluster and who owns which shard: the rows, and how they change.
//!
//! Owns: the trait [`Ownership`] that every shared backend implements, its rows, and [`Alone`], the membership of one for
//! backends that a single process uses. Not here: when to take or release (`cluster::lease`), who should own what
//! (`cluster::placement`), the fence itself, which the backend checks at every commit.
//!
//! Invariants:
//! - Time is the store's. A node's own clock decides nothing here.
//! - A shard's epoch only grows; it grows exactly when the shard is taken. Two nodes never hold one epoch of a shard.
//! - A shard is taken only from nobody, or from a node whose lease is over or whose process is known to be gone.
//!
//! Tests: `tests/it/ownership_contract.rs` runs one suite over all backends.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;

use super::Fence;
use crate::types::{Fault, Kind, Load, Millis, NodeId, Protocol, Roles};

/// What can go wrong with membership and ownership.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The cluster has another number of shards.
    #[error("the cluster '{cluster}' has {stored} shards, this node is configured for {configured}")]
    OtherShards {
        /// The cluster.
        cluster: String,
        /// Number in force.
        stored: u32,
        /// Number this node was started with.
        configured: u32,
    },
    /// A live node speaks no version of the protocol that this one speaks.
    #[error("node {node} speaks cluster protocol {theirs}, this build speaks {ours}: they have no version in common")]
    OtherProtocol {
        /// The live node.
        node: NodeId,
        /// What it speaks.
        theirs: Protocol,
        /// What this build speaks.
        ours: Protocol,
    },
    /// The node is no longer a member: its row is gone or its lease is over. It must stop, and may join as a new one.
    #[error("this node's lease is over")]
    Lost,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] super::Error),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::OtherShards { .. } | Error::OtherProtocol { .. } => Kind::Conflict,
            Error::Lost => Kind::Fenced,
            Error::Store(error) => error.kind(),
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::OtherShards { .. } => "CLUSTER_OTHER_SHARDS",
            Error::OtherProtocol { .. } => "CLUSTER_OTHER_PROTOCOL",
            Error::Lost => "CLUSTER_LEASE_LOST",
            Error::Store(error) => error.code(),
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Error::OtherShards { stored, .. } => {
                Some(format!("set cluster.shards = {stored}, or give this node another cluster.name"))
            }
            Error::OtherProtocol { node, theirs, ours } => Some(if theirs.max < ours.min {
                format!(
                    "this build is too new for {node}: bring all nodes to a release between, whose protocol reaches from {} \
                     to {}, and then to this one; or stop all nodes before this one starts",
                    theirs.max, ours.min
                )
            } else {
                format!("this build is too old for {node}: start one that speaks cluster protocol {theirs}")
            }),
            Error::Lost => Some(String::from("repeat the request; it will reach another node")),
            Error::Store(error) => error.hint(),
        }
    }
}

/// A node that wants to take part.
#[derive(Debug, Clone)]
pub struct Joining {
    /// Its id: a new one for each start.
    pub node: NodeId,
    /// Name of the cluster.
    pub cluster: String,
    /// Number of shards it was configured with.
    pub shards: u32,
    /// Where other nodes and operators reach it (`http=HOST:PORT`, ...). Opaque to the store.
    pub addresses: Vec<String>,
    /// What it takes part in.
    pub roles: Roles,
    /// How much it takes compared to others, until it renews with another weight; 100 is usual.
    pub weight: u32,
    /// What its build speaks.
    pub protocol: Protocol,
    /// How long its membership lasts without renewal.
    pub lease: Duration,
}

/// What a renewal says about the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Renewal {
    /// How long from the store's now on.
    pub lease: Duration,
    /// How busy it is.
    pub load: Load,
    /// How much it takes compared to others, at present.
    pub weight: u32,
    /// Whether it gives everything away and takes nothing.
    pub draining: bool,
}

/// A node, as the store has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NodeRow {
    /// Its id.
    pub node: NodeId,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// What it takes part in.
    pub roles: Roles,
    /// How much it takes compared to others, at present.
    pub weight: u32,
    /// What its build speaks.
    pub protocol: Protocol,
    /// Milliseconds left of its lease; 0 or less when it is over.
    pub lease_left: i64,
    /// How busy it said it was.
    pub load: Load,
    /// Whether it gives everything away.
    pub draining: bool,
    /// Whether its process holds its session. False: the process is gone, or it lost its connection.
    pub alive: bool,
}

impl NodeRow {
    /// Whether what it owns is its own: the lease runs and the process is there.
    pub const fn holds(&self) -> bool {
        self.lease_left > 0 && self.alive
    }
}

/// A shard, as the store has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ShardRow {
    /// The shard.
    pub shard: u32,
    /// Who took it last; nobody when it was released or never taken.
    pub node: Option<NodeId>,
    /// How often it was taken.
    pub epoch: u64,
    /// Stimuli lodged for it by others, ever.
    pub lodged: u64,
}

/// Everything about the cluster at one moment of the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct View {
    /// The store's time.
    pub now: Millis,
    /// Members, in id order; also those whose lease is over, until they are swept.
    pub nodes: Vec<NodeRow>,
    /// All shards, in order.
    pub shards: Vec<ShardRow>,
}

/// A shard that a node wants, and the epoch at which it saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The shard.
    pub shard: u32,
    /// The epoch seen.
    pub epoch: u64,
}

/// Membership and ownership, kept by the store that all nodes share. Every call is one transaction. A call whose future is
/// dropped may or may not have happened; each may be repeated.
#[async_trait]
pub trait Ownership: Send + Sync + 'static {
    /// Whether other processes may take part.
    fn is_shared(&self) -> bool {
        true
    }

    /// Makes the node a member; creates the cluster and its shards when it is the first. Sweeps nodes that own nothing and
    /// whose lease has been over for long.
    ///
    /// # Errors
    /// [`Error::OtherShards`], [`Error::OtherProtocol`], [`Error::Store`].
    async fn join(&self, joining: &Joining) -> Result<View, Error>;

    /// Prolongs the node's lease from the store's now on, and shows the cluster.
    ///
    /// # Errors
    /// [`Error::Lost`] when the node is no member or its lease is over; [`Error::Store`].
    async fn renew(&self, node: &NodeId, renewal: Renewal) -> Result<View, Error>;

    /// Shows the cluster.
    ///
    /// # Errors
    /// [`Error::Store`].
    async fn view(&self) -> Result<View, Error>;

    /// Members whose lease runs though their process is known to be gone. Cheap: it is asked several times a second.
    ///
    /// # Errors
    /// [`Error::Store`].
    async fn gone(&self) -> Result<Vec<NodeId>, Error>;

    /// Takes those of the shards whose epoch is still the one seen and that are free, or whose owner's lease is over or
    /// process is gone. Returns the fences of those taken; the others are left out.
    ///
    /// # Errors
    /// [`Error::Lost`] when the node's own lease is over; [`Error::Store`].
    async fn take(&self, node: &NodeId, claims: &[Claim]) -> Result<Vec<Fence>, Error>;

    /// Gives up those of the shards that the node still owns at that epoch. The holder must have stopped writing for them.
    ///
    /// # Errors
    /// [`Error::Store`].
    async fn release(&self, node: &NodeId, fences: &[Fence]) -> Result<(), Error>;

    /// Asks a member to give everything away and take nothing more, as an operator would: it sees so in its row. Not taken back
    /// in this life of the node. Whether there is such a member.
    ///
    /// # Errors
    /// [`Error::Store`].
    async fn drain(&self, node: &NodeId) -> Result<bool, Error>;

    /// Ends the membership and gives up what the node still owns.
    ///
    /// # Errors
    /// [`Error::Store`].
    async fn leave(&self, node: &NodeId) -> Result<(), Error>;
}

/// The rows and their rules in plain memory. Time is an argument.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Rows {
    cluster: Option<String>,
    nodes: Vec<Member>,
    shards: Vec<ShardRow>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Member {
    row: NodeRow,
    until: Millis,
}

/// Leases over for so long, in milliseconds, are swept when a node joins.
const SWEEP_MS: i64 = 60_000;

impl Rows {
    /// As [`Ownership::join`].
    ///
    /// # Errors
    /// [`Error::OtherShards`], [`Error::OtherProtocol`].
    pub fn join(&mut self, joining: &Joining, now: Millis) -> Result<View, Error> {
        let stored = u32::try_from(self.shards.len()).unwrap_or(u32::MAX);
        if self.cluster.is_some() && stored != joining.shards {
            let (cluster, configured) = (joining.cluster.clone(), joining.shards);
            return Err(Error::OtherShards { cluster, stored, configured });
        }
        let live = self.nodes.iter().filter(|member| member.until > now && member.row.alive);
        if let Some(other) = live.map(|member| &member.row).find(|row| !row.protocol.meets(joining.protocol)) {
            let (node, theirs, ours) = (other.node.clone(), other.protocol, joining.protocol);
            return Err(Error::OtherProtocol { node, theirs, ours });
        }
        if self.cluster.is_none() {
            self.cluster = Some(joining.cluster.clone());
            self.shards =
                (0..joining.shards).map(|shard| ShardRow { shard, node: None, epoch: 0, lodged: 0 }).collect();
        }
        let owning = |node: &NodeId| self.shards.iter().any(|shard| shard.node.as_ref() == Some(node));
        self.nodes.retain(|member| {
            member.row.node != joining.node && (member.until.plus(SWEEP_MS) > now || owning(&member.row.node))
        });
        let row = NodeRow {
            node: joining.node.clone(),
            addresses: joining.addresses.clone(),
            roles: joining.roles.clone(),
            weight: joining.weight,
            protocol: joining.protocol,
            lease_left: 0,
            load: Load::default(),
            draining: false,
            alive: true,
        };
        self.nodes.push(Member { row, until: later(now, joining.lease) });
        self.nodes.sort_by(|one, other| one.row.node.cmp(&other.row.node));
        Ok(self.view(now))
    }

    /// As [`Ownership::renew`].
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn renew(&mut self, node: &NodeId, renewal: Renewal, now: Millis) -> Result<View, Error> {
        let member = self.member(node, now)?;
        member.until = later(now, renewal.lease);
        (member.row.load, member.row.weight) = (renewal.load, renewal.weight);
        member.row.draining |= renewal.draining;
        Ok(self.view(now))
    }

    /// As [`Ownership::view`].
    pub fn view(&self, now: Millis) -> View {
        let row = |member: &Member| NodeRow { lease_left: member.until.0 - now.0, ..member.row.clone() };
        View { now, nodes: self.nodes.iter().map(row).collect(), shards: self.shards.clone() }
    }

    /// As [`Ownership::gone`].
    pub fn gone(&self, now: Millis) -> Vec<NodeId> {
        let gone = self.nodes.iter().filter(|member| member.until > now && !member.row.alive);
        gone.map(|member| member.row.node.clone()).collect()
    }

    /// As [`Ownership::take`].
    ///
    /// # Errors
    /// [`Error::Lost`].
    pub fn take(&mut self, node: &NodeId, claims: &[Claim], now: Millis) -> Result<Vec<Fence>, Error> {
        self.member(node, now)?;
        let mut taken = Vec::new();
        for claim in claims {
            let Some(row) = self.shards.get_mut(claim.shard as usize) else { continue };
            let held = row.node.as_ref().is_some_and(|owner| {
                self.nodes.iter().any(|member| member.row.node == *owner && member.until > now && member.row.alive)
            });
            if row.epoch == claim.epoch && !held {
                row.node = Some(node.clone());
                row.epoch += 1;
                taken.push(row.fence());
            }
        }
        Ok(taken)
    }

    /// As [`Ownership::release`].
    pub fn release(&mut self, node: &NodeId, fences: &[Fence]) {
        for fence in fences {
            let row = self.shard(fence.shard);
            if let Some(row) = row.filter(|row| row.epoch == fence.epoch && row.node.as_ref() == Some(node)) {
                row.node = None;
            }
        }
    }

    /// As [`Ownership::drain`].
    pub fn drain(&mut self, node: &NodeId) -> bool {
        let member = self.nodes.iter_mut().find(|member| member.row.node == *node);
        member.map(|member| member.row.draining = true).is_some()
    }

    /// As [`Ownership::leave`].
    pub fn leave(&mut self, node: &NodeId) {
        self.nodes.retain(|member| member.row.node != *node);
        self.shards.iter_mut().filter(|row| row.node.as_ref() == Some(node)).for_each(|row| row.node = None);
    }

    /// Whether a node's process holds its session.
    pub fn set_alive(&mut self, node: &NodeId, alive: bool) {
        self.nodes.iter_mut().filter(|member| member.row.node == *node).for_each(|member| member.row.alive = alive);
    }

    /// Whether a node ever joined: without one there is no cluster and nobody is fenced.
    pub fn is_founded(&self) -> bool {
        self.cluster.is_some()
    }

    /// The shard's row.
    pub fn shard(&mut self, shard: u32) -> Option<&mut ShardRow> {
        self.shards.get_mut(shard as usize)
    }

    fn member(&mut self, node: &NodeId, now: Millis) -> Result<&mut Member, Error> {
        let own = |member: &&mut Member| member.row.node == *node && member.until > now;
        self.nodes.iter_mut().find(own).ok_or(Error::Lost)
    }
}

impl ShardRow {
    /// The right to write for it at its present epoch.
    pub const fn fence(&self) -> Fence {
        Fence { shard: self.shard, epoch: self.epoch, lodged: self.lodged }
    }
}

fn later(now: Millis, lease: Duration) -> Millis {
    now.plus(i64::try_from(lease.as_millis()).unwrap_or(i64::MAX))
}

/// The membership of one: what a process does that shares its store with nobody, on the code path of many. The store's own
/// lock keeps others out, so time does not pass here and no lease ends; it forgets with the process.
#[derive(Debug, Default)]
pub struct Alone(Mutex<Rows>);

/// When everything happens that happens alone.
const ALWAYS: Millis = Millis(0);

impl Alone {
    fn rows(&self) -> MutexGuard<'_, Rows> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Ownership for Alone {
    fn is_shared(&self) -> bool {
        false
    }
    async fn join(&self, joining: &Joining) -> Result<View, Error> {
        self.rows().join(joining, ALWAYS)
    }
    async fn renew(&self, node: &NodeId, renewal: Renewal) -> Result<View, Error> {
        self.rows().renew(node, renewal, ALWAYS)
    }
    async fn view(&self) -> Result<View, Error> {
        Ok(self.rows().view(ALWAYS))
    }
    async fn gone(&self) -> Result<Vec<NodeId>, Error> {
        Ok(Vec::new())
    }
    async fn take(&self, node: &NodeId, claims: &[Claim]) -> Result<Vec<Fence>, Error> {
        self.rows().take(node, claims, ALWAYS)
    }
    async fn release(&self, node: &NodeId, fences: &[Fence]) -> Result<(), Error> {
        self.rows().release(node, fences);
        Ok(())
    }
    async fn drain(&self, node: &NodeId) -> Result<bool, Error> {
        Ok(self.rows().drain(node))
    }
    async fn leave(&self, node: &NodeId) -> Result<(), Error> {
        self.rows().leave(node);
        Ok(())
    }
}
