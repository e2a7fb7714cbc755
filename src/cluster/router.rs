//! The router: instance -> shard -> arbiter, without a lock and without an actor hop.

use std::sync::Arc;

use crate::{
    instance::{Error, Receipt, Until, events::Hub},
    store::Store,
    types::{InstanceKey, Profile, StateSnapshot, Stimulus, StimulusId},
};

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
    store: Arc<dyn Store>,
    hub: Hub,
}

impl Router {
    /// Delivers a stimulus to its instance, activating it if need be, and waits as long as `until` says.
    ///
    /// Not cancel safe in the sense that dropping the future does not take the stimulus back: it may still be decided. The
    /// wait itself has no deadline of its own; the doors set one.
    ///
    /// # Errors
    /// [`Error`]; after anything but [`Error::Timeout`] and [`Error::Crashed`] the stimulus was not accepted.
    pub async fn deliver(&self, key: &InstanceKey, stimulus: Stimulus, until: Until) -> Result<Receipt, Error> {
        let _ = (key, stimulus, until);
        Err(Error::Draining)
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
    ) -> Result<StateSnapshot, Error> {
        let _ = (key, stimulus, expected);
        Err(Error::Draining)
    }

    /// The channel of state patches. Doors refuse plain stimuli on it.
    pub const PATCH_CHANNEL: &str = "state/patch";

    /// Creates an instance or replaces its profile; true when it was created.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a rule or setting is wrong, with where.
    pub async fn put_profile(&self, key: &InstanceKey, profile: Profile) -> Result<bool, Error> {
        let _ = (key, profile);
        Err(Error::Draining)
    }

    /// Forgets an instance.
    ///
    /// # Errors
    /// [`Error::NotFound`] when there is none.
    pub async fn forget(&self, key: &InstanceKey) -> Result<(), Error> {
        let _ = key;
        Err(Error::Draining)
    }

    /// Puts a dead letter back into the inbox.
    ///
    /// # Errors
    /// [`Error::NoDeadLetter`].
    pub async fn revive(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<(), Error> {
        let _ = (key, stimulus);
        Err(Error::Draining)
    }

    /// The committed state, from the read cache or the store; `None` when there is no such instance.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn state(&self, key: &InstanceKey) -> Result<Option<Arc<StateSnapshot>>, Error> {
        Ok(self.0.store.state(key).await?.map(Arc::new))
    }

    /// Whether an instance is in memory, and how much waits for it there.
    pub async fn presence(&self, key: &InstanceKey) -> Presence {
        let _ = key;
        Presence::default()
    }

    /// Watches of instances.
    pub fn hub(&self) -> &Hub {
        &self.0.hub
    }

    /// The store, for reads (turns, stimuli, dead letters, listings).
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.0.store
    }
}
