//! The shelves of a node, within a bound of bytes: made on demand, brought up to date by every question, let go when others
//! are asked about more.
//!
//! Invariants: a shelf that is handed out knows every turn committed before it was asked for; one that is of an earlier life is begun
//! anew; the bound holds but for the one shelf that was asked for last. Tests: `tests/it/memory.rs`.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::RwLock;

use super::{Error, checkpoint, index, part, shelf::Shelf};
use crate::{
    config,
    store::{Done, Keep, Part, Piece, Remembered, Store},
    telemetry::metric,
    types::InstanceKey,
};

/// Turns read at once.
const PAGE: usize = 16;
/// Parts read at once: some megabytes.
const PARTS: usize = 1;
/// More episodes than this are added, and searched, on a thread that may block.
const MANY: usize = 2000;
/// No life has this number.
const NO_LIFE: i64 = i64::MIN;
/// What an entry takes beside its shelf.
const ENTRY: usize = 256;

pub(super) type Shared = Arc<RwLock<Shelf>>;

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
    /// Parts that were read, and that could not be.
    parts: [metrics::Counter; 2],
    /// The same of indexes.
    indexes: [metrics::Counter; 2],
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
            parts: ["read", "damaged"].map(|result| metrics::counter!(metric::MEMORY_PARTS, "result" => result)),
            indexes: ["read", "damaged"].map(|result| metrics::counter!(metric::MEMORY_INDEXES, "result" => result)),
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

    /// The shelf of an instance if it is held.
    pub(super) fn held(&self, key: &InstanceKey) -> Option<Shared> {
        self.lock().entries.get(key).map(|entry| Arc::clone(&entry.shelf))
    }

    /// The shelf of an instance as of now, and whether there is something of it to be kept in the store.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Store`].
    pub(super) async fn current(&self, store: &dyn Store, key: &InstanceKey) -> Result<(Shared, bool), Error> {
        let shared = self.entry(key);
        let mut changed = shared.read().await.life == NO_LIFE && self.open(store, key, &shared).await?;
        loop {
            let (life, turn) = {
                let shelf = shared.read().await;
                (shelf.life, shelf.turn)
            };
            let page = store.remembered(key, if life == NO_LIFE { 0 } else { turn }, PAGE).await?;
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
            let (bytes, stale) = self.settle(&shared).await;
            self.weigh(key, bytes);
            return Ok((shared, stale));
        }
        Ok((shared, false))
    }

    /// Begins a shelf with the index and the parts of it that are in the store, and what is between them in the log; whether there
    /// were any parts.
    async fn open(&self, store: &dyn Store, key: &InstanceKey, shared: &Shared) -> Result<bool, Error> {
        self.begin(store, key, shared).await?;
        let (mut opened, mut bad, mut ahead) = (false, HashSet::new(), None);
        loop {
            let (life, turn) = {
                let shelf = shared.read().await;
                (shelf.life, shelf.turn)
            };
            let found = match ahead.take() {
                Some(found) => found,
                None => store.parts(key, turn, PARTS).await?,
            };
            let fits = found.life != 0 && (life == NO_LIFE || life == found.life);
            let Some(part) = found.parts.into_iter().find(|part| !bad.contains(&part.after)).filter(|_| fits) else {
                return Ok(opened);
            };
            if part.after > turn {
                let page = store.remembered(key, turn, PAGE).await?;
                if page.life != found.life || page.turns.is_empty() {
                    return Ok(opened);
                }
                self.follow(shared, page).await;
                opened = true;
                continue;
            }
            let (after, upto) = (part.after, part.upto);
            // While it is followed the next one is read.
            let (taken, next) = tokio::join!(self.take(shared, found.life, part), store.parts(key, upto, PARTS));
            if taken {
                (opened, ahead) = (true, Some(next?));
                self.parts[0].increment(1);
                continue;
            }
            // Not worth an error: the log has everything. It is made again when enough was read from there.
            tracing::warn!(instance = %key, after, upto, "a part of a memory is damaged or of another build, and is read from the log");
            self.parts[1].increment(1);
            bad.insert(after);
            let (done, end) = Done::channel();
            let piece = Piece::Part(Part { after, upto, rec: bytes::Bytes::new() });
            store.keep(Keep { key: key.clone(), life: found.life, seen: u64::MAX, piece }, done);
            drop(end.await);
        }
    }

    /// Begins a shelf that knows nothing yet with the index in the store. One that is damaged is made anew from the vectors.
    async fn begin(&self, store: &dyn Store, key: &InstanceKey, shared: &Shared) -> Result<(), Error> {
        let Some(found) = store.index(key).await? else { return Ok(()) };
        let (lexical, limit, life) = (self.lexical, self.limit, found.life);
        let mut shelf = Arc::clone(shared).write_owned().await;
        let begun = tokio::task::spawn_blocking(move || {
            let Ok(plans) = index::decode(&found.rec) else { return false };
            // Somebody else may have begun it meanwhile.
            if shelf.life == NO_LIFE {
                *shelf = Shelf::new(life, lexical, limit);
                shelf.begin(plans, found.upto);
            }
            true
        });
        if begun.await.unwrap_or(false) {
            self.indexes[0].increment(1);
            return Ok(());
        }
        tracing::warn!(instance = %key, "the index of a memory is damaged or of another build, and is made anew");
        self.indexes[1].increment(1);
        let (done, end) = Done::channel();
        let piece = Piece::Index(bytes::Bytes::new());
        store.keep(Keep { key: key.clone(), life, seen: u64::MAX, piece }, done);
        drop(end.await);
        Ok(())
    }

    /// Follows the digests of a part; whether it could be read.
    async fn take(&self, shared: &Shared, life: i64, part: Part) -> bool {
        let (lexical, limit) = (self.lexical, self.limit);
        let mut shelf = Arc::clone(shared).write_owned().await;
        let taken = tokio::task::spawn_blocking(move || {
            let Ok(digests) = part::decode(&part.rec, lexical) else { return false };
            if shelf.life == NO_LIFE {
                *shelf = Shelf::new(life, lexical, limit);
            }
            // Somebody else may have followed some of it meanwhile, or another life.
            if shelf.life != life {
                return true;
            }
            for digest in &digests {
                if digest.turn > shelf.turn {
                    shelf.take(digest);
                }
            }
            // Turns that changed nothing of the memory may be the last it covers.
            shelf.turn = shelf.turn.max(part.upto);
            true
        });
        taken.await.unwrap_or(false)
    }

    /// Makes what is worth making, once after a run of turns: an index that grows page by page would be made again and again.
    /// How many bytes the shelf has then, and whether enough was read from the log to be kept in parts, or the index is new.
    async fn settle(&self, shared: &Shared) -> (usize, bool) {
        let mut shelf = Arc::clone(shared).write_owned().await;
        let heavy = shelf.len() > MANY;
        let mut settle = move || {
            shelf.settle();
            shelf.live = true;
            let stale = shelf.read >= checkpoint::LEAST;
            if stale {
                shelf.read = 0;
            }
            (shelf.bytes(), stale || shelf.is_unkept())
        };
        if heavy { tokio::task::spawn_blocking(settle).await.unwrap_or_default() } else { settle() }
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
            let live = shelf.live;
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
