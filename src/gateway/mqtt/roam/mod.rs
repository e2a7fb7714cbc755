//! The embedded broker as one of several over one store: sessions go to the node their client connects to.
//!
//! Owns: what is said to the other brokers and asked of them ([`note`]), who they are ([`peers`]), and the tasks that follow
//! the store ([`follow`]): sessions other nodes have, mail, sessions and presence of nodes that are gone. Taking a session at
//! a CONNECT is `seat`. Not here: routes (`registry`), what the store promises (`store::roaming`).
//!
//! Invariants: what was acknowledged for a lasting session goes through the store; the bus carries hints, and messages for
//! sessions that do not last or at QoS 0. Nothing waits for a peer without a deadline. A node that uses its store alone has none
//! of this. Why: docs/adr/0013. Tests: `tests/it/mqtt_cluster.rs`.

pub mod follow;
pub mod note;
pub mod peers;
pub mod seat;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, mpsc, oneshot};

use self::{
    note::{Aim, KIND, Note, Publish},
    peers::{Own, Peers},
};
use super::{
    embedded::count_dropped,
    record::Message,
    registry::Space,
    session::{Inbound, Session, Taken},
};
use crate::{
    cluster::bus::{self, Bus, message::Relay},
    store::roaming::{Roaming, Seat},
    types::{InstanceId, NodeId, TenantId},
};

/// Longest wait for the peers to know of a new subscription.
const TOLD: Duration = Duration::from_secs(1);
/// They are asked again this often meanwhile.
const AGAIN: Duration = Duration::from_millis(200);
/// Longest wait for another node to let go of a session.
const YIELDED: Duration = Duration::from_secs(5);
/// Comings and goings of devices that wait to be written.
const SIGNS: usize = 65_536;

/// What the broker of a cluster is made of, beside the parts every broker has.
#[derive(Clone)]
pub struct Parts {
    /// Sessions in the shared store.
    pub sessions: Arc<dyn Roaming>,
    /// The way to the other nodes.
    pub bus: Arc<dyn Bus>,
}

/// What another node remembered of a session it let go of.
#[derive(Debug, Default)]
pub struct Memory {
    /// What it remembers of what the client sent.
    pub inbound: Inbound,
    /// Messages up to this position may have been sent.
    pub sent: i64,
}

/// A device came or went.
pub(super) struct Sign {
    pub tenant: TenantId,
    pub instance: InstanceId,
    pub is_online: bool,
    /// Told when it is written.
    pub told: Option<oneshot::Sender<()>>,
}

enum Call {
    Look { left: HashSet<NodeId>, done: oneshot::Sender<()> },
    Yield(oneshot::Sender<Memory>),
}

/// This broker among others.
pub struct Roam {
    sessions: Arc<dyn Roaming>,
    bus: Arc<dyn Bus>,
    peers: Mutex<Peers>,
    own: Mutex<Own>,
    calls: Mutex<HashMap<u64, Call>>,
    next: AtomicU64,
    /// Who wants to be told that the store was looked at.
    asked: Mutex<Vec<(NodeId, u64)>>,
    look: Notify,
    mail: Notify,
    /// Who wants to be told that mail was taken.
    emptied: Mutex<Vec<oneshot::Sender<()>>>,
    signs: mpsc::Sender<Sign>,
    unsigned: AtomicUsize,
    /// Tenants at their limit of retained values.
    full: Mutex<HashSet<TenantId>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Roam {
    /// A broker that has said nothing yet, and the comings and goings for [`follow::signs`].
    pub(super) fn new(parts: Parts) -> (Arc<Self>, mpsc::Receiver<Sign>) {
        let (signs, waiting) = mpsc::channel(SIGNS);
        let roam = Self {
            sessions: parts.sessions,
            bus: parts.bus,
            peers: Mutex::default(),
            own: Mutex::default(),
            calls: Mutex::default(),
            next: AtomicU64::new(1),
            asked: Mutex::default(),
            look: Notify::new(),
            mail: Notify::new(),
            emptied: Mutex::default(),
            signs,
            unsigned: AtomicUsize::new(0),
            full: Mutex::default(),
        };
        (Arc::new(roam), waiting)
    }

    /// This node.
    pub fn me(&self) -> &NodeId {
        self.bus.node()
    }

    /// Sessions in the shared store.
    pub fn sessions(&self) -> &dyn Roaming {
        &*self.sessions
    }

    fn relay(note: &Note) -> Option<bus::Message> {
        note.encode().map(|body| bus::Message::Relay(Relay { kind: KIND.into(), body }))
    }

    /// False when the bus did not take it.
    pub(super) fn send(&self, to: &NodeId, note: &Note) -> bool {
        Self::relay(note).is_some_and(|message| self.bus.send(to, &message).is_ok())
    }

    fn broadcast(&self, note: &Note) {
        if let Some(message) = Self::relay(note) {
            let _ = self.bus.broadcast(&message);
        }
    }

    /// A session of this node that does not last subscribes, or does no longer.
    pub(super) fn want(&self, tenant: &TenantId, filter: &str, wanted: bool) {
        let mut own = lock(&self.own);
        if own.count(&(tenant.clone(), filter.into()), wanted) {
            // Under the lock: changes leave in the order of their numbers.
            let changes = vec![(tenant.clone(), filter.into(), wanted)];
            self.broadcast(&Note::Wants { told: own.told, anew: false, changes });
        }
    }

    fn here(&self) {
        let told = lock(&self.own).told;
        self.broadcast(&Note::Here { told });
    }

    fn tell_all(&self, to: &NodeId) {
        let own = lock(&self.own);
        if !self.send(to, &Note::Wants { told: own.told, anew: true, changes: own.all() }) {
            tracing::debug!(%to, "what this node's MQTT sessions want could not be told");
        }
    }

    /// Rows of sessions changed: peers may look sooner.
    pub(super) fn changed(&self) {
        let told = lock(&self.own).told;
        self.broadcast(&Note::Look { call: 0, told });
    }

    /// Returns when every peer knows what this node's sessions subscribe to, or after a deadline: peers find it in the store
    /// by themselves then, a little later. Cancel safe.
    pub(super) async fn told(&self) {
        let left: HashSet<NodeId> = lock(&self.peers).nodes().into_iter().collect();
        if left.is_empty() || self.bus.health() != bus::Health::Up {
            return;
        }
        let call = self.next.fetch_add(1, Ordering::Relaxed);
        let (done, mut told) = oneshot::channel();
        lock(&self.calls).insert(call, Call::Look { left, done });
        let until = Instant::now() + TOLD;
        while Instant::now() < until {
            let number = lock(&self.own).told;
            self.broadcast(&Note::Look { call, told: number });
            if tokio::time::timeout(AGAIN, &mut told).await.is_ok() {
                break;
            }
        }
        lock(&self.calls).remove(&call);
    }

    /// Asks a node to let go of a session, and waits for that, not for ever.
    pub(super) async fn yielded(&self, node: &str, seat: &Seat) -> Option<Memory> {
        let node = NodeId::new(node).ok()?;
        let call = self.next.fetch_add(1, Ordering::Relaxed);
        let (tell, memory) = oneshot::channel();
        lock(&self.calls).insert(call, Call::Yield(tell));
        let note = Note::Yield { call, tenant: seat.tenant.clone(), client: seat.client.clone() };
        let memory = if self.send(&node, &note) {
            tokio::time::timeout(YIELDED, memory).await.ok().and_then(Result::ok)
        } else {
            None
        };
        lock(&self.calls).remove(&call);
        memory
    }

    /// Returns when what was left for sessions here before is in their queues, or after a deadline.
    pub(super) async fn emptied(&self) {
        let (tell, emptied) = oneshot::channel();
        lock(&self.emptied).push(tell);
        self.mail.notify_one();
        let _ = tokio::time::timeout(TOLD, emptied).await;
    }

    /// A client connected here: its session ends elsewhere if it does not last, and others see the rows that changed.
    pub(super) fn came(&self, session: &Session) {
        let (tenant, client) = (session.tenant.clone(), session.client.to_string());
        let at = session.lock().since;
        self.broadcast(&Note::Came { tenant, client, at });
    }

    fn looked(&self, from: &NodeId, call: u64) {
        let mut calls = lock(&self.calls);
        let Some(Call::Look { left, .. }) = calls.get_mut(&call) else { return };
        left.remove(from);
        if left.is_empty()
            && let Some(Call::Look { done, .. }) = calls.remove(&call)
        {
            let _ = done.send(());
        }
    }

    fn remembered(&self, call: u64, memory: Memory) {
        if let Some(Call::Yield(tell)) = lock(&self.calls).remove(&call) {
            let _ = tell.send(memory);
        }
    }

    /// Sends a message to nodes whose sessions want it. It may be lost.
    pub(super) fn spread(&self, tenant: &TenantId, message: &Message, from: Option<&str>, aims: BTreeMap<NodeId, Aim>) {
        for (node, aim) in aims {
            let (tenant, message, from) = (tenant.clone(), message.clone(), from.map(String::from));
            let publish = Publish { tenant, message, from, aim };
            if !self.send(&node, &Note::Publish(Box::new(publish))) {
                count_dropped("bus", 1);
            }
        }
    }

    /// Tells these nodes that there is mail.
    pub(super) fn posted(&self, nodes: &HashSet<String>) {
        for node in nodes.iter().filter_map(|node| NodeId::new(node).ok()) {
            if node == *self.me() {
                self.mail.notify_one();
            } else {
                self.send(&node, &Note::Mail);
            }
        }
    }

    /// A device came or went: it is told in the order of the calls.
    pub(super) fn sign(&self, sign: Sign) {
        self.unsigned.fetch_add(1, Ordering::AcqRel);
        if self.signs.try_send(sign).is_err() {
            self.unsigned.fetch_sub(1, Ordering::AcqRel);
            count_dropped("presence", 1);
        }
    }

    /// A device is about to connect here: that is written before its connection elsewhere ends, so that it is never
    /// absent meanwhile. Returns when it is, or after a deadline.
    pub(super) async fn expect(&self, space: &Space, instance: &InstanceId) {
        if space.arrive(instance) {
            let (told, written) = oneshot::channel();
            let (tenant, instance) = (space.tenant.clone(), instance.clone());
            self.sign(Sign { tenant, instance, is_online: true, told: Some(told) });
            let _ = tokio::time::timeout(TOLD, written).await;
        }
    }

    /// A connection of a device is over, or did not come about.
    pub(super) fn miss(&self, space: &Space, instance: &InstanceId) {
        if space.leave(instance) {
            let (tenant, instance) = (space.tenant.clone(), instance.clone());
            self.sign(Sign { tenant, instance, is_online: false, told: None });
        }
    }

    /// Comings and goings that are not written yet.
    pub(super) fn unsigned(&self) -> usize {
        self.unsigned.load(Ordering::Acquire)
    }

    /// Whether a tenant is at its limit of retained values, as of the last count.
    pub(super) fn is_full(&self, tenant: &TenantId) -> bool {
        lock(&self.full).contains(tenant)
    }
}

impl Memory {
    fn of(unreleased: Vec<u16>, taken: Vec<(u16, u32, crate::types::StimulusId)>, sent: i64) -> Self {
        let id = super::packet::Id::new;
        let taken = taken.into_iter().filter_map(|(at, hash, stimulus)| Some(Taken { id: id(at)?, hash, stimulus }));
        let unreleased = unreleased.into_iter().filter_map(id).collect();
        Self { inbound: Inbound { unreleased, taken: taken.collect(), forgot: false }, sent }
    }
}
