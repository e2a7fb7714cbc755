//! The one thread that writes: takes what is queued, commits it in one transaction, then tells the ends.
//!
//! Invariants: an end is told after `COMMIT` returned and never before; a transaction that fails leaves memory as it was.
//! Not here: what a unit writes (`apply`), folding (`fold`), removal and expiry (`chores`), checkpoints (`checkpoint`).
//! Tests: `tests/it/store_contract.rs`, `tests/it/store_sqlite.rs`.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use rusqlite::{Connection, Statement, params};
use tokio::sync::Notify;

use super::{
    Options,
    apply::Trouble,
    checkpoint::Checkpoints,
    counts::Counts,
    fold::Folding,
    memtable::{Generation, Memtable},
    queue::{Queue, Woken},
    record, rows,
};
use crate::{
    runtime::clock::Clock,
    store::{Committed, Done, Error, Head, Keep, MqttWrite, Rejection, Shipping, Unit, Work},
    telemetry::metric,
};

/// Bytes of payload in one group commit, about.
const MAX_BATCH_BYTES: usize = 4 << 20;
/// A store that has nothing to do begins to fold after this.
const IDLE: Duration = Duration::from_secs(2);
/// A look at whether the plan of a fold is ready.
const SOON: Duration = Duration::from_millis(5);

/// What the writer is asked to do.
pub(super) enum Job {
    /// A unit of an instance.
    Unit(Unit),
    /// Writes of `delivery`.
    Ship(Vec<Shipping>, Done),
    /// Writes of the MQTT door.
    Mqtt(Vec<MqttWrite>, Done),
    /// A part of a memory.
    Keep(Box<Keep>, Done),
    /// A write that proves that writes work.
    Probe(Done),
    /// Everything is folded, and what is forgotten is removed, before the end is told.
    Settle(Done),
}

impl Job {
    pub(super) fn into_done(self) -> Done {
        match self {
            Job::Unit(Unit { done, .. })
            | Job::Ship(_, done)
            | Job::Mqtt(_, done)
            | Job::Keep(_, done)
            | Job::Probe(done)
            | Job::Settle(done) => done,
        }
    }

    /// Roughly the bytes it writes.
    fn weight(&self) -> usize {
        match self {
            Job::Unit(unit) => match &unit.work {
                // Replies, effects and episodes are of the stimulus' order of size.
                Work::Turns { turns, .. } => turns.iter().map(|record| 2 * record.stimulus.weight()).sum(),
                Work::Accept { stimuli } => stimuli.iter().map(|stimulus| stimulus.weight()).sum(),
                Work::Step { steps, .. } => steps.iter().map(|step| step.weight()).sum(),
                _ => 1024,
            },
            Job::Ship(writes, _) => 512 * writes.len(),
            Job::Mqtt(writes, _) => writes.iter().map(mqtt_weight).sum(),
            Job::Keep(keep, _) => keep.piece.rec().len(),
            Job::Probe(_) | Job::Settle(_) => 64,
        }
    }
}

fn mqtt_weight(write: &MqttWrite) -> usize {
    match write {
        MqttWrite::PutSession { record, .. }
        | MqttWrite::Enqueue { record, .. }
        | MqttWrite::Mail { record, .. }
        | MqttWrite::Retain { record, .. } => record.len() + 128,
        MqttWrite::DropSession { .. } | MqttWrite::Dequeue { .. } | MqttWrite::Collect { .. } => 128,
    }
}

/// What the writer shares with the readers and the doors of the store.
pub(super) struct Shared {
    /// Jobs for the writer.
    pub jobs: Queue<Job>,
    /// What is not folded yet.
    pub memtable: RwLock<Memtable>,
    /// Woken after commits with effects.
    pub hint: Arc<Notify>,
    /// When to checkpoint.
    pub checkpoints: Checkpoints,
    /// The store was dropped, not closed: leave everything as a crash would.
    pub abandoned: AtomicBool,
}

impl Shared {
    /// The memtable, for a lookup.
    pub(super) fn memtable(&self) -> RwLockReadGuard<'_, Memtable> {
        self.memtable.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn memtable_mut(&self) -> RwLockWriteGuard<'_, Memtable> {
        self.memtable.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writer's own view.
pub(super) struct Writer<'c> {
    pub(super) db: &'c Connection,
    pub(super) insert_turn: Statement<'c>,
    pub(super) shared: Arc<Shared>,
    pub(super) options: Options,
    pub(super) clock: Clock,
    /// What the running transaction adds to the memtable.
    pub(super) delta: Generation,
    pub(super) waiting: Counts,
    pub(super) dead: Counts,
    /// Steps of turns under way.
    pub(super) steps: Counts,
    /// Days the folded index has.
    pub(super) days: BTreeSet<i64>,
    pub(super) folding: Option<Folding>,
    /// There may be rows of forgotten instances to remove.
    pub(super) has_forgotten: bool,
    /// The running transaction has effects.
    pub(super) outgoing: bool,
    pub(super) buffer: Vec<u8>,
    /// Deleted content is overwritten wherever it stood.
    pub(super) overwrites: bool,
    /// The next log position.
    next: i64,
    /// A position was given out that no row of the log will show.
    issued: bool,
    max_batch: usize,
    /// Chores failed; they rest until then.
    resting: Option<Instant>,
    batch_units: metrics::Histogram,
    commit_seconds: metrics::Histogram,
    queue_units: metrics::Gauge,
}

impl<'c> Writer<'c> {
    /// Reads what it must know, and what is not folded, from the database.
    pub(super) fn open(
        db: &'c Connection,
        shared: Arc<Shared>,
        options: Options,
        max_batch: usize,
        clock: Clock,
    ) -> Result<Self, Error> {
        let insert_turn =
            db.prepare("INSERT INTO turns (seq, tenant, instance, flags, rec) VALUES (?1, ?2, ?3, ?4, ?5)")?;
        let newest: Option<i64> = db.query_row("SELECT max(seq) FROM turns", [], |row| row.get(0))?;
        let issued = ["issued", "folded", "shipped"].map(|name| rows::meta(db, name));
        let mut next = newest.unwrap_or(0);
        for position in issued {
            next = next.max(position?);
        }
        let mut writer = Self {
            db,
            insert_turn,
            options,
            clock,
            delta: Generation::default(),
            waiting: count(db, "SELECT tenant, instance, count(*) FROM inbox GROUP BY tenant, instance")?,
            dead: count(db, "SELECT tenant, instance, count(*) FROM dead GROUP BY tenant, instance")?,
            steps: count(db, "SELECT tenant, instance, count(*) FROM turn_steps GROUP BY tenant, instance")?,
            days: rows::days(db)?.into_iter().collect(),
            folding: None,
            has_forgotten: true,
            outgoing: false,
            buffer: Vec::new(),
            overwrites: false,
            next: next + 1,
            issued: false,
            max_batch: max_batch.max(1),
            resting: None,
            batch_units: metrics::histogram!(metric::COMMIT_BATCH),
            commit_seconds: metrics::histogram!(metric::COMMIT_SECONDS),
            queue_units: metrics::gauge!(metric::COMMIT_QUEUE),
            shared,
        };
        writer.recover()?;
        Ok(writer)
    }

    pub(super) fn memtable(&self) -> RwLockReadGuard<'_, Memtable> {
        self.shared.memtable()
    }

    pub(super) fn memtable_mut(&self) -> RwLockWriteGuard<'_, Memtable> {
        self.shared.memtable_mut()
    }

    /// A new log position.
    pub(super) fn take_position(&mut self) -> i64 {
        let position = self.next;
        self.next += 1;
        position
    }

    /// As `take_position`, for one that must never be given out again though no turn stands there.
    pub(super) fn take_lasting_position(&mut self) -> i64 {
        self.issued = true;
        self.take_position()
    }

    /// The position given out last.
    pub(super) const fn last_position(&self) -> i64 {
        self.next - 1
    }

    /// Remembers with this transaction that positions were given out, so that none comes twice when its rows are removed.
    pub(super) const fn keep_positions(&mut self) {
        self.issued = true;
    }

    /// Works until the queue is closed, then settles (unless the store was abandoned).
    pub(super) fn run(mut self) {
        let mut batch = VecDeque::new();
        loop {
            let (mut units, mut bytes) = (0, 0);
            let (max, patience) = (self.max_batch, self.patience());
            let woken = self.shared.jobs.take(&mut batch, patience, |job| {
                units += 1;
                bytes += job.weight();
                units < max && bytes < MAX_BATCH_BYTES
            });
            match woken {
                Woken::Items => self.batch(&mut batch),
                Woken::Idle => self.idle(),
                Woken::Closed => break,
            }
        }
        if !self.shared.abandoned.load(Ordering::Acquire)
            && let Err(error) = self.settle()
        {
            tracing::warn!(%error, "the store closes with work left for its next start");
        }
    }

    /// How long to wait for jobs before looking at other work.
    fn patience(&mut self) -> Duration {
        if self.resting.is_some_and(|until| Instant::now() < until) {
            return IDLE;
        }
        self.resting = None;
        match self.folding.as_mut().map(Folding::is_ready) {
            Some(false) => SOON,
            Some(true) => Duration::ZERO,
            None if self.has_chores() => Duration::ZERO,
            None => IDLE,
        }
    }

    fn batch(&mut self, batch: &mut VecDeque<Job>) {
        let started = Instant::now();
        self.batch_units.record(to_f64(batch.len()));
        let ends = self.transact(|writer| {
            let ends = writer.apply_all(batch)?;
            writer.side_work()?;
            Ok(ends)
        });
        self.commit_seconds.record(started.elapsed());
        match ends {
            Ok(ends) => self.tell(batch, ends),
            Err(error) if batch.len() == 1 && self.folding.is_none() || spares_none(&error) => {
                for job in batch.drain(..) {
                    job.into_done().tell(Err(Rejection::Failed(error.clone())));
                }
            }
            // One unit (or a fold) spoilt the transaction: alone, each shows whether it was the one.
            Err(error) => {
                tracing::warn!(%error, units = batch.len(), "a group commit failed, its units are tried one by one");
                self.rest();
                for job in std::mem::take(batch) {
                    let mut one = VecDeque::from([job]);
                    match self.transact(|writer| writer.apply_all(&one)) {
                        Ok(ends) => self.tell(&mut one, ends),
                        Err(error) => one.drain(..).for_each(|job| {
                            job.into_done().tell(Err(Rejection::Failed(error.clone())));
                        }),
                    }
                }
            }
        }
        self.queue_units.set(to_f64(self.shared.jobs.len()));
        self.checkpoint();
        self.maybe_freeze();
    }

    fn tell(&mut self, batch: &mut VecDeque<Job>, ends: Vec<Result<Committed, Rejection>>) {
        for (job, end) in batch.drain(..).zip(ends) {
            match job {
                Job::Settle(done) => {
                    let settled = self.settle();
                    done.tell(settled.and(Ok(NOTHING)).map_err(Rejection::Failed));
                }
                job => job.into_done().tell(end),
            }
        }
    }

    fn apply_all(&mut self, batch: &VecDeque<Job>) -> Result<Vec<Result<Committed, Rejection>>, Error> {
        let mut ends = Vec::with_capacity(batch.len());
        for job in batch {
            let end = match job {
                Job::Unit(unit) => match self.apply(unit) {
                    Ok(committed) => Ok(committed),
                    Err(Trouble::Rejected(rejection)) => Err(rejection),
                    Err(Trouble::Failed(error)) => return Err(error),
                },
                Job::Ship(writes, _) => {
                    writes.iter().try_for_each(|write| self.apply_shipping(write))?;
                    Ok(NOTHING)
                }
                Job::Mqtt(writes, _) => {
                    writes.iter().try_for_each(|write| self.apply_mqtt(write))?;
                    Ok(NOTHING)
                }
                Job::Keep(keep, _) => {
                    self.keep_part(keep)?;
                    Ok(NOTHING)
                }
                Job::Probe(_) => {
                    rows::set_meta(self.db, "probe", self.clock.now().0)?;
                    Ok(NOTHING)
                }
                Job::Settle(_) => Ok(NOTHING),
            };
            ends.push(end);
        }
        Ok(ends)
    }

    /// Runs `work` in a transaction. Memory moves with it: what it staged becomes true when it is durable, and is forgotten
    /// when it fails.
    pub(super) fn transact<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        self.before()?;
        self.overwrite(false)?;
        let next = self.next;
        self.db.execute_batch("BEGIN IMMEDIATE")?;
        let done = work(self).and_then(|value| {
            if self.issued {
                rows::set_meta(self.db, "issued", self.last_position())?;
            }
            std::mem::swap(&mut self.delta, &mut self.shared.memtable_mut().committing);
            self.commit()?;
            Ok(value)
        });
        self.issued = false;
        let outgoing = std::mem::take(&mut self.outgoing);
        if done.is_ok() {
            self.shared.memtable_mut().commit();
            self.waiting.commit();
            self.dead.commit();
            self.steps.commit();
            self.fold_committed();
            if outgoing {
                self.shared.hint.notify_one();
            }
        } else {
            if !self.db.is_autocommit() {
                // When even this fails the next BEGIN tells.
                let _ = self.db.execute_batch("ROLLBACK");
            }
            self.delta.clear();
            self.shared.memtable_mut().committing.clear();
            self.waiting.rollback();
            self.dead.rollback();
            self.steps.rollback();
            self.fold_rolled_back();
            self.next = next;
        }
        done
    }

    fn commit(&self) -> Result<(), Error> {
        #[cfg(feature = "faults")]
        if self.options.disk_full_file.as_ref().is_some_and(|file| file.exists()) {
            return Err(Error::Full(String::from("a fault on demand says so")));
        }
        Ok(self.db.execute_batch("COMMIT")?)
    }

    fn before(&mut self) -> Result<(), Error> {
        #[cfg(feature = "faults")]
        if let Some(pages) = self.options.max_pages.as_ref().map(|pages| pages.load(Ordering::Acquire)) {
            self.db.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(()))?;
        }
        Ok(())
    }

    /// Work beside the units, in small portions that grow with the batch, so that it keeps pace and no commit is long.
    fn side_work(&mut self) -> Result<(), Error> {
        if self.resting.is_some() {
            return Ok(());
        }
        let portion = (8 * self.delta.turns).clamp(128, 2048);
        self.fold_portion(portion)?;
        self.chores_portion(64)
    }

    /// Nothing was asked for a while: fold, remove and expire in transactions of their own.
    fn idle(&mut self) {
        if self.folding.is_none() && !self.memtable().active.is_empty() && !self.has_chores() {
            return self.freeze();
        }
        let done = self.transact(|writer| {
            writer.fold_portion(2048)?;
            writer.chores_portion(512)
        });
        if let Err(error) = done {
            tracing::warn!(%error, "the store could not tidy up, it tries again later");
            self.rest();
        }
        self.checkpoint();
    }

    fn rest(&mut self) {
        self.resting = Some(Instant::now() + IDLE);
    }

    /// Folds everything and finishes all chores.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        loop {
            if let Some(folding) = &mut self.folding {
                folding.wait();
            } else if !self.memtable().active.is_empty() {
                self.freeze();
                continue;
            } else if !self.has_chores() {
                return Ok(());
            }
            self.transact(|writer| {
                writer.fold_portion(4096)?;
                writer.chores_portion(2048)
            })?;
            self.checkpoint();
        }
    }

    fn maybe_freeze(&mut self) {
        if self.folding.is_none() && self.memtable().active.turns >= self.options.generation_turns {
            self.freeze();
        }
    }

    /// The last steps of a checkpoint: with few pages left, a pass on this connection ends it, and the log starts over.
    fn checkpoint(&mut self) {
        if self.shared.checkpoints.writer_should_finish() {
            let _ = self.db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        }
    }

    /// Reads the end of the log that is not folded.
    fn recover(&mut self) -> Result<(), Error> {
        let folded = rows::meta(self.db, "folded")?;
        let mut lives: std::collections::HashMap<_, Option<i64>, ahash::RandomState> = Default::default();
        let mut query = self.db.prepare("SELECT seq, tenant, instance, rec FROM turns WHERE seq > ?1 ORDER BY seq")?;
        let mut found = query.query(params![folded])?;
        while let Some(row) = found.next()? {
            let seq: i64 = row.get(0)?;
            let key = rows::key(row, 1, 2)?;
            let born = match lives.get(&key) {
                Some(born) => *born,
                None => *lives.entry(key.clone()).or_insert(rows::born(self.db, &key)?),
            };
            // A turn of an earlier life of the instance, not removed yet.
            if born.is_none_or(|born| seq <= born) {
                continue;
            }
            let (head, bytes) = record::decode_row(rows::blob(row, 3)?, seq)?;
            self.delta.add_turn(&key, head.place.head_before().advance(seq));
            if head.has(record::INDEXED) {
                let turn = record::decode_record(bytes, seq)?;
                let decided = super::memtable::Decided { seq, day: super::memtable::day(turn.decided_at) };
                self.delta.ids.insert(super::memtable::id_key(&key, &turn.stimulus.id), decided);
            }
            if head.has(record::EPISODES) {
                self.delta.episodes.entry(key).or_default().push(seq);
            }
        }
        std::mem::swap(&mut self.delta, &mut self.shared.memtable_mut().committing);
        self.shared.memtable_mut().commit();
        Ok(())
    }
}

/// The end of work that adds no turn to any instance.
const NOTHING: Committed = Committed { head: Head { turn: 0, links: [0; 4] }, created: false };

/// Whether an error spares no unit, so that there is no use in trying them one by one.
const fn spares_none(error: &Error) -> bool {
    matches!(error, Error::Full(_) | Error::Locked(_) | Error::Closed)
}

fn count(db: &Connection, query: &str) -> Result<Counts, Error> {
    let mut query = db.prepare(query)?;
    let mut found = query.query([])?;
    let mut counts = Vec::new();
    while let Some(row) = found.next()? {
        counts.push((rows::key(row, 0, 1)?, row.get(2)?));
    }
    Ok(Counts::of(counts))
}

#[allow(clippy::cast_precision_loss)] // queue lengths
fn to_f64(count: usize) -> f64 {
    count as f64
}
