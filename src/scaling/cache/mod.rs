//! The cache: three tiers behind one door, never the truth and never written before it.
//!
//! Owns: [`TieredCache`], which everybody holds; the tiers (`l1` in process, `l2` Redis or a region of this process, `shelf` a file);
//! loading once (`flight`), what is held for how long (`policy`), states of instances (`states`), the actors that do all but
//! hits (`actors`). Not here: what is loaded from where.
//!
//! Invariants: a tier that fails is a miss; a late fill never hides what is newer; every tier is bounded; a key begins with the
//! tenant. What must not be wrong has its version, or the hash of its content, in its key, or is sealed (`states`): the time to live
//! only ends what nobody needs.
//! Tests: at the foot of each file; `tests/it/cache.rs`.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use moka::ops::compute::Op;

use crate::{
    config::{self, Config},
    runtime::clock::Clock,
    types::Millis,
};

pub mod actors;
mod breaker;
mod entry;
mod figures;
mod flight;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod l1;
mod l2;
mod ledger;
mod link;
mod policy;
mod region;
mod shelf;
mod slot;
mod states;
mod stripes;

pub use actors::{ArbiterHandle, Sizes};
use actors::{Crew, Parts};
use entry::{Entry, Frozen};
pub use figures::Answer;
use figures::{Figures, Read};
use flight::{Outcome, Turn};
use l1::L1;
use l2::L2;
use link::{Guard, Link};
use policy::Policies;
use region::Region;
pub use slot::{Kind, Local, Packed, Slot, Value};
pub use states::States;
use stripes::{Filling, Stripes};

const MIB: u64 = 1024 * 1024;
/// How long one node waits for what another one loads.
const AWAIT_OTHER: Duration = Duration::from_secs(3);
/// How often it looks whether that is there.
const LOOK: Duration = Duration::from_millis(10);

/// What a cache is made of.
pub struct Options {
    /// Sizes of the tiers, in bytes; 0: without it.
    pub sizes: Sizes,
    /// What is held for how long.
    pub policy: config::Cache,
    /// Redis and the cluster's name; without it the second tier is in this process.
    pub redis: Option<(config::Redis, String)>,
    /// The folder of the third tier's file; without it there is none.
    pub folder: Option<PathBuf>,
    /// Time.
    pub clock: Clock,
}

impl Default for Options {
    fn default() -> Self {
        let sizes = Sizes { l1: 64 * MIB, l2: 0, l3: 0 };
        Self { sizes, policy: config::Cache::default(), redis: None, folder: None, clock: Clock::System }
    }
}

impl Options {
    /// Those of a node's settings.
    pub fn of(config: &Config, clock: Clock) -> Self {
        // Trying things leaves nothing behind.
        let durable = config.store.backend != config::Backend::Memory;
        Self {
            sizes: Sizes::of(&config.scaling),
            policy: config.cache.clone(),
            redis: (!config.redis.is_off()).then(|| (config.redis.clone(), config.cluster.name.clone())),
            folder: durable.then(|| config.node.data_dir.clone()),
            clock,
        }
    }
}

impl Sizes {
    /// Those of the settings.
    pub const fn of(scaling: &config::Scaling) -> Self {
        Self {
            l1: scaling.limits.cache_l1_size_mb as u64 * MIB,
            l2: scaling.limits.cache_l2_size_mb as u64 * MIB,
            l3: scaling.limits.cache_l3_size_mb as u64 * MIB,
        }
    }
}

/// The cache of a node. Cheap to clone; all methods may be called from any thread.
#[derive(Clone)]
pub struct TieredCache(Arc<Inner>);

impl std::fmt::Debug for TieredCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TieredCache").field("bytes", &self.weighed()).finish_non_exhaustive()
    }
}

struct Inner {
    l1: L1,
    l2: L2,
    l3: Option<(PathBuf, u64)>,
    /// Whether the second and the third tier hold anything at all.
    on: [AtomicBool; 2],
    policies: ArcSwap<Policies>,
    stripes: Stripes,
    crew: Crew,
    /// This life of the process.
    life: u64,
    clock: Clock,
    born: Instant,
    dice: AtomicU64,
    figures: Arc<Figures>,
}

/// What the first tier has.
enum Look<V> {
    Fresh(Option<Arc<V>>),
    Stale(Option<Arc<V>>),
    Miss,
}

/// What a tier holds under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// `l1`, `l2`, `l3`.
    pub tier: &'static str,
    /// The version of what it was made from.
    pub version: u64,
    /// How old it is, in milliseconds.
    pub age_ms: i64,
    /// For how long it is fresh, in milliseconds; negative when it is not any more.
    pub fresh_ms: i64,
    /// Bytes it takes there.
    pub bytes: u64,
    /// Whether it says that there is nothing.
    pub negative: bool,
    /// Whether this process vouches for it.
    pub sealed: bool,
}

impl TieredCache {
    /// A cache whose actors do not run yet: everybody loads for themselves, and only the first tier is filled.
    pub fn new(options: Options) -> Self {
        let Options { sizes, policy, redis, folder, clock } = options;
        let figures = Arc::new(Figures::default());
        let l2 = match redis {
            None => L2::Region(Region::new(sizes.l2, figures.clone())),
            Some((redis, cluster)) => match Link::new(&redis, &cluster, sizes.l2, figures.clone()) {
                Ok(link) => L2::Redis(link),
                Err(reason) => {
                    tracing::warn!(reason, "the cache does without Redis");
                    L2::Off
                }
            },
        };
        let life = u64::from_le_bytes(*uuid::Uuid::new_v4().as_bytes().first_chunk::<8>().unwrap_or(&[1; 8])) | 1;
        let cache = Self(Arc::new(Inner {
            l1: L1::new(sizes.l1, figures.clone()),
            l2,
            on: [AtomicBool::new(sizes.l2 > 0), AtomicBool::new(sizes.l3 > 0 && folder.is_some())],
            l3: folder.map(|folder| (folder, sizes.l3)),
            policies: ArcSwap::from_pointee(Policies::of(&policy)),
            stripes: Stripes::default(),
            crew: Crew::default(),
            life,
            clock,
            born: Instant::now(),
            dice: AtomicU64::new(life),
            figures,
        }));
        let leaves = Arc::downgrade(&cache.0);
        cache.0.l1.on_leave(Box::new(move |slot, entry| {
            // What a lower tier has need not be written again.
            if !entry.below
                && let Some(inner) = leaves.upgrade().map(Self)
            {
                inner.0.crew.write(slot, entry, inner.goes_below(slot.kind).0, false, None);
            }
        }));
        cache
    }

    /// Starts the actors: the supervisor and the first two tiers on one arbiter, the third on another, which waits for the disk.
    pub fn start(&self, arbiter: ArbiterHandle, disk: ArbiterHandle) {
        let inner = &self.0;
        inner.crew.start(Parts {
            l1: inner.l1.clone(),
            l2: inner.l2.clone(),
            l3: inner.l3.clone(),
            clock: inner.clock.clone(),
            figures: inner.figures.clone(),
            arbiter,
            disk,
        });
    }

    /// Other sizes. The first tier begins empty, which gives its memory back; the others keep what fits.
    pub fn resize(&self, sizes: Sizes) {
        let [l2, l3] = &self.0.on;
        l2.store(sizes.l2 > 0, Ordering::Relaxed);
        l3.store(sizes.l3 > 0 && self.0.l3.is_some(), Ordering::Relaxed);
        if !self.0.crew.resize(sizes) {
            self.0.l1.resize(sizes.l1);
        }
    }

    /// What is held from here on is held for so long; what is held keeps its time.
    pub fn set_policy(&self, policy: &config::Cache) {
        self.0.policies.store(Arc::new(Policies::of(policy)));
    }

    /// What is under a key: from a tier, or loaded, by one for all who want it at the time, on this node and as far as possible
    /// in the cluster. `None` is remembered, too, for a short time.
    ///
    /// `version` is that of what the value is made from, as far as the caller knows: an older one is a miss. Use 0 where the key
    /// says it all. Where the type's policy allows, a value that is no longer fresh is served while a fresh one is loaded.
    ///
    /// Cancel safe: when a caller that loads gives up, the next one who waits loads.
    ///
    /// # Errors
    /// Those of `load`, also for those who waited for it.
    pub async fn get_or_load<V, E, L, F>(&self, slot: &Slot, version: u64, load: L) -> Result<Option<Arc<V>>, E>
    where
        V: Value,
        E: Clone + Send + Sync + 'static,
        L: FnOnce() -> F + Send + 'static,
        F: Future<Output = Result<Option<V>, E>> + Send + 'static,
    {
        if self.0.policies.load().of_kind(slot.kind).ttl.is_zero() {
            return Ok(load().await?.map(Arc::new));
        }
        match self.look::<V>(slot, version) {
            Look::Fresh(value) => Ok(value),
            Look::Stale(value) => {
                self.renew(slot, version, load);
                Ok(value)
            }
            Look::Miss => self.find_or_load(slot, version, load).await,
        }
    }

    /// As [`TieredCache::get_or_load`], for what is made as a part of the caller's own work and so does not outlive it. Nothing is
    /// served that is no longer fresh.
    ///
    /// Cancel safe: as there.
    ///
    /// # Errors
    /// Those of `make`, also for those who waited for it.
    pub async fn get_or_make<V, E, L, F>(&self, slot: &Slot, version: u64, make: L) -> Result<Option<Arc<V>>, E>
    where
        V: Value,
        E: Clone + Send + Sync + 'static,
        L: FnOnce() -> F,
        F: Future<Output = Result<Option<V>, E>>,
    {
        if self.0.policies.load().of_kind(slot.kind).ttl.is_zero() {
            return Ok(make().await?.map(Arc::new));
        }
        match self.look::<V>(slot, version) {
            Look::Fresh(value) => Ok(value),
            Look::Stale(_) | Look::Miss => self.find_or_load(slot, version, make).await,
        }
    }

    /// What the first tier does not have: from those below, or loaded, by one for all.
    async fn find_or_load<V, E, L, F>(&self, slot: &Slot, version: u64, load: L) -> Result<Option<Arc<V>>, E>
    where
        V: Value,
        E: Clone + Send + Sync + 'static,
        L: FnOnce() -> F,
        F: Future<Output = Result<Option<V>, E>>,
    {
        match self.0.crew.join(slot).await {
            Turn::Lead(lead) => {
                let end = match self.peek(slot, version) {
                    Some(entry) => Ok(entry),
                    None => self.fetch::<V, E, _, _>(slot, version, load).await,
                };
                lead.end(match &end {
                    Ok(entry) => Outcome::Entry(entry.clone()),
                    Err(error) => Outcome::Failed(Arc::new(error.clone())),
                });
                Ok(end?.into_value::<V>())
            }
            Turn::Ended(Outcome::Entry(entry)) if entry.version >= version && entry.is::<V>() => {
                Ok(entry.into_value::<V>())
            }
            Turn::Ended(Outcome::Failed(error)) if error.is::<E>() => match error.downcast_ref::<E>() {
                Some(error) => Err(error.clone()),
                None => Ok(None),
            },
            Turn::Ended(_) | Turn::Alone => Ok(self.fetch::<V, E, _, _>(slot, version, load).await?.into_value::<V>()),
        }
    }

    /// What the first tier has under a key, of this version or newer, and fresh. Counts as a read.
    pub fn get<V: Value>(&self, slot: &Slot, version: u64) -> Option<Option<Arc<V>>> {
        match self.look::<V>(slot, version) {
            Look::Fresh(value) => Some(value),
            Look::Stale(_) | Look::Miss => None,
        }
    }

    /// What the first tier has under a key and is fresh, for a caller who finds out whether it still is so, and tells with
    /// [`TieredCache::proved`]. Not counted.
    pub fn held<V: Value>(&self, slot: &Slot) -> Option<Arc<V>> {
        if self.0.policies.load().of_kind(slot.kind).ttl.is_zero() {
            return None;
        }
        let entry = self.0.l1.get(slot).filter(|entry| self.0.clock.now() < entry.fresh)?;
        entry.into_value::<V>()
    }

    /// Counts a read of what has to be proved: whether something was held, and still was so.
    pub fn proved(&self, kind: Kind, still: bool) {
        self.0.figures.read(0, kind, if still { Read::Validated } else { Read::Miss });
    }

    /// Holds a value that was made otherwise, in all tiers of its type; a newer one that is held stays.
    pub fn put<V: Value>(&self, slot: &Slot, version: u64, value: V) {
        let entry = self.entry(slot, version, Some(value));
        if !self.0.policies.load().of_kind(slot.kind).ttl.is_zero() && self.0.l1.put(slot, entry.clone()) {
            self.write(slot, &entry, None);
        }
    }

    /// As [`TieredCache::put`], of what only lives in this process, whichever version is held.
    pub fn replace<V: Value>(&self, slot: &Slot, version: u64, value: V) {
        let entry = self.entry(slot, version, Some(value));
        if !self.0.policies.load().of_kind(slot.kind).ttl.is_zero() {
            self.0.l1.change(slot, |_| Op::Put(entry.clone()));
        }
    }

    /// Drops what is held of what only lives in this process.
    pub fn let_go(&self, slot: &Slot) {
        self.0.l1.remove(slot);
    }

    /// What is held under a key is wrong from now on: it is dropped from all tiers here, and fills under way are void. Other
    /// nodes keep theirs until its time is over: what must not be old anywhere has its version in its key.
    pub fn invalidate(&self, slot: &Slot) {
        self.0.stripes.of(slot.stable_hash()).change();
        self.0.l1.remove(slot);
        let policy = *self.0.policies.load().of_kind(slot.kind);
        self.0.crew.remove(slot, policy.l2, policy.l3);
    }

    /// What each tier holds under a key.
    pub async fn inspect(&self, slot: &Slot) -> Vec<Found> {
        let now = self.0.clock.now();
        let mut found = Vec::new();
        if let Some(entry) = self.0.l1.get(slot) {
            found.push(Found {
                tier: figures::TIERS[0],
                version: entry.version,
                age_ms: now.0 - entry.made.0,
                fresh_ms: entry.fresh.0 - now.0,
                bytes: entry.weight.into(),
                negative: entry.is_negative(),
                sealed: entry.seal.life == self.0.life,
            });
        }
        let below = [(1, self.0.l2.get(slot).await.map(Vec::from)), (2, self.0.crew.read(slot).await)];
        for (tier, bytes) in below {
            let Some(bytes) = bytes else { continue };
            let Some(frozen) = Frozen::read(&bytes) else { continue };
            found.push(Found {
                tier: figures::TIERS[tier],
                version: frozen.version,
                age_ms: now.0 - frozen.made.0,
                fresh_ms: frozen.fresh.0 - now.0,
                bytes: bytes.len() as u64,
                negative: frozen.is_negative(),
                sealed: frozen.seal.life == self.0.life,
            });
        }
        found
    }

    /// Entries and bytes of the first tier, after what is due was evicted.
    pub fn measure(&self) -> (u64, u64) {
        self.0.l1.measure()
    }

    /// Bytes of the first tier as it stands, with what is due for eviction.
    pub fn weighed(&self) -> u64 {
        self.0.l1.weighed()
    }

    /// So many states were told to other nodes as stale.
    pub fn told_stale(&self, count: u64) {
        self.0.figures.invalidated(false, count);
    }

    fn until(&self, kind: Kind, found: bool, now: Millis) -> (Millis, Millis) {
        // Any spread will do: it is not a secret.
        let dice = self.0.dice.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed) >> 17;
        self.0.policies.load().until(kind, found, now, dice)
    }

    /// Seconds of this life, from 1.
    fn seconds(&self) -> u32 {
        u32::try_from(self.0.born.elapsed().as_secs()).unwrap_or(u32::MAX - 1) + 1
    }

    fn entry<V: Value>(&self, slot: &Slot, version: u64, value: Option<V>) -> Entry {
        let now = self.0.clock.now();
        let until = self.until(slot.kind, value.is_some(), now);
        Entry::new(slot, version, value.map(Arc::new), now, until)
    }

    /// What is held, fresh, for whoever just became the one to load.
    fn peek(&self, slot: &Slot, version: u64) -> Option<Entry> {
        let entry = self.0.l1.get(slot).filter(|entry| entry.version >= version)?;
        (self.0.clock.now() < entry.fresh).then_some(entry)
    }

    fn look<V: Value>(&self, slot: &Slot, version: u64) -> Look<V> {
        let entry = self.0.l1.get(slot).filter(|entry| entry.version >= version && entry.is::<V>());
        let now = self.0.clock.now();
        let (look, how) = match entry {
            Some(entry) if now < entry.fresh => (Look::Fresh(entry.into_value::<V>()), Read::Hit),
            Some(entry) if now < entry.usable => (Look::Stale(entry.into_value::<V>()), Read::Stale),
            _ => (Look::Miss, Read::Miss),
        };
        self.0.figures.read(0, slot.kind, how);
        look
    }

    /// Loads anew what is served meanwhile, unless somebody does already.
    fn renew<V, E, L, F>(&self, slot: &Slot, version: u64, load: L)
    where
        V: Value,
        E: Clone + Send + Sync + 'static,
        L: FnOnce() -> F + Send + 'static,
        F: Future<Output = Result<Option<V>, E>> + Send + 'static,
    {
        let (cache, slot) = (self.clone(), slot.clone());
        tokio::spawn(async move {
            let Turn::Lead(lead) = cache.0.crew.join(&slot).await else { return };
            let end = match cache.peek(&slot, version) {
                Some(entry) => Ok(entry),
                None => cache.load::<V, E, _, _>(&slot, version, load, None).await,
            };
            lead.end(match end {
                Ok(entry) => Outcome::Entry(entry),
                Err(_) => Outcome::Again,
            });
        });
    }

    /// From the tiers below, or loaded: by another node, if one does at this moment.
    async fn fetch<V, E, L, F>(&self, slot: &Slot, version: u64, load: L) -> Result<Entry, E>
    where
        V: Value,
        L: FnOnce() -> F,
        F: Future<Output = Result<Option<V>, E>>,
    {
        if let Some(entry) = self.below::<V>(slot, version).await {
            return Ok(entry);
        }
        let L2::Redis(link) = &self.0.l2 else { return self.load(slot, version, load, None).await };
        if !self.goes_below(slot.kind).0 {
            return self.load(slot, version, load, None).await;
        }
        let token = self.0.dice.fetch_add(1, Ordering::Relaxed);
        let until = Instant::now() + AWAIT_OTHER;
        while Instant::now() < until {
            match link.guard(slot, token).await {
                Guard::Mine => {
                    // Perhaps it was put there between the look and the guard.
                    if let Some(entry) = self.second::<V>(slot, version).await {
                        link.free(slot, token).await;
                        return Ok(entry);
                    }
                    let end = self.load(slot, version, load, Some(token)).await;
                    if end.is_err() {
                        // The next one who asks need not wait for the guard's own end.
                        link.free(slot, token).await;
                    }
                    return end;
                }
                Guard::Unknown => break,
                Guard::Theirs => {
                    tokio::time::sleep(LOOK).await;
                    if let Some(entry) = self.second::<V>(slot, version).await {
                        return Ok(entry);
                    }
                }
            }
        }
        self.load(slot, version, load, None).await
    }

    /// From the second or the third tier; what is found goes into those above.
    async fn below<V: Value>(&self, slot: &Slot, version: u64) -> Option<Entry> {
        let (l2, l3) = self.goes_below(slot.kind);
        if l2 {
            let found = self.second::<V>(slot, version).await;
            self.0.figures.read(1, slot.kind, if found.is_some() { Read::Hit } else { Read::Miss });
            if found.is_some() {
                return found;
            }
        }
        if l3 {
            let filling = Filling::begin(self.0.stripes.of(slot.stable_hash()));
            let found = self.0.crew.read(slot).await.and_then(|bytes| self.thaw::<V>(slot, version, &bytes));
            self.0.figures.read(2, slot.kind, if found.is_some() { Read::Hit } else { Read::Miss });
            let entry = found?;
            self.hold(slot, &entry, &filling);
            self.0.crew.write(slot, &entry, l2, false, None);
            return Some(entry);
        }
        None
    }

    async fn second<V: Value>(&self, slot: &Slot, version: u64) -> Option<Entry> {
        let filling = Filling::begin(self.0.stripes.of(slot.stable_hash()));
        let bytes = self.0.l2.get(slot).await?;
        let entry = self.thaw::<V>(slot, version, &bytes)?;
        self.hold(slot, &entry, &filling);
        Some(entry)
    }

    fn thaw<V: Value>(&self, slot: &Slot, version: u64, bytes: &[u8]) -> Option<Entry> {
        let frozen = Frozen::read(bytes)?;
        (frozen.version >= version && self.0.clock.now() < frozen.fresh).then(|| frozen.thaw::<V>(slot))?
    }

    async fn load<V, E, L, F>(&self, slot: &Slot, version: u64, load: L, guard: Option<u64>) -> Result<Entry, E>
    where
        V: Value,
        L: FnOnce() -> F,
        F: Future<Output = Result<Option<V>, E>>,
    {
        let filling = Filling::begin(self.0.stripes.of(slot.stable_hash()));
        let began = Instant::now();
        let value = load().await?;
        self.0.figures.loaded(slot.kind, began.elapsed());
        let entry = self.entry(slot, version, value).below();
        self.hold(slot, &entry, &filling);
        if filling.is_current() {
            self.write(slot, &entry, guard);
        }
        Ok(entry)
    }

    fn hold(&self, slot: &Slot, entry: &Entry, filling: &Filling<'_>) {
        self.0.l1.change(slot, |held| match held {
            Some(held) if held.version > entry.version && entry.made < held.fresh => Op::Nop,
            _ if !filling.is_current() => Op::Nop,
            _ => Op::Put(entry.clone()),
        });
    }

    fn write(&self, slot: &Slot, entry: &Entry, guard: Option<u64>) {
        let (l2, l3) = self.goes_below(slot.kind);
        // That there is nothing is not worth a disk.
        self.0.crew.write(slot, entry, l2, l3 && !entry.is_negative(), guard);
    }

    /// Whether the second and the third tier hold a type at present.
    fn goes_below(&self, kind: Kind) -> (bool, bool) {
        let (policy, [l2, l3]) = (*self.0.policies.load().of_kind(kind), &self.0.on);
        (policy.l2 && l2.load(Ordering::Relaxed), policy.l3 && l3.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::types::{RawJson, TenantId};

    fn slot(kind: Kind, id: &str) -> Slot {
        Slot::new(kind, &TenantId::new("t").unwrap(), id)
    }

    fn cache(clock: &Clock) -> TieredCache {
        TieredCache::new(Options { clock: clock.clone(), ..Options::default() })
    }

    /// Loads `text`; how often is counted.
    async fn get(
        cache: &TieredCache,
        slot: &Slot,
        version: u64,
        text: Option<&str>,
        loads: &Arc<AtomicUsize>,
    ) -> Option<String> {
        let (loads, text) = (loads.clone(), text.map(str::to_owned));
        let load = move || async move {
            loads.fetch_add(1, Ordering::SeqCst);
            Ok::<_, ()>(text)
        };
        let value = cache.get_or_load::<String, _, _, _>(slot, version, load).await.unwrap();
        value.map(|value| (*value).clone())
    }

    #[tokio::test]
    async fn a_value_is_loaded_once_until_its_time_is_over_or_its_version_is() {
        let clock = Clock::manual(Millis(0));
        let (cache, loads, slot) = (cache(&clock), Arc::default(), slot(Kind::Answer, "a"));
        assert_eq!(get(&cache, &slot, 1, Some("one"), &loads).await.as_deref(), Some("one"));
        assert_eq!(get(&cache, &slot, 1, Some("two"), &loads).await.as_deref(), Some("one"));
        assert_eq!(
            get(&cache, &slot, 2, Some("two"), &loads).await.as_deref(),
            Some("two"),
            "a newer one is asked for"
        );
        assert_eq!(get(&cache, &slot, 1, Some("three"), &loads).await.as_deref(), Some("two"), "and never goes back");
        clock.advance(86_400_000);
        assert_eq!(get(&cache, &slot, 1, Some("four"), &loads).await.as_deref(), Some("four"), "its time is over");
        cache.invalidate(&slot);
        assert_eq!(get(&cache, &slot, 1, Some("five"), &loads).await.as_deref(), Some("five"));
    }

    #[tokio::test]
    async fn that_there_is_nothing_is_remembered_for_a_short_time() {
        let clock = Clock::manual(Millis(0));
        let (cache, loads, slot) = (cache(&clock), Arc::<AtomicUsize>::default(), slot(Kind::Answer, "a"));
        assert_eq!(get(&cache, &slot, 0, None, &loads).await, None);
        assert_eq!(get(&cache, &slot, 0, None, &loads).await, None);
        assert_eq!(loads.load(Ordering::SeqCst), 1);
        clock.advance(10_000);
        assert_eq!(get(&cache, &slot, 0, Some("now"), &loads).await.as_deref(), Some("now"));
    }

    #[tokio::test]
    async fn what_is_dropped_while_it_is_loaded_is_not_held() {
        let cache = cache(&Clock::System);
        let slot = slot(Kind::Answer, "a");
        let (dropper, dropped) = (cache.clone(), slot.clone());
        let load = move || async move {
            dropper.invalidate(&dropped);
            Ok::<_, ()>(Some(String::from("old")))
        };
        cache.get_or_load::<String, _, _, _>(&slot, 0, load).await.unwrap();
        assert_eq!(cache.get::<String>(&slot, 0), None);
        cache.put(&slot, 3, String::from("new"));
        cache.put(&slot, 2, String::from("old"));
        assert_eq!(cache.get::<String>(&slot, 0).flatten().as_deref().map(String::as_str), Some("new"));
        assert_eq!(cache.get::<String>(&slot, 4), None, "a newer one is wanted");
        assert_eq!(cache.get::<RawJson>(&slot, 0), None, "it is of another type");
    }

    #[tokio::test]
    async fn a_type_with_no_time_to_live_is_not_held() {
        let policy = config::Cache { ttl: config::CacheTtl { answer: 0, ..Default::default() }, ..Default::default() };
        let cache = TieredCache::new(Options { policy, ..Options::default() });
        let (loads, slot) = (Arc::<AtomicUsize>::default(), slot(Kind::Answer, "a"));
        get(&cache, &slot, 0, Some("a"), &loads).await;
        cache.put(&slot, 0, String::from("a"));
        get(&cache, &slot, 0, Some("a"), &loads).await;
        assert_eq!((loads.load(Ordering::SeqCst), cache.measure().0), (2, 0));
    }

    #[test]
    fn the_default_policy_is_that_of_the_settings() {
        let loaded = config::load(&config::Sources::default()).unwrap();
        assert_eq!(loaded.config.cache, config::Cache::default());
    }
}
