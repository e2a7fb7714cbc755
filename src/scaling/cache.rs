//! The in-process read cache of committed states: a hit costs no mailbox, no thread and no store.
//!
//! Not here: the truth. An entry is only ever what a commit left behind.
//! Invariants: a late fill never overwrites a newer version; a commit refreshes what is held before anybody is answered.
//! Tests: at the foot.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use moka::{ops::compute::Op, sync::Cache};

use crate::{
    telemetry::metric,
    types::{InstanceKey, StateSnapshot},
};

/// Slots that tell a commit whether a fill of the same instance may be under way; instances share them by hash.
const STRIPES: usize = 1024;

/// States by instance, weighed in bytes. Cheap to clone.
#[derive(Clone)]
pub struct StateCache {
    cache: Cache<InstanceKey, Arc<StateSnapshot>, ahash::RandomState>,
    stripes: Arc<[Stripe]>,
    hits: metrics::Counter,
    misses: metrics::Counter,
}

#[derive(Default)]
struct Stripe {
    /// Commits so far.
    commits: AtomicU64,
    /// Readers between their look into the store and their fill.
    filling: AtomicU64,
}

/// A fill that has begun: taken before the store is read, so that a commit in between is noticed.
pub struct Fill<'a> {
    cache: &'a StateCache,
    stripe: &'a Stripe,
    commits: u64,
    key: &'a InstanceKey,
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        self.stripe.filling.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Fill<'_> {
    /// Holds what was read, unless a commit came in between.
    pub fn finish(self, state: &Arc<StateSnapshot>) {
        let _ = self.cache.cache.entry_by_ref(self.key).and_compute_with(|held| match held {
            Some(held) if held.value().version >= state.version => Op::Nop,
            _ if self.stripe.commits.load(Ordering::SeqCst) != self.commits => Op::Nop,
            _ => Op::Put(state.clone()),
        });
    }
}

impl StateCache {
    /// A cache of about so many bytes.
    pub fn new(bytes: u64) -> Self {
        let cache = Cache::builder()
            .max_capacity(bytes)
            .weigher(|key: &InstanceKey, state: &Arc<StateSnapshot>| {
                let bytes = key.instance.as_str().len() + state.doc.get().len() + 192;
                u32::try_from(bytes).unwrap_or(u32::MAX)
            })
            .build_with_hasher(ahash::RandomState::new());
        let stripes = (0..STRIPES).map(|_| Stripe::default()).collect();
        let reads = |result| metrics::counter!(metric::CACHE_READS, "tier" => "l1", "result" => result);
        Self { cache, stripes, hits: reads("hit"), misses: reads("miss") }
    }

    fn stripe(&self, key: &InstanceKey) -> &Stripe {
        &self.stripes[key.stable_hash() as usize % STRIPES]
    }

    /// What is held.
    pub fn get(&self, key: &InstanceKey) -> Option<Arc<StateSnapshot>> {
        let found = self.cache.get(key);
        if found.is_some() { &self.hits } else { &self.misses }.increment(1);
        found
    }

    /// Begins to fill; to be called before the store is read.
    pub fn begin_fill<'a>(&'a self, key: &'a InstanceKey) -> Fill<'a> {
        let stripe = self.stripe(key);
        stripe.filling.fetch_add(1, Ordering::SeqCst);
        Fill { cache: self, stripe, commits: stripe.commits.load(Ordering::SeqCst), key }
    }

    /// Replaces what is held by what a commit left behind, and voids fills under way; holds nothing that nobody read.
    pub fn refresh(&self, key: &InstanceKey, version: u64, state: impl FnOnce() -> StateSnapshot) {
        let stripe = self.stripe(key);
        stripe.commits.fetch_add(1, Ordering::SeqCst);
        if stripe.filling.load(Ordering::SeqCst) == 0 && !self.cache.contains_key(key) {
            return;
        }
        let _ = self.cache.entry_by_ref(key).and_compute_with(|held| match held {
            Some(held) if held.value().version < version => Op::Put(Arc::new(state())),
            _ => Op::Nop,
        });
    }

    /// Drops everything, and voids fills under way.
    pub fn clear(&self) {
        for stripe in &*self.stripes {
            stripe.commits.fetch_add(1, Ordering::SeqCst);
        }
        self.cache.invalidate_all();
    }

    /// Drops an instance, and voids fills under way.
    pub fn forget(&self, key: &InstanceKey) {
        self.stripe(key).commits.fetch_add(1, Ordering::SeqCst);
        let _ = self.cache.entry_by_ref(key).and_compute_with(|_| Op::Remove);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::types::{InstanceId, RawJson, TenantId};

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap())
    }

    fn state(version: u64) -> Arc<StateSnapshot> {
        Arc::new(StateSnapshot::new(version, version, RawJson::parse("{}").unwrap()))
    }

    #[test]
    fn a_late_fill_never_hides_a_commit() {
        let cache = StateCache::new(1 << 20);
        let key = key();
        let fill = cache.begin_fill(&key);
        cache.refresh(&key, 2, || (*state(2)).clone());
        fill.finish(&state(1));
        assert_eq!(cache.get(&key), None);
        cache.begin_fill(&key).finish(&state(2));
        assert_eq!(cache.get(&key), Some(state(2)));
    }

    #[test]
    fn a_commit_refreshes_only_what_is_held() {
        let cache = StateCache::new(1 << 20);
        let key = key();
        cache.refresh(&key, 1, || unreachable!("nobody reads it"));
        cache.begin_fill(&key).finish(&state(1));
        cache.refresh(&key, 2, || (*state(2)).clone());
        assert_eq!(cache.get(&key).unwrap().version, 2);
        cache.forget(&key);
        assert_eq!(cache.get(&key), None);

        cache.begin_fill(&key).finish(&state(3));
        let late = cache.begin_fill(&key);
        cache.clear();
        assert_eq!(cache.get(&key), None);
        late.finish(&state(3));
        assert_eq!(cache.get(&key), None, "what was read before belongs to another time");
    }
}
