//! A session: what one client id means between and during connections, and the link to the connection that serves it.
//!
//! Not here: how sessions are found and routed to (`registry`), stored (`record`) or served (`connection`).
//!
//! Invariants: at most one link at a time; the lock is held for short work in memory only, never across an await, and
//! never while another lock of the broker or the store is asked for.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    task::Context,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use tokio_util::sync::CancellationToken;

use super::{
    outbox::Outbox,
    packet::Id,
    record::{self, Message, Subscription, Will},
    roam::note::Aim,
    topic::{self, Filter},
};
use crate::{
    gateway::auth::Pass,
    store::MqttWrite,
    types::{Millis, StimulusId, TenantId},
};

/// The hold of a session that this node does not have: nothing is written under it.
pub const NOBODY: u64 = i64::MAX as u64;

/// Where a session is that another node has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Away {
    /// The node's id.
    pub node: String,
    /// Whether its client is connected there.
    pub connected: bool,
}

/// How others reach the task that serves a connection.
#[derive(Debug)]
pub struct Link {
    /// The right of its client to be here.
    pub pass: Arc<Pass>,
    waker: AtomicWaker,
    dirty: AtomicBool,
    close: AtomicU8,
    ended: CancellationToken,
}

impl Link {
    /// Of a client that was let in.
    pub fn new(pass: Arc<Pass>) -> Self {
        let (waker, ended) = (AtomicWaker::new(), CancellationToken::new());
        Self { pass, waker, dirty: AtomicBool::new(false), close: AtomicU8::new(0), ended }
    }

    /// There is something to send.
    pub fn wake(&self) {
        if !self.dirty.swap(true, Ordering::AcqRel) {
            self.waker.wake();
        }
    }

    /// The connection must end for this reason code. The first reason stays.
    pub fn close(&self, reason: u8) {
        let _ = self.close.compare_exchange(0, reason, Ordering::AcqRel, Ordering::Acquire);
        self.waker.wake();
    }

    /// Whether there is something to send since it was last asked, and why to close if one must.
    pub fn poll(&self, context: &Context<'_>) -> (bool, Option<u8>) {
        self.waker.register(context.waker());
        let reason = self.close.load(Ordering::Acquire);
        (self.dirty.swap(false, Ordering::AcqRel), (reason != 0).then_some(reason))
    }

    /// The connection has ended and everything it took is settled.
    pub fn end(&self) {
        self.ended.cancel();
    }

    /// Returns when [`Link::end`] was called. Cancel safe.
    pub fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }
}

/// A publish of QoS 1 or 2 that was taken lately, to recognise when it comes again.
#[derive(Debug, Clone)]
pub struct Taken {
    /// Packet id.
    pub id: Id,
    /// Of topic and payload.
    pub hash: u32,
    /// The stimulus it became.
    pub stimulus: StimulusId,
}

/// What a session remembers of what its client sent.
#[derive(Debug, Default)]
pub struct Inbound {
    /// QoS 2 ids that were received and not released.
    pub unreleased: BTreeSet<Id>,
    /// The newest stimuli, as many as the client may have unacknowledged.
    pub taken: VecDeque<Taken>,
    /// Whether the session was taken from a node that could not say what it took of the client's publishes. Before one that
    /// comes again is taken anew, what that node had on the way is barred.
    pub forgot: bool,
}

/// One client id of one tenant.
#[derive(Debug)]
pub struct Session {
    /// Tenant.
    pub tenant: TenantId,
    /// Client id.
    pub client: Arc<str>,
    /// The number under which this node has it in the store; 0 when it has not, or uses the store alone.
    hold: AtomicU64,
    state: Mutex<State>,
}

/// What changes in a session.
#[derive(Debug, Default)]
pub struct State {
    /// Tells this session from earlier ones under the same client id.
    pub uid: u64,
    /// Number of connections so far; 0 for a session nobody connected to yet.
    pub epoch: u64,
    /// Life after a disconnect, in seconds; 0 = it ends with its connection.
    pub expiry_seconds: u32,
    /// When its last connection ended.
    pub disconnected_at: Option<Millis>,
    /// Who its wills and stimuli come from.
    pub sender: String,
    /// Whether it has a row.
    pub stored: bool,
    /// Whether it is over; a new one must be made.
    pub gone: bool,
    /// Subscriptions by filter.
    pub subscriptions: BTreeMap<String, Subscription>,
    /// The will in force; after the connection, the will that waits for its delay.
    pub will: Option<Will>,
    /// When the waiting will is sent.
    pub will_at: Option<Millis>,
    /// When the schedule looks at it.
    pub due: Option<Millis>,
    /// The connection.
    pub link: Option<Arc<Link>>,
    /// What it still has to send.
    pub outbox: Outbox,
    /// What it remembers of its client's publishes, while no connection has it.
    pub inbound: Inbound,
    /// Another node that has it. What is here of it then is what the store says of its subscriptions.
    pub away: Option<Away>,
    /// The connection it had here before another node took it, while that one may not be done yet.
    pub leaving: Option<Arc<Link>>,
    /// Whether a connection is just taking it from the store.
    pub claiming: bool,
    /// When its connection began.
    pub since: Millis,
}

impl Inbound {
    /// Whether nothing is remembered.
    pub fn is_empty(&self) -> bool {
        self.unreleased.is_empty() && self.taken.is_empty() && !self.forgot
    }
}

impl State {
    /// What this node remembers of a session stays with it when another node takes it, for a client that comes back here:
    /// only this node knows what it took and what is not decided yet.
    pub fn inherit(&mut self, before: &mut Self) {
        if self.uid == before.uid {
            self.leaving = self.leaving.take().or_else(|| before.leaving.take());
            if self.inbound.is_empty() {
                self.inbound = std::mem::take(&mut before.inbound);
            }
        }
    }

    /// Whether it outlives its connection.
    pub fn is_persistent(&self) -> bool {
        self.expiry_seconds > 0
    }

    /// When it ends, if no connection comes.
    pub fn expires_at(&self) -> Option<Millis> {
        self.disconnected_at.map(|at| at.plus(i64::from(self.expiry_seconds) * 1000))
    }

    /// What a record says; it has a row.
    pub fn of(record: record::Session) -> Self {
        Self {
            uid: record.uid,
            epoch: record.epoch,
            expiry_seconds: record.expiry_seconds,
            disconnected_at: record.disconnected_at,
            sender: record.sender,
            stored: true,
            subscriptions: record.subscriptions.into_iter().map(|one| (one.filter.clone(), one)).collect(),
            will: record.will,
            ..Self::default()
        }
    }

    /// How a message is delivered through these of its subscriptions: QoS, retain flag, identifiers. `None` when none of
    /// them wants it, or only at QoS 0.
    pub fn wish(&self, message: &Message, is_own: bool, aim: &Aim) -> Option<(u8, bool, Vec<u32>)> {
        let is_meant = |one: &Subscription| match Filter::parse(&one.filter) {
            Some(Filter { share: Some(_), .. }) => aim.shared.contains(&one.filter),
            Some(Filter { share: None, path }) => aim.plain && topic::matches(path, &message.topic),
            None => false,
        };
        let wanted = || self.subscriptions.values().filter(|one| is_meant(one) && !(one.no_local && is_own));
        let qos = wanted().map(|one| one.qos.min(message.qos)).max().filter(|qos| *qos > 0)?;
        let retain = message.retain && wanted().any(|one| one.retain_as_published);
        Some((qos, retain, wanted().filter_map(|one| one.id).collect()))
    }

    fn record(&self) -> record::Session {
        record::Session {
            uid: self.uid,
            epoch: self.epoch,
            expiry_seconds: self.expiry_seconds,
            disconnected_at: self.disconnected_at,
            sender: self.sender.clone(),
            subscriptions: self.subscriptions.values().cloned().collect(),
            will: self.will.clone(),
        }
    }
}

impl Session {
    /// A session nobody connected to yet.
    pub fn new(tenant: TenantId, client: Arc<str>) -> Self {
        Self { tenant, client, hold: AtomicU64::new(0), state: Mutex::default() }
    }

    /// A session as it was stored.
    pub fn restored(tenant: TenantId, client: Arc<str>, record: record::Session) -> Self {
        let state = State::of(record);
        Self { tenant, client, hold: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// The state. A panic elsewhere does not make it unusable: every change of it is whole.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The write that makes the session's row what the state is.
    ///
    /// # Errors
    /// [`record::Error`], which the types rule out.
    pub fn put(&self, state: &State) -> Result<MqttWrite, record::Error> {
        Ok(MqttWrite::PutSession {
            tenant: self.tenant.clone(),
            client: self.client.to_string(),
            hold: self.hold(),
            record: record::encode(&state.record())?,
        })
    }

    /// The write that removes the session's row and queue.
    pub fn drop_row(&self) -> MqttWrite {
        MqttWrite::DropSession { tenant: self.tenant.clone(), client: self.client.to_string(), hold: self.hold() }
    }

    /// The write that adds a message to the session's queue. `or_mail`: or leaves it for the node that has the session by now.
    pub fn enqueue(&self, order: i64, record: Bytes, or_mail: bool) -> MqttWrite {
        let (tenant, client, hold) = (self.tenant.clone(), self.client.to_string(), self.hold());
        MqttWrite::Enqueue { tenant, client, hold, order, or_mail, record }
    }

    /// The write that removes a message from the session's queue.
    pub fn dequeue(&self, order: i64) -> MqttWrite {
        let (tenant, client, hold) = (self.tenant.clone(), self.client.to_string(), self.hold());
        MqttWrite::Dequeue { tenant, client, hold, order }
    }

    /// The number under which this node has it in the store.
    pub fn hold(&self) -> u64 {
        self.hold.load(Ordering::Acquire)
    }

    /// From now on it is written under this number.
    pub fn set_hold(&self, hold: u64) {
        self.hold.store(hold, Ordering::Release);
    }
}
