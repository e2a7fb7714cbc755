//! The store that many nodes share: PostgreSQL, some writer lanes with group commit, a pool of readers.
//!
//! A turn is one row of the log; a batch of units is one transaction of two round trips, which holds the shards of its units
//! and compares their fences. Ownership of shards stands in the same database.
//!
//! | file | what |
//! |---|---|
//! | `connect`, `connections` | connections, sessions, migrations, errors; pools of them |
//! | `sql` | a statement; a connection that runs it, prepared or not |
//! | `lane` | the task that commits |
//! | `decide`, `writes` | what becomes of a unit; what a batch writes |
//! | `query`, `recall`, `rows` | what is read |
//! | `replica` | reads that a replica answers |
//! | `guard` | the role that sees one tenant at a time |
//! | `feeds` | which feeds are worth asking for |
//! | `ownership` | who takes part and who owns what |
//! | `chores` | removal and expiry |
//!
//! Invariants: those of `store`, and: no statement names an instance without its tenant; safety never depends on a clock.
//! Decisions: `docs/adr/0007-postgresql-store.md`. Tests: `tests/it/store_contract.rs`, `tests/it/store_postgres.rs`,
//! `tests/it/ownership_contract.rs`.

mod chores;
mod connect;
mod connections;
mod decide;
mod feeds;
mod guard;
mod lane;
mod ownership;
mod parts;
mod query;
mod recall;
mod replica;
mod roaming;
mod rows;
mod sql;
mod steps;
mod writes;

#[cfg(feature = "faults")]
use std::path::PathBuf;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{
    runtime::Handle,
    sync::{Notify, mpsc},
    task::JoinHandle,
};
use tokio_postgres::{Client, Row};
use tokio_util::sync::CancellationToken;

use self::{
    connect::{Failure, Target},
    connections::Connections,
    feeds::Feeds,
    lane::{Job, Lane},
    ownership::Sessions,
    replica::Replica,
    sql::{Conn, Param, Sql},
    writes::int,
};
use super::{
    Committed, DeadLetter, Done, Episode, Error, Feed, Fence, Head, Index, Keep, Known, Listed, Loaded, MqttRow,
    MqttWrite, Outgoing, Parts, Pending, Reader, Rejection, Remembered, Scope, Shipping, Snapshot, Spans, Stats, Store,
    Unit, Work, Writer,
};
use crate::{
    config,
    runtime::clock::Clock,
    scaling::pool::{Limits, Places},
    telemetry::metric,
    types::{InstanceId, InstanceKey, Millis, StateSnapshot, StimulusId, TenantId, TurnRecord},
};

/// Tries of a read whose connection broke.
const READ_TRIES: u32 = 3;
/// How long `close` waits for what is queued.
const CLOSING: Duration = Duration::from_secs(20);
/// Connections beside the lanes that write: for ownership and chores.
const OTHER_WRITERS: usize = 4;

/// How a store differs from the usual.
#[derive(Debug, Clone)]
pub struct Options {
    /// Recognise repeated stimulus ids. Off only for the negative control of a test.
    pub dedupe: bool,
    /// Whether only the owner of a shard may write for it: the negative control of the cluster tests turns it off.
    pub fenced: bool,
    /// Connections for reads, and how long they may be waited for.
    pub pool: Limits,
    /// How long a batch that was surely not written is tried again while there is no connection.
    pub patience: Duration,
    /// Commits fail with [`Error::Full`] while this file exists.
    #[cfg(feature = "faults")]
    pub disk_full_file: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            dedupe: true,
            fenced: true,
            pool: Limits::default(),
            patience: Duration::from_secs(5),
            #[cfg(feature = "faults")]
            disk_full_file: None,
        }
    }
}

struct Metrics {
    units: metrics::Histogram,
    seconds: metrics::Histogram,
    queue: metrics::Gauge,
}

/// How many lanes commit: as configured, or one for each two cores. Fewer lanes make fewer and larger transactions, which cost
/// node and server less; more of them use a server with many cores.
fn lanes(configured: usize, cores: usize) -> usize {
    if configured > 0 { configured } else { (cores / 2).clamp(1, 8) }
}

/// What lanes, readers and chores have in common.
struct Shared {
    shards: u32,
    dedupe: bool,
    fenced: bool,
    max_batch: usize,
    patience: Duration,
    #[cfg(feature = "faults")]
    disk_full_file: Option<PathBuf>,
    /// Opens a transaction; behind a pooler with its settings.
    begin: String,
    prepared: bool,
    writers: Arc<Connections>,
    hint: Arc<Notify>,
    feeds: Feeds,
    metrics: Metrics,
    waiting: AtomicUsize,
    abandoned: AtomicBool,
    closed: CancellationToken,
    clock: Clock,
}

impl Shared {
    async fn writer(&self) -> Result<Conn, Failure> {
        Ok(Conn::new(self.writers.get().await?, self.prepared))
    }

    fn queued(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }
}

fn no_connection(error: &deadpool_postgres::PoolError) -> Failure {
    match error {
        deadpool_postgres::PoolError::Timeout(kind) => {
            Failure::Lost(format!("no connection within the wait ({kind:?})"))
        }
        deadpool_postgres::PoolError::Closed => Failure::Refused(Error::Closed),
        error => Failure::Lost(
            std::error::Error::source(error).map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
        ),
    }
}

/// The store. Dropping it without [`Store::close`] abandons what is queued.
pub struct PostgresStore {
    shared: Arc<Shared>,
    readers: Arc<Connections>,
    replica: Option<Replica>,
    guarded: bool,
    direct: Target,
    lanes: Mutex<Option<Lanes>>,
    sessions: tokio::sync::Mutex<Sessions>,
    handle: Handle,
}

struct Lanes {
    /// One for each lane; the last one lodges.
    senders: Vec<mpsc::Sender<Job>>,
    tasks: Vec<JoinHandle<()>>,
}

impl PostgresStore {
    /// Opens the store: connects, brings the schema up to date, founds the cluster's tables for so many shards if they are
    /// empty, starts the lanes on `handle`. Everything this store does runs there, whoever asks.
    ///
    /// # Errors
    /// [`Error::NewerSchema`], [`Error::Corrupt`] when the database was founded for another number of shards,
    /// [`Error::Backend`].
    pub async fn open(config: &config::Store, shards: u32, clock: Clock, handle: Handle) -> Result<Arc<Self>, Error> {
        Self::open_with(config, shards, clock, handle, Options::default()).await
    }

    /// As [`PostgresStore::open`], with options.
    ///
    /// # Errors
    /// As [`PostgresStore::open`].
    pub async fn open_with(
        config: &config::Store,
        shards: u32,
        clock: Clock,
        handle: Handle,
        options: Options,
    ) -> Result<Arc<Self>, Error> {
        let settings = &config.postgres;
        let url = connect::url("store.postgres.url", &settings.url, &settings.url_env)?
            .ok_or_else(|| Error::Backend(String::from("store.postgres.url is not set")))?;
        let direct = connect::url("store.postgres.direct_url", &settings.direct_url, &settings.direct_url_env)?;
        let pooled = settings.pooler;
        let target = Target::new(connect::expose(&url), config, pooled, handle.clone())?;
        let direct = match &direct {
            Some(url) => Target::new(connect::expose(url), config, false, handle.clone())?,
            None => Target::new(connect::expose(&url), config, false, handle.clone())?,
        };
        connect::migrate(&direct).await?;
        let lanes = lanes(settings.lanes, std::thread::available_parallelism().map_or(1, usize::from));
        let writers = Limits { size: lanes + 1 + OTHER_WRITERS, overflow: 0, ..options.pool };
        let begin =
            if pooled { format!("BEGIN; {}", connect::settings(config, "SET LOCAL")) } else { String::from("BEGIN") };
        let shared = Arc::new(Shared {
            shards,
            dedupe: options.dedupe,
            fenced: options.fenced,
            max_batch: config.max_batch,
            patience: options.patience,
            #[cfg(feature = "faults")]
            disk_full_file: options.disk_full_file,
            begin,
            prepared: !pooled,
            writers: Connections::new(&target, "postgres_writers", writers)?,
            hint: Arc::default(),
            feeds: Feeds::new(shards),
            metrics: Metrics {
                units: metrics::histogram!(metric::COMMIT_BATCH),
                seconds: metrics::histogram!(metric::COMMIT_SECONDS),
                queue: metrics::gauge!(metric::COMMIT_QUEUE),
            },
            waiting: AtomicUsize::new(0),
            abandoned: AtomicBool::new(false),
            closed: CancellationToken::new(),
            clock,
        });
        found(&shared).await?;
        let guarded = guard::establish(settings.row_security, &shared.writer().await?, &direct).await?;
        let replica = connect::url("store.postgres.replica_url", &settings.replica_url, &settings.replica_url_env)?;
        let replica = match &replica {
            Some(url) => {
                let target = Target::new(connect::expose(url), config, pooled, handle.clone())?;
                let flushes = config.durability == config::Durability::Full;
                Some(Replica::new(Connections::new(&target, "postgres_replica", options.pool)?, flushes, !pooled))
            }
            None => None,
        };
        let depth = config.max_queue.div_ceil(lanes).max(1);
        let mut all = Lanes { senders: Vec::new(), tasks: Vec::new() };
        for lane in 0..=lanes {
            let (sender, jobs) = mpsc::channel(depth);
            let lane = Lane::new(Arc::clone(&shared), jobs, lane == lanes);
            all.senders.push(sender);
            all.tasks.push(handle.spawn(lane.run()));
        }
        handle.spawn(chores::run(Arc::downgrade(&shared)));
        let readers = Connections::new(&target, "postgres_readers", options.pool)?;
        let pools = [Some(&readers), Some(&shared.writers), replica.as_ref().map(Replica::connections)];
        handle.spawn(connections::tend(pools.into_iter().flatten().map(Arc::downgrade).collect()));
        Ok(Arc::new(Self {
            shared,
            readers,
            replica,
            guarded,
            direct,
            lanes: Mutex::new(Some(all)),
            sessions: tokio::sync::Mutex::default(),
            handle,
        }))
    }

    /// How many shards the database was founded for.
    pub fn shards(&self) -> u32 {
        self.shared.shards
    }

    fn queue(&self, lane: impl FnOnce(usize) -> usize, job: Job) {
        let lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let (job, error) = match &*lanes {
            None => (job, Error::Closed),
            Some(all) => match all.senders[lane(all.senders.len() - 1)].try_send(job) {
                Ok(()) => {
                    self.shared.waiting.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(mpsc::error::TrySendError::Full(job)) => (job, Error::Overloaded),
                Err(mpsc::error::TrySendError::Closed(job)) => (job, Error::Closed),
            },
        };
        drop(lanes);
        job.into_done().tell(Err(Rejection::Failed(error)));
    }

    fn queued(&self) -> usize {
        self.shared.queued()
    }

    fn begin(&self) -> &str {
        &self.shared.begin
    }

    async fn writer(&self) -> Result<Conn, Failure> {
        self.shared.writer().await
    }

    async fn sessions(&self) -> tokio::sync::MutexGuard<'_, Sessions> {
        self.sessions.lock().await
    }

    /// A connection of its own that goes to the server itself.
    async fn session_connection(&self) -> Result<(Client, JoinHandle<()>), Failure> {
        Ok(self.direct.connect().await?)
    }

    /// Reads that the replica answered, where there is one.
    pub fn replica_reads(&self) -> u64 {
        self.replica.as_ref().map_or(0, Replica::served)
    }

    /// Whether rows of a tenant are read as a role that sees no other tenant's.
    pub fn is_guarded(&self) -> bool {
        self.guarded
    }

    /// As [`PostgresStore::rows_of`], from the replica if it has everything that was committed when this was called.
    async fn fresh_rows(&self, tenant: &TenantId, sql: &Sql, params: &[Param<'_>]) -> Result<Vec<Row>, Error> {
        let guard = self.guarded.then_some(tenant);
        if let Some(replica) = self.replica.as_ref().filter(|_| !self.shared.closed.is_cancelled())
            && let Some(rows) = replica.rows(&self.readers, guard, sql, params).await
        {
            return Ok(rows);
        }
        self.read(guard, sql, params).await
    }

    /// Runs a statement that reads rows of one tenant.
    async fn rows_of(&self, tenant: &TenantId, sql: &Sql, params: &[Param<'_>]) -> Result<Vec<Row>, Error> {
        self.read(self.guarded.then_some(tenant), sql, params).await
    }

    /// Runs a statement that reads for the node itself, whosever the rows are.
    async fn rows(&self, sql: &Sql, params: &[Param<'_>]) -> Result<Vec<Row>, Error> {
        self.read(None, sql, params).await
    }

    /// Runs a statement that only reads, again on another connection when one broke.
    async fn read(&self, guard: Option<&TenantId>, sql: &Sql, params: &[Param<'_>]) -> Result<Vec<Row>, Error> {
        let mut tries = 0;
        loop {
            if self.shared.closed.is_cancelled() {
                return Err(Error::Closed);
            }
            let read =
                async { Conn::new(self.readers.get().await?, self.shared.prepared).read(guard, sql, params).await };
            tries += 1;
            match read.await {
                Ok(rows) => return Ok(rows),
                Err(Failure::Lost(_) | Failure::Again(_)) if tries < READ_TRIES => {}
                Err(failure) => return Err(failure.into_error()),
            }
        }
    }

    fn end(&self, patience: Duration) {
        let Some(Lanes { senders, tasks }) = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        drop(senders);
        let (told, ended) = std::sync::mpsc::sync_channel(1);
        self.handle.spawn(async move {
            for task in tasks {
                drop(task.await);
            }
            let _ = told.send(());
        });
        if !patience.is_zero() && ended.recv_timeout(patience).is_err() {
            tracing::warn!("the store closes with commits under way");
        }
        self.shared.abandoned.store(true, Ordering::Release);
        self.shared.closed.cancel();
        self.readers.close();
        self.replica.iter().for_each(Replica::close);
        if let Ok(mut sessions) = self.sessions.try_lock() {
            sessions.clear();
        }
    }
}

/// Makes the rows of the cluster and its shards when there are none.
async fn found(shared: &Shared) -> Result<(), Error> {
    const CLUSTER: Sql = Sql {
        text: "INSERT INTO cluster (shards) VALUES ($1) ON CONFLICT DO NOTHING",
        types: &[tokio_postgres::types::Type::INT4],
    };
    const SHARDS: Sql = Sql {
        text: "INSERT INTO shards (shard) SELECT n FROM cluster c, generate_series(0, c.shards - 1) n
               ON CONFLICT DO NOTHING",
        types: &[],
    };
    const STORED: Sql = Sql { text: "SELECT shards FROM cluster", types: &[] };
    let conn = shared.writer().await?;
    conn.run(&CLUSTER, &[&int(shared.shards)]).await?;
    conn.run(&SHARDS, &[]).await?;
    let stored = conn.run(&STORED, &[]).await?;
    let stored: i32 = stored.first().map(|row| row.try_get(0)).transpose().map_err(Failure::from)?.unwrap_or(0);
    if stored == int(shared.shards) {
        return Ok(());
    }
    let (stored, ours) = (stored, shared.shards);
    Err(Error::Corrupt(format!("the database was founded for {stored} shards, this node is configured for {ours}")))
}

impl Drop for PostgresStore {
    fn drop(&mut self) {
        self.shared.abandoned.store(true, Ordering::Release);
        if let Some(lanes) = self.lanes.lock().unwrap_or_else(PoisonError::into_inner).take() {
            lanes.tasks.iter().for_each(JoinHandle::abort);
        }
        self.shared.closed.cancel();
    }
}

impl Writer for PostgresStore {
    fn submit(&self, unit: Unit) {
        let shard = unit.fence.shard as usize;
        let lodges = matches!(unit.work, Work::Lodge { .. });
        self.queue(|lanes| if lodges { lanes } else { shard % lanes }, Job::Unit(unit));
    }

    fn ship(&self, under: Vec<Fence>, writes: Vec<Shipping>, done: Done) {
        let shard = writes.first().map_or(0, |write| write.shard(self.shared.shards)) as usize;
        self.queue(|lanes| shard % lanes, Job::Ship(under, writes, done));
    }

    fn mqtt(&self, writes: Vec<MqttWrite>, done: Done) {
        self.queue(|_| 0, Job::Mqtt(writes, done));
    }

    fn keep(&self, keep: Keep, done: Done) {
        // Beside the lanes: nothing waits for it, and nothing comes after it.
        let shared = Arc::clone(&self.shared);
        self.handle.spawn(async move {
            let kept = parts::keep(&shared, &keep).await;
            done.tell(match kept {
                Ok(()) => Ok(Committed { head: Head::default(), created: false }),
                Err(failure) => Err(Rejection::Failed(failure.into_error())),
            });
        });
    }
}

#[async_trait]
impl Reader for PostgresStore {
    async fn load(&self, key: &InstanceKey) -> Result<Loaded, Error> {
        self.load_instance(key, None).await
    }

    async fn load_with(&self, key: &InstanceKey, snapshot: Arc<Snapshot>) -> Result<Loaded, Error> {
        self.load_instance(key, Some(&snapshot)).await
    }

    async fn state(&self, key: &InstanceKey) -> Result<Option<StateSnapshot>, Error> {
        self.read_state(key).await
    }

    async fn turns(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Vec<Arc<TurnRecord>>, Error> {
        self.read_turns(key, after, limit).await
    }

    async fn find(&self, key: &InstanceKey, stimulus: &StimulusId) -> Result<Option<Known>, Error> {
        self.find_stimulus(key, stimulus).await
    }

    async fn find_prefix(&self, key: &InstanceKey, prefix: &str) -> Result<Option<Known>, Error> {
        self.find_by_prefix(key, prefix).await
    }

    async fn locate(&self, tenant: &TenantId, stimulus: &StimulusId) -> Result<Vec<InstanceId>, Error> {
        self.locate_stimulus(tenant, stimulus).await
    }

    async fn list(
        &self,
        tenant: &TenantId,
        label: Option<(&str, &str)>,
        after: Option<&InstanceId>,
        limit: usize,
    ) -> Result<Vec<Listed>, Error> {
        self.list_instances(tenant, label, after, limit).await
    }

    async fn waiting(
        &self,
        scope: &Scope,
        after: Option<&InstanceKey>,
        limit: usize,
    ) -> Result<Vec<InstanceKey>, Error> {
        self.waiting_instances(scope, after, limit).await
    }

    async fn dead_letters(
        &self,
        key: &InstanceKey,
        after: Option<&StimulusId>,
        limit: usize,
    ) -> Result<Vec<DeadLetter>, Error> {
        self.read_dead(key, after, limit).await
    }

    async fn recall(&self, key: &InstanceKey, query: &str, limit: usize) -> Result<Vec<Episode>, Error> {
        self.recall_episodes(key, query, limit).await
    }

    async fn remembered(&self, key: &InstanceKey, after: u64, limit: usize) -> Result<Remembered, Error> {
        self.read_remembered(key, after, limit).await
    }

    async fn parts(&self, key: &InstanceKey, behind: u64, limit: usize) -> Result<Parts, Error> {
        self.read_parts(key, behind, limit).await
    }

    async fn index(&self, key: &InstanceKey) -> Result<Option<Index>, Error> {
        self.read_index(key).await
    }

    async fn spans(&self, key: &InstanceKey) -> Result<Spans, Error> {
        self.read_spans(key).await
    }

    async fn turns_at(&self, key: &InstanceKey, turns: &[u64]) -> Result<Vec<Arc<TurnRecord>>, Error> {
        let Some(standing) = self.standing(key).await? else { return Ok(Vec::new()) };
        let turns: Vec<i64> = turns.iter().map(|turn| writes::big(*turn)).collect();
        Ok(self.read_turns_at(key, standing.life, &turns).await?.into_iter().map(Arc::new).collect())
    }

    fn feeds(&self, scope: &Scope) -> Vec<Feed> {
        (0..self.shared.shards).filter(|shard| scope.has(*shard)).map(Feed).collect()
    }

    async fn outgoing(&self, after: &[(Feed, i64)], limit: usize) -> Result<Vec<Outgoing>, Error> {
        let look = self.shared.feeds.look(after, Instant::now());
        if look.asked.is_empty() {
            return Ok(Vec::new());
        }
        let outgoing = self.read_outgoing(&look.asked, limit).await?;
        // Of a full page nothing is known about the feeds that did not come into it.
        let full = outgoing.len() >= limit;
        self.shared.feeds.found(&look, Instant::now(), |feed| full || outgoing.iter().any(|turn| turn.feed == feed));
        Ok(outgoing)
    }

    async fn shipped(&self, feeds: &[Feed]) -> Result<Vec<i64>, Error> {
        self.read_shipped(feeds).await
    }

    async fn due(&self, scope: &Scope, now: Millis, limit: usize) -> Result<Vec<Pending>, Error> {
        self.read_due(scope, now, limit).await
    }

    async fn mqtt_rows(&self) -> Result<Vec<MqttRow>, Error> {
        self.read_mqtt().await
    }

    async fn stats(&self) -> Result<Stats, Error> {
        self.read_stats().await
    }

    async fn probe(&self, deadline: Duration) -> Result<(), Error> {
        let (done, end) = Done::channel();
        self.queue(|_| 0, Job::Probe(done));
        let both = async {
            match end.await {
                Ok(Ok(_)) => self.read_shipped(&[]).await.map(drop),
                Ok(Err(Rejection::Failed(error))) => Err(error),
                Ok(Err(_)) | Err(_) => Err(Error::Closed),
            }
        };
        let late = Error::Backend(format!("no commit and read within {deadline:?}"));
        tokio::time::timeout(deadline, both).await.unwrap_or(Err(late))
    }
}

impl Store for PostgresStore {
    fn outgoing_hint(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.hint)
    }

    fn pools(&self) -> Vec<Arc<Places>> {
        let all = [Some(&self.readers), Some(&self.shared.writers), self.replica.as_ref().map(Replica::connections)];
        all.into_iter().flatten().map(|connections| connections.places().clone()).collect()
    }

    fn resize(&self, pool: Limits) {
        for readers in [Some(&self.readers), self.replica.as_ref().map(Replica::connections)].into_iter().flatten() {
            readers.places().resize(pool);
        }
    }

    /// Must not be called on the runtime the store was opened with, unless that one has other threads: it waits for it.
    fn close(&self) {
        self.end(CLOSING);
    }
}

#[test]
fn lanes_follow_the_cores_unless_they_are_set() {
    assert_eq!([1, 2, 3, 4, 16, 64].map(|cores| lanes(0, cores)), [1, 1, 1, 2, 8, 8]);
    assert_eq!(lanes(5, 2), 5);
}
