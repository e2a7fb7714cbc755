//! A lane: one connection that commits, many units in one transaction.
//!
//! A batch takes two round trips: in the first it opens the transaction, marks its number in the lane's row, holds the shards
//! of its units and looks up what it needs; in the second it writes everything and commits. All statements of a round trip
//! are sent at once. A shard's units always go through the same lane, so they are applied in the order of submission.
//!
//! Invariants:
//! - Nobody is told the end of a unit before the batch's COMMIT was answered, or, when the connection broke before the
//!   answer, before the lane's row was read: it holds the number of the last batch that was committed, and is locked until
//!   the broken transaction is over.
//! - What was surely not written is tried again a bounded number of times, then refused. What may have been written is neither
//!   refused nor acknowledged until it is known, however long that takes.
//! - A unit at fault takes no neighbour with it: after a failure that is not the connection's, units are tried one by one.
//!
//! Not here: what is looked up and decided (`decide`), what is written (`writes`).
//! Tests: `tests/it/store_contract.rs`, `tests/it/store_postgres.rs`.

use std::{
    collections::{BTreeSet, HashMap, HashSet, VecDeque},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{sync::mpsc, time::Instant};
use tokio_postgres::{Row, types::Type};
use uuid::Uuid;

use super::{
    Shared,
    connect::Failure,
    decide::{Decider, End, Facts, Place, Places, Questions, Standing},
    rows,
    sql::{Conn, Param, Sql},
    writes::{Writes, big, int},
};
use crate::{
    store::{Committed, Done, Error, Fence, Head, Known, MqttWrite, Rejection, Shipping, Unit},
    types::TenantId,
};

/// Tries of a batch before it is refused or taken apart.
const TRIES: u32 = 6;
/// First pause between two tries; it doubles, and each pause is spread.
const PAUSE: Duration = Duration::from_millis(10);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Most bytes of stimuli and records in one transaction, roughly.
const MAX_BYTES: usize = 32 * 1024 * 1024;
/// Lives asked for at once.
const LIVES_AT_ONCE: usize = 64;

const MARK: Sql =
    Sql { text: "UPDATE lanes SET batch = $2, used_at = now() WHERE lane = $1", types: &[Type::UUID, Type::INT8] };
const REGISTER: Sql = Sql {
    text: "INSERT INTO lanes (lane, batch) VALUES ($1, $2) ON CONFLICT (lane) DO NOTHING",
    types: &[Type::UUID, Type::INT8],
};
const RESOLVE: Sql = Sql { text: "SELECT batch FROM lanes WHERE lane = $1 FOR UPDATE", types: &[Type::UUID] };
const HOLD: Sql = Sql {
    text: "SELECT shard, epoch, lodged FROM shards WHERE shard = ANY($1) ORDER BY shard FOR SHARE",
    types: &[Type::INT4_ARRAY],
};
/// Sessions that are written, kept from being taken until the batch is over.
const HOLD_SESSIONS: Sql = Sql {
    text: "SELECT s.tenant, s.client, s.hold FROM mqtt_sessions s
           JOIN unnest($1::text[], $2::text[]) g(tenant, client) ON s.tenant = g.tenant AND s.client = g.client
           ORDER BY s.tenant, s.client FOR NO KEY UPDATE OF s",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
/// As [`HOLD`], for those who change the count of what is lodged.
const HOLD_TO_LODGE: Sql = Sql {
    text: "SELECT shard, epoch, lodged FROM shards WHERE shard = ANY($1) ORDER BY shard FOR NO KEY UPDATE",
    types: &[Type::INT4_ARRAY],
};
const INSTANCES: Sql = Sql {
    text: "SELECT k.n, i.life, (SELECT max(t.turn) FROM turns t WHERE t.tenant = i.tenant AND t.life = i.life)
           FROM unnest($1::text[], $2::text[]) WITH ORDINALITY k(tenant, instance, n)
           JOIN instances i ON i.tenant = k.tenant AND i.instance = k.instance",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
const STIMULI: Sql = Sql {
    text: "SELECT f.n, f.waiting, f.dead, f.decided, CASE WHEN f.waiting IS NOT NULL THEN (
             SELECT count(*) FROM inbox e WHERE e.tenant = f.tenant AND e.instance = f.instance AND e.ord < f.waiting
           ) ELSE 0 END FROM (
             SELECT k.n, k.tenant, k.instance,
               (SELECT b.ord FROM inbox b WHERE b.tenant = k.tenant AND b.stimulus = k.stimulus
                 AND b.instance = k.instance ORDER BY b.ord LIMIT 1) AS waiting,
               CASE WHEN k.wide THEN (SELECT d.ord FROM dead d WHERE d.tenant = k.tenant AND d.stimulus = k.stimulus
                 AND d.instance = k.instance ORDER BY d.ord LIMIT 1) END AS dead,
               CASE WHEN k.wide THEN (SELECT s.turn FROM seen s WHERE s.tenant = k.tenant AND s.stimulus = k.stimulus
                 AND s.life = coalesce(k.life, (SELECT i.life FROM instances i
                   WHERE i.tenant = k.tenant AND i.instance = k.instance))) END AS decided
             FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::bool[])
               WITH ORDINALITY k(tenant, instance, stimulus, life, wide, n)) f
           WHERE f.waiting IS NOT NULL OR f.dead IS NOT NULL OR f.decided IS NOT NULL",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::TEXT_ARRAY, Type::INT8_ARRAY, Type::BOOL_ARRAY],
};
const BARRED: Sql = Sql {
    text: "SELECT b.tenant, b.session, b.hold FROM mqtt_barred b
           JOIN unnest($1::text[], $2::text[]) g(tenant, session) ON b.tenant = g.tenant AND b.session = g.session",
    types: &[Type::TEXT_ARRAY, Type::TEXT_ARRAY],
};
const LIVES: Sql = Sql { text: "SELECT nextval('lives') FROM generate_series(1, $1::bigint)", types: &[Type::INT8] };
const WAITING_AT: Sql = Sql { text: "SELECT rec FROM inbox WHERE ord = $1", types: &[Type::INT8] };
const DEAD_AT: Sql = Sql { text: "SELECT reason, tries, at, rec FROM dead WHERE ord = $1", types: &[Type::INT8] };
const TURN_AT: Sql = Sql {
    text: "SELECT rec FROM turns WHERE tenant = $1 AND life = $2 AND turn = $3",
    types: &[Type::TEXT, Type::INT8, Type::INT8],
};

/// Something to commit.
pub(super) enum Job {
    /// A unit.
    Unit(Unit),
    /// Writes of delivery, and the fences of their shards.
    Ship(Vec<Fence>, Vec<Shipping>, Done),
    /// Writes of the MQTT door.
    Mqtt(Vec<MqttWrite>, Done),
    /// Nothing but a commit.
    Probe(Done),
}

impl Job {
    /// Gives up everything but the news.
    pub(super) fn into_done(self) -> Done {
        match self {
            Job::Unit(Unit { done, .. }) | Job::Ship(_, _, done) | Job::Mqtt(_, done) | Job::Probe(done) => done,
        }
    }

    /// About how many bytes it writes.
    fn weight(&self) -> usize {
        use crate::store::Work;
        let text = |s: &crate::types::Stimulus| {
            256 + s.content.as_ref().map_or(0, String::len) + s.data.as_ref().map_or(0, |d| d.get().len())
        };
        match self {
            Job::Unit(unit) => match &unit.work {
                Work::Turns { turns, .. } => turns.iter().map(|t| 4096 + text(&t.stimulus)).sum(),
                Work::Accept { stimuli } | Work::Lodge { stimuli } => stimuli.iter().map(|s| text(s)).sum(),
                Work::Step { steps, .. } => steps.iter().map(|step| step.weight()).sum(),
                _ => 4096,
            },
            Job::Ship(_, writes, _) => writes.len() * 1024,
            Job::Mqtt(writes, _) => writes.len() * 1024,
            Job::Probe(_) => 64,
        }
    }
}

type Ends = Vec<Result<Committed, Rejection>>;

/// How a try to commit ended.
enum Tried {
    /// It is durable; each job's end.
    Committed(Ends),
    /// Nothing was written.
    Failed(Failure),
    /// The connection broke after the COMMIT was sent. These are the ends if it was committed.
    Unknown(Ends, String),
}

/// The end of work that adds no turn to any instance.
const NOTHING: Committed = Committed { head: Head { turn: 0, links: [0; 4] }, created: false };

/// A lane at work.
pub(super) struct Lane {
    shared: Arc<Shared>,
    jobs: mpsc::Receiver<Job>,
    /// Whether it lodges: then it only lodges.
    lodges: bool,
    /// Units whose instance stood in the batch before them.
    deferred: VecDeque<Job>,
    conn: Option<Conn>,
    id: Uuid,
    number: i64,
    lives: Vec<i64>,
    seed: u64,
}

impl Lane {
    /// A lane that takes its jobs from here.
    pub(super) fn new(shared: Arc<Shared>, jobs: mpsc::Receiver<Job>, lodges: bool) -> Self {
        let id = Uuid::new_v4();
        let seed = id.as_u64_pair().0 | 1;
        Self { shared, jobs, lodges, deferred: VecDeque::new(), conn: None, id, number: 0, lives: Vec::new(), seed }
    }

    /// Commits until nobody can submit any more and everything is committed.
    pub(super) async fn run(mut self) {
        let mut taken = Vec::new();
        loop {
            let max = self.shared.max_batch;
            if self.deferred.is_empty() {
                if self.jobs.recv_many(&mut taken, max).await == 0 {
                    return;
                }
            } else {
                while taken.len() < max
                    && let Ok(job) = self.jobs.try_recv()
                {
                    taken.push(job);
                }
            }
            self.shared.waiting.fetch_sub(taken.len(), Ordering::Relaxed);
            self.deferred.extend(taken.drain(..));
            let batch = self.next_batch();
            self.shared.metrics.units.record(batch.len() as f64);
            self.commit(batch).await;
            self.shared.metrics.queue.set(self.shared.queued() as f64);
        }
    }

    /// The oldest jobs of which no two units are of one instance. Those that must wait keep their order.
    fn next_batch(&mut self) -> Vec<Job> {
        let mut batch: Vec<Job> = Vec::new();
        let mut later = VecDeque::new();
        let mut bytes = 0;
        let mut keys = HashSet::with_hasher(ahash::RandomState::new());
        for job in self.deferred.drain(..) {
            let full = batch.len() >= self.shared.max_batch || bytes > MAX_BYTES;
            let fits = match &job {
                Job::Unit(unit) => keys.insert(unit.key.clone()),
                _ => true,
            };
            if full || !fits {
                later.push_back(job);
            } else {
                bytes += job.weight();
                batch.push(job);
            }
        }
        self.deferred = later;
        batch
    }

    /// Brings a batch to its end, and tells everybody.
    async fn commit(&mut self, batch: Vec<Job>) {
        let began = Instant::now();
        match self.attempts(&batch).await {
            Ok(ends) => {
                self.shared.metrics.seconds.record(began.elapsed());
                tell(batch, ends);
            }
            Err(failure @ Failure::Lost(_)) => refuse(batch, &failure.into_error()),
            Err(failure) if batch.len() == 1 => refuse(batch, &failure.into_error()),
            Err(Failure::Refused(error @ Error::Full(_))) => refuse(batch, &error),
            // One unit spoilt the transaction: alone, each shows whether it was the one.
            Err(failure) => {
                tracing::warn!(?failure, units = batch.len(), "a group commit failed, its units are tried one by one");
                for job in batch {
                    let one = vec![job];
                    match self.attempts(&one).await {
                        Ok(ends) => tell(one, ends),
                        Err(failure) => refuse(one, &failure.into_error()),
                    }
                }
            }
        }
    }

    /// Tries as often as it makes sense.
    async fn attempts(&mut self, batch: &[Job]) -> Result<Ends, Failure> {
        let patience = self.shared.patience;
        let began = Instant::now();
        let mut tries = 0;
        loop {
            let failure = match self.attempt(batch).await {
                Tried::Committed(ends) => return Ok(ends),
                Tried::Failed(failure) => failure,
                Tried::Unknown(ends, why) => {
                    tracing::warn!(
                        "the connection broke in the middle of a commit ({why}): what became of it is looked up"
                    );
                    self.conn = None;
                    if self.was_committed().await {
                        return Ok(ends);
                    }
                    Failure::Lost(why)
                }
            };
            tries += 1;
            let goes_on = match &failure {
                // Nobody is there: until the patience is over, then those who wait are told.
                Failure::Lost(_) => began.elapsed() < patience && !self.shared.is_abandoned(),
                Failure::Again(_) => tries < TRIES,
                Failure::Refused(_) | Failure::Taken => false,
            };
            if matches!(failure, Failure::Lost(_)) {
                self.conn = None;
            }
            if !goes_on {
                return Err(failure);
            }
            tracing::debug!(?failure, tries, "a group commit is tried again");
            self.pause(tries).await;
        }
    }

    async fn pause(&mut self, tries: u32) {
        let longest = PAUSE.saturating_mul(1 << tries.min(10)).min(LONGEST_PAUSE);
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        let spread = 0.5 + 0.5 * (self.seed >> 40) as f64 / f64::from(1u32 << 24);
        tokio::time::sleep(longest.mul_f64(spread)).await;
    }

    /// Whether the lane's last batch was committed, though nobody said so. Asks until it is known.
    async fn was_committed(&mut self) -> bool {
        let mut tries = 0;
        loop {
            let id = self.id;
            let looked = async {
                let conn = self.connected().await?;
                // Waits for the lock of a transaction that is not over yet.
                let found = conn.run(&RESOLVE, &[&id]).await?;
                Ok::<_, Failure>(found.first().map(|row| row.try_get::<_, i64>(0)).transpose()?)
            };
            match looked.await {
                Ok(batch) => return batch.is_some_and(|batch| batch >= self.number),
                Err(failure) => {
                    tries += 1;
                    tracing::warn!(?failure, tries, "what became of a commit is not known yet");
                    if !matches!(failure, Failure::Again(_)) {
                        self.conn = None;
                    }
                    self.pause(tries).await;
                }
            }
        }
    }

    async fn connected(&mut self) -> Result<&Conn, Failure> {
        if self.conn.as_ref().is_none_or(Conn::is_closed) {
            self.conn = None;
            let conn = self.shared.writer().await?;
            // The row stays as it is when it is there: it may be asked for the last batch.
            conn.run(&REGISTER, &[&self.id, &0i64]).await?;
            for sql in [&MARK, &HOLD, &HOLD_TO_LODGE, &INSTANCES, &STIMULI, &BARRED, &LIVES] {
                conn.prepare(sql).await?;
            }
            self.conn = Some(conn);
        }
        self.conn.as_ref().ok_or_else(|| Failure::Lost(String::from("no connection")))
    }

    async fn attempt(&mut self, batch: &[Job]) -> Tried {
        #[cfg(feature = "faults")]
        if self.shared.disk_full_file.as_ref().is_some_and(|file| file.exists()) {
            return Tried::Failed(Failure::Refused(Error::Full(String::from("a fault on demand says so"))));
        }
        self.number += 1;
        let number = self.number;
        let needed = batch.len().max(LIVES_AT_ONCE / 4);
        let mut lives = std::mem::take(&mut self.lives);
        let (id, lodges) = (self.id, self.lodges);
        let shared = Arc::clone(&self.shared);
        let tried = match self.connected().await {
            Ok(conn) => {
                if lives.len() < needed {
                    let count = big((needed + LIVES_AT_ONCE) as u64);
                    match conn.run(&LIVES, &[&count]).await {
                        Ok(rows) => lives.extend(rows.iter().filter_map(|row| row.try_get::<_, i64>(0).ok())),
                        Err(failure) => return Tried::Failed(failure),
                    }
                }
                Attempt { shared: &shared, conn, id, number, lodges, lives: &mut lives }.run(batch).await
            }
            Err(failure) => Tried::Failed(failure),
        };
        // Lives that were taken and not written are lost: they only have to differ.
        self.lives = lives;
        tried
    }
}

/// One try to commit a batch.
struct Attempt<'c> {
    shared: &'c Shared,
    conn: &'c Conn,
    id: Uuid,
    number: i64,
    lodges: bool,
    lives: &'c mut Vec<i64>,
}

impl Attempt<'_> {
    async fn run(&mut self, batch: &[Job]) -> Tried {
        match self.prepare(batch).await {
            Ok((ends, writes)) => self.write(ends, &writes).await,
            Err(failure) => {
                // A connection that answers is used again.
                if !matches!(failure, Failure::Lost(_)) && self.conn.batch("ROLLBACK").await.is_err() {
                    return Tried::Failed(Failure::Lost(String::from("the transaction could not be ended")));
                }
                Tried::Failed(failure)
            }
        }
    }

    /// The first round trip, and the decisions.
    async fn prepare<'a>(&mut self, batch: &'a [Job]) -> Result<(Ends, Writes<'a>), Failure> {
        let mut questions = Questions::default();
        let dedupe = self.shared.dedupe;
        let askings: Vec<_> = batch
            .iter()
            .map(|job| match job {
                Job::Unit(unit) => Some(questions.ask(unit, dedupe)),
                Job::Ship(under, ..) => {
                    questions.shards.extend(under.iter().map(|fence| fence.shard));
                    None
                }
                _ => None,
            })
            .collect();
        let facts = self.look_up(&questions).await?;
        let holds = self.hold_sessions(batch).await?;
        let mut writes = Writes::default();
        let mut ends = Vec::with_capacity(batch.len());
        let mut repeats = Vec::new();
        for (job, asking) in batch.iter().zip(askings) {
            match job {
                Job::Unit(unit) => {
                    let fenced = self.shared.fenced;
                    let mut decider = Decider { facts: &facts, writes: &mut writes, lives: self.lives, dedupe, fenced };
                    let Some(asking) = asking else { continue };
                    match decider.unit(unit, asking).map_err(Failure::Refused)? {
                        End::Written(committed) => ends.push(Ok(committed)),
                        End::Refused(rejection) => ends.push(Err(rejection)),
                        End::Repeats(index, place) => {
                            repeats.push((ends.len(), unit, index, place));
                            ends.push(Err(Rejection::NotFound));
                        }
                    }
                    continue;
                }
                Job::Ship(under, all, _) => {
                    let fenced = self.shared.fenced;
                    let gone = |shard: u32| {
                        let fence = under.iter().find(|fence| fenced && fence.shard == shard);
                        fence.is_some_and(|fence| facts.shards.get(&shard).is_none_or(|row| row.0 != fence.epoch))
                    };
                    let kept = all.iter().filter(|write| !gone(write.shard(self.shared.shards)));
                    kept.for_each(|write| writes.ship(write));
                }
                Job::Mqtt(all, _) => all.iter().for_each(|write| {
                    let is_held = |(tenant, client, hold): (&TenantId, &str, u64)| {
                        holds.get(&(tenant.as_str().into(), client.into())) == Some(&hold)
                    };
                    writes.mqtt(write, write.held().is_none_or(is_held));
                }),
                Job::Probe(_) => {}
            }
            ends.push(Ok(NOTHING));
        }
        for (at, unit, index, place) in repeats {
            let known = self.known(unit, place).await?;
            ends[at] = Err(Rejection::Duplicate { index, known });
        }
        for loss in writes.take_losses() {
            let found = self.conn.run(&TURN_AT, &[&loss.0, &loss.1, &big(loss.2)]).await?;
            if let Some(row) = found.first() {
                writes.redact(&loss, row.try_get(0)?).map_err(Failure::Refused)?;
            }
        }
        let shards = self.shared.shards;
        writes.flatten(|key| key.shard(shards)).map_err(Failure::Refused)?;
        Ok((ends, writes))
    }

    /// The numbers under which the sessions that are written are held at present. They stay so until the batch is over.
    async fn hold_sessions(&self, batch: &[Job]) -> Result<HashMap<(String, String), u64>, Failure> {
        let writes = batch.iter().filter_map(|job| if let Job::Mqtt(writes, _) = job { Some(writes) } else { None });
        let written: BTreeSet<(&str, &str)> =
            writes.flatten().filter_map(MqttWrite::held).map(|(tenant, client, _)| (tenant.as_str(), client)).collect();
        if written.is_empty() {
            return Ok(HashMap::new());
        }
        let (tenants, clients): (Vec<&str>, Vec<&str>) = written.into_iter().unzip();
        let found = self.conn.run(&HOLD_SESSIONS, &[&tenants, &clients]).await?;
        let hold = |row: &Row| Ok(((row.try_get(0)?, row.try_get(1)?), row.try_get::<_, i64>(2)?.unsigned_abs()));
        found.iter().map(hold).collect()
    }

    async fn look_up(&self, questions: &Questions<'_>) -> Result<Facts, Failure> {
        let conn = self.conn;
        let shards: Vec<i32> = questions.shards.iter().map(|shard| int(*shard)).collect();
        let keys: (Vec<&str>, Vec<&str>) =
            questions.instances.iter().map(|key| (key.tenant.as_str(), key.instance.as_str())).unzip();
        let asked = &questions.stimuli;
        let tenants: Vec<&str> = asked.iter().map(|asked| asked.key.tenant.as_str()).collect();
        let instances: Vec<&str> = asked.iter().map(|asked| asked.key.instance.as_str()).collect();
        let ids: Vec<&str> = asked.iter().map(|asked| asked.stimulus.as_str()).collect();
        let lives: Vec<Option<i64>> = asked.iter().map(|asked| asked.life).collect();
        let wide: Vec<bool> = asked.iter().map(|asked| asked.wide).collect();
        let sessions: (Vec<&str>, Vec<&str>) = questions.sessions.iter().copied().unzip();
        let hold = if self.lodges { &HOLD_TO_LODGE } else { &HOLD };
        let mark: [Param<'_>; 2] = [&self.id, &self.number];
        // Sent in this order. The shards are held before anything is looked up: what others committed is seen.
        let (begun, marked, held, found, known, barred) = futures_util::join!(
            conn.batch(&self.shared.begin),
            conn.run(&MARK, &mark),
            async { if shards.is_empty() { Ok(Vec::new()) } else { conn.run(hold, &[&shards]).await } },
            async { if keys.0.is_empty() { Ok(Vec::new()) } else { conn.run(&INSTANCES, &[&keys.0, &keys.1]).await } },
            async {
                if ids.is_empty() {
                    Ok(Vec::new())
                } else {
                    conn.run(&STIMULI, &[&tenants, &instances, &ids, &lives, &wide]).await
                }
            },
            async {
                if sessions.0.is_empty() {
                    Ok(Vec::new())
                } else {
                    conn.run(&BARRED, &[&sessions.0, &sessions.1]).await
                }
            },
        );
        begun?;
        marked?;
        let mut facts = Facts::default();
        for row in held? {
            let (shard, epoch, lodged): (i32, i64, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            facts.shards.insert(shard.unsigned_abs(), (epoch.unsigned_abs(), lodged.unsigned_abs()));
        }
        for row in found? {
            let (at, life, turn): (i64, i64, Option<i64>) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            facts.instances.insert(place_of(at), Standing { life, turn: turn.unwrap_or(0).unsigned_abs() });
        }
        for row in known? {
            let places = Places {
                waiting: row.try_get(1)?,
                dead: row.try_get(2)?,
                decided: row.try_get(3)?,
                before: row.try_get(4)?,
            };
            facts.stimuli.insert(place_of(row.try_get(0)?), places);
        }
        for row in barred? {
            facts.barred.insert((row.try_get(0)?, row.try_get(1)?), row.try_get::<_, i64>(2)?.unsigned_abs());
        }
        Ok(facts)
    }

    /// Reads what is known of a repeated stimulus.
    async fn known(&self, unit: &Unit, place: Place) -> Result<Known, Failure> {
        let gone = || Failure::Again(String::from("a row that was found is gone"));
        match place {
            Place::Waiting(ord) => {
                let found = self.conn.run(&WAITING_AT, &[&ord]).await?;
                Ok(Known::Waiting(Arc::new(rows::stimulus(found.first().ok_or_else(gone)?, 0)?)))
            }
            Place::Dead(ord) => {
                let found = self.conn.run(&DEAD_AT, &[&ord]).await?;
                Ok(Known::Dead(Arc::new(rows::letter(found.first().ok_or_else(gone)?, 0)?)))
            }
            Place::Decided(life, turn) => {
                let found = self.conn.run(&TURN_AT, &[&unit.key.tenant.as_str(), &life, &turn]).await?;
                Ok(Known::Decided(Arc::new(rows::turn(found.first().ok_or_else(gone)?, 0)?)))
            }
        }
    }

    /// The second round trip.
    async fn write(&self, ends: Ends, writes: &Writes<'_>) -> Tried {
        let steps = writes.steps();
        for (sql, _) in &steps {
            if let Err(failure) = self.conn.prepare(sql).await {
                let lost = matches!(failure, Failure::Lost(_)) || self.conn.batch("ROLLBACK").await.is_err();
                return Tried::Failed(if lost {
                    Failure::Lost(String::from("a statement was not taken"))
                } else {
                    failure
                });
            }
        }
        // A statement that fails makes a rollback of the COMMIT behind it, which says nothing: all must have succeeded.
        let sent = join_all(steps.iter().map(|(sql, params)| self.conn.run(sql, params)));
        let (written, committed) = futures_util::future::join(sent, self.conn.batch("COMMIT")).await;
        let failed = written.into_iter().find_map(Result::err);
        match (failed, committed) {
            (None, Ok(())) => {
                let mut feeds = writes.feeds().peekable();
                if feeds.peek().is_some() {
                    self.shared.feeds.moved(feeds);
                    self.shared.hint.notify_one();
                }
                Tried::Committed(ends)
            }
            // The server ended the transaction before it came to the COMMIT.
            (Some(failure @ (Failure::Again(_) | Failure::Refused(_) | Failure::Taken)), _) => Tried::Failed(failure),
            (Some(Failure::Lost(why)), _) => Tried::Unknown(ends, why),
            (None, Err(Failure::Lost(why))) => Tried::Unknown(ends, why),
            // A COMMIT that fails writes nothing; only one whose answer is missing may have.
            (None, Err(failure)) => Tried::Failed(failure),
        }
    }
}

/// The place in a question of an answer numbered from one.
fn place_of(ordinal: i64) -> usize {
    usize::try_from(ordinal - 1).unwrap_or(usize::MAX)
}

fn tell(batch: Vec<Job>, ends: Ends) {
    for (job, end) in batch.into_iter().zip(ends) {
        job.into_done().tell(end);
    }
}

fn refuse(batch: Vec<Job>, error: &Error) {
    for job in batch {
        job.into_done().tell(Err(Rejection::Failed(error.clone())));
    }
}
