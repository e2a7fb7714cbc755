//! The commit path: the store as it is, against the design that was not taken (one clustered table with its index).
//!
//! `cargo bench --bench store` prints a table (turns a second, CPU milliseconds per 1,000 turns with the work of all
//! threads, longest and 99th percentile commit) for batches of 1, 32 and 256 turns of as many instances, synchronous FULL,
//! 512 bytes of payload, 100,000 instances in random order; then criterion's figures for one batch. The cost of making the
//! records is measured alone and taken off. Figures and what follows from them: `docs/adr/0002-turn-and-commit.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    collections::VecDeque,
    hint::black_box,
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use criterion::Criterion;
use rusqlite::{Connection, params};
use sophont::{
    config,
    runtime::clock::Clock,
    store::{Committed, Done, Fence, Head, Rejection, Store as _, Unit, Work, Writer as _, sqlite::SqliteStore},
    types::{
        Channel, InstanceId, InstanceKey, Outcome, RawJson, Source, StateChange, Stimulus, StimulusId, TenantId,
        TurnRecord,
    },
};

const INSTANCES: usize = 100_000;
const PAYLOAD: usize = 512;

/// Instances in an order that visits each once a round, and the records they write.
struct Load {
    keys: Vec<InstanceKey>,
    heads: Vec<Head>,
    order: Vec<usize>,
    at: usize,
    seed: u64,
    chosen_ids: bool,
    payload: String,
    channel: Channel,
    clock: Clock,
}

impl Load {
    fn new(chosen_ids: bool) -> Self {
        let tenant = TenantId::new("default").unwrap();
        let key = |n| InstanceKey::new(tenant.clone(), InstanceId::new(format!("device-{n:06}")).unwrap());
        let mut load = Self {
            keys: (0..INSTANCES).map(key).collect(),
            heads: vec![Head::default(); INSTANCES],
            order: (0..INSTANCES).collect(),
            at: 0,
            seed: 0x9e37_79b9_7f4a_7c15,
            chosen_ids,
            payload: "x".repeat(PAYLOAD),
            channel: Channel::new("telemetry").unwrap(),
            clock: Clock::System,
        };
        load.shuffle();
        load
    }

    fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    fn shuffle(&mut self) {
        for last in (1..INSTANCES).rev() {
            let other = usize::try_from(self.random() % (last as u64 + 1)).unwrap();
            self.order.swap(last, other);
        }
    }

    fn next(&mut self) -> (usize, Arc<TurnRecord>) {
        // The same order again: another one could name an instance whose last turn is still on its way.
        self.at %= INSTANCES;
        let index = self.order[self.at];
        self.at += 1;
        let turn = self.heads[index].turn + 1;
        let now = self.clock.now();
        let mut stimulus = Stimulus::text(Source::Http, self.channel.clone(), self.payload.as_str(), now);
        if self.chosen_ids {
            let id = format!("{:016x}{:016x}", self.random(), self.random());
            stimulus = stimulus.with_repeatable_id(StimulusId::new(id).unwrap());
        }
        let state = match turn % 16 {
            0 => StateChange::Full(RawJson::parse(r#"{"desired":{},"reported":{"celsius":21.5}}"#).unwrap()),
            _ => StateChange::None,
        };
        let record = TurnRecord {
            turn,
            version: turn / 16,
            stimulus,
            outcome: Outcome::Silent,
            reply: None,
            effects: Vec::new(),
            state,
            episodes: Vec::new(),
            steps: 0,
            engine: String::from("reflex"),
            model: None,
            usage: None,
            error: None,
            decided_at: now,
            epoch: 0,
        };
        (index, Arc::new(record))
    }
}

/// What is measured: something that commits batches of turns.
trait Subject {
    /// Commits `turns` turns in batches; tells how long each commit took.
    fn commit(&mut self, load: &mut Load, turns: usize, batch: usize) -> Vec<Duration>;
    /// Finishes what it put off.
    fn settle(&mut self) {}
}

type End = (usize, Instant, Result<Committed, Rejection>);

/// The store as it is, with two batches in flight.
struct Real {
    store: Arc<SqliteStore>,
    sender: mpsc::SyncSender<End>,
    ends: mpsc::Receiver<End>,
}

fn settings(batch: usize) -> config::Store {
    config::Store {
        backend: config::Backend::Sqlite,
        durability: config::Durability::Full,
        max_batch: batch,
        max_queue: 65_536,
        readers: 1,
        cache_mb: 32,
        slow_query_ms: 0,
        postgres: config::Config::default().store.postgres,
    }
}

impl Real {
    fn open(folder: &Path, batch: usize) -> Self {
        let (sender, ends) = mpsc::sync_channel(4096);
        Self { store: SqliteStore::open(folder, &settings(batch), Clock::System).unwrap(), sender, ends }
    }

    fn submit(&self, load: &mut Load) {
        let (index, record) = load.next();
        let (sender, begun) = (self.sender.clone(), Instant::now());
        let done = Done::new(move |end| sender.send((index, begun, end)).unwrap());
        let work = Work::Turns { head: load.heads[index], turns: vec![record] };
        self.store.submit(Unit { key: load.keys[index].clone(), fence: Fence::default(), work, done });
    }
}

impl Subject for Real {
    fn commit(&mut self, load: &mut Load, turns: usize, batch: usize) -> Vec<Duration> {
        let (mut begun, mut ended) = (0, 0);
        let mut took = Vec::with_capacity(turns);
        while ended < turns {
            while begun < turns && begun - ended < 2 * batch {
                self.submit(load);
                begun += 1;
            }
            // A whole batch ends at once.
            for _ in 0..batch.min(turns - ended) {
                let (index, at, end) = self.ends.recv().unwrap();
                load.heads[index] = end.unwrap().head;
                took.push(at.elapsed());
                ended += 1;
            }
        }
        took
    }

    fn settle(&mut self) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(self.store.settle()).unwrap();
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.store.close();
    }
}

/// The design that was not taken: turns clustered by instance, ids indexed in the same transaction. Bare, on the
/// measuring thread, without queue, threads or ends to tell.
struct Clustered {
    db: Connection,
    buffer: Vec<u8>,
}

impl Clustered {
    fn open(folder: &Path) -> Self {
        let db = Connection::open(folder.join("clustered.db")).unwrap();
        db.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -32768;
             CREATE TABLE turns (tenant TEXT NOT NULL, instance TEXT NOT NULL, turn INTEGER NOT NULL, rec BLOB NOT NULL,
               PRIMARY KEY (tenant, instance, turn)) STRICT, WITHOUT ROWID;
             CREATE TABLE seen (bucket INTEGER NOT NULL, tenant TEXT NOT NULL, stimulus TEXT NOT NULL,
               instance TEXT NOT NULL, turn INTEGER NOT NULL,
               PRIMARY KEY (bucket, tenant, stimulus, instance)) STRICT, WITHOUT ROWID;",
        )
        .unwrap();
        db.set_prepared_statement_cache_capacity(16);
        Self { db, buffer: Vec::new() }
    }
}

impl Subject for Clustered {
    fn commit(&mut self, load: &mut Load, turns: usize, batch: usize) -> Vec<Duration> {
        let mut took = Vec::with_capacity(turns);
        let mut left = turns;
        while left > 0 {
            let begun = Instant::now();
            let size = batch.min(left);
            self.db.execute_batch("BEGIN IMMEDIATE").unwrap();
            for _ in 0..size {
                let (index, record) = load.next();
                let key = &load.keys[index];
                let (tenant, instance) = (key.tenant.as_str(), key.instance.as_str());
                let mut buffer = std::mem::take(&mut self.buffer);
                buffer.clear();
                let buffer = record.encode(buffer).unwrap();
                self.db
                    .prepare_cached("INSERT INTO turns (tenant, instance, turn, rec) VALUES (?1, ?2, ?3, ?4)")
                    .unwrap()
                    .execute(params![tenant, instance, record.turn, buffer])
                    .unwrap();
                self.buffer = buffer;
                if record.stimulus.repeatable {
                    // The unique key refuses a repeat; a look at the day before is left out in this design's favour.
                    self.db
                        .prepare_cached(
                            "INSERT INTO seen (bucket, tenant, stimulus, instance, turn) VALUES (1, ?1, ?2, ?3, ?4)",
                        )
                        .unwrap()
                        .execute(params![tenant, record.stimulus.id.as_str(), instance, record.turn])
                        .unwrap();
                }
                load.heads[index].turn = record.turn;
            }
            self.db.execute_batch("COMMIT").unwrap();
            took.extend(std::iter::repeat_n(begun.elapsed(), size));
            left -= size;
        }
        took
    }
}

/// User and system time of this process so far.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: VecDeque<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10) // 100 ticks a second on Linux
}

struct Figures {
    per_second: f64,
    cpu_ms: f64,
    p50: Duration,
    p99: Duration,
    max: Duration,
}

fn measure(subject: &mut dyn Subject, load: &mut Load, turns: usize, batch: usize) -> Figures {
    // Every instance has a turn, and what follows from that is done.
    if load.heads.iter().all(|head| head.turn == 0) {
        subject.commit(load, INSTANCES, 256);
        subject.settle();
    }
    let (cpu_before, begun) = (cpu(), Instant::now());
    let mut took = subject.commit(load, turns, batch);
    let elapsed = begun.elapsed();
    // What was put off is part of the price.
    subject.settle();
    let used = cpu() - cpu_before;
    let making = making(load, turns);
    took.sort_unstable();
    let turns = turns as f64;
    Figures {
        per_second: turns / elapsed.as_secs_f64(),
        cpu_ms: used.saturating_sub(making).as_secs_f64() * 1e6 / turns,
        p50: took[took.len() / 2],
        p99: took[took.len() * 99 / 100],
        max: *took.last().unwrap(),
    }
}

/// The time that making so many records takes.
fn making(load: &mut Load, turns: usize) -> Duration {
    let begun = Instant::now();
    for _ in 0..turns {
        black_box(load.next());
    }
    begun.elapsed()
}

fn syncs_per_second(folder: &Path) -> f64 {
    use std::io::Write as _;
    let mut file = std::fs::File::create(folder.join("sync")).unwrap();
    let begun = Instant::now();
    let mut count = 0;
    while begun.elapsed() < Duration::from_secs(1) {
        file.write_all(&[7; 4096]).unwrap();
        file.sync_data().unwrap();
        count += 1;
    }
    f64::from(count) / begun.elapsed().as_secs_f64()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn compare() {
    let place = folder();
    println!("{:.0} fdatasync/s, {INSTANCES} instances, {PAYLOAD} B, synchronous FULL", syncs_per_second(place.path()));
    println!("| design | ids | batch | turns/s | CPU ms / 1k | p50 ms | p99 ms | max ms |");
    println!("|---|---|---|---|---|---|---|---|");
    for chosen_ids in [false, true] {
        for (batch, turns) in [(256, 300_000), (32, 60_000), (1, 4_000)] {
            for design in ["folded log", "clustered"] {
                let place = folder();
                let mut subject: Box<dyn Subject> = match design {
                    "clustered" => Box::new(Clustered::open(place.path())),
                    _ => Box::new(Real::open(place.path(), batch)),
                };
                let mut load = Load::new(chosen_ids);
                let figures = measure(&mut *subject, &mut load, turns, batch);
                let ms = |time: Duration| time.as_secs_f64() * 1e3;
                println!(
                    "| {design} | {} | {batch} | {:.0} | {:.1} | {:.2} | {:.2} | {:.1} |",
                    if chosen_ids { "chosen" } else { "generated" },
                    figures.per_second,
                    figures.cpu_ms,
                    ms(figures.p50),
                    ms(figures.p99),
                    ms(figures.max)
                );
            }
        }
    }
}

fn criterion_batch(criterion: &mut Criterion) {
    let place = folder();
    let mut real = Real::open(place.path(), 256);
    let mut load = Load::new(false);
    real.commit(&mut load, INSTANCES, 256);
    criterion.bench_function("store/commit of 256 turns", |bencher| {
        bencher.iter_custom(|rounds| {
            let begun = Instant::now();
            real.commit(&mut load, usize::try_from(rounds).unwrap() * 256, 256);
            begun.elapsed()
        });
    });
}

fn main() {
    // `cargo test --benches` and `-- --test` only look whether it runs.
    if std::env::args().any(|argument| argument == "--bench") && std::env::args().all(|argument| argument != "--test") {
        compare();
    }
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    criterion_batch(&mut criterion);
    criterion.final_summary();
}
