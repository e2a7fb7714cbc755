//! The load balancer: who is how busy, how much this node takes, and where work goes that any node may do.
//!
//! Owns: the actor [`LoadBalancer`], which alone hears reports and judges, and its handle [`Balancer`], by which everybody
//! reads the newest [`Routing`] without a mailbox. Not here: the judging (`scaling::load_balancer`, `scaling::load_report`),
//! the snapshot's meaning (`routing`), what becomes of a weight (`membership` writes it into the node's row, `placement`
//! plans by the rows).
//!
//! Invariants:
//! - Reports are hints: one that is lost, or a mailbox that is full, costs accuracy for a moment and nothing else. The rows of
//!   the nodes are read each second whether there is a bus or not.
//! - Nothing waits for the actor. When it dies it is replaced, knows everybody again a second later, and the weight stays.
//!
//! Tests: at the foot; `tests/it/cluster.rs`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use actix::prelude::*;
use actix_rt::ArbiterHandle;
use arc_swap::{ArcSwap, Guard};

use super::{
    bus::{Bus, Message as Said},
    routing::{BUSIEST, Peer, Routing},
};
use crate::{
    scaling::{
        auto_scaling::{AutoScaling, Judgement, Short, Thresholds, Usage},
        load_balancer::Weighing,
        load_report::{Reports, Way},
    },
    store::ownership::{NodeRow, View},
    telemetry::metric,
    types::{Load, NodeId, Strategy},
};

/// Messages the actor may have waiting; beyond it reports are left out.
const MAILBOX: usize = 1024;
/// How often this node looks at its own load, tells the others, and judges.
const TICK: Duration = Duration::from_millis(500);

/// What a balancer is made of.
pub struct Parts {
    /// This node.
    pub me: NodeId,
    /// Its configured weight.
    pub weight: u32,
    /// Over how long loads are averaged before shards follow them; zero: they do not.
    pub window: Duration,
    /// How long a lease lasts: rows tell by it how old they are. A report older than two thirds of it is not believed.
    pub lease: Duration,
    /// How one of several nodes is picked.
    pub strategy: Strategy,
    /// How busy this node is.
    pub gauge: Arc<dyn Fn() -> Load + Send + Sync>,
    /// Share of its memory in use, in thousandths.
    pub memory: Arc<dyn Fn() -> u32 + Send + Sync>,
    /// When it is full.
    pub thresholds: Thresholds,
    /// Is told again and again whether what can wait is to wait for another node: whether this one is full and another one has
    /// room. Must not block.
    pub on_full: Box<dyn Fn(bool) + Send + Sync>,
    /// The way to the others.
    pub bus: Arc<dyn Bus>,
    /// Where the actor lives.
    pub arbiter: ArbiterHandle,
}

/// The handle. Cheap to clone; every method returns at once and may be called from any thread.
#[derive(Clone)]
pub struct Balancer(Arc<Inner>);

struct Inner {
    parts: Parts,
    routing: ArcSwap<Routing>,
    /// What this node takes at present.
    weight: AtomicU32,
    /// Outlives the actor. Only the actor locks it.
    weighing: Mutex<Weighing>,
    /// As `weighing`.
    scaling: Mutex<AutoScaling>,
    thresholds: ArcSwap<Thresholds>,
    judged: ArcSwap<Judgement>,
    actor: Mutex<Option<Addr<LoadBalancer>>>,
    born: Instant,
}

impl Balancer {
    /// Starts the actor.
    pub fn start(parts: Parts) -> Self {
        let routing = Routing::new(parts.me.clone(), parts.strategy, Vec::new(), None);
        let inner = Inner {
            routing: ArcSwap::from_pointee(routing),
            weight: AtomicU32::new(parts.weight),
            weighing: Mutex::new(Weighing::new(parts.weight, parts.window)),
            scaling: Mutex::default(),
            thresholds: ArcSwap::from_pointee(parts.thresholds),
            judged: ArcSwap::from_pointee(Judgement { full: None, desired: 1 }),
            actor: Mutex::new(None),
            born: Instant::now(),
            parts,
        };
        let balancer = Self(Arc::new(inner));
        drop(balancer.actor());
        balancer
    }

    /// The newest snapshot. Lock-free.
    pub fn routing(&self) -> Guard<Arc<Routing>> {
        self.0.routing.load()
    }

    /// How busy this node says it is: as busy as can be when it is full, so that others take work from it and send it none.
    pub fn load(&self) -> Load {
        self.0.said((self.0.parts.gauge)())
    }

    /// Whether this node is full, and of what.
    pub fn full(&self) -> Option<Short> {
        self.0.judged.load().full
    }

    /// From here on it is full beyond these.
    pub fn set_thresholds(&self, thresholds: Thresholds) {
        self.0.thresholds.store(Arc::new(thresholds));
    }

    /// How much this node takes compared to others.
    pub fn weight(&self) -> u32 {
        self.0.weight.load(Ordering::Acquire)
    }

    /// Another node said how busy it is, so long ago.
    pub fn hear(&self, from: NodeId, load: Load, age: Duration) {
        let taken_at = self.0.born.elapsed().saturating_sub(age);
        self.tell(Heard { from, load, taken_at });
    }

    /// The rows of all nodes were read.
    pub fn see(&self, view: &View) {
        let rows = view.nodes.iter().filter(|row| row.lease_left > 0).cloned().collect();
        self.tell(Seen { rows, at: self.0.born.elapsed() });
    }

    fn tell<M>(&self, message: M)
    where
        M: Message<Result = ()> + Send + 'static,
        LoadBalancer: Handler<M>,
    {
        // Full, or gone this moment: it is a hint.
        if self.actor().is_none_or(|actor| actor.try_send(message).is_err()) {
            metrics::counter!(metric::BALANCER_LEFT_OUT).increment(1);
        }
    }

    /// The actor; a new one when it died. None when the node stops.
    fn actor(&self) -> Option<Addr<LoadBalancer>> {
        let mut actor = self.0.actor.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(living) = actor.as_ref().filter(|actor| actor.connected()) {
            return Some(living.clone());
        }
        if actor.is_some() {
            tracing::error!("the load balancer died and is replaced");
        }
        let parts = &self.0.parts;
        let shared = Arc::downgrade(&self.0);
        let reports = Reports::new(parts.window, parts.lease * 2 / 3);
        let new = LoadBalancer { shared, reports, rows: Vec::new(), stale: BTreeMap::new() };
        let new = LoadBalancer::start_in_arbiter(&parts.arbiter, |_| new);
        *actor = new.connected().then(|| new.clone());
        actor.clone()
    }
}

impl Inner {
    fn said(&self, load: Load) -> Load {
        if self.judged.load().full.is_some() { Load { busy_permille: BUSIEST, ..load } } else { load }
    }

    /// Judges whether this node is full, and how many nodes there should be.
    fn judge(&self, now: Duration, load: Load, routing: &Routing) {
        let usage = Usage {
            cpu_permille: load.busy_permille,
            memory_permille: (self.parts.memory)(),
            others_permille: routing.others_average(),
            nodes: u32::try_from(routing.peers().iter().filter(|peer| !peer.row.draining).count()).unwrap_or(u32::MAX),
        };
        let thresholds = self.thresholds.load();
        let mut scaling = self.scaling.lock().unwrap_or_else(PoisonError::into_inner);
        let judged = scaling.judge(now, usage, &thresholds);
        drop(scaling);
        let before = self.judged.swap(Arc::new(judged));
        (self.parts.on_full)(judged.full.is_some() && routing.others_have_room());
        if judged.full.is_some() != before.full.is_some() {
            match judged.full {
                Some(short) => tracing::warn!(
                    threshold = short.setting(),
                    cpu_permille = usage.cpu_permille,
                    memory_permille = usage.memory_permille,
                    "this node is full: while others have room it gives shards away, and refuses stimuli of the background class"
                ),
                None => tracing::info!("this node has room again"),
            }
        }
        if judged.desired != before.desired {
            tracing::info!(desired = judged.desired, nodes = usage.nodes, "how many nodes the load asks for");
        }
        metrics::gauge!(metric::SCALING_FULL).set(f64::from(u8::from(judged.full.is_some())));
        metrics::gauge!(metric::SCALING_MEMORY).set(f64::from(usage.memory_permille) / 1000.0);
        metrics::gauge!(metric::SCALING_DESIRED).set(f64::from(judged.desired));
    }
}

/// The actor: hears who is how busy, judges how much this node takes, publishes the snapshot.
pub struct LoadBalancer {
    shared: std::sync::Weak<Inner>,
    reports: Reports,
    /// As last seen.
    rows: Vec<NodeRow>,
    /// Nodes whose lease runs, and whether their reports are too old to be believed.
    stale: BTreeMap<NodeId, bool>,
}

/// Another node said how busy it is.
#[derive(Message)]
#[rtype(result = "()")]
struct Heard {
    from: NodeId,
    load: Load,
    taken_at: Duration,
}

/// The rows were read.
#[derive(Message)]
#[rtype(result = "()")]
struct Seen {
    rows: Vec<NodeRow>,
    at: Duration,
}

impl Actor for LoadBalancer {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(MAILBOX);
        ctx.run_interval(TICK, |balancer, ctx| match balancer.shared.upgrade() {
            Some(shared) => balancer.tick(&shared),
            None => ctx.stop(),
        });
    }
}

impl Handler<Heard> for LoadBalancer {
    type Result = ();
    fn handle(&mut self, Heard { from, load, taken_at }: Heard, _: &mut Self::Context) {
        // One that is no member, or not yet, is heard when its row is seen.
        if self.rows.iter().any(|row| row.node == from) {
            self.note(&from, load, Way::Bus, taken_at);
        }
    }
}

impl Handler<Seen> for LoadBalancer {
    type Result = ();
    fn handle(&mut self, Seen { rows, at }: Seen, _: &mut Self::Context) {
        let Some(shared) = self.shared.upgrade() else { return };
        for row in rows.iter().filter(|row| row.node != shared.parts.me) {
            // It was written when the lease was prolonged.
            let left = Duration::from_millis(u64::try_from(row.lease_left).unwrap_or(0));
            let taken_at = at.saturating_sub(shared.parts.lease.saturating_sub(left));
            self.note(&row.node, row.load, Way::Row, taken_at);
        }
        self.reports.keep(|node| rows.iter().any(|row| row.node == *node));
        let changed = self.rows.len() != rows.len()
            || self
                .rows
                .iter()
                .zip(&rows)
                .any(|(one, other)| (&one.node, one.draining) != (&other.node, other.draining));
        self.rows = rows;
        if changed {
            // Who comes, goes or drains is known at once; loads can wait for the next tick.
            self.publish(&shared);
        }
    }
}

impl LoadBalancer {
    fn note(&mut self, node: &NodeId, load: Load, way: Way, taken_at: Duration) {
        if self.reports.hear(node, load, way, taken_at) {
            metrics::counter!(metric::BALANCER_REPORTS, "way" => way.as_str()).increment(1);
        }
    }

    fn tick(&mut self, shared: &Inner) {
        let (me, now) = (&shared.parts.me, shared.born.elapsed());
        let measured = (shared.parts.gauge)();
        let load = shared.said(measured);
        self.note(me, load, Way::Own, now);
        self.publish(shared);
        let routing = shared.routing.load();
        shared.judge(now, measured, &routing);
        let own = self.reports.believed(me, now).map_or(0, |report| report.average_permille);
        let mut weighing = shared.weighing.lock().unwrap_or_else(PoisonError::into_inner);
        let weight = weighing.judge(now, own, routing.others_average());
        drop(weighing);
        let before = shared.weight.swap(weight, Ordering::AcqRel);
        if weight != before {
            tracing::info!(weight, before, busy_permille = own, "this node's share follows its load");
        }
        metrics::gauge!(metric::BALANCER_WEIGHT).set(f64::from(weight));
        metrics::gauge!(metric::BALANCER_BUSY).set(f64::from(own) / 1000.0);
        let said = Said::Report(load);
        if routing.peers().len() > 1 && routing.spoken() >= u32::from(said.since()) {
            // Without a bus the rows say it.
            let _ = shared.parts.bus.broadcast(&said);
        }
    }

    fn publish(&mut self, shared: &Inner) {
        let now = shared.born.elapsed();
        let peer = |row: &NodeRow| Peer { row: row.clone(), report: self.reports.believed(&row.node, now) };
        let peers: Vec<Peer> = self.rows.iter().map(peer).collect();
        for peer in &peers {
            let stale = peer.report.is_none();
            let was = self.stale.insert(peer.row.node.clone(), stale);
            if stale && was == Some(false) {
                metrics::counter!(metric::BALANCER_STALE).increment(1);
                tracing::warn!(node = %peer.row.node, "it does not say any more how busy it is");
            }
        }
        self.stale.retain(|node, _| peers.iter().any(|peer| peer.row.node == *node));
        let routing = Routing::new(shared.parts.me.clone(), shared.parts.strategy, peers, Some(&shared.routing.load()));
        shared.routing.store(Arc::new(routing));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use actix_rt::Arbiter;

    use super::*;
    use crate::{
        cluster::bus::Off,
        types::{Millis, Protocol, Role, Roles},
    };

    /// Makes the actor panic.
    #[derive(Message)]
    #[rtype(result = "()")]
    struct Poison;

    impl Handler<Poison> for LoadBalancer {
        type Result = ();
        fn handle(&mut self, _: Poison, _: &mut Self::Context) {
            panic!("poisoned");
        }
    }

    fn id(name: &str) -> NodeId {
        NodeId::new(format!("{name}.0")).unwrap()
    }

    fn view(nodes: &[(&str, u32, i64)]) -> View {
        let row = |(name, busy, lease_left): &(&str, u32, i64)| NodeRow {
            node: id(name),
            addresses: Vec::new(),
            roles: Roles::default(),
            weight: 100,
            protocol: Protocol { min: 1, max: 2 },
            lease_left: *lease_left,
            load: Load { busy_permille: *busy, ..Load::default() },
            draining: false,
            alive: true,
        };
        View { now: Millis(0), nodes: nodes.iter().map(row).collect(), shards: Vec::new() }
    }

    fn balancer(arbiter: &Arbiter) -> Balancer {
        let (bus, _) = Off::new(id("me"));
        Balancer::start(Parts {
            me: id("me"),
            weight: 100,
            window: Duration::from_secs(30),
            lease: Duration::from_secs(3600),
            strategy: Strategy::LeastLoaded,
            gauge: Arc::new(Load::default),
            memory: Arc::new(|| 0),
            thresholds: Thresholds {
                cpu_permille: 700,
                memory_permille: 800,
                full_after: Duration::ZERO,
                spare_after: Duration::ZERO,
            },
            on_full: Box::new(|_| ()),
            bus,
            arbiter: arbiter.handle(),
        })
    }

    /// Waits until the snapshot is so.
    async fn until(balancer: &Balancer, so: impl Fn(&Routing) -> bool) {
        while !so(&balancer.routing()) {
            tokio::task::yield_now().await;
        }
    }

    fn busy(routing: &Routing, name: &str) -> Option<(u32, Way)> {
        let report = routing.peer(&id(name))?.report?;
        Some((report.load.busy_permille, report.way))
    }

    const RUNS: i64 = 3_600_000;

    #[actix_rt::test]
    async fn it_knows_who_is_there_and_how_busy_by_whatever_is_newer() {
        let arbiter = Arbiter::new();
        let balancer = balancer(&arbiter);
        assert!(balancer.routing().peers().is_empty());
        balancer.see(&view(&[("a", 700, RUNS), ("b", 300, RUNS), ("gone", 0, 0), ("me", 0, RUNS)]));
        until(&balancer, |routing| routing.peers().len() == 3).await;
        assert_eq!(balancer.routing().other(Role::Gateway, 0).unwrap().row.node, id("b"));
        balancer.hear(id("b"), Load { busy_permille: 900, ..Load::default() }, Duration::ZERO);
        balancer.hear(id("nobody"), Load::default(), Duration::ZERO);
        until(&balancer, |routing| busy(routing, "b") == Some((900, Way::Bus))).await;
        assert_eq!(balancer.routing().other(Role::Gateway, 0).unwrap().row.node, id("a"));
        assert_eq!(balancer.routing().peers().len(), 3, "who is no member is not believed");
        balancer.see(&view(&[("b", 100, RUNS), ("me", 0, RUNS)]));
        until(&balancer, |routing| routing.peer(&id("a")).is_none()).await;
        until(&balancer, |routing| busy(routing, "b") == Some((100, Way::Row))).await;
        arbiter.stop();
    }

    #[actix_rt::test]
    async fn when_it_dies_it_is_replaced_and_knows_everybody_again() {
        let arbiter = Arbiter::new();
        let balancer = balancer(&arbiter);
        let before = balancer.actor().unwrap();
        assert!(before.try_send(Poison).is_ok());
        while before.connected() {
            tokio::task::yield_now().await;
        }
        balancer.see(&view(&[("a", 700, RUNS), ("me", 0, RUNS)]));
        until(&balancer, |routing| busy(routing, "a").is_some()).await;
        assert!(balancer.actor().unwrap() != before);
        arbiter.stop();
        arbiter.join().unwrap();
        balancer.see(&view(&[]));
        assert!(
            balancer.actor().is_none() || !balancer.actor().unwrap().connected(),
            "nothing lives on a stopped arbiter"
        );
    }
}
