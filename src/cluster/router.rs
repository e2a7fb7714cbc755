//! The router: instance -> shard -> arbiter, from an immutable table, without a lock.
//!
//! Not here: shards' residents (`shard`), ownership between nodes.
//! Invariants: everything about one instance passes through one shard actor on one thread, in the order of the calls.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::sync::oneshot;

use super::{shard::What, shards::Shards};
use crate::{
    instance::{
        Error, Receipt, Until,
        environment::Environment,
        events::Hub,
        inbox::{Line, Waiter},
        turn::PATCH_CHANNEL,
    },
    store::{Scope, Store},
    types::{InstanceKey, Profile, StateSnapshot, Stimulus, StimulusId},
};

/// Longest wait for a change of an instance itself (profile, forget, revive).
const CONTROL_DEADLINE: Duration = Duration::from_secs(30);
/// Instances woken by one page of the scan.
const SCAN_PAGE: usize = 256;

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
    draining: AtomicBool,
}

impl Router {
    /// Over the shards of this node.
    pub fn new(environment: Arc<Environment>, shards: Shards) -> Self {
        Self(Arc::new(Inner { environment, shards, draining: AtomicBool::new(false) }))
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
        self.tell(key, What::Deliver(stimulus, expected, waiter));
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

    /// The channel of state patches. Doors refuse plain stimuli on it.
    pub const PATCH_CHANNEL: &str = PATCH_CHANNEL;

    /// Creates an instance or replaces its profile; true when it was created.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a rule or setting is wrong, with where.
    pub async fn put_profile(&self, key: &InstanceKey, profile: Profile) -> Result<bool, Error> {
        let mind = self.0.environment.minds.of(&Arc::new(profile))?;
        self.control(key, |answer| What::PutProfile(mind, answer)).await
    }

    /// Forgets an instance.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn forget(&self, key: &InstanceKey) -> Result<(), Error> {
        self.control(key, What::Forget).await
    }

    /// Puts a dead letter back into the inbox.
    ///
    /// # Errors
    /// [`Error::NoDeadLetter`].
    pub async fn revive(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<(), Error> {
        let stimulus = stimulus.clone();
        self.control(key, |answer| What::Revive(stimulus, answer)).await
    }

    /// The committed state; `None` when there is no such instance. From the read cache where this node alone changes the
    /// instance, else from the store.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn state(&self, key: &InstanceKey) -> Result<Option<Arc<StateSnapshot>>, Error> {
        let states = &self.0.environment.states;
        let served = self.0.shards.serves(key);
        if let Some(state) = served.then(|| states.get(key)).flatten() {
            return Ok(Some(state));
        }
        let fill = served.then(|| states.begin_fill(key));
        let Some(state) = self.0.environment.store.state(key).await?.map(Arc::new) else { return Ok(None) };
        if let Some(fill) = fill {
            fill.finish(&state);
        }
        Ok(Some(state))
    }

    /// Whether an instance is in memory, and how much waits for it there.
    pub async fn presence(&self, key: &InstanceKey) -> Presence {
        let (answer, observed) = oneshot::channel();
        self.tell(key, What::Observe(answer));
        match observed.await {
            Ok(Some(observed)) => Presence { active: true, inbox: observed.inbox },
            Ok(None) | Err(_) => Presence::default(),
        }
    }

    /// Wakes every instance with stimuli waiting in the store: the scan behind every lost wake, and the resumption after a
    /// restart. Returns how many.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn wake_waiting(&self) -> Result<usize, Error> {
        let mut woken = 0;
        let mut after = None;
        loop {
            let page = self.0.environment.store.waiting(&Scope::all(), after.as_ref(), SCAN_PAGE).await?;
            for key in &page {
                self.tell(key, What::Wake);
            }
            woken += page.len();
            match page.into_iter().next_back() {
                Some(last) if !self.is_draining() => after = Some(last),
                _ => return Ok(woken),
            }
        }
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

    /// The store, for reads (turns, stimuli, dead letters, listings).
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.0.environment.store
    }

    /// What the node's instances share.
    pub fn environment(&self) -> &Arc<Environment> {
        &self.0.environment
    }

    async fn control<T>(
        &self,
        key: &InstanceKey,
        what: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> What,
    ) -> Result<T, Error> {
        if self.is_draining() {
            return Err(Error::Draining);
        }
        let (answer, receiver) = oneshot::channel();
        self.tell(key, what(answer));
        match tokio::time::timeout(CONTROL_DEADLINE, receiver).await {
            Err(_) => Err(Error::Timeout(CONTROL_DEADLINE)),
            Ok(Err(_)) => Err(Error::Overloaded("the instance's mailbox is full")),
            Ok(Ok(end)) => end,
        }
    }

    fn tell(&self, key: &InstanceKey, what: What) {
        if let Err(what) = self.0.shards.tell(key, what) {
            what.refuse(Error::Fenced);
        }
    }
}
