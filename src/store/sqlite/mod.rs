//! The store of one node: SQLite, one writer with group commit, a pool of readers.
//!
//! A turn costs one append to the log (`turns`) in its commit; heads, the index of ids and the words of episodes are folded
//! from the log later, sorted, inside following commits, while a memtable answers for what is not folded. A start reads the
//! unfolded end of the log again.
//!
//! | file | what |
//! |---|---|
//! | `schema` | opening, locking, migrating, errors |
//! | `writer`, `apply` | the thread that commits; what a unit writes |
//! | `memtable`, `fold` | what is not folded; folding it |
//! | `chores`, `checkpoint` | removal and expiry; the write-ahead log |
//! | `reader`, `query`, `recall` | the threads that read; what they read |
//! | `steps`, `parts` | turns under way; parts of memories |
//! | `rows`, `counts`, `queue` | single rows; rows per instance; the bounded queue |
//! | `copy` | the whole database at one moment |
//!
//! Invariants: those of `store`, and: no statement names an instance without its tenant; the memtable and the folded
//! tables together know exactly the log. Decisions: `docs/adr/0002-turn-and-commit.md`, `docs/adr/0005-storage-format-and-versioning.md`.
//! Tests: `tests/it/store_contract.rs`, `tests/it/store_sqlite.rs`; figures: `benches/store.rs`.

mod apply;
mod checkpoint;
mod chores;
mod copy;
mod counts;
mod fold;
mod memtable;
mod parts;
mod query;
mod queue;
mod reader;
mod recall;
mod rows;
mod schema;
mod steps;
mod writer;

#[cfg(feature = "faults")]
use std::sync::atomic::AtomicU32;
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use async_trait::async_trait;
use tokio::sync::Notify;

pub use self::copy::copy;
use self::{
    checkpoint::Checkpoints,
    memtable::Memtable,
    queue::{Queue, Refused},
    reader::{Readers, View},
    schema::FolderLock,
    writer::{Job, Shared, Writer as WriterThread},
};
use super::{
    DeadLetter, Done, Episode, Error, Feed, Fence, Index, Keep, Known, Listed, Loaded, MqttRow, MqttWrite, Outgoing,
    Parts, Pending, Reader, Rejection, Remembered, Scope, Shipping, Snapshot, Spans, Stats, Store, Unit, Writer,
    record,
};
use crate::{
    config,
    runtime::clock::Clock,
    scaling::pool::{Limits, Places},
    types::{InstanceId, InstanceKey, Millis, StateSnapshot, StimulusId, TenantId, TurnRecord},
};

/// Turns of a generation: what a start reads again at most twice, and what is sorted at once.
const GENERATION_TURNS: usize = 32 * 1024;

/// How a store differs from the usual.
#[derive(Debug, Clone)]
pub struct Options {
    /// Recognise repeated stimulus ids. Off only for the negative control of a test.
    pub dedupe: bool,
    /// Threads that read, and how long they may be waited for.
    pub pool: Limits,
    /// Turns that are folded together.
    pub generation_turns: usize,
    /// Commits fail with [`Error::Full`] while this file exists.
    #[cfg(feature = "faults")]
    pub disk_full_file: Option<PathBuf>,
    /// The database may have this many pages at most, as it stands before each commit.
    #[cfg(feature = "faults")]
    pub max_pages: Option<Arc<AtomicU32>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dedupe: true,
            pool: Limits::default(),
            generation_turns: GENERATION_TURNS,
            #[cfg(feature = "faults")]
            disk_full_file: None,
            #[cfg(feature = "faults")]
            max_pages: None,
        }
    }
}

/// The store. Dropping it without [`Store::close`] leaves the files as a crash would.
pub struct SqliteStore {
    shared: Arc<Shared>,
    readers: Readers,
    folder: PathBuf,
    /// Part of the log that is known to have no effects: from, to.
    quiet: Mutex<(i64, i64)>,
    threads: Mutex<Option<Threads>>,
}

struct Threads {
    writer: JoinHandle<()>,
    others: Vec<JoinHandle<()>>,
    /// Held as long as any thread may touch the files.
    lock: FolderLock,
}

impl SqliteStore {
    /// Opens (or makes) the store in a folder, reads the unfolded end of its log, and starts its threads.
    ///
    /// # Errors
    /// [`Error::Locked`] when another process uses the folder, [`Error::NewerSchema`], [`Error::Corrupt`], or
    /// [`Error::Backend`].
    pub fn open(folder: &Path, config: &config::Store, clock: Clock) -> Result<Arc<Self>, Error> {
        Self::open_with(folder, config, clock, Options::default())
    }

    /// As [`SqliteStore::open`], with options.
    ///
    /// # Errors
    /// As [`SqliteStore::open`].
    pub fn open_with(
        folder: &Path,
        config: &config::Store,
        clock: Clock,
        options: Options,
    ) -> Result<Arc<Self>, Error> {
        let lock = schema::lock(folder)?;
        let mut db = schema::writer(folder, config)?;
        schema::migrate(&mut db)?;
        let checkpoints = Checkpoints::new();
        checkpoints.follow(&mut db)?;
        let shared = Arc::new(Shared {
            jobs: Queue::new(config.max_queue),
            memtable: RwLock::new(Memtable::default()),
            hint: Arc::default(),
            checkpoints,
            abandoned: AtomicBool::new(false),
        });
        let (opened, ready) = std::sync::mpsc::sync_channel(1);
        let (max_batch, pool) = (config.max_batch, options.pool);
        let for_writer = Arc::clone(&shared);
        let writer = spawn("store-write", move || {
            match WriterThread::open(&db, Arc::clone(&for_writer), options, max_batch, clock) {
                Ok(writer) => {
                    drop(opened.send(Ok(())));
                    writer.run();
                }
                Err(error) => return drop(opened.send(Err(error))),
            }
            // Readers are gone by now when the store is closed; after a crash nothing may be tidied.
            if !for_writer.abandoned.load(Ordering::Acquire) {
                let truncated = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
                if truncated != Ok(0) {
                    tracing::warn!(?truncated, "the write-ahead log is left for the next start");
                }
            }
        })?;
        let opened = ready.recv().unwrap_or(Err(Error::Closed));
        let started = opened.and_then(|()| Readers::start(folder, config, pool, &shared));
        let readers = match started {
            Ok(started) => started,
            Err(error) => {
                shared.abandoned.store(true, Ordering::Release);
                drop(shared.jobs.abandon());
                drop(writer.join());
                return Err(error);
            }
        };
        let for_checkpoints = schema::writer(folder, config)?;
        let checkpoints = shared.checkpoints.clone();
        let others = vec![spawn("store-checkpoint", move || checkpoints.run(&for_checkpoints))?];
        let threads = Mutex::new(Some(Threads { writer, others, lock }));
        Ok(Arc::new(Self { shared, readers, folder: folder.to_path_buf(), quiet: Mutex::new((0, 0)), threads }))
    }

    fn queue(&self, job: Job) {
        if let Err((job, refused)) = self.shared.jobs.push(job) {
            let error = match refused {
                Refused::Full => Error::Overloaded,
                Refused::Closed => Error::Closed,
            };
            job.into_done().tell(Err(Rejection::Failed(error)));
        }
    }

    /// Folds everything and removes what is forgotten or expired. The store does so by itself; tests force it.
    ///
    /// # Errors
    /// What the writer says.
    pub async fn settle(&self) -> Result<(), Error> {
        let (done, end) = Done::channel();
        self.queue(Job::Settle(done));
        outcome(end.await)
    }

    fn end(&self) {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Threads { writer, others, lock }) = threads else { return };
        self.readers.stop();
        self.shared.checkpoints.stop();
        others.into_iter().for_each(join);
        self.shared.jobs.close();
        join(writer);
        drop(lock);
    }

    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&View) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        self.readers.run(read).await
    }
}

/// Waits for a thread, unless it is this one: the last owner of a store may be the end of a unit.
fn join(thread: JoinHandle<()>) {
    if thread.thread().id() != std::thread::current().id() {
        drop(thread.join());
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, Error> {
    let thread = std::thread::Builder::new().name(String::from(name)).spawn(work);
    thread.map_err(|e| Error::Backend(format!("no thread for {name}: {e}")))
}

fn outcome<C, E>(end: Result<Result<C, Rejection>, E>) -> Result<(), Error> {
    match end {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(Rejection::Failed(error))) => Err(error),
        Ok(Err(_)) | Err(_) => Err(Error::Closed),
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.shared.abandoned.store(true, Ordering::Release);
        drop(self.shared.jobs.abandon());
        self.end();
    }
}

impl Writer for SqliteStore {
    fn submit(&self, unit: Unit) {
        self.queue(Job::Unit(unit));
    }
    fn ship(&self, _: Vec<Fence>, writes: Vec<Shipping>, done: Done) {
        self.queue(Job::Ship(writes, done));
    }
    fn mqtt(&self, writes: Vec<MqttWrite>, done: Done) {
        self.queue(Job::Mqtt(writes, done));
    }
    fn keep(&self, keep: Keep, done: Done) {
        self.queue(Job::Keep(Box::new(keep), done));
    }
}

#[async_trait]
impl Reader for SqliteStore {
    async fn load(&self, key: &InstanceKey) -> Result<Loaded, Error> {
        let key = key.clone();
        self.read(move |view| view.load(&key, None)).await
    }

    async fn load_with(&self, key: &InstanceKey, snapshot: Arc<Snapshot>) -> Result<Loaded, Error> {
        let key = key.clone();
        self.read(move |view| view.load(&key, Some(&snapshot))).await
    }

    async fn state(&self, key: &InstanceKey) -> Result<Option<StateSnapshot>, Error> {
        let key = key.clone();
        self.read(move |view| view.state(&key)).await
    }

    async fn turns(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let key = key.clone();
        self.read(move |view| view.turns(&key, after, limit)).await
    }

    async fn find(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Option<Known>, Error> {
        let (key, stimulus) = (key.clone(), stimulus.clone());
        self.read(move |view| view.find(&key, &stimulus)).await
    }

    async fn find_prefix(&self, key: &InstanceKey, prefix: &str) -> Result<Option<Known>, Error> {
        let (key, prefix) = (key.clone(), String::from(prefix));
        self.read(move |view| view.find_prefix(&key, &prefix)).await
    }

    async fn locate(&self, tenant: &TenantId, stimulus: &StimulusId) -> Result<Vec<InstanceId>, Error> {
        let (tenant, stimulus) = (tenant.clone(), stimulus.clone());
        self.read(move |view| view.locate(&tenant, &stimulus)).await
    }

    async fn list(
        &self,
        tenant: &TenantId,
        label: Option<(&str, &str)>,
        after: Option<&InstanceId>,
        limit: usize,
    ) -> Result<Vec<Listed>, Error> {
        let (tenant, after) = (tenant.clone(), after.cloned());
        let label = label.map(|(name, value)| (String::from(name), String::from(value)));
        self.read(move |view| {
            let label = label.as_ref().map(|(name, value)| (name.as_str(), value.as_str()));
            view.list(&tenant, label, after.as_ref(), limit)
        })
        .await
    }

    async fn waiting(
        &self,
        scope: &Scope,
        after: Option<&InstanceKey>,
        limit: usize,
    ) -> Result<Vec<InstanceKey>, Error> {
        let (scope, after) = (scope.clone(), after.cloned());
        self.read(move |view| view.waiting(&scope, after.as_ref(), limit)).await
    }

    async fn dead_letters(
        &self,
        key: &InstanceKey,
        after: Option<&StimulusId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error> {
        let (key, after) = (key.clone(), after.cloned());
        self.read(move |view| view.dead_letters(&key, after.as_ref(), limit)).await
    }

    async fn recall(&self, key: &InstanceKey, query: &str, limit: usize) -> Result<Vec<Episode>, Error> {
        let (key, query) = (key.clone(), String::from(query));
        self.read(move |view| view.recall(&key, &query, limit)).await
    }

    async fn remembered(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Remembered, Error> {
        let key = key.clone();
        self.read(move |view| view.remembered(&key, after, limit)).await
    }

    async fn parts(&self, key: &InstanceKey, behind: u64, limit: usize) -> Result<Parts, Error> {
        let key = key.clone();
        self.read(move |view| view.parts(&key, behind, limit)).await
    }

    async fn index(&self, key: &InstanceKey) -> Result<Option<Index>, Error> {
        let key = key.clone();
        self.read(move |view| view.index(&key)).await
    }

    async fn spans(&self, key: &InstanceKey) -> Result<Spans, Error> {
        let key = key.clone();
        self.read(move |view| view.spans(&key)).await
    }

    async fn turns_at(&self, key: &InstanceKey, turns: &[u64]) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let (key, turns) = (key.clone(), turns.to_vec());
        self.read(move |view| view.turns_at(&key, &turns)).await
    }

    fn feeds(&self, _: &Scope) -> Vec<Feed> {
        vec![Feed(0)]
    }

    async fn outgoing(&self, after: &[(Feed, i64)], limit: usize) -> Result<Vec<Outgoing>, Error> {
        let Some((_, after)) = after.iter().copied().find(|(feed, _)| *feed == Feed(0)) else { return Ok(Vec::new()) };
        // Delivery asks again and again from where it stands: what is known to be quiet is not searched again.
        let (quiet_from, quiet_to) = *self.quiet.lock().unwrap_or_else(PoisonError::into_inner);
        let from = if (quiet_from..quiet_to).contains(&after) { quiet_to } else { after };
        let (outgoing, searched) = self.read(move |view| view.outgoing(from, limit)).await?;
        if outgoing.is_empty() && searched > from && limit > 0 {
            *self.quiet.lock().unwrap_or_else(PoisonError::into_inner) = (after, searched);
        }
        Ok(outgoing)
    }

    async fn shipped(&self, feeds: &[Feed]) -> Result<Vec<i64>, Error> {
        let shipped = self.read(|view| view.shipped()).await?;
        Ok(feeds.iter().map(|feed| if *feed == Feed(0) { shipped } else { 0 }).collect())
    }

    async fn due(&self, scope: &Scope, now: Millis, limit: usize) -> Result<Vec<Pending>, Error> {
        let scope = scope.clone();
        self.read(move |view| view.due(&scope, now, limit)).await
    }

    async fn mqtt_rows(&self) -> Result<Vec<MqttRow>, Error> {
        self.read(|view| view.mqtt_rows()).await
    }

    async fn stats(&self) -> Result<Stats, Error> {
        let stats = self.read(|view| view.stats()).await?;
        let size = |name: String| std::fs::metadata(self.folder.join(name)).map_or(0, |file| file.len());
        let bytes = size(String::from(schema::DATABASE)) + size(format!("{}-wal", schema::DATABASE));
        Ok(Stats { bytes, ..stats })
    }

    async fn probe(&self, deadline: Duration) -> Result<(), Error> {
        let (done, end) = Done::channel();
        self.queue(Job::Probe(done));
        let both = async {
            outcome(end.await)?;
            self.shipped(&[Feed(0)]).await.map(drop)
        };
        let late = Error::Backend(format!("no commit and read within {deadline:?}"));
        tokio::time::timeout(deadline, both).await.unwrap_or(Err(late))
    }
}

impl Store for SqliteStore {
    fn outgoing_hint(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.hint)
    }

    fn pools(&self) -> Vec<Arc<Places>> {
        vec![self.readers.places().clone()]
    }

    fn resize(&self, pool: Limits) {
        self.readers.resize(pool);
    }

    fn close(&self) {
        self.end();
    }
}
