//! Committed states: what an instance's owner may answer with at the price of a look into memory, and copies elsewhere.
//!
//! An entry is *sealed* when this process vouches for it: read or committed under an epoch of its shard. While that epoch lasts,
//! every commit replaces it here before anybody is answered, so a sealed entry of the current epoch is the newest there is. In
//! the second tier, where a commit does not reach it, the seal also counts the commits of the instance's stripe: as long as
//! there was none since, what is written there is still the newest, whatever the server lost or kept. That there is no such
//! instance is held for a moment, until anything happens in its stripe. All else is a *copy*, here or in the second tier: it is
//! served after the owner said that nothing is newer, or to those who said that they do not mind. What other nodes read is put
//! into the second tier when it is committed, so that the owner need only say so.
//!
//! Not here: who owns what (`cluster`), asking the owner (`cluster::reads`). Invariants: a late fill never hides a commit; a commit
//! refreshes what is held before anybody is answered, and holds nothing that nobody read.
//! Tests: at the foot; `tests/it/cache.rs`.

use std::{
    sync::{Arc, OnceLock, atomic::Ordering},
    time::Instant,
};

use moka::ops::compute::Op;

use super::{
    TieredCache,
    entry::{Entry, Frozen, Seal},
    figures::{Answer, Read},
    flight::{Outcome, Turn},
    slot::{Kind, Slot},
    stripes::{Filling, Stripe},
};
use crate::types::{InstanceKey, Millis, StateSnapshot};

/// Port: tells other nodes that a state they may hold has another version now, or is gone. Must not block.
pub type Tell = Box<dyn Fn(&InstanceKey, Option<u64>) + Send + Sync>;

/// For how long a node remembers that an instance it owns does not exist, in milliseconds, when nothing happens meanwhile. Another
/// node may take in its first stimulus for an owner that does not answer, which the owner learns a little later.
const NOTHING_MS: i64 = 1000;

/// States by instance. Cheap to clone.
#[derive(Clone)]
pub struct States {
    cache: TieredCache,
    tell: Arc<OnceLock<Tell>>,
    /// A fault for tests: what is held is served, whoever changed it meanwhile.
    blind: bool,
}

impl States {
    /// Those of a cache. `blind` is a fault on demand: commits do not refresh, copies are not checked.
    pub fn new(cache: TieredCache, blind: bool) -> Self {
        Self { cache, tell: Arc::default(), blind }
    }

    /// From here on this tells other nodes. The first one stays.
    pub fn on_stale(&self, tell: Tell) {
        let _ = self.tell.set(tell);
    }

    /// Whether copies are trusted on purpose.
    pub const fn is_blind(&self) -> bool {
        self.blind
    }

    fn stripe(&self, key: &InstanceKey) -> &Stripe {
        self.cache.0.stripes.of(key.stable_hash())
    }

    fn count(&self, how: Read) {
        self.cache.0.figures.read(0, Kind::State, how);
    }

    /// The state, for a node that owns the instance under this epoch. Counts a hit, and nothing else.
    pub fn owned(&self, key: &InstanceKey, epoch: u64) -> Option<Arc<StateSnapshot>> {
        let state = self.sealed(key, epoch)??;
        self.count(Read::Hit);
        Some(state)
    }

    /// What this node knows of an instance under this epoch: its state, or that there is none.
    fn sealed(&self, key: &InstanceKey, epoch: u64) -> Option<Option<Arc<StateSnapshot>>> {
        let entry = self.cache.0.l1.state(key)?;
        if !entry.seal.is_some() || entry.seal.epoch != epoch {
            return None;
        }
        if entry.is_negative() {
            let still = entry.seal.commits == self.stripe(key).count() && self.cache.0.clock.now() < entry.fresh;
            return still.then_some(None);
        }
        entry.into_value::<StateSnapshot>().map(Some)
    }

    /// The state where [`States::owned`] has none: from the second tier, or loaded, by one for all who want it at the time.
    ///
    /// # Errors
    /// Those of `load`.
    pub async fn load_owned<E, L, F>(
        &self,
        key: &InstanceKey,
        epoch: u64,
        load: L,
    ) -> Result<Option<Arc<StateSnapshot>>, E>
    where
        E: Clone + Send + Sync + 'static,
        L: Fn() -> F,
        F: Future<Output = Result<Option<StateSnapshot>, E>>,
    {
        const ROUNDS: usize = 3;
        if let Some(known) = self.sealed(key, epoch) {
            self.count(Read::Hit);
            return Ok(known);
        }
        self.count(Read::Miss);
        let slot = Slot::of(Kind::State, key);
        for _ in 0..ROUNDS {
            match self.cache.0.crew.join(&slot).await {
                Turn::Lead(lead) => {
                    let end = match self.sealed(key, epoch) {
                        // Somebody was quicker.
                        Some(known) => {
                            lead.end(Outcome::Again);
                            return Ok(known);
                        }
                        None => self.fill(key, &slot, epoch, &load).await,
                    };
                    lead.end(match &end {
                        Ok(entry) => Outcome::Entry(entry.clone()),
                        Err(error) => Outcome::Failed(Arc::new(error.clone())),
                    });
                    return Ok(end?.into_value::<StateSnapshot>());
                }
                // It is as good as read just now if nothing was committed since before it was read.
                Turn::Ended(Outcome::Entry(entry))
                    if entry.seal.epoch == epoch && entry.seal.commits == self.stripe(key).count() =>
                {
                    return Ok(entry.into_value::<StateSnapshot>());
                }
                Turn::Ended(Outcome::Failed(error)) => match error.downcast_ref::<E>() {
                    Some(error) => return Err(error.clone()),
                    None => break,
                },
                Turn::Ended(Outcome::Entry(_)) => {}
                Turn::Ended(Outcome::Again) | Turn::Alone => break,
            }
            if let Some(known) = self.sealed(key, epoch) {
                return Ok(known);
            }
        }
        if let Some(known) = self.sealed(key, epoch) {
            return Ok(known);
        }
        Ok(self.fill(key, &slot, epoch, &load).await?.into_value::<StateSnapshot>())
    }

    /// Reads the second tier, then the source, and holds what was found unless something was committed meanwhile.
    async fn fill<E, L, F>(&self, key: &InstanceKey, slot: &Slot, epoch: u64, load: &L) -> Result<Entry, E>
    where
        L: Fn() -> F,
        F: Future<Output = Result<Option<StateSnapshot>, E>>,
    {
        let inner = &self.cache.0;
        let filling = Filling::begin(self.stripe(key));
        let seal = Seal { life: inner.life, epoch, commits: filling.changes() };
        let (below, _) = self.cache.goes_below(Kind::State);
        if below {
            let found = inner.l2.get(slot).await;
            let found = found.as_deref().and_then(Frozen::read).filter(|frozen| frozen.seal == seal);
            let entry = found.and_then(|frozen| frozen.thaw::<StateSnapshot>(slot)).filter(|_| filling.is_current());
            inner.figures.read(1, Kind::State, if entry.is_some() { Read::Hit } else { Read::Miss });
            if let Some(entry) = entry {
                self.hold(slot, &entry, &filling);
                return Ok(entry);
            }
        }
        let began = Instant::now();
        let state = load().await?;
        inner.figures.loaded(Kind::State, began.elapsed());
        let Some(state) = state else {
            let entry = self.nothing(slot).sealed(seal).below();
            self.hold(slot, &entry, &filling);
            return Ok(entry);
        };
        let entry = self.entry(slot, Arc::new(state)).sealed(seal).below();
        self.hold(slot, &entry, &filling);
        if filling.is_current() {
            inner.crew.write(slot, &entry, below, false, None);
        }
        Ok(entry)
    }

    fn nothing(&self, slot: &Slot) -> Entry {
        let now = self.cache.0.clock.now();
        let (fresh, _) = self.cache.until(Kind::State, false, now);
        let until = fresh.min(now.plus(NOTHING_MS));
        Entry::new::<StateSnapshot>(slot, 0, None, now, (until, until))
    }

    fn entry(&self, slot: &Slot, state: Arc<StateSnapshot>) -> Entry {
        let now = self.cache.0.clock.now();
        Entry::new(slot, state.version, Some(state), now, self.cache.until(Kind::State, true, now))
    }

    fn hold(&self, slot: &Slot, entry: &Entry, filling: &Filling<'_>) {
        self.cache.0.l1.change(slot, |held| match held {
            Some(held)
                if held.seal.is_some()
                    && !held.is_negative()
                    && held.seal.epoch >= entry.seal.epoch
                    && held.version >= entry.version =>
            {
                Op::Nop
            }
            _ if !filling.is_current() => Op::Nop,
            _ => Op::Put(entry.clone()),
        });
    }

    /// Replaces what is held by what a commit left behind, and voids fills under way; holds nothing that nobody read. Tells
    /// other nodes that may hold an older one.
    pub fn refresh(&self, key: &InstanceKey, epoch: u64, version: u64, state: impl FnOnce() -> StateSnapshot) {
        let stripe = self.stripe(key);
        let commits = stripe.change();
        if !self.blind {
            self.replace(stripe, key, Seal { life: self.cache.0.life, epoch, commits }, version, state);
        }
        // Last: whoever was told the state after this looked was told the new one.
        self.tell(stripe, key, Some(version));
    }

    fn replace(
        &self,
        stripe: &Stripe,
        key: &InstanceKey,
        seal: Seal,
        version: u64,
        state: impl FnOnce() -> StateSnapshot,
    ) {
        if stripe.filling.load(Ordering::SeqCst) == 0 && !self.cache.0.l1.has_state(key) {
            return;
        }
        let slot = Slot::of(Kind::State, key);
        // Other nodes read it: they are told that it changed, and find it there.
        let lent = stripe.lent.load(Ordering::SeqCst) != 0 && self.cache.goes_below(Kind::State).0;
        let entry = self.entry(&slot, Arc::new(state())).sealed(seal);
        let entry = if lent { entry.below() } else { entry };
        let put = self.cache.0.l1.change(&slot, |held| match held {
            Some(held) if held.seal.epoch != seal.epoch || held.version < version => Op::Put(entry.clone()),
            _ => Op::Nop,
        });
        if put && lent {
            self.cache.0.crew.write(&slot, &entry, true, false, None);
        }
    }

    /// Something about an instance changed that is no change of its state: fills under way are void.
    pub fn touch(&self, key: &InstanceKey) {
        self.stripe(key).change();
    }

    /// Drops an instance, and voids fills under way.
    pub fn forget(&self, key: &InstanceKey) {
        let stripe = self.stripe(key);
        stripe.change();
        let slot = Slot::of(Kind::State, key);
        self.cache.0.l1.remove(&slot);
        self.cache.0.crew.remove(&slot, true, false);
        self.tell(stripe, key, None);
    }

    /// Another node was told the state: it is told when that changes.
    pub fn lend(&self, key: &InstanceKey) {
        self.stripe(key).lent.store(self.cache.seconds(), Ordering::SeqCst);
    }

    fn tell(&self, stripe: &Stripe, key: &InstanceKey, version: Option<u64>) {
        // Stripes are shared: it may have been another instance that was told, which costs one message more.
        if stripe.lent.load(Ordering::SeqCst) == 0 {
            return;
        }
        stripe.lent.store(0, Ordering::SeqCst);
        if let Some(tell) = self.tell.get() {
            tell(key, version);
        }
    }

    // Copies of what other nodes own.

    /// Whatever is held of an instance, and whether it is fresh enough for those who do not mind. Not counted.
    pub fn copy(&self, key: &InstanceKey) -> Option<(Arc<StateSnapshot>, bool)> {
        let entry = self.cache.0.l1.state(key)?;
        let fresh = self.cache.0.clock.now() < entry.fresh;
        Some((entry.into_value::<StateSnapshot>()?, fresh))
    }

    /// A copy was served: the owner said that nothing is newer, or the caller did not mind.
    pub fn served(&self, validated: bool) {
        self.count(if validated { Read::Validated } else { Read::Hit });
    }

    /// The owner of a state answered about it, or did not.
    pub fn answered(&self, how: Answer) {
        self.cache.0.figures.answered(how);
    }

    /// No copy could be served.
    pub fn missed(&self) {
        self.count(Read::Miss);
    }

    /// What the second tier has of an instance: to be served once its owner said that nothing is newer. Not counted.
    pub async fn second(&self, key: &InstanceKey) -> Option<Arc<StateSnapshot>> {
        if !self.cache.goes_below(Kind::State).0 {
            return None;
        }
        let slot = Slot::of(Kind::State, key);
        let bytes = self.cache.0.l2.get(&slot).await?;
        Frozen::read(&bytes)?.thaw::<StateSnapshot>(&slot)?.into_value::<StateSnapshot>()
    }

    /// A read that found no copy in the first tier was answered by one from the second, or was not.
    pub fn seconded(&self, found: bool) {
        if self.cache.goes_below(Kind::State).0 {
            let how = if found { Read::Validated } else { Read::Miss };
            self.cache.0.figures.read(1, Kind::State, how);
        }
    }

    /// Holds what the owner or the store said at this moment or later. A commit seen meanwhile is not hidden. `below`: the second
    /// tier has it, too.
    pub fn keep(&self, key: &InstanceKey, state: &Arc<StateSnapshot>, asked: Millis, below: bool) {
        let slot = Slot::of(Kind::State, key);
        let entry = self.entry(&slot, state.clone());
        let entry = if below { entry.below() } else { entry };
        self.cache.0.l1.change(&slot, |held| match held {
            Some(held) if held.version > entry.version && held.made >= asked => Op::Nop,
            _ => Op::Put(entry.clone()),
        });
    }

    /// What a copy is measured against when it was made.
    pub fn now(&self) -> Millis {
        self.cache.0.clock.now()
    }

    /// Another node said that its instance has another version now, or is gone.
    pub fn stale(&self, key: &InstanceKey, version: Option<u64>) {
        self.cache.0.figures.invalidated(true, 1);
        let older = |held: &Entry| version.is_none_or(|version| held.version < version);
        if !self.cache.0.l1.has_state(key) {
            return;
        }
        self.cache.0.l1.change(&Slot::of(Kind::State, key), |held| match held {
            Some(held) if older(held) => Op::Remove,
            _ => Op::Nop,
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::{
        scaling::cache::Options,
        types::{InstanceId, RawJson, TenantId},
    };

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap())
    }

    fn state(version: u64) -> StateSnapshot {
        StateSnapshot::new(version, version, RawJson::parse("{}").unwrap())
    }

    fn states() -> States {
        States::new(TieredCache::new(Options::default()), false)
    }

    async fn load(states: &States, epoch: u64, version: u64) -> u64 {
        let key = key();
        let loaded = states.load_owned(&key, epoch, || async move { Ok::<_, Infallible>(Some(state(version))) });
        loaded.await.unwrap().unwrap().version
    }

    fn held(states: &States, epoch: u64) -> Option<u64> {
        states.owned(&key(), epoch).map(|state| state.version)
    }

    #[tokio::test]
    async fn a_late_fill_never_hides_a_commit() {
        let (states, key) = (states(), key());
        let loaded = states.load_owned(&key, 1, || async {
            // The store was read, and before it is told a commit comes.
            states.refresh(&key, 1, 2, || state(2));
            Ok::<_, Infallible>(Some(state(1)))
        });
        assert_eq!(loaded.await.unwrap().unwrap().version, 1);
        assert_eq!(held(&states, 1), None);
        load(&states, 1, 2).await;
        assert_eq!(held(&states, 1), Some(2));
    }

    #[tokio::test]
    async fn a_commit_refreshes_only_what_is_held() {
        let states = states();
        states.refresh(&key(), 1, 1, || unreachable!("nobody reads it"));
        load(&states, 1, 1).await;
        states.refresh(&key(), 1, 2, || state(2));
        assert_eq!(held(&states, 1), Some(2));
        states.refresh(&key(), 1, 1, || state(1));
        assert_eq!(held(&states, 1), Some(2), "an older one never comes back");
        states.forget(&key());
        assert_eq!(held(&states, 1), None);
    }

    #[tokio::test]
    async fn that_there_is_nothing_is_known_until_something_happens() {
        let (clock, key) = (crate::runtime::clock::Clock::manual(Millis(0)), key());
        let cache = TieredCache::new(Options { clock: clock.clone(), ..Options::default() });
        let (states, loads) = (States::new(cache, false), std::sync::atomic::AtomicUsize::new(0));
        let look = async |epoch| {
            let load = async || {
                loads.fetch_add(1, Ordering::SeqCst);
                Ok::<_, Infallible>(None)
            };
            assert!(states.load_owned(&key, epoch, load).await.unwrap().is_none());
            loads.load(Ordering::SeqCst)
        };
        assert_eq!((look(1).await, look(1).await), (1, 1));
        states.touch(&key);
        assert_eq!((look(1).await, look(1).await), (2, 2), "it may have come to be");
        assert_eq!(look(2).await, 3, "another tenure knows for itself");
        clock.advance(NOTHING_MS);
        assert_eq!(look(2).await, 4, "another node may have taken something in for it");
        states.refresh(&key, 2, 1, || state(1));
        assert_eq!(held(&states, 2), Some(1));
    }

    #[tokio::test]
    async fn what_belongs_to_another_tenure_is_not_trusted() {
        let states = states();
        load(&states, 1, 5).await;
        assert_eq!((held(&states, 2), held(&states, 1)), (None, Some(5)));
        // Meanwhile it lived elsewhere, was forgotten, and began anew.
        assert_eq!(load(&states, 3, 1).await, 1);
        assert_eq!((held(&states, 3), held(&states, 1)), (Some(1), None));
    }

    #[tokio::test]
    async fn copies_are_never_taken_for_the_owners_own() {
        let states = states();
        let asked = states.now();
        states.keep(&key(), &Arc::new(state(4)), asked, false);
        assert_eq!(held(&states, 0), None);
        assert_eq!(states.copy(&key()).map(|(state, fresh)| (state.version, fresh)), Some((4, true)));
        states.stale(&key(), Some(4));
        assert!(states.copy(&key()).is_some(), "it is the newest");
        states.stale(&key(), Some(5));
        assert!(states.copy(&key()).is_none());
        states.keep(&key(), &Arc::new(state(4)), asked, false);
        states.stale(&key(), None);
        assert!(states.copy(&key()).is_none());
    }

    #[tokio::test]
    async fn others_are_told_once_after_they_were_told_the_state() {
        let states = states();
        let told = Arc::new(std::sync::Mutex::new(Vec::new()));
        let tells = told.clone();
        states.on_stale(Box::new(move |key, version| tells.lock().unwrap().push((key.clone(), version))));
        states.refresh(&key(), 1, 1, || state(1));
        states.lend(&key());
        states.refresh(&key(), 1, 2, || state(2));
        states.refresh(&key(), 1, 3, || state(3));
        states.lend(&key());
        states.forget(&key());
        assert_eq!(*told.lock().unwrap(), [(key(), Some(2)), (key(), None)]);
    }
}
