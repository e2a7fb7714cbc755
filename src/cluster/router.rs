//! The router: instance -> shard -> arbiter, or another node, from an immutable table, without a lock.
//!
//! Not here: shards' residents (`shard`), who owns what (`membership`), the way to other nodes (`forward`).
//! Invariants: everything about one instance passes through one shard actor on one thread, in the order of the calls; what
//! a sender sent here is not overtaken by what it sends later, though the shard comes or goes between.
//! Tests: `tests/it/turn.rs`, `tests/it/cluster.rs`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    bus::message::{Question, Told},
    member::{self, Member},
    shard::What,
    shards::Shards,
};
use crate::{
    instance::{
        Error, Receipt, Until,
        ears::Ears,
        environment::Environment,
        events::Hub,
        inbox::{Line, Waiter, Waiting},
        turn::PATCH_CHANNEL,
    },
    memory::Memory,
    store::{Scope, Store},
    types::{InstanceKey, Profile, RawJson, StateSnapshot, Stimulus, StimulusId},
};

/// Longest wait for a change of an instance itself (profile, forget, revive).
const CONTROL_DEADLINE: Duration = Duration::from_secs(30);

/// How an instance lives at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Presence {
    /// Whether it is in memory.
    pub active: bool,
    /// Stimuli waiting in memory.
    pub inbox: usize,
}

/// The way into instances. Cheap to clone; every method may be called from any thread.
#[derive(Clone)]
pub struct Router(Arc<Inner>);

struct Inner {
    environment: Arc<Environment>,
    shards: Shards,
    /// None where there are only the shards that are here.
    member: Option<Member>,
    draining: AtomicBool,
}

impl Router {
    /// Over the shards of this node; what is not here goes the way of the member, if there is one.
    pub fn new(environment: Arc<Environment>, shards: Shards, member: Option<Member>) -> Self {
        Self(Arc::new(Inner { environment, shards, member, draining: AtomicBool::new(false) }))
    }

    /// Delivers a stimulus to its instance, activating it if need be, and waits as long as `until` says.
    ///
    /// Dropping the future does not take the stimulus back: it may still be decided. The wait has no deadline of its own;
    /// the doors set one.
    ///
    /// # Errors
    /// [`Error`]; after anything but [`Error::Timeout`] and [`Error::Crashed`] the stimulus was not accepted.
    pub async fn deliver(&self, key: &InstanceKey, stimulus: Stimulus, until: Until) -> Result<Receipt, Error> {
        self.submit(key, stimulus, None, until)?.await.unwrap_or(Err(Error::Crashed))
    }

    /// The first half of [`Router::deliver`]: the stimulus is on its way, in the order of the calls, when this returns. The
    /// receiver yields the end; closed without an answer means [`Error::Crashed`].
    ///
    /// # Errors
    /// [`Error::Draining`] or [`Error::Overloaded`]: it is not on its way.
    pub fn submit(
        &self,
        key: &InstanceKey,
        stimulus: Stimulus,
        expected: Option<u64>,
        until: Until,
    ) -> Result<oneshot::Receiver<Result<Receipt, Error>>, Error> {
        self.send(key, stimulus, expected, until, None)
    }

    /// As [`Router::submit`], for one of a line: once one of the line was not taken, those behind it are refused too.
    ///
    /// # Errors
    /// As [`Router::submit`].
    pub fn submit_in_line(
        &self,
        key: &InstanceKey,
        stimulus: Stimulus,
        until: Until,
        line: &Line,
    ) -> Result<oneshot::Receiver<Result<Receipt, Error>>, Error> {
        self.send(key, stimulus, None, until, Some(line.clone()))
    }

    fn send(
        &self,
        key: &InstanceKey,
        stimulus: Stimulus,
        expected: Option<u64>,
        until: Until,
        line: Option<Line>,
    ) -> Result<oneshot::Receiver<Result<Receipt, Error>>, Error> {
        let (waiter, receiver) = Waiter::new(until, line);
        if self.is_draining() {
            waiter.tell(Err(Error::Draining));
            return Err(Error::Draining);
        }
        if let Some(member) = &self.0.member
            && (member.forwarder().holds(key, stimulus.sender.as_deref())
                || self.0.shards.is_leaving(self.0.shards.shard_of(key)))
        {
            member.forwarder().forward(key, Waiting::arrived(stimulus, expected, waiter));
            return Ok(receiver);
        }
        match (self.0.shards.tell(key, What::Deliver(stimulus, expected, waiter)), &self.0.member) {
            (Ok(()), _) => {}
            (Err(What::Deliver(stimulus, expected, waiter)), Some(member)) => {
                member.forwarder().forward(key, Waiting::arrived(stimulus, expected, waiter));
            }
            (Err(what), _) => what.refuse(Error::Fenced),
        }
        Ok(receiver)
    }

    /// Applies a merge patch to the state as a turn of its own: `stimulus.data` is `{"desired":…,"reported":…}` and
    /// `stimulus.channel` is [`Router::PATCH_CHANNEL`]. With `expected`, only if the state has that version.
    ///
    /// # Errors
    /// [`Error::VersionMismatch`], [`Error::Invalid`], or as [`Router::deliver`].
    pub async fn patch(
        &self,
        key: &InstanceKey,
        stimulus: Stimulus,
        expected: Option<u64>,
    ) -> Result<Arc<StateSnapshot>, Error> {
        self.submit(key, stimulus, expected, Until::Decided)?.await.unwrap_or(Err(Error::Crashed))?;
        self.state(key).await?.ok_or(Error::NotFound)
    }

    /// What instances remember.
    pub fn memory(&self) -> &Memory {
        &self.0.environment.memory
    }

    /// The channel of state patches. Doors refuse plain stimuli on it.
    pub const PATCH_CHANNEL: &str = PATCH_CHANNEL;

    /// Creates an instance or replaces its profile; true when it was created.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a rule or setting is wrong, with where.
    pub async fn put_profile(&self, key: &InstanceKey, profile: Profile) -> Result<bool, Error> {
        let profile = Arc::new(profile);
        let mind = self.0.environment.minds.of(&key.tenant, &profile)?;
        match self.control(key, |answer| What::PutProfile(mind, answer)).await {
            Err(Error::Fenced) => {
                let json = serde_json::to_string(&*profile).map_err(|error| Error::Invalid(error.to_string()))?;
                let json = RawJson::parse(&json).map_err(|error| Error::Invalid(error.to_string()))?;
                match self.ask(key, Question::PutProfile(json)).await? {
                    Told::Stored { created } => Ok(created),
                    _ => Err(Error::Crashed),
                }
            }
            end => end,
        }
    }

    /// Forgets an instance.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn forget(&self, key: &InstanceKey) -> Result<(), Error> {
        match self.control(key, What::Forget).await {
            Err(Error::Fenced) => self.ask(key, Question::Forget).await.map(drop),
            end => end,
        }
    }

    /// Puts a dead letter back into the inbox.
    ///
    /// # Errors
    /// [`Error::NoDeadLetter`].
    pub async fn revive(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<(), Error> {
        let id = stimulus.clone();
        match self.control(key, |answer| What::Revive(id, answer)).await {
            Err(Error::Fenced) => self.ask(key, Question::Revive(stimulus.clone())).await.map(drop),
            end => end,
        }
    }

    /// The committed state; `None` when there is no such instance. Never older than what was acknowledged before the call: from
    /// the cache where this node alone changes the instance, or where the node that does says that nothing is newer, else
    /// from the store.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn state(&self, key: &InstanceKey) -> Result<Option<Arc<StateSnapshot>>, Error> {
        self.read(key, false).await
    }

    /// As [`Router::state`]; what is held here and not older than `cache.ttl.state` will do.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn state_eventual(&self, key: &InstanceKey) -> Result<Option<Arc<StateSnapshot>>, Error> {
        self.read(key, true).await
    }

    async fn read(&self, key: &InstanceKey, eventual: bool) -> Result<Option<Arc<StateSnapshot>>, Error> {
        let environment = &self.0.environment;
        let trusted = || self.0.member.as_ref().is_none_or(|member| member.membership().serves());
        let epoch = self.0.shards.epoch(self.0.shards.shard_of(key)).filter(|_| trusted());
        let Some(epoch) = epoch else {
            return match &self.0.member {
                Some(member) => member.copies().read(key, eventual).await,
                None => Ok(environment.store.state(key).await?.map(Arc::new)),
            };
        };
        if let Some(state) = environment.states.owned(key, epoch) {
            return Ok(Some(state));
        }
        Ok(environment.states.load_owned(key, epoch, || environment.store.state(key)).await?)
    }

    /// Whether an instance is in memory, and how much waits for it there.
    pub async fn presence(&self, key: &InstanceKey) -> Presence {
        let (answer, observed) = oneshot::channel();
        if self.0.shards.tell(key, What::Observe(answer)).is_ok() {
            return match observed.await {
                Ok(Some(observed)) => Presence { active: true, inbox: observed.inbox },
                Ok(None) | Err(_) => Presence::default(),
            };
        }
        match self.ask(key, Question::Observe).await {
            Ok(Told::Presence { active, inbox }) => {
                Presence { active, inbox: usize::try_from(inbox).unwrap_or(usize::MAX) }
            }
            // Whoever wants to know how it lives at present can do without.
            Ok(_) | Err(_) => Presence::default(),
        }
    }

    /// The name of the node that owns an instance; nothing while it changes hands, or where there is only this one.
    pub fn owner(&self, key: &InstanceKey) -> Option<String> {
        let table = self.0.member.as_ref()?.membership().table();
        let route = table.routes.get(self.0.shards.shard_of(key) as usize)?;
        route.node.as_ref().map(|node| node.name().to_owned())
    }

    /// Wakes every instance with stimuli waiting in the store: the scan behind every lost wake, and the resumption after a
    /// restart. Returns how many.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn wake_waiting(&self) -> Result<usize, Error> {
        let scope = self.0.member.as_ref().map_or_else(Scope::all, |member| member.scope().borrow().clone());
        Ok(member::wake(&self.0.shards, &*self.0.environment.store, &scope).await?)
    }

    /// From here on nothing new is taken.
    pub fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    /// Whether nothing new is taken.
    pub fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    /// Returns when no instance has work in hand, provided that nothing new comes. Cancel safe.
    pub async fn idle(&self) {
        self.0.shards.idle().await;
    }

    /// Instances with work in hand.
    pub fn busy(&self) -> usize {
        self.0.shards.busy()
    }

    /// Watches of instances.
    pub fn hub(&self) -> &Hub {
        &self.0.environment.hub
    }

    /// Who still waits for what.
    pub fn ears(&self) -> &Ears {
        &self.0.environment.ears
    }

    /// The store, for reads (turns, stimuli, dead letters, listings).
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.0.environment.store
    }

    /// What the node's instances share.
    pub fn environment(&self) -> &Arc<Environment> {
        &self.0.environment
    }

    /// Changes an instance of this node; [`Error::Fenced`] when it is not here.
    async fn control<T>(
        &self,
        key: &InstanceKey,
        what: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> What,
    ) -> Result<T, Error> {
        if self.is_draining() {
            return Err(Error::Draining);
        }
        let (answer, receiver) = oneshot::channel();
        self.0.shards.tell(key, what(answer)).map_err(|_| Error::Fenced)?;
        match tokio::time::timeout(CONTROL_DEADLINE, receiver).await {
            Err(_) => Err(Error::Timeout(CONTROL_DEADLINE)),
            Ok(Err(_)) => Err(Error::Overloaded("the instance's mailbox is full")),
            Ok(Ok(end)) => end,
        }
    }

    /// Asks whoever owns the instance.
    async fn ask(&self, key: &InstanceKey, question: Question) -> Result<Told, Error> {
        let Some(member) = &self.0.member else { return Err(Error::Fenced) };
        member.forwarder().ask(key, question, CONTROL_DEADLINE).await
    }
}
