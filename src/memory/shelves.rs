//! The shelves of a node, within a bound of bytes: made on demand, brought up to date by every question, let go when others
//! are asked about more.
//!
//! Invariants: a shelf that is handed out knows every turn committed before it was asked for; one that is of an earlier life is begun
//! anew; the bound holds but for the one shelf that was asked for last. Tests: `tests/it/memory.rs`.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::RwLock;

use super::{Error, shelf::Shelf};
use crate::{
    config,
    store::{Reader, Remembered},
    telemetry::metric,
    types::InstanceKey,
};

/// Turns read at once.
const PAGE: usize = 16;
/// More episodes than this are added, and searched, on a thread that may block.
const MANY: usize = 2000;
/// No life has this number.
const NO_LIFE: i64 = i64::MIN;
/// What an entry takes beside its shelf.
const ENTRY: usize = 256;

type Shared = Arc<RwLock<Shelf>>;

struct Entry {
    shelf: Shared,
    bytes: usize,
    used: u64,
}

#[derive(Default)]
struct Inner {
    entries: HashMap<InstanceKey, Entry, ahash::RandomState>,
    bytes: usize,
    clock: u64,
}

/// The shelves.
pub(super) struct Shelves {
    inner: Mutex<Inner>,
    most: usize,
    lexical: bool,
    limit: usize,
    kinds: [metrics::Counter; 3],
    held: metrics::Gauge,
}

impl Shelves {
    pub(super) fn new(config: &config::Memory, lexical: bool) -> Self {
        let kind = |kind: &'static str| metrics::counter!(metric::MEMORY_EPISODES, "kind" => kind);
        Self {
            inner: Mutex::default(),
            most: config.cache_mb.saturating_mul(1024 * 1024),
            lexical,
            limit: config.exact_vectors,
            kinds: [kind("fresh"), kind("duplicate"), kind("junk")],
            held: metrics::gauge!(metric::MEMORY_SHELF_BYTES),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entry(&self, key: &InstanceKey) -> Shared {
        let mut inner = self.lock();
        inner.clock += 1;
        let used = inner.clock;
        if let Some(entry) = inner.entries.get_mut(key) {
            entry.used = used;
            return Arc::clone(&entry.shelf);
        }
        let shelf = Arc::new(RwLock::new(Shelf::new(NO_LIFE, self.lexical, self.limit)));
        inner.entries.insert(key.clone(), Entry { shelf: Arc::clone(&shelf), bytes: ENTRY, used });
        inner.bytes += ENTRY;
        shelf
    }

    /// The shelf of an instance as of now.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Store`].
    pub(super) async fn current(&self, reader: &dyn Reader, key: &InstanceKey) -> Result<Shared, Error> {
        let shared = self.entry(key);
        let mut changed = false;
        loop {
            let (life, turn) = {
                let shelf = shared.read().await;
                (shelf.life, shelf.turn)
            };
            let page = reader.remembered(key, if life == NO_LIFE { 0 } else { turn }, PAGE).await?;
            if page.life == 0 {
                self.remove(key);
                return Err(Error::NotFound);
            }
            if page.life == life && page.turns.is_empty() {
                break;
            }
            let full = page.turns.len() == PAGE;
            changed = true;
            let other = page.life != life;
            self.follow(&shared, page).await;
            // Of another life: what was read may begin in its middle.
            if !full && (!other || life == NO_LIFE) {
                break;
            }
        }
        if changed {
            let bytes = self.settle(&shared).await;
            self.weigh(key, bytes);
        }
        Ok(shared)
    }

    /// Makes what is worth making, once after a run of turns: an index that grows page by page would be made again and again.
    /// How many bytes the shelf has then.
    async fn settle(&self, shared: &Shared) -> usize {
        let mut shelf = Arc::clone(shared).write_owned().await;
        let heavy = shelf.len() > MANY;
        let mut settle = move || {
            shelf.settle();
            shelf.bytes()
        };
        if heavy { tokio::task::spawn_blocking(settle).await.unwrap_or(0) } else { settle() }
    }

    async fn follow(&self, shared: &Shared, page: Remembered) {
        let (lexical, limit) = (self.lexical, self.limit);
        let mut shelf = Arc::clone(shared).write_owned().await;
        let heavy = page.turns.iter().map(|turn| turn.episodes.len()).sum::<usize>() > MANY
            || page.turns.iter().any(|turn| !turn.forgotten().runs.is_empty());
        let mut apply = move || {
            if shelf.life != page.life {
                let fresh = shelf.life == NO_LIFE;
                *shelf = Shelf::new(page.life, lexical, limit);
                if !fresh {
                    return (false, Vec::new());
                }
            }
            let live = shelf.turn > 0;
            let mut kinds = Vec::new();
            for turn in &page.turns {
                // Somebody else may have followed it meanwhile.
                if turn.turn > shelf.turn {
                    kinds.append(&mut shelf.follow(turn));
                }
            }
            (live, kinds)
        };
        let followed = if heavy { tokio::task::spawn_blocking(apply).await.ok() } else { Some(apply()) };
        let Some((live, kinds)) = followed else { return };
        // What is read again after a restart was counted when it came.
        for kind in kinds.iter().filter(|_| live) {
            self.kinds[*kind as usize].increment(1);
        }
    }

    /// Looks something up, on a thread that may block where that may take long.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        shared: &Shared,
        look: impl FnOnce(&Shelf) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let shelf = Arc::clone(shared).read_owned().await;
        if shelf.len() <= MANY {
            return look(&shelf);
        }
        let looked = tokio::task::spawn_blocking(move || look(&shelf)).await;
        looked.unwrap_or(Err(Error::Store(crate::store::Error::Closed)))
    }

    /// Notes how large a shelf is, and lets go of others until all fit.
    fn weigh(&self, key: &InstanceKey, bytes: usize) {
        let mut guard = self.lock();
        let inner = &mut *guard;
        if let Some(entry) = inner.entries.get_mut(key) {
            inner.bytes = inner.bytes.saturating_sub(entry.bytes) + bytes + ENTRY;
            entry.bytes = bytes + ENTRY;
        }
        if inner.bytes > self.most {
            let mut oldest: Vec<(u64, InstanceKey)> =
                inner.entries.iter().map(|(key, entry)| (entry.used, key.clone())).collect();
            oldest.sort_unstable_by_key(|(used, _)| *used);
            oldest.pop();
            // A tenth more than is needed, so that not every question sorts.
            let goal = self.most / 10 * 9;
            for (_, key) in oldest {
                if inner.bytes <= goal {
                    break;
                }
                if let Some(gone) = inner.entries.remove(&key) {
                    inner.bytes = inner.bytes.saturating_sub(gone.bytes);
                }
            }
        }
        #[allow(clippy::cast_precision_loss)] // bytes of memory
        self.held.set(inner.bytes as f64);
    }

    pub(super) fn remove(&self, key: &InstanceKey) {
        let mut inner = self.lock();
        if let Some(gone) = inner.entries.remove(key) {
            inner.bytes = inner.bytes.saturating_sub(gone.bytes);
        }
    }
}
