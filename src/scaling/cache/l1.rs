//! The first tier: entries of this process, weighed in bytes with what they cost beside their value. A hit takes no lock and no
//! mailbox.
//!
//! Not here: what is served (`states`, the facade), what is loaded (`flight`). Invariants: an entry never replaces one of a newer
//! version; the tier is at most a few percent above its size, whatever is put in; the value of what leaves is freed at once, also
//! while the table keeps the rest. Tests: at the foot; `tests/it/cache.rs`, `tests/it/load.rs`.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use moka::{
    notification::RemovalCause,
    ops::compute::{CompResult, Op},
    sync::Cache,
};

use super::{
    entry::{Entry, Kept},
    figures::Figures,
    slot::{Slot, StateOf},
};
use crate::types::InstanceKey;

type Held = Cache<Slot, Kept, ahash::RandomState>;
/// Takes what had to leave for lack of room. Must not block.
pub(super) type Leaves = Box<dyn Fn(&Slot, &Entry) + Send + Sync>;

/// The evictions of a cache are worked off by whoever puts something in, at the latest when so much of the size was put in
/// since the last time.
const LATE: u64 = 64;
/// An entry larger than this share of the size is not held: it would drive out everything else.
const SHARE: u64 = 8;

/// The tier. Cheap to clone.
#[derive(Clone)]
pub(super) struct L1(Arc<Inner>);

struct Inner {
    held: ArcSwap<Held>,
    size: AtomicU64,
    /// Bytes put in since evictions were last worked off.
    put: AtomicU64,
    leaves: Arc<OnceLock<Leaves>>,
    figures: Arc<Figures>,
}

impl L1 {
    /// Of so many bytes.
    pub fn new(bytes: u64, figures: Arc<Figures>) -> Self {
        let leaves = Arc::default();
        let held = ArcSwap::from_pointee(build(bytes, &leaves, &figures));
        figures.limit(0, bytes);
        Self(Arc::new(Inner { held, size: AtomicU64::new(bytes), put: AtomicU64::new(0), leaves, figures }))
    }

    /// From here on this takes what has to leave. The first one stays.
    pub fn on_leave(&self, leaves: Leaves) {
        let _ = self.0.leaves.set(leaves);
    }

    /// What is held.
    pub fn get(&self, slot: &Slot) -> Option<Entry> {
        self.0.held.load().get(slot)?.entry()
    }

    /// What is held of an instance's state.
    pub fn state(&self, key: &InstanceKey) -> Option<Entry> {
        self.0.held.load().get(&StateOf(key))?.entry()
    }

    /// Whether something is held of an instance's state.
    pub fn has_state(&self, key: &InstanceKey) -> bool {
        self.0.held.load().contains_key(&StateOf(key))
    }

    /// Puts an entry in unless what is held is newer; whether it is in.
    pub fn put(&self, slot: &Slot, entry: Entry) -> bool {
        self.change(slot, |held| match held {
            Some(held) if held.version > entry.version => Op::Nop,
            _ => Op::Put(entry.clone()),
        })
    }

    /// Replaces what is held as `change` says, which nobody else changes meanwhile; whether something was put in. It may be
    /// called more than once.
    pub fn change(&self, slot: &Slot, change: impl Fn(Option<&Entry>) -> Op<Entry>) -> bool {
        let held = self.0.held.load();
        let size = self.0.size.load(Ordering::Relaxed);
        let result = held.entry_by_ref(slot).and_compute_with(|held| {
            // What leaves at this moment does not stand here: whoever takes it out has the key to himself, too.
            let held = held.and_then(|held| held.into_value().entry());
            match change(held.as_ref()) {
                Op::Put(entry) if u64::from(entry.weight) > size / SHARE => match held {
                    Some(_) => Op::Remove,
                    None => Op::Nop,
                },
                Op::Put(entry) => Op::Put(Kept::new(entry)),
                Op::Remove => Op::Remove,
                Op::Nop => Op::Nop,
            }
        });
        let (CompResult::Inserted(entry) | CompResult::ReplacedWith(entry)) = result else { return false };
        let weight = u64::from(entry.value().weight());
        if self.0.put.fetch_add(weight, Ordering::Relaxed) + weight > size / LATE {
            self.0.put.store(0, Ordering::Relaxed);
            held.run_pending_tasks();
        }
        true
    }

    /// Drops an entry, behind whoever is putting one in.
    pub fn remove(&self, slot: &Slot) {
        let _ = self.0.held.load().entry_by_ref(slot).and_compute_with(|_| Op::Remove);
    }

    /// Another size. What is held is dropped, and with it the memory: the tables of a cache do not shrink.
    pub fn resize(&self, bytes: u64) {
        self.0.size.store(bytes, Ordering::Relaxed);
        self.0.put.store(0, Ordering::Relaxed);
        let old = self.0.held.swap(Arc::new(build(bytes, &self.0.leaves, &self.0.figures)));
        // Whoever looks something up at this moment lets go of the table in a moment; until then it holds nothing.
        old.iter().for_each(|(_, kept)| drop(kept.take()));
        old.invalidate_all();
        old.run_pending_tasks();
        self.0.figures.limit(0, bytes);
    }

    /// Bytes it may hold.
    pub fn size(&self) -> u64 {
        self.0.size.load(Ordering::Relaxed)
    }

    /// Bytes that are held, with what is due for eviction.
    pub fn weighed(&self) -> u64 {
        self.0.held.load().weighted_size()
    }

    /// Entries and their bytes, after what is due was evicted.
    pub fn measure(&self) -> (u64, u64) {
        let held = self.0.held.load();
        held.run_pending_tasks();
        (held.entry_count(), held.weighted_size())
    }
}

fn build(bytes: u64, leaves: &Arc<OnceLock<Leaves>>, figures: &Arc<Figures>) -> Held {
    let (leaves, figures) = (leaves.clone(), figures.clone());
    Cache::builder()
        .max_capacity(bytes)
        .weigher(|_, kept: &Kept| kept.weight())
        .eviction_listener(move |slot: Arc<Slot>, kept: Kept, cause| {
            let entry = kept.take();
            if cause == RemovalCause::Size {
                figures.evicted(0, slot.kind, 1);
                if let (Some(leaves), Some(entry)) = (leaves.get(), entry) {
                    leaves(&slot, &entry);
                }
            }
        })
        .build_with_hasher(ahash::RandomState::new())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        scaling::cache::slot::Kind,
        types::{Millis, TenantId},
    };

    fn slot(n: u64) -> Slot {
        Slot::new(Kind::Answer, &TenantId::new("t").unwrap(), n.to_string())
    }

    fn entry(slot: &Slot, version: u64, bytes: usize) -> Entry {
        Entry::new(slot, version, Some(Arc::new("x".repeat(bytes))), Millis(0), (Millis(1), Millis(1)))
    }

    fn l1(bytes: u64) -> L1 {
        L1::new(bytes, Arc::new(Figures::default()))
    }

    #[test]
    fn a_late_fill_never_hides_a_newer_version() {
        let l1 = l1(1 << 20);
        assert!(l1.put(&slot(1), entry(&slot(1), 2, 10)));
        assert!(!l1.put(&slot(1), entry(&slot(1), 1, 10)));
        assert_eq!(l1.get(&slot(1)).unwrap().version, 2);
        assert!(l1.put(&slot(1), entry(&slot(1), 2, 20)), "the same version may be made again");
    }

    #[test]
    fn it_stays_at_its_size_while_values_of_all_sizes_churn() {
        let size = 32 << 20;
        let l1 = l1(size);
        let mut random = 1u64;
        let mut most = 0;
        for n in 0..6000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // From 10 B to 1 MiB, each power of two as often as any other.
            let bytes = 10usize << ((random >> 33) % 18).min(16);
            l1.put(&slot(n), entry(&slot(n), 0, bytes));
            most = most.max(l1.0.held.load().weighted_size());
        }
        assert!(most <= size + size / 10, "{most} bytes were held");
        let (_, bytes) = l1.measure();
        assert!(bytes <= size && bytes > size / 2, "{bytes} bytes are held");
        l1.resize(4 << 20);
        assert_eq!(l1.measure(), (0, 0));
        assert!(!l1.put(&slot(1), entry(&slot(1), 0, 1 << 20)), "it would drive out everything else");
        assert!(l1.put(&slot(1), entry(&slot(1), 0, 1 << 10)));
    }

    #[test]
    fn the_value_of_what_leaves_is_freed_at_once() {
        let (l1, value) = (l1(1 << 20), Arc::new(String::from("value")));
        let of = |version| Entry::new(&slot(1), version, Some(value.clone()), Millis(0), (Millis(1), Millis(1)));
        let held = |l1: &L1| {
            l1.measure();
            Arc::strong_count(&value) - 1
        };
        l1.put(&slot(1), of(1));
        l1.put(&slot(1), of(2));
        assert_eq!(held(&l1), 1, "replaced");
        l1.remove(&slot(1));
        assert_eq!(held(&l1), 0, "removed");
        l1.put(&slot(1), of(1));
        l1.resize(1 << 19);
        assert_eq!(held(&l1), 0, "resized");
        (0..2000).for_each(|n| assert!(l1.put(&slot(n), of(1))));
        let (entries, _) = l1.measure();
        assert!(entries < 2000 && held(&l1) as u64 == entries, "{} for {entries} entries", held(&l1));
    }

    #[test]
    fn what_has_to_leave_is_handed_on() {
        let l1 = l1(64 << 10);
        let left = Arc::new(AtomicU64::new(0));
        let counted = left.clone();
        l1.on_leave(Box::new(move |_, _| {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        for n in 0..200 {
            l1.put(&slot(n), entry(&slot(n), 0, 1000));
        }
        let (held, _) = l1.measure();
        assert_eq!(held + left.load(Ordering::Relaxed), 200);
    }
}
