//! The durable truth: what is accepted, decided, remembered and still to be sent.
//!
//! Owns: the traits every backend implements and the units of work they commit. Backends: [`sqlite`]
//! (one writer, group commit), [`postgres`] (shared by many nodes) and [`memory`] (tests and simulation, with faults on demand).
//! Not here: what a turn decides (`instance::turn`), caching (`scaling`), delivery (`delivery`).
//!
//! Invariants:
//! - [`Done`] is called exactly once for every submitted unit, and with `Ok` only after the data is durable.
//! - A unit is applied whole or not at all; units of one instance are applied in the order of submission.
//! - A repeatable stimulus id that is already known within its instance is refused as [`Rejection::Duplicate`].
//! - A unit whose [`Fence`] is stale is refused as [`Rejection::Fenced`] and takes no neighbour with it.
//! - Nothing is decided before what was lodged earlier: a shard's owner that has not looked is [`Rejection::Behind`].
//!
//! Tests: `tests/it/store_contract.rs` runs one suite over all backends.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;

use crate::{
    scaling::pool::{Limits, Places},
    types::{
        Fault, InstanceId, InstanceKey, Kind, Millis, Profile, StateSnapshot, Step, Stimulus, StimulusId, TenantId,
        TurnRecord,
    },
};

mod check;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub(crate) mod journal;
mod links;
pub mod memory;
pub mod ownership;
pub mod postgres;
pub(crate) mod rank;
pub(crate) mod record;
pub(crate) mod replay;
pub mod roaming;
mod scope;
mod slow;
pub mod sqlite;

pub use journal::Journal;
pub use scope::{Feed, Scope};
pub use slow::set_threshold as set_slow_threshold;

/// Most instances [`Reader::locate`] names.
pub const MAX_LOCATED: usize = 10;

/// What can go wrong in a store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The commit queue is full.
    #[error("the commit queue is full")]
    Overloaded,
    /// The data folder is full. Nothing was written.
    #[error("no space left for the store: {0}")]
    Full(String),
    /// Another process holds the store.
    #[error("the store is locked by another process: {0}")]
    Locked(String),
    /// The stored bytes are damaged.
    #[error("the store is damaged: {0}")]
    Corrupt(String),
    /// Written by a newer build.
    #[error("the store has schema {found}, this build knows up to {known}: run a newer build")]
    NewerSchema {
        /// Version found.
        found: u32,
        /// Newest version this build knows.
        known: u32,
    },
    /// The store is closing or its writer is gone.
    #[error("the store is closed")]
    Closed,
    /// Anything else the backend reports.
    #[error("the store failed: {0}")]
    Backend(String),
}

impl Fault for Error {
    fn kind(&self) -> Kind {
        match self {
            Error::Overloaded => Kind::Overloaded,
            Error::Full(_) | Error::Locked(_) | Error::Closed | Error::Backend(_) => Kind::Unavailable,
            Error::Corrupt(_) | Error::NewerSchema { .. } => Kind::Internal,
        }
    }
    fn code(&self) -> &'static str {
        match self {
            Error::Overloaded => "OVERLOADED",
            Error::Full(_) => "STORE_FULL",
            Error::Locked(_) => "STORE_LOCKED",
            Error::Corrupt(_) => "STORE_CORRUPT",
            Error::NewerSchema { .. } => "STORE_NEWER_SCHEMA",
            Error::Closed | Error::Backend(_) => "STORE_UNAVAILABLE",
        }
    }
    fn hint(&self) -> Option<String> {
        Some(String::from(match self {
            Error::Full(_) => "free space in the data folder; nothing was acknowledged that was not stored",
            Error::Locked(_) => {
                "stop the other process that uses this data folder, or give this one its own --data-dir"
            }
            Error::Corrupt(_) => "stop the node and restore the data folder from a backup",
            Error::NewerSchema { .. } => "start the build that wrote this data folder, or a newer one",
            Error::Overloaded | Error::Closed | Error::Backend(_) => "try again after the time in Retry-After",
        }))
    }
}

/// The right under which a unit is written. SQLite, which one process uses alone, accepts every fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Fence {
    /// The shard.
    pub shard: u32,
    /// The owner's epoch.
    pub epoch: u64,
    /// How many of the stimuli lodged for the shard, counted from its beginning, its owner has looked at.
    pub lodged: u64,
}

/// One unit of work for one instance, applied whole or not at all.
#[derive(Debug)]
pub struct Unit {
    /// The instance.
    pub key: InstanceKey,
    /// The writer's right.
    pub fence: Fence,
    /// What to write.
    pub work: Work,
    /// Told the end.
    pub done: Done,
}

/// What a unit writes.
#[derive(Debug)]
pub enum Work {
    /// The fast path and the end of the slow path: turns in order, numbered from `head.turn + 1` without gaps.
    ///
    /// A turn that forgets ([`TurnRecord::forgotten`]) takes the content of those episodes out of the earlier turns' records and
    /// out of what was derived from them. Each turn removes its stimulus from the inbox if it stands there, and the steps it took.
    /// An instance that has no row yet gets one with no
    /// profile of its own.
    Turns {
        /// The instance's head before these turns, as the last [`Committed`] or [`Loaded`] gave it.
        head: Head,
        /// The turns.
        turns: Vec<Arc<TurnRecord>>,
    },
    /// The slow path's first half: the stimulus is accepted and waits.
    Accept {
        /// The stimuli, in arrival order.
        stimuli: Vec<Arc<Stimulus>>,
    },
    /// As [`Work::Accept`], from a node that does not own the shard, on behalf of the owner: the fence's epoch is not looked
    /// at, and the shard's count of lodged stimuli grows with the unit.
    Lodge {
        /// The stimuli, in arrival order.
        stimuli: Vec<Arc<Stimulus>>,
    },
    /// Steps of a stimulus that is being thought about. They go with the turn that decides it, with its burial, and with the
    /// instance. A number that stands there already is written anew.
    Step {
        /// The instance's head, unchanged.
        head: Head,
        /// Whose; it stands in the inbox.
        stimulus: StimulusId,
        /// The number of the first; the first of a turn is 0.
        first: u32,
        /// The steps, in order.
        steps: Vec<Arc<Step>>,
    },
    /// A stimulus could not be decided: it leaves the inbox (if it stands there) for the dead letters.
    Bury {
        /// The stimulus.
        stimulus: Arc<Stimulus>,
        /// Why.
        reason: String,
        /// How often it was tried.
        tries: u32,
        /// When it was given up.
        at: Millis,
    },
    /// A dead letter goes back to the inbox with its tries forgotten.
    Revive {
        /// Which.
        stimulus: StimulusId,
    },
    /// Creates the instance or replaces its profile.
    PutProfile {
        /// The profile.
        profile: Arc<Profile>,
        /// Now.
        at: Millis,
    },
    /// Forgets the instance: profile, turns, inbox, dead letters, ids, episodes, reminders. Outgoing effects already decided
    /// may still be delivered.
    Forget,
}

/// Where an instance's history ends. Opaque to everyone but the backend; kept by the instance between commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Head {
    /// Number of the last turn, 0 before the first.
    pub turn: u64,
    /// Log positions of the last turn and of the last turns whose numbers are multiples of 16, 256 and 4096: a skip list
    /// (Pugh 1990, made deterministic) through an append-only log. Zero where there is none.
    pub links: [i64; 4],
}

/// What a unit achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The head after the unit (unchanged by work that adds no turn).
    pub head: Head,
    /// Whether [`Work::PutProfile`] created the instance.
    pub created: bool,
}

/// Why a unit was not applied though the store works.
#[derive(Debug, Clone)]
pub enum Rejection {
    /// The stimulus at this position of the unit has an id that is known: `known` says what became of it.
    Duplicate {
        /// Position among the unit's turns or stimuli.
        index: usize,
        /// The earlier one. Of two with one id in the same unit it is the first, which is no more written than the rest.
        known: Known,
    },
    /// The stimulus at this position was made of a publish under a hold that is barred ([`roaming::Origin`]): its sender goes
    /// on at another node, which decides it when it comes again.
    Barred {
        /// Position among the unit's turns or stimuli.
        index: usize,
    },
    /// The fence is stale: another node owns the shard.
    Fenced,
    /// The fence is of the right epoch, but stimuli were lodged that the owner has not looked at, and what comes later must
    /// not be decided before them. The owner reads what waits, then tries again with this count in its fence. Only
    /// [`Work::Accept`], and [`Work::Turns`] of which a stimulus does not stand in the inbox, are refused so.
    Behind {
        /// The shard's count of lodged stimuli.
        lodged: u64,
    },
    /// [`Work::Revive`] names no dead letter.
    NotFound,
    /// The store failed; nothing of the unit was written.
    Failed(Error),
}

/// What is known of a stimulus id.
#[derive(Debug, Clone, PartialEq)]
pub enum Known {
    /// It waits in the inbox.
    Waiting(Arc<Stimulus>),
    /// It was decided.
    Decided(Arc<TurnRecord>),
    /// It is a dead letter.
    Dead(Arc<DeadLetter>),
}

type Tell = Box<dyn FnOnce(Result<Committed, Rejection>) + Send>;

/// The end of a unit, told once. Runs on the writer's thread (or the submitter's, when the unit is refused at once or the
/// backend is [`memory`]): it must be short, must not block, and must not want a lock its submitter holds.
pub struct Done(Mutex<Option<Tell>>);

impl Done {
    /// Calls `tell` with the end.
    pub fn new(tell: impl FnOnce(Result<Committed, Rejection>) + Send + 'static) -> Self {
        Self(Mutex::new(Some(Box::new(tell))))
    }

    /// A future of the end. Dropping the future loses the news, not the work.
    pub fn channel() -> (Self, tokio::sync::oneshot::Receiver<Result<Committed, Rejection>>) {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        (Self::new(move |end| drop(sender.send(end))), receiver)
    }

    /// Tells the end.
    pub fn tell(mut self, end: Result<Committed, Rejection>) {
        self.take_and_tell(end);
    }

    /// The lock is never taken: it only lets a batch of units be looked at by several threads.
    fn take_and_tell(&mut self, end: Result<Committed, Rejection>) {
        if let Some(tell) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            tell(end);
        }
    }
}

impl Drop for Done {
    /// A unit that is dropped unwritten has failed.
    fn drop(&mut self) {
        self.take_and_tell(Err(Rejection::Failed(Error::Closed)));
    }
}

impl std::fmt::Debug for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Done")
    }
}

/// What was made of an instance's turns, to be used again as long as its history ends there.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where the history ends: it says which life, too.
    pub head: Head,
    /// The state there.
    pub state: StateSnapshot,
    /// Turns since the record that holds the whole state.
    pub turns_since_full: u64,
}

/// All that activation needs.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Whether the instance exists: it has a profile or at least one turn or waiting stimulus.
    pub exists: bool,
    /// Its own profile, if it was given one.
    pub profile: Option<Arc<Profile>>,
    /// When it was created.
    pub created_at: Option<Millis>,
    /// Where its history ends.
    pub head: Head,
    /// Its state.
    pub state: StateSnapshot,
    /// Turns since the record that holds the whole state.
    pub turns_since_full: u64,
    /// Stimuli accepted and not decided, in arrival order.
    pub inbox: Vec<Arc<Stimulus>>,
    /// The steps so far of those that were being thought about.
    pub journals: Vec<Journal>,
}

/// A stimulus that was given up.
#[derive(Debug, Clone, PartialEq)]
pub struct DeadLetter {
    /// The stimulus.
    pub stimulus: Stimulus,
    /// Why.
    pub reason: String,
    /// How often it was tried.
    pub tries: u32,
    /// When it was given up.
    pub at: Millis,
}

/// One line of a listing of instances.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its id.
    pub instance: InstanceId,
    /// Its profile, if it has one of its own.
    pub profile: Option<Arc<Profile>>,
    /// When it was created.
    pub created_at: Millis,
}

/// An episode found by recall.
#[derive(Debug, Clone, PartialEq)]
pub struct Episode {
    /// Its id within the instance.
    pub id: u64,
    /// The turn that recorded it.
    pub turn: u64,
    /// What is remembered.
    pub content: String,
    /// Structured part.
    pub data: Option<crate::types::RawJson>,
    /// Labels.
    pub tags: Vec<String>,
    /// How good it was.
    pub reward: Option<f32>,
    /// When it happened.
    pub occurred_at: Millis,
    /// When it was recorded.
    pub recorded_at: Millis,
    /// How well it matches, higher is better.
    pub score: f64,
}

/// Turns that changed what an instance remembers.
#[derive(Debug, Clone, Default)]
pub struct Remembered {
    /// Tells one life of the instance from another; 0 when there is no such instance.
    pub life: i64,
    /// The turns, oldest first.
    pub turns: Vec<Arc<TurnRecord>>,
}

/// A piece of what a memory makes of its turns, kept so that it need not be made again. Derived: dropped when in doubt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// It begins behind this turn.
    pub after: u64,
    /// The last turn it covers.
    pub upto: u64,
    /// Its bytes, which are the memory's own.
    pub rec: Bytes,
}

/// Parts of an instance's memory.
#[derive(Debug, Clone, Default)]
pub struct Parts {
    /// As [`Remembered::life`].
    pub life: i64,
    /// They, in the order of turns.
    pub parts: Vec<Part>,
}

/// What is covered by parts.
#[derive(Debug, Clone, Default)]
pub struct Spans {
    /// As [`Remembered::life`].
    pub life: i64,
    /// The instance's last turn.
    pub head: u64,
    /// Behind which turn each part begins, and the last turn it covers; in order.
    pub spans: Vec<(u64, u64)>,
    /// The last turn that the index over its vectors knows; nothing where there is none, or none that may be read.
    pub index: Option<u64>,
}

impl Spans {
    /// Of what stands in the store: places and last turns. Parts are at the turns they begin behind; -1 is the turn that forgot
    /// something last, and an index, at -2, that knows less is of no use.
    fn of(life: i64, head: u64, rows: &[(i64, u64)]) -> Self {
        let at = |place| rows.iter().find(|(at, _)| *at == place).map(|(_, upto)| *upto);
        let forgot = at(-1).unwrap_or(0);
        let spans = rows.iter().filter_map(|(at, upto)| Some((u64::try_from(*at).ok()?, *upto))).collect();
        Self { life, head, spans, index: at(-2).filter(|upto| (forgot..=head).contains(upto)) }
    }
}

/// The index over the vectors of a memory, as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// As [`Remembered::life`].
    pub life: i64,
    /// The last turn it knows.
    pub upto: u64,
    /// Its bytes, which are the memory's own.
    pub rec: Bytes,
}

/// A piece of a memory on its way to the store.
#[derive(Debug, Clone)]
pub struct Keep {
    /// Whose.
    pub key: InstanceKey,
    /// Of which life.
    pub life: i64,
    /// What was forgotten by this turn or earlier is not in it.
    pub seen: u64,
    /// It.
    pub piece: Piece,
}

/// What is kept of a memory beside the log. One without bytes removes the one in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// A part, in place of the one that begins where it does.
    Part(Part),
    /// The index over its vectors as of the turn that was seen, in place of the one there was.
    Index(Bytes),
}

impl Piece {
    /// Its bytes.
    pub const fn rec(&self) -> &Bytes {
        match self {
            Self::Part(part) => &part.rec,
            Self::Index(rec) => rec,
        }
    }
}

/// A turn with something for `delivery`, in commit order.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// In which feed.
    pub feed: Feed,
    /// Position in the feed; grows, with gaps.
    pub position: i64,
    /// Whose turn.
    pub key: InstanceKey,
    /// The turn.
    pub turn: Arc<TurnRecord>,
}

/// An effect that could not be delivered at once and is tried again later, or a reminder that waits for its time.
#[derive(Debug, Clone, PartialEq)]
pub struct Pending {
    /// Whose.
    pub key: InstanceKey,
    /// `TURN-INDEX`, unique within the instance.
    pub effect_id: String,
    /// What.
    pub effect: crate::types::Effect,
    /// Content of the reply the effect refers to, for [`crate::types::EffectKind::Reply`].
    pub reply: Option<crate::types::Reply>,
    /// The stimulus the turn decided, for the payload.
    pub stimulus: StimulusId,
    /// Tries so far.
    pub tries: u32,
    /// When it is due.
    pub due: Millis,
}

/// What `delivery` writes. One submission is applied whole.
#[derive(Debug, Clone)]
pub enum Shipping {
    /// All effects of a feed up to this position are delivered or pending.
    Shipped {
        /// Of which feed.
        feed: Feed,
        /// The position.
        position: i64,
    },
    /// Keep for later; replaces one with the same key and effect id.
    Postpone(Box<Pending>),
    /// Delivered or given up.
    Settle {
        /// Whose.
        key: InstanceKey,
        /// Which.
        effect_id: String,
    },
}

impl Shipping {
    /// The shard it is written for, of so many.
    pub fn shard(&self, count: u32) -> u32 {
        match self {
            Self::Shipped { feed, .. } => feed.0,
            Self::Postpone(pending) => pending.key.shard(count),
            Self::Settle { key, .. } => key.shard(count),
        }
    }
}

/// A write to the MQTT tables. `record`s are opaque, versioned bytes of the MQTT door. All keys begin with tenant.
///
/// `hold` is the number under which the writing node has the session ([`roaming`]): under an older one than the session's the
/// write is not applied. 0 on a store that one node uses alone.
#[derive(Debug, Clone)]
pub enum MqttWrite {
    /// Creates or replaces a session.
    PutSession {
        /// Tenant.
        tenant: TenantId,
        /// MQTT client id.
        client: String,
        /// Under which number.
        hold: u64,
        /// The session: subscriptions, expiry, will, connection count.
        record: Bytes,
    },
    /// Removes a session and its queue.
    DropSession {
        /// Tenant.
        tenant: TenantId,
        /// MQTT client id.
        client: String,
        /// Under which number.
        hold: u64,
    },
    /// Appends a message to a session's queue.
    Enqueue {
        /// Tenant.
        tenant: TenantId,
        /// MQTT client id.
        client: String,
        /// Under which number.
        hold: u64,
        /// Order within the session, chosen by the door, growing.
        order: i64,
        /// Whether it becomes mail for whoever has the session when that is another node by now.
        or_mail: bool,
        /// The message.
        record: Bytes,
    },
    /// Removes an acknowledged message from a session's queue.
    Dequeue {
        /// Tenant.
        tenant: TenantId,
        /// MQTT client id.
        client: String,
        /// Under which number.
        hold: u64,
        /// Which.
        order: i64,
    },
    /// Leaves a message for a session that another node has. Without such a session nothing is written.
    Mail {
        /// Tenant.
        tenant: TenantId,
        /// MQTT client id.
        client: String,
        /// The message.
        record: Bytes,
    },
    /// Removes mail that was taken.
    Collect {
        /// Tenant.
        tenant: TenantId,
        /// MQTT client id.
        client: String,
        /// Under which number.
        hold: u64,
        /// Which.
        mail: i64,
    },
    /// Sets a retained value; an empty record clears it.
    Retain {
        /// Tenant.
        tenant: TenantId,
        /// Topic.
        topic: String,
        /// The message, empty to clear.
        record: Bytes,
    },
}

impl MqttWrite {
    /// The session it is written for and the number, where it needs one.
    pub fn held(&self) -> Option<(&TenantId, &str, u64)> {
        match self {
            Self::PutSession { tenant, client, hold, .. }
            | Self::DropSession { tenant, client, hold }
            | Self::Enqueue { tenant, client, hold, .. }
            | Self::Dequeue { tenant, client, hold, .. }
            | Self::Collect { tenant, client, hold, .. } => (*hold > 0).then_some((tenant, client, *hold)),
            Self::Mail { .. } | Self::Retain { .. } => None,
        }
    }
}

/// A stored MQTT row, as read at start.
#[derive(Debug, Clone)]
pub enum MqttRow {
    /// A session.
    Session {
        /// Tenant.
        tenant: TenantId,
        /// Client id.
        client: String,
        /// Its record.
        record: Bytes,
    },
    /// A queued message, in order within its session.
    Queued {
        /// Tenant.
        tenant: TenantId,
        /// Client id.
        client: String,
        /// Order.
        order: i64,
        /// Its record.
        record: Bytes,
    },
    /// A retained value.
    Retained {
        /// Tenant.
        tenant: TenantId,
        /// Topic.
        topic: String,
        /// Its record.
        record: Bytes,
    },
}

/// Figures of a store, for health and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Units waiting for the writer.
    pub queue: usize,
    /// Stimuli in all inboxes.
    pub inbox: u64,
    /// Dead letters.
    pub dead: u64,
    /// Effects and reminders pending.
    pub pending: u64,
    /// Bytes on disk.
    pub bytes: u64,
}

/// Writes. All return at once; the end is told through [`Done`].
pub trait Writer: Send + Sync + 'static {
    /// Queues a unit. Units of one instance must come from one place, in order.
    ///
    /// A queue that is full answers through `done` with [`Error::Overloaded`], before this returns.
    fn submit(&self, unit: Unit);
    /// Queues writes of `delivery`; they share the turns' group commit. What is written for a shard under a fence whose epoch is
    /// not the shard's any more is left out: another node sees to it. A shard without a fence is not looked at.
    fn ship(&self, under: Vec<Fence>, writes: Vec<Shipping>, done: Done);
    /// Queues writes of the MQTT door; they share the turns' group commit.
    fn mqtt(&self, writes: Vec<MqttWrite>, done: Done);
    /// Keeps a piece of a memory. It is left out, which is no error, when the instance has another life by now or forgot something
    /// behind the turn that was seen. A turn that forgets removes the parts in which that stands, and the index, in its own
    /// commit.
    fn keep(&self, keep: Keep, done: Done);
}

/// Reads. They see everything whose `Done` was told. Cancel safe: dropping a future abandons the read.
#[async_trait]
pub trait Reader: Send + Sync + 'static {
    /// What activation needs; `exists` is false for an instance nobody has heard of.
    async fn load(&self, key: &InstanceKey) -> Result<Loaded, Error>;
    /// As [`Reader::load`]; turns need not be read again where the history still ends as it does in the snapshot.
    async fn load_with(&self, key: &InstanceKey, snapshot: Arc<Snapshot>) -> Result<Loaded, Error> {
        drop(snapshot);
        self.load(key).await
    }
    /// The committed state, without the inbox.
    async fn state(&self, key: &InstanceKey) -> Result<Option<StateSnapshot>, Error>;
    /// Turns with numbers above `after`, oldest first, at most `limit`.
    async fn turns(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Vec<Arc<TurnRecord>>, Error>;
    /// What is known of a stimulus id: waiting, dead, or decided. An id that its sender chose is found within the
    /// deduplication window by index; a generated one by its time through the log.
    async fn find(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Option<Known>, Error>;
    /// The newest decided repeatable stimulus of the instance whose id begins with `prefix`, within the deduplication window.
    async fn find_prefix(&self, key: &InstanceKey, prefix: &str) -> Result<Option<Known>, Error>;
    /// Instances of the tenant that know this repeatable stimulus id (decided, waiting or dead), at most 10.
    async fn locate(&self, tenant: &TenantId, stimulus: &StimulusId) -> Result<Vec<InstanceId>, Error>;
    /// Instances of a tenant in id order after `after`, at most `limit`, only those whose profile carries the label if given.
    async fn list(
        &self,
        tenant: &TenantId,
        label: Option<(&str, &str)>,
        after: Option<&InstanceId>,
        limit: usize,
    ) -> Result<Vec<Listed>, Error>;
    /// Instances of the scope with stimuli waiting, each once, in key order after `after`, at most `limit`: the scan behind
    /// every wake.
    async fn waiting(
        &self,
        scope: &Scope,
        after: Option<&InstanceKey>,
        limit: usize,
    ) -> Result<Vec<InstanceKey>, Error>;
    /// Dead letters of an instance in the order they were given up, after the named one.
    async fn dead_letters(
        &self,
        key: &InstanceKey,
        after: Option<&StimulusId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error>;
    /// Episodes of the instance that match the query's words, best first (BM25). Sees every committed turn.
    async fn recall(&self, key: &InstanceKey, query: &str, limit: usize) -> Result<Vec<Episode>, Error>;
    /// Turns of the instance that remembered or forgot something, with numbers above `after`, oldest first, at most `limit`. What
    /// was forgotten since is not in them. Sees every committed turn.
    async fn remembered(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Remembered, Error>;
    /// Parts of the instance's memory that reach beyond a turn and not beyond its last one, in order, at most `limit`.
    async fn parts(&self, key: &InstanceKey, behind: u64, limit: usize) -> Result<Parts, Error>;
    /// The index over the vectors of the instance's memory, unless it knows more turns than there are, or something was forgotten
    /// behind the last one it knows.
    async fn index(&self, key: &InstanceKey) -> Result<Option<Index>, Error>;
    /// What all parts cover, and the index.
    async fn spans(&self, key: &InstanceKey) -> Result<Spans, Error>;
    /// These turns of the instance, as far as there are any, in no order.
    async fn turns_at(&self, key: &InstanceKey, turns: &[u64]) -> Result<Vec<Arc<TurnRecord>>, Error>;
    /// The feeds in which turns of the scope's instances stand.
    fn feeds(&self, scope: &Scope) -> Vec<Feed>;
    /// Turns with effects, of each feed those after a position and in the order of positions, at most `limit` in all. None
    /// is passed over: what is missing of a feed comes after the last that is given of it.
    async fn outgoing(&self, after: &[(Feed, i64)], limit: usize) -> Result<Vec<Outgoing>, Error>;
    /// The last position of each feed told by [`Shipping::Shipped`], 0 at first.
    async fn shipped(&self, feeds: &[Feed]) -> Result<Vec<i64>, Error>;
    /// Pending effects and reminders of the scope's instances due at or before `now`, soonest first.
    async fn due(&self, scope: &Scope, now: Millis, limit: usize) -> Result<Vec<Pending>, Error>;
    /// All rows of the MQTT tables: sessions, then queued messages in order, then retained values. For the door's start.
    async fn mqtt_rows(&self) -> Result<Vec<MqttRow>, Error>;
    /// Figures.
    async fn stats(&self) -> Result<Stats, Error>;
    /// Whether a write and a read succeed at present, within the deadline. For the readiness check.
    async fn probe(&self, deadline: Duration) -> Result<(), Error>;
}

/// A backend, shared by the whole node.
pub trait Store: Writer + Reader {
    /// Woken after each commit that carries turns with effects. A hint: `delivery` also looks periodically.
    fn outgoing_hint(&self) -> Arc<tokio::sync::Notify>;
    /// Its pools, for figures and readiness; none where nothing is bounded.
    fn pools(&self) -> Vec<Arc<Places>> {
        Vec::new()
    }
    /// From here on its reads have these places. Returns at once; reads under way are finished.
    fn resize(&self, _pool: Limits) {}
    /// Commits what is queued, checkpoints and closes; later submissions fail with [`Error::Closed`].
    fn close(&self);
}
