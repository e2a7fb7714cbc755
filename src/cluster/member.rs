//! A node's part in a cluster, put together: what the membership takes becomes open shards, what is elsewhere is forwarded, and
//! the others are told.
//!
//! Owns: the wiring ([`Member`]), who owns what as forwarding sees it (`Map`), opening and closing as the membership wants it
//! (`Held`). Not here: any of the parts. A node that is alone is a member of a cluster of one, on this path.
//! Tests: `tests/it/cluster.rs`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{
    PROTOCOL,
    balancer::{self, Balancer},
    bus::{self, Message, gate::Gate, message::Relay},
    copies::{self, Copies},
    forward::{self, Forwarder, Local, Owner, Owners},
    gauge::{Claimed, Gauge},
    hearing::{self, Hearing},
    lease::Terms,
    membership::{self, Holder, Membership, Scales, Standing},
    operations::Operations,
    shards::{ArbiterHandle, Shards},
    watch::Watches,
};
use crate::{
    config::{self, Config},
    delivery::Leaving,
    instance::environment::Environment,
    runtime::drain::Drain,
    scaling::auto_scaling::{Short, Thresholds},
    store::{
        Fence, Scope, Store,
        ownership::{self, Joining, NodeRow, Ownership, View},
    },
    types::{Fault, InstanceKey, Kind, Load, NodeId, Protocol},
};

/// Longest wait for the turns of a shard that is handed off. A thought that takes longer is begun again by the next owner.
const HAND_OFF: Duration = Duration::from_secs(3);
/// Longest wait for the effects of a shard that is handed off. Those under way longer may be sent again by the next owner.
const FAREWELL: Duration = Duration::from_secs(3);
/// Instances woken by one page of a scan.
const SCAN_PAGE: usize = 256;

/// How often is looked whether nothing is on its way.
const LOOK: Duration = Duration::from_millis(10);

/// Why a node cannot take part.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot join.
    #[error(transparent)]
    Ownership(#[from] ownership::Error),
    /// It is set to be alone, and another node is there.
    #[error("scaling.horizontal_scaling_enabled is false here, and node {0} is alive in this database")]
    NotAlone(NodeId),
    /// The settings of the bus are wrong.
    #[error(transparent)]
    Bus(#[from] bus::redis::Unusable),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Ownership(error) => error.kind(),
            Error::NotAlone(_) => Kind::Conflict,
            Error::Bus(_) => Kind::Invalid,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Ownership(error) => error.code(),
            Error::NotAlone(_) => "CLUSTER_NOT_ALONE",
            Error::Bus(_) => "BUS_UNUSABLE",
        }
    }
    fn hint(&self) -> Option<String> {
        match self {
            Error::Ownership(error) => error.hint(),
            Error::NotAlone(_) => Some(String::from(
                "stop that node, or let this one be one of several: leave scaling.horizontal_scaling_enabled out",
            )),
            Error::Bus(_) => None,
        }
    }
}

/// What a member is made of.
pub struct Parts<'a> {
    /// The node's settings.
    pub config: &'a Config,
    /// Where the node is reached: `http=HOST:PORT`, `mqtt=HOST:PORT`.
    pub addresses: Vec<String>,
    /// The rows that nodes share.
    pub ownership: Arc<dyn Ownership>,
    /// The truth.
    pub store: Arc<dyn Store>,
    /// What instances share.
    pub environment: Arc<Environment>,
    /// The shards, none of them here yet.
    pub shards: Shards,
    /// The node's drain.
    pub drain: Drain,
    /// Where the load balancer lives.
    pub arbiter: ArbiterHandle,
    /// Where tasks run.
    pub handle: tokio::runtime::Handle,
}

/// A node's part in its cluster. Cheap to clone.
#[derive(Clone)]
pub struct Member {
    membership: Membership,
    forwarder: Forwarder,
    operations: Operations,
    balancer: Balancer,
    copies: Copies,
    scope: watch::Receiver<Scope>,
    gate: Arc<Gate>,
    alone: Arc<AtomicBool>,
    relays: Arc<OnceLock<Hears>>,
    delivery: Arc<OnceLock<Leaving>>,
}

/// Who hears what doors of other nodes relay to the same door here. Must not block.
type Hears = Box<dyn Fn(NodeId, Relay) + Send + Sync>;

impl Member {
    /// Joins, and returns when this node has what it gets at once: everything, if it is alone.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn start(parts: Parts<'_>) -> Result<Self, Error> {
        let Parts { config, addresses, ownership, store, environment, shards, drain, arbiter, handle } = parts;
        let node = NodeId::generate(&config.node.name());
        let (alone, shared) = (!config.scales_out(), ownership.is_shared());
        let terms = Terms::of(&config.cluster, shared);
        if alone {
            insist_on_being_alone(&*ownership, terms.lease).await?;
        }
        // A node whose store is its own will always be alone.
        let redis = if shared { &config.redis } else { &config.redis.off() };
        let (bus, inlet) = bus::start(redis, &config.cluster.name, node.clone(), &handle)?;
        let gate = Arc::new(Gate::new(bus, !alone));
        let (bus, alone): (Arc<dyn bus::Bus>, _) = (gate.clone(), Arc::new(AtomicBool::new(alone)));
        let map = Arc::new(Map { me: node.clone(), shards: shards.clone(), membership: OnceLock::new() });
        let forwarder = Forwarder::new(forward::Parts {
            bus: bus.clone(),
            owners: map.clone(),
            store: store.clone(),
            answer: Duration::from_millis(config.redis.answer_ms),
            handle: handle.clone(),
        });
        let (scope, owned) = watch::channel(Scope::none());
        let (for_held, handle_of_held) = (forwarder.clone(), handle.clone());
        let delivery: Arc<OnceLock<Leaving>> = Arc::default();
        let held = Held {
            shards: shards.clone(),
            forwarder: for_held,
            store,
            scope,
            leaving: Mutex::default(),
            delivery: delivery.clone(),
            shared,
            deaf: config.faults.fence_off,
            handle: handle_of_held,
        };
        #[cfg(feature = "faults")]
        let (claimed, spoken) = (
            Claimed { busy: config.faults.busy_permille, memory: config.faults.memory_permille },
            config.faults.protocol,
        );
        #[cfg(not(feature = "faults"))]
        let (claimed, spoken) = (Claimed::default(), None);
        let fullness = environment.clone();
        let gauge = Gauge::new(environment.clone(), shards.clone(), claimed);
        let balancer = Balancer::start(balancer::Parts {
            me: node.clone(),
            weight: config.node.weight,
            window: Duration::from_secs(config.scaling.load_seconds),
            lease: terms.lease,
            strategy: config.scaling.strategy,
            memory: Arc::new({
                let gauge = gauge.clone();
                move || gauge.memory_permille()
            }),
            gauge: Arc::new(move || gauge.read()),
            thresholds: thresholds(&config.scaling),
            on_full: Box::new(move |turns_away| fullness.limits.set_turns_away(turns_away)),
            bus: bus.clone(),
            arbiter,
        });
        let hint = (bus.clone(), balancer.clone());
        let membership = Membership::join(membership::Parts {
            ownership: ownership.clone(),
            holder: Arc::new(held),
            joining: Joining {
                node: node.clone(),
                cluster: config.cluster.name.clone(),
                shards: shards.count(),
                addresses,
                roles: config.node.roles.clone(),
                weight: config.node.weight,
                protocol: spoken.map_or(PROTOCOL, |only| Protocol { min: only, max: only }),
                lease: terms.lease,
            },
            terms,
            look: membership::LOOK,
            restless: membership::RESTLESS,
            scales: Arc::new(balancer.clone()),
            // A hint: whoever hears it looks sooner. Without a bus everybody looks in time all the same.
            changed: Arc::new(move || {
                let _ = hint.0.broadcast(&Message::Load(hint.1.load()));
            }),
            handle: handle.clone(),
        })
        .await?;
        // Nobody else sets it.
        let _ = map.membership.set(membership.clone());
        let watches = Watches::start(&environment.hub, &forwarder, &drain, &handle);
        let (sees, routes) = (membership.clone(), balancer.clone());
        let hearing = Hearing::start(hearing::Parts {
            ears: environment.ears.clone(),
            forwarder: forwarder.clone(),
            others: Box::new(move || others(&sees)),
            spoken: Box::new(move || routes.routing().spoken()),
            answer: Duration::from_millis(config.redis.answer_ms),
            deaf: config.faults.drop_listens,
        });
        let copies = Copies::new(copies::Parts {
            environment: environment.clone(),
            owners: map.clone(),
            bus: bus.clone(),
            served: served(&shards, &membership),
            understood: understood(&balancer, 3),
            answer: Duration::from_millis(config.redis.answer_ms),
            deaf: config.faults.drop_invalidations,
            handle: handle.clone(),
        });
        copies.tell(&drain);
        let (hears, watching, weighs) = (membership.clone(), watches.clone(), balancer.clone());
        let (copying, losing) = (copies.clone(), (copies.clone(), hearing.clone()));
        let listening = hearing.clone();
        let relays = Arc::new(OnceLock::<Hears>::new());
        let door = relays.clone();
        let news = Box::new(move |from: NodeId, age_ms: u64, message: Message| {
            let message = copying.hear(&from, age_ms, message).err();
            let heard = message.and_then(|message| listening.hear(from.clone(), age_ms, message).err());
            let Some(message) = heard else { return };
            match watching.hear(from.clone(), message) {
                Err(Message::Load(load)) => {
                    weighs.hear(from, load, Duration::ZERO);
                    hears.look();
                }
                Err(Message::Report(load)) => weighs.hear(from, load, Duration::ZERO),
                Err(Message::Relay(relay)) => {
                    if let Some(hear) = door.get() {
                        hear(from, relay);
                    }
                }
                _ => {}
            }
        });
        let local = Local::new(shards, environment, news).on_lost(move |to| {
            losing.0.lost(to);
            losing.1.lost(to);
        });
        forwarder.serve(inlet, Arc::new(local), &drain);
        handle.spawn(follow(membership.clone(), forwarder.clone(), (watches, hearing), drain, alone.clone()));
        let settled = |standing: &Standing| standing.open > 0 || (standing.version > 1 && !standing.alone);
        let _ = tokio::time::timeout(terms.lease, membership.standing().wait_for(settled)).await;
        Ok(Self {
            membership,
            forwarder,
            operations: Operations::new(ownership, node, balancer.clone()),
            balancer,
            copies,
            scope: owned,
            gate,
            alone,
            relays,
            delivery,
        })
    }

    /// From now on delivery lets go of a shard before it is handed off. To be called once.
    pub fn deliver_with(&self, delivery: Leaving) {
        let _ = self.delivery.set(delivery);
    }

    /// Whether this node could be a cluster of one: whether no other one is alive.
    ///
    /// # Errors
    /// [`Error::NotAlone`].
    pub fn may_be_alone(&self) -> Result<(), Error> {
        self.others().first().map_or(Ok(()), |other| Err(Error::NotAlone(other.clone())))
    }

    /// Other nodes whose lease runs.
    fn others(&self) -> Vec<NodeId> {
        others(&self.membership)
    }

    /// From here on this node is a cluster of one, or one of several.
    pub fn set_alone(&self, alone: bool) {
        self.alone.store(alone, Ordering::Release);
        self.gate.set_open(!alone);
    }

    /// This node's membership.
    pub const fn membership(&self) -> &Membership {
        &self.membership
    }

    /// The way to instances of other nodes.
    pub const fn forwarder(&self) -> &Forwarder {
        &self.forwarder
    }

    /// The operator's side.
    pub const fn operations(&self) -> &Operations {
        &self.operations
    }

    /// Who is how busy, and where work goes that any node may do.
    pub const fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    /// States of instances that other nodes own.
    pub const fn copies(&self) -> &Copies {
        &self.copies
    }

    /// Who hears what doors of other nodes relay. The first one stays; it must not block.
    pub fn on_relay(&self, hear: impl Fn(NodeId, Relay) + Send + Sync + 'static) {
        let _ = self.relays.set(Box::new(hear));
    }

    /// The shards that are here, and news of them.
    pub fn scope(&self) -> watch::Receiver<Scope> {
        self.scope.clone()
    }

    /// Returns when nothing is on its way to other nodes, or after `patience`.
    pub async fn idle(&self, patience: Duration) {
        let empty = async {
            while !self.forwarder.is_empty() {
                tokio::time::sleep(LOOK).await;
            }
        };
        let _ = tokio::time::timeout(patience, empty).await;
    }

    /// Ends the membership, and then the bus, which tells the others. Nothing may be on its way any more.
    pub async fn leave(&self, patience: Duration) {
        self.membership.leave().await;
        self.forwarder.bus().close(patience).await;
    }

    /// Whether this node is a member that may serve.
    ///
    /// # Errors
    /// Why not.
    pub fn is_member(&self) -> Result<(), String> {
        if self.membership.standing().borrow().member {
            Ok(())
        } else {
            Err(String::from("the lease is not renewed: the store does not answer in time"))
        }
    }

    /// Whether this node has room for more work.
    ///
    /// # Errors
    /// What it is full of.
    pub fn has_room(&self) -> Result<(), String> {
        match self.balancer.full() {
            None => Ok(()),
            Some(short) => {
                let what = match short {
                    Short::Cpu => "processors",
                    Short::Memory => "memory",
                };
                Err(format!("full: its {what} are above {} for a while", short.setting()))
            }
        }
    }

    /// Whether messages to other nodes flow, or need not.
    ///
    /// # Errors
    /// Why they do not.
    pub fn has_bus(&self) -> Result<(), String> {
        match self.forwarder.bus().health() {
            bus::Health::Up | bus::Health::Off => Ok(()),
            bus::Health::Down(why) => Err(why.to_string()),
        }
    }
}

/// The epoch under which an instance is served here: it is open, and the lease runs.
fn served(shards: &Shards, membership: &Membership) -> copies::Served {
    let (shards, membership) = (shards.clone(), membership.clone());
    Box::new(move |key| shards.epoch(shards.shard_of(key)).filter(|_| membership.serves()))
}

/// Whether all nodes know what is said since a version of the protocol.
fn understood(balancer: &Balancer, since: u32) -> Box<dyn Fn() -> bool + Send + Sync> {
    let balancer = balancer.clone();
    Box::new(move || balancer.routing().spoken() >= since)
}

impl Scales for Balancer {
    fn load(&self) -> Load {
        Self::load(self)
    }
    fn weight(&self) -> u32 {
        Self::weight(self)
    }
    fn see(&self, view: &View) {
        Self::see(self, view);
    }
}

/// Tells forwarding and watches of every new table.
async fn follow(
    membership: Membership,
    forwarder: Forwarder,
    (watches, hearing): (Watches, Hearing),
    drain: Drain,
    alone: Arc<AtomicBool>,
) {
    let mut standing = membership.standing();
    let mut intruders: Vec<NodeId> = Vec::new();
    loop {
        tokio::select! {
            changed = standing.changed() => if changed.is_err() { return },
            () = drain.stopped() => return,
        }
        forwarder.moved();
        watches.moved();
        hearing.moved();
        if alone.load(Ordering::Acquire) {
            let others = others(&membership);
            if !others.is_empty() && others != intruders {
                tracing::error!(?others, "other nodes joined, and scaling.horizontal_scaling_enabled is false here");
            }
            intruders = others;
        }
    }
}

/// Other nodes whose lease runs.
fn others(membership: &Membership) -> Vec<NodeId> {
    let table = membership.table();
    table.nodes.iter().map(|row| &row.node).filter(|node| *node != membership.node()).cloned().collect()
}

/// When a node is full, as it is set.
pub fn thresholds(config: &config::Scaling) -> Thresholds {
    Thresholds {
        cpu_permille: config.limits.auto_scaling_threshold_cpu * 10,
        memory_permille: config.limits.auto_scaling_threshold_memory * 10,
        full_after: Duration::from_secs(config.full_after_seconds),
        spare_after: Duration::from_secs(config.spare_after_seconds),
    }
}

/// Waits until no other node is alive, at most for a lease: an earlier life of this node ends within it.
async fn insist_on_being_alone(ownership: &dyn Ownership, lease: Duration) -> Result<(), Error> {
    let until = tokio::time::Instant::now() + lease;
    loop {
        let view = ownership.view().await?;
        let Some(other) = view.nodes.into_iter().find(NodeRow::holds) else { return Ok(()) };
        if tokio::time::Instant::now() >= until {
            return Err(Error::NotAlone(other.node));
        }
        tokio::time::sleep(membership::LOOK).await;
    }
}

/// Who owns what, as forwarding sees it: what is open here is here, whatever the table says.
struct Map {
    me: NodeId,
    shards: Shards,
    membership: OnceLock<Membership>,
}

impl Owners for Map {
    fn shard_of(&self, key: &InstanceKey) -> u32 {
        self.shards.shard_of(key)
    }

    fn owner(&self, shard: u32) -> Owner {
        if self.shards.is_leaving(shard) {
            return Owner::Leaving;
        }
        if self.shards.epoch(shard).is_some() {
            return Owner::Here;
        }
        let Some(membership) = self.membership.get() else { return Owner::Nobody };
        match membership.table().routes.get(shard as usize) {
            Some(route) => match &route.node {
                Some(node) if *node == self.me => Owner::Leaving,
                Some(node) => Owner::Node { node: node.clone(), epoch: route.epoch },
                None => Owner::Nobody,
            },
            None => Owner::Nobody,
        }
    }

    fn epoch(&self, shard: u32) -> u64 {
        let known = self
            .membership
            .get()
            .and_then(|membership| membership.table().routes.get(shard as usize).map(|route| route.epoch));
        known.unwrap_or_default()
    }

    fn doubt(&self, _: u32) {
        if let Some(membership) = self.membership.get() {
            membership.look();
        }
    }
}

/// The shards, as the membership opens and closes them.
struct Held {
    shards: Shards,
    forwarder: Forwarder,
    store: Arc<dyn Store>,
    scope: watch::Sender<Scope>,
    /// Shards that take nothing new and whose effects are still leaving, with their epochs.
    leaving: Mutex<BTreeMap<u32, u64>>,
    delivery: Arc<OnceLock<Leaving>>,
    /// Whether other processes may use the store. A store that is one process's own knows no shards.
    shared: bool,
    /// A fault for tests: what is lost is kept.
    deaf: bool,
    handle: tokio::runtime::Handle,
}

impl Held {
    fn leaving(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        self.leaving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self) {
        // One at a time, so that an older list never comes after a newer one.
        let leaving = self.leaving();
        let here = self.shards.here();
        let all = !self.shared && !here.is_empty();
        let here = here.into_iter().filter_map(|shard| Some((shard, self.shards.epoch(shard)?)));
        let held = here.chain(leaving.iter().map(|(shard, epoch)| (*shard, *epoch)));
        self.scope.send_replace(if all { Scope::all() } else { Scope::held(self.shards.count(), held) });
        drop(leaving);
        self.forwarder.moved();
    }

    fn scan(&self, scope: Scope) {
        let (shards, store) = (self.shards.clone(), self.store.clone());
        self.handle.spawn(async move {
            if let Err(error) = wake(&shards, &*store, &scope).await {
                tracing::warn!(%error, "a scan for what waits failed; the next one finds it");
            }
        });
    }
}

#[async_trait]
impl Holder for Held {
    async fn open(&self, fences: Vec<Fence>) {
        let mut opened = Vec::new();
        for fence in fences {
            match self.shards.open(fence, Some(Arc::new(self.forwarder.clone()))).await {
                Ok(()) => opened.push(fence.shard),
                Err(error) => tracing::error!(shard = fence.shard, %error, "a shard was taken and cannot be opened"),
            }
        }
        self.publish();
        self.scan(if self.shared { Scope::of(self.shards.count(), opened) } else { Scope::all() });
    }

    async fn close(&self, shard: u32) {
        let Some(epoch) = self.shards.epoch(shard) else { return };
        self.leaving().insert(shard, epoch);
        self.shards.close(shard, HAND_OFF).await;
        if let Some(delivery) = self.delivery.get()
            && tokio::time::timeout(FAREWELL, delivery.settle(shard, epoch)).await.is_err()
        {
            tracing::info!(shard, "effects are under way still; the next owner may send them again");
        }
        self.leaving().remove(&shard);
        self.publish();
    }

    fn drop_now(&self, shards: &[u32]) {
        if self.deaf {
            return;
        }
        for shard in shards {
            self.leaving().remove(shard);
            self.shards.drop_now(*shard);
        }
        self.publish();
    }

    /// Whoever lodges tells the owner; that hint may be lost, or go to an earlier owner.
    fn seen(&self, fences: &[Fence]) {
        let behind: Vec<u32> =
            fences.iter().filter(|fence| self.shards.learn_lodged(fence)).map(|fence| fence.shard).collect();
        if !behind.is_empty() {
            self.scan(Scope::of(self.shards.count(), behind));
        }
    }
}

/// Wakes every instance of these shards with stimuli waiting in the store: the scan behind every lost wake. Returns how many.
///
/// # Errors
/// Those of the store.
pub(super) async fn wake(shards: &Shards, store: &dyn Store, scope: &Scope) -> Result<usize, crate::store::Error> {
    let (mut woken, mut after) = (0, None);
    loop {
        let page = store.waiting(scope, after.as_ref(), SCAN_PAGE).await?;
        // One that moved meanwhile is woken by its next owner.
        page.iter().for_each(|key| drop(shards.tell(key, super::shard::What::Wake)));
        woken += page.len();
        match page.into_iter().next_back() {
            Some(last) => after = Some(last),
            None => return Ok(woken),
        }
    }
}
