//! The second tier of a node without Redis: written, compressed entries in this process, bounded in bytes.
//!
//! Invariant: an entry never replaces one of a newer version. Tests: at the foot.

use std::sync::Arc;

use arc_swap::ArcSwap;
use bytes::Bytes;
use moka::{notification::RemovalCause, ops::compute::Op, sync::Cache};

use super::{entry, figures::Figures, slot::Slot};

type Held = Cache<Slot, Bytes, ahash::RandomState>;

/// The region. Cheap to clone.
#[derive(Clone)]
pub(super) struct Region {
    held: Arc<ArcSwap<Held>>,
    figures: Arc<Figures>,
}

impl Region {
    /// Of so many bytes.
    pub fn new(bytes: u64, figures: Arc<Figures>) -> Self {
        figures.limit(1, bytes);
        Self { held: Arc::new(ArcSwap::from_pointee(build(bytes, &figures))), figures }
    }

    /// What is held.
    pub fn get(&self, slot: &Slot) -> Option<Bytes> {
        self.held.load().get(slot)
    }

    /// Puts an entry in unless what is held is newer.
    pub fn put(&self, slot: &Slot, frozen: Vec<u8>) {
        let (version, frozen) = (entry::version(&frozen), Bytes::from(frozen));
        let _ = self.held.load().entry_by_ref(slot).and_compute_with(|held| match held {
            Some(held) if entry::version(held.value()) > version => Op::Nop,
            _ => Op::Put(frozen.clone()),
        });
    }

    /// Drops an entry.
    pub fn remove(&self, slot: &Slot) {
        let _ = self.held.load().entry_by_ref(slot).and_compute_with(|_| Op::Remove);
    }

    /// Another size. What fits is kept: written entries say themselves whether they may be served.
    pub fn resize(&self, bytes: u64) {
        let new = build(bytes, &self.figures);
        let old = self.held.swap(Arc::new(new));
        let mut room = bytes - bytes / 16;
        for (slot, frozen) in old.iter() {
            let weight = u64::from(weigh(&slot, &frozen));
            if weight > room {
                break;
            }
            room -= weight;
            self.put(&slot, frozen.to_vec());
        }
        old.invalidate_all();
        old.run_pending_tasks();
        self.figures.limit(1, bytes);
    }

    /// Entries and their bytes, after what is due was evicted.
    pub fn measure(&self) -> (u64, u64) {
        let held = self.held.load();
        held.run_pending_tasks();
        (held.entry_count(), held.weighted_size())
    }
}

fn weigh(slot: &Slot, frozen: &Bytes) -> u32 {
    u32::try_from(frozen.len() + slot.id.len() + entry::OVERHEAD).unwrap_or(u32::MAX)
}

fn build(bytes: u64, figures: &Arc<Figures>) -> Held {
    let figures = figures.clone();
    Cache::builder()
        .max_capacity(bytes)
        .weigher(weigh)
        .eviction_listener(move |slot: Arc<Slot>, _, cause| {
            if cause == RemovalCause::Size {
                figures.evicted(1, slot.kind, 1);
            }
        })
        .build_with_hasher(ahash::RandomState::new())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{
        scaling::cache::{entry::Entry, slot::Kind},
        types::{Millis, TenantId},
    };

    fn slot(n: u64) -> Slot {
        Slot::new(Kind::Answer, &TenantId::new("t").unwrap(), n.to_string())
    }

    fn frozen(version: u64, bytes: usize) -> Vec<u8> {
        let value = Some(Arc::new("x".repeat(bytes)));
        Entry::new(&slot(0), version, value, Millis(0), (Millis(1), Millis(1))).freeze().unwrap()
    }

    #[test]
    fn it_keeps_the_newest_and_what_fits() {
        let region = Region::new(1 << 20, Arc::new(Figures::default()));
        region.put(&slot(1), frozen(2, 10));
        region.put(&slot(1), frozen(1, 10));
        assert_eq!(entry::version(&region.get(&slot(1)).unwrap()), Some(2));
        (2..500).for_each(|n| region.put(&slot(n), frozen(1, 100)));
        let before = region.measure();
        region.resize(1 << 16);
        let after = region.measure();
        assert!(after.1 <= 1 << 16 && after.0 > 50 && before.0 == 499, "{before:?} {after:?}");
        region.remove(&slot(1));
        assert_eq!(region.get(&slot(1)), None);
    }
}
