//! The shell around `cluster::lease`: one task that calls the store, tells the holder, and publishes who owns what.
//!
//! Not here: decisions (`lease`, `placement`), rows (`store::ownership`), what opening and closing a shard means ([`Holder`]).
//! Invariants:
//! - Every call of the store has a deadline, so that serving stops in time though the store hangs.
//! - A shard is released only after the holder closed it; what was lost is dropped before the next call of the store.
//! - A hint ([`Membership::look`]) only makes the next look come sooner; without any, it comes with the next renewal.
//!
//! Tests: `tests/it/membership.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    lease::{Due, Lease, Moment, Moves, Terms},
    placement,
};
use crate::{
    config,
    store::{
        Fence,
        ownership::{Claim, Error, Joining, NodeRow, Ownership, Renewal, ShardRow, View},
    },
    telemetry::metric,
    types::{Load, NodeId},
};

/// Port: has the shards of this node.
#[async_trait]
pub trait Holder: Send + Sync + 'static {
    /// Opens shards that were just taken. Returns when they take work; must be quick.
    async fn open(&self, fences: Vec<Fence>);
    /// Closes a shard in good order: it takes nothing new, finishes its turns, and lets its instances go. Returns when nothing is
    /// written for it any more; must have an end.
    async fn close(&self, shard: u32);
    /// Closes shards that this node may not decide for any more. Must not wait.
    fn drop_now(&self, shards: &[u32]);
    /// The rights of this node as the store just told them, with what others lodged. Must not wait.
    fn seen(&self, fences: &[Fence]);
}

/// Port: what this node's row says about its load, and who wants to read the rows of others.
pub trait Scales: Send + Sync + 'static {
    /// How busy this node is.
    fn load(&self) -> Load;
    /// How much it takes compared to others.
    fn weight(&self) -> u32;
    /// The rows were read. Must not wait.
    fn see(&self, view: &View);
}

/// Where a shard is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Route {
    /// Its owner; nobody while it changes hands.
    pub node: Option<NodeId>,
    /// How often it was taken.
    pub epoch: u64,
    /// Whether it is open on this node.
    pub here: bool,
}

/// Who owns what and who takes part, at one moment. Immutable.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// Grows with each table.
    pub version: u64,
    /// By shard.
    pub routes: Vec<Route>,
    /// Members whose lease runs, in id order.
    pub nodes: Vec<NodeRow>,
}

/// How this node stands in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// Version of the newest table.
    pub version: u64,
    /// Whether it is a member that may serve.
    pub member: bool,
    /// Shards open here.
    pub open: usize,
    /// Whether it holds nothing, not even something that is being closed.
    pub empty: bool,
    /// Whether it gives everything away, as it was told or as an operator asked.
    pub draining: bool,
    /// Whether no other node could own shards.
    pub alone: bool,
}

impl Terms {
    /// As configured: renewed three times a lease.
    pub fn of(config: &config::Cluster, shared: bool) -> Self {
        let lease = Duration::from_secs(config.lease_seconds);
        Self { lease, every: lease / 3, moves: config.max_moves, shared }
    }
}

/// Between two looks for nodes whose process is gone.
pub const LOOK: Duration = Duration::from_millis(250);
/// Between two looks while shards change hands.
pub const RESTLESS: Duration = Duration::from_millis(50);

/// What a membership is made of.
pub struct Parts {
    /// The store's rows.
    pub ownership: Arc<dyn Ownership>,
    /// Who has the shards.
    pub holder: Arc<dyn Holder>,
    /// How this node introduces itself.
    pub joining: Joining,
    /// How the lease is kept.
    pub terms: Terms,
    /// Between two looks for nodes whose process is gone; [`LOOK`] is usual.
    pub look: Duration,
    /// Between two looks while shards change hands; [`RESTLESS`] is usual.
    pub restless: Duration,
    /// How busy this node is, and who listens.
    pub scales: Arc<dyn Scales>,
    /// Told when this node took or released shards: a hint for the others, who then call [`Membership::look`].
    pub changed: Arc<dyn Fn() + Send + Sync>,
    /// Where the task runs.
    pub handle: tokio::runtime::Handle,
}

/// This node's membership. Cheap to clone. Dropping it does not end it: [`Membership::leave`] does.
#[derive(Clone)]
pub struct Membership(Arc<Shared>);

struct Shared {
    node: NodeId,
    table: ArcSwap<Table>,
    standing: watch::Sender<Standing>,
    look: Notify,
    draining: AtomicBool,
    quit: CancellationToken,
    gone: CancellationToken,
    born: Instant,
    /// Until when it may serve, in milliseconds since it was born.
    serves_until: AtomicU64,
}

impl Membership {
    /// Joins the cluster and keeps the membership until it leaves. What it takes arrives at the holder later.
    ///
    /// # Errors
    /// The first join's error, when repeating it does not help or the store does not answer within a lease.
    pub async fn join(parts: Parts) -> Result<Self, Error> {
        let lease = Lease::new(parts.joining.node.clone(), parts.terms);
        let shared = Arc::new(Shared {
            node: parts.joining.node.clone(),
            table: ArcSwap::default(),
            standing: watch::Sender::default(),
            look: Notify::new(),
            draining: AtomicBool::new(false),
            quit: CancellationToken::new(),
            gone: CancellationToken::new(),
            born: Instant::now(),
            serves_until: AtomicU64::new(0),
        });
        let handle = parts.handle.clone();
        let mut keeper = Keeper {
            shared: shared.clone(),
            parts,
            lease,
            view: View::default(),
            closing: JoinSet::new(),
            settled: Vec::new(),
            next_look: Moment::ZERO,
            meters: Meters::new(),
        };
        keeper.join().await?;
        handle.spawn(keeper.run());
        Ok(Self(shared))
    }

    /// This node's id.
    pub fn node(&self) -> &NodeId {
        &self.0.node
    }

    /// Who owns what, as last seen. Lock-free.
    pub fn table(&self) -> arc_swap::Guard<Arc<Table>> {
        self.0.table.load()
    }

    /// How this node stands, and news of it. A new version means a new table.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.0.standing.subscribe()
    }

    /// Whether this node may still answer for what is open here: its lease was renewed recently enough. For those who answer
    /// from memory; commits are fenced anyway.
    pub fn serves(&self) -> bool {
        let now = self.0.born.elapsed().as_millis();
        now < u128::from(self.0.serves_until.load(Ordering::Acquire))
    }

    /// Something changed elsewhere, somebody says: look soon.
    pub fn look(&self) {
        self.0.look.notify_one();
    }

    /// Gives everything away and takes nothing more. Returns when nothing is held, when there is nobody to give it to, or after
    /// `patience`; whether nothing is held. Cancel safe; it goes on draining.
    pub async fn drain(&self, patience: Duration) -> bool {
        self.0.draining.store(true, Ordering::Release);
        self.look();
        let mut standing = self.standing();
        let done = standing.wait_for(|standing| standing.draining && (standing.empty || standing.alone));
        let _ = timeout(patience, done).await;
        self.0.standing.borrow().empty
    }

    /// Closes what is still open, without waiting, and ends the membership; the rest of the cluster knows at once if the store
    /// answers within a lease.
    pub async fn leave(&self) {
        self.0.quit.cancel();
        self.0.gone.cancelled().await;
    }
}

struct Meters {
    nodes: metrics::Gauge,
    open: metrics::Gauge,
    renewals: metrics::Histogram,
    failures: metrics::Counter,
    taken: metrics::Counter,
    handed: metrics::Counter,
    lost: metrics::Counter,
    moves_by_drain: metrics::Counter,
    moves_by_members: metrics::Counter,
    moves_by_weight: metrics::Counter,
}

impl Meters {
    fn new() -> Self {
        let moves = |reason| metrics::counter!(metric::CLUSTER_MOVES, "reason" => reason);
        Self {
            moves_by_drain: moves("drain"),
            moves_by_members: moves("members"),
            moves_by_weight: moves("weight"),
            nodes: metrics::gauge!(metric::CLUSTER_NODES),
            open: metrics::gauge!(metric::CLUSTER_SHARDS),
            renewals: metrics::histogram!(metric::CLUSTER_RENEWAL_SECONDS),
            failures: metrics::counter!(metric::CLUSTER_RENEWAL_FAILURES),
            taken: metrics::counter!(metric::CLUSTER_SHARDS_TAKEN),
            handed: metrics::counter!(metric::CLUSTER_SHARDS_HANDED),
            lost: metrics::counter!(metric::CLUSTER_SHARDS_LOST),
        }
    }
}

/// The task's own state.
struct Keeper {
    shared: Arc<Shared>,
    parts: Parts,
    lease: Lease,
    /// As last seen.
    view: View,
    closing: JoinSet<u32>,
    /// Who could own shards when nothing was on the move last.
    settled: Vec<NodeId>,
    next_look: Moment,
    meters: Meters,
}

impl Keeper {
    fn now(&self) -> Moment {
        self.shared.born.elapsed()
    }

    async fn run(mut self) {
        let quit = self.shared.quit.clone();
        while !quit.is_cancelled() {
            match self.lease.due(self.now()) {
                Due::Stop => {
                    tracing::error!("the lease could not be renewed in time: this node stops serving its shards");
                    self.stop(false);
                }
                Due::Join => {
                    if let Err(error) = self.join().await {
                        tracing::warn!(%error, "joining the cluster again failed");
                    }
                }
                Due::Renew => self.renew().await,
                Due::Nothing(until) => tokio::select! {
                    () = quit.cancelled() => break,
                    () = self.wait(until) => {}
                },
            }
        }
        self.stop(false);
        let leave = self.parts.ownership.leave(&self.shared.node);
        match timeout(self.parts.terms.lease, leave).await {
            Ok(Ok(())) => (self.parts.changed)(),
            Ok(Err(error)) => tracing::warn!(%error, "the cluster was left without a word; the lease runs out"),
            Err(_) => tracing::warn!("the cluster was left without a word; the lease runs out"),
        }
        self.shared.gone.cancel();
    }

    /// Waits for whatever comes first: the next thing due, a look for gone nodes, a hint, the end of a hand-off.
    async fn wait(&mut self, until: Moment) {
        let at = |moment: Moment| self.shared.born + moment;
        tokio::select! {
            () = sleep_until(at(until)) => {}
            () = sleep_until(at(self.next_look)) => self.look_for_the_gone().await,
            () = self.shared.look.notified() => self.lease.hurry(),
            Some(ended) = self.closing.join_next() => self.closed(ended.ok()).await,
        }
    }

    /// How long a call may take: a third of a lease, and never beyond the moment at which serving must stop.
    fn limit(&self) -> Duration {
        let third = self.parts.terms.lease / 3;
        let left = self.lease.serves_until().map(|until| until.saturating_sub(self.now()));
        left.filter(|left| !left.is_zero()).map_or(third, |left| left.min(third))
    }

    async fn join(&mut self) -> Result<(), Error> {
        let asked = self.now();
        self.lease.asks(asked);
        let answer = timeout(self.parts.terms.lease, self.parts.ownership.join(&self.parts.joining)).await;
        let view = answer.unwrap_or_else(|_| Err(late()))?;
        tracing::info!(node = %self.shared.node, nodes = view.nodes.len(), "joined the cluster");
        self.lease.renewed(asked);
        self.lease.hurry();
        self.view = view;
        self.publish();
        (self.parts.changed)();
        Ok(())
    }

    async fn renew(&mut self) {
        if self.shared.draining.load(Ordering::Acquire) {
            self.lease.drain();
        }
        let asked = self.now();
        self.lease.asks(asked);
        let (lease, scales) = (self.parts.terms.lease, &self.parts.scales);
        let (load, weight) = (scales.load(), scales.weight());
        let renewal = Renewal { lease, load, weight, draining: self.lease.is_draining() };
        let answer = timeout(self.limit(), self.parts.ownership.renew(&self.shared.node, renewal)).await;
        match answer.unwrap_or_else(|_| Err(late())) {
            Ok(view) => {
                self.meters.renewals.record(self.now().saturating_sub(asked));
                self.lease.renewed(asked);
                self.carry_out(view).await;
            }
            Err(Error::Lost) => {
                tracing::error!("the store says that this node's lease is over: it stops serving and joins again");
                self.stop(true);
                self.lease.hurry();
            }
            Err(error) => {
                self.meters.failures.increment(1);
                tracing::warn!(%error, "the lease was not renewed");
                self.publish();
            }
        }
    }

    async fn carry_out(&mut self, view: View) {
        self.parts.scales.see(&view);
        let was_draining = self.lease.is_draining();
        let moves = self.lease.look(&view, self.now());
        self.view = view;
        if self.lease.is_draining() != was_draining {
            tracing::info!("this node was asked to drain");
        }
        if !moves.lost.is_empty() {
            tracing::warn!(shards = moves.lost.len(), "lost to other nodes");
            self.meters.lost.increment(moves.lost.len() as u64);
            self.parts.holder.drop_now(&moves.lost);
        }
        self.count(&moves);
        for shard in moves.hand_off {
            let holder = self.parts.holder.clone();
            self.closing.spawn_on(
                async move {
                    holder.close(shard).await;
                    shard
                },
                &self.parts.handle,
            );
        }
        if !moves.release.is_empty() {
            self.release(&moves.release).await;
            self.lease.hurry();
        }
        let mine = self.view.shards.iter().filter(|row| row.node.as_ref() == Some(&self.shared.node));
        self.parts.holder.seen(&mine.map(ShardRow::fence).collect::<Vec<_>>());
        if !moves.take.is_empty() {
            self.take(&moves.take).await;
        }
        if self.lease.is_restless() {
            self.lease.within(self.now() + self.parts.restless);
        }
        self.publish();
    }

    /// Counts what is handed off, by why: this node drains, others came or went, or the same nodes have other weights.
    fn count(&mut self, moves: &Moves) {
        let takers = self.view.nodes.iter().filter(|row| placement::may_own(row)).map(|row| row.node.clone());
        if !self.lease.is_restless() {
            self.settled = takers.collect();
            return;
        }
        let number = moves.hand_off.len() as u64;
        match (self.lease.is_draining(), takers.eq(self.settled.iter().cloned())) {
            (true, _) => self.meters.moves_by_drain.increment(number),
            (false, false) => self.meters.moves_by_members.increment(number),
            (false, true) => self.meters.moves_by_weight.increment(number),
        }
    }

    async fn take(&mut self, claims: &[Claim]) {
        let answer = timeout(self.limit(), self.parts.ownership.take(&self.shared.node, claims)).await;
        match answer.unwrap_or_else(|_| Err(late())) {
            Ok(fences) => {
                tracing::info!(shards = fences.len(), "taken");
                self.meters.taken.increment(fences.len() as u64);
                self.lease.taken(&fences);
                for fence in &fences {
                    if let Some(row) = self.view.shards.get_mut(fence.shard as usize) {
                        (row.node, row.epoch) = (Some(self.shared.node.clone()), fence.epoch);
                    }
                }
                self.parts.holder.open(fences).await;
                (self.parts.changed)();
            }
            Err(error) => tracing::warn!(%error, "shards were not taken"),
        }
    }

    async fn release(&mut self, fences: &[Fence]) {
        let answer = timeout(self.limit(), self.parts.ownership.release(&self.shared.node, fences)).await;
        match answer.unwrap_or_else(|_| Err(late())) {
            Ok(()) => (self.parts.changed)(),
            // The next look finds them in this node's name and releases them then.
            Err(error) => tracing::warn!(%error, "shards were not released"),
        }
    }

    /// A hand-off ended, and with it perhaps others.
    async fn closed(&mut self, first: Option<u32>) {
        let mut ended: Vec<u32> = first.into_iter().collect();
        while let Some(Ok(shard)) = self.closing.try_join_next() {
            ended.push(shard);
        }
        let fences: Vec<Fence> = ended.into_iter().filter_map(|shard| self.lease.closed(shard)).collect();
        if fences.is_empty() {
            return;
        }
        self.meters.handed.increment(fences.len() as u64);
        self.release(&fences).await;
        self.lease.within(self.now() + self.parts.restless);
        self.publish();
    }

    /// Whether a process that owns shards is gone: then the next renewal is due now.
    async fn look_for_the_gone(&mut self) {
        self.next_look = self.now() + self.parts.look;
        let answer = timeout(self.limit(), self.parts.ownership.gone()).await;
        let gone = answer.unwrap_or_else(|_| Err(late())).unwrap_or_default();
        let owns = |node: &NodeId| self.view.shards.iter().any(|row| row.node.as_ref() == Some(node));
        if gone.iter().any(|node| *node != self.shared.node && owns(node)) {
            tracing::warn!(?gone, "processes are gone");
            self.lease.hurry();
        }
    }

    fn stop(&mut self, lost: bool) {
        let shards = self.lease.stop(lost);
        self.meters.lost.increment(shards.len() as u64);
        self.parts.holder.drop_now(&shards);
        self.publish();
    }

    fn publish(&mut self) {
        let Self { shared, lease, view, meters, .. } = self;
        let nodes: Vec<NodeRow> = view.nodes.iter().filter(|row| row.lease_left > 0).cloned().collect();
        let holding =
            |node: &&NodeId| **node != shared.node && nodes.iter().any(|row| row.node == **node && row.holds());
        let mut routes: Vec<Route> = view
            .shards
            .iter()
            .map(|row| Route { node: row.node.as_ref().filter(holding).cloned(), epoch: row.epoch, here: false })
            .collect();
        let mut open = 0;
        for (shard, epoch) in lease.open() {
            if let Some(route) = routes.get_mut(shard as usize) {
                *route = Route { node: Some(shared.node.clone()), epoch, here: true };
                open += 1;
            }
        }
        let until = lease.serves_until().unwrap_or_default().as_millis();
        shared.serves_until.store(u64::try_from(until).unwrap_or(u64::MAX), Ordering::Release);
        meters.nodes.set(nodes.len() as f64);
        meters.open.set(open as f64);
        let standing = Standing {
            version: shared.table.load().version,
            member: lease.serves_until().is_some_and(|until| until > shared.born.elapsed()),
            open,
            empty: lease.holds_nothing(),
            draining: lease.is_draining(),
            alone: placement::is_alone(view, &shared.node),
        };
        let old = shared.table.load();
        let same = |one: &NodeRow, other: &NodeRow| {
            (&one.node, one.draining, one.holds(), one.weight, one.load)
                == (&other.node, other.draining, other.holds(), other.weight, other.load)
        };
        let unchanged = old.routes == routes
            && old.nodes.len() == nodes.len()
            && old.nodes.iter().zip(&nodes).all(|(one, other)| same(one, other));
        let version = if unchanged { old.version } else { old.version + 1 };
        if !unchanged {
            shared.table.store(Arc::new(Table { version, routes, nodes }));
        }
        let standing = Standing { version, ..standing };
        shared.standing.send_if_modified(|now| std::mem::replace(now, standing) != standing);
    }
}

/// The store did not answer in time.
fn late() -> Error {
    Error::Store(crate::store::Error::Backend(String::from("no answer in time")))
}
