//! What a turn costs on PostgreSQL: CPU of this process and of the server, by units in one commit.
//!
//! `SOPHONT_DATABASE=postgres://… cargo bench --bench store_postgres` wants an empty database of a server on this machine,
//! whose processes it finds through the one that serves it. It prints turns a second, CPU milliseconds per 1,000 turns of
//! both, and how long a commit took, for 32 and 256 turns of as many instances in one commit. Figures:
//! `docs/adr/0007-postgresql-store.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use sophont::{
    config::{self, Config},
    runtime::clock::Clock,
    store::{Committed, Done, Fence, Head, Rejection, Store as _, Unit, Work, Writer as _, postgres::PostgresStore},
    types::{
        Channel, InstanceId, InstanceKey, Outcome, RawJson, Source, StateChange, Stimulus, StimulusId, TenantId,
        TurnRecord,
    },
};

const INSTANCES: usize = 20_000;
const SHARDS: u32 = 256;
const PAYLOAD: usize = 512;

type End = (usize, Instant, Result<Committed, Rejection>);

struct Bench {
    store: Arc<PostgresStore>,
    keys: Vec<InstanceKey>,
    heads: Vec<Head>,
    next: usize,
    sender: mpsc::SyncSender<End>,
    ends: mpsc::Receiver<End>,
}

impl Bench {
    fn submit(&mut self, chosen_ids: bool) {
        let index = self.next % INSTANCES;
        self.next += 1;
        let (key, head) = (self.keys[index].clone(), self.heads[index]);
        let channel = Channel::new("telemetry").unwrap();
        let mut stimulus = Stimulus::text(Source::Http, channel, "x".repeat(PAYLOAD), Clock::System.now());
        if chosen_ids {
            let id = format!("{:032x}", (self.next as u128).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835));
            stimulus = stimulus.with_repeatable_id(StimulusId::new(id).unwrap());
        }
        let turn = head.turn + 1;
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
            decided_at: Clock::System.now(),
            epoch: 0,
        };
        let (sender, begun) = (self.sender.clone(), Instant::now());
        let done = Done::new(move |end| sender.send((index, begun, end)).unwrap());
        let fence = Fence { shard: key.shard(SHARDS), epoch: 0, lodged: 0 };
        self.store.submit(Unit { key, fence, work: Work::Turns { head, turns: vec![Arc::new(record)] }, done });
    }

    /// Commits so many turns with at most so many under way.
    fn commit(&mut self, turns: usize, open: usize, chosen_ids: bool) -> Vec<Duration> {
        let (mut begun, mut took) = (0, Vec::with_capacity(turns));
        while took.len() < turns {
            while begun < turns && begun - took.len() < open {
                self.submit(chosen_ids);
                begun += 1;
            }
            let (index, at, end) = self.ends.recv().unwrap();
            self.heads[index] = end.unwrap().head;
            took.push(at.elapsed());
        }
        took.sort_unstable();
        took
    }
}

/// User and system time of a process, and of its children that ended.
fn cpu(pid: &str) -> (u64, String) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let number = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    let parent = fields.get(1).map_or(String::new(), |parent| String::from(*parent));
    (number(11) + number(12) + number(13) + number(14), parent)
}

/// Of a process and all its living children, in milliseconds (100 ticks a second on Linux).
fn tree(root: &str) -> u64 {
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.parse::<u32>().is_ok());
    let children: u64 = pids.map(|pid| cpu(&pid)).filter(|(_, parent)| parent == root).map(|(ticks, _)| ticks).sum();
    (cpu(root).0 + children) * 10
}

fn main() {
    let Ok(url) = std::env::var("SOPHONT_DATABASE") else {
        println!("SOPHONT_DATABASE names no database: nothing is measured");
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let server = runtime.block_on(async {
        let (client, connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        cpu(&pid.to_string()).1
    });
    let tenant = TenantId::new("default").unwrap();
    let key = |n| InstanceKey::new(tenant.clone(), InstanceId::new(format!("device-{n:06}")).unwrap());
    let (sender, ends) = mpsc::sync_channel(65_536);
    let open = |batch: usize, lanes: usize| {
        let mut config: config::Store = Config::default().store;
        (config.max_batch, config.postgres.url, config.postgres.lanes) = (batch, url.clone(), lanes);
        runtime.block_on(PostgresStore::open(&config, SHARDS, Clock::System, runtime.handle().clone())).unwrap()
    };
    let keys = (0..INSTANCES).map(key).collect();
    let mut bench = Bench { store: open(256, 4), keys, heads: vec![Head::default(); INSTANCES], next: 0, sender, ends };
    bench.commit(INSTANCES, 2048, false);
    println!("{INSTANCES} instances, {PAYLOAD} B, each in turn");
    println!("| ids | lanes | batch | turns/s | our CPU ms / 1k | server's CPU ms / 1k | p50 ms | p99 ms |");
    println!("|---|---|---|---|---|---|---|---|");
    for (chosen_ids, lanes, batch, turns) in [
        (false, 1, 32, 20_000),
        (false, 1, 256, 60_000),
        (false, 4, 256, 60_000),
        (true, 1, 32, 20_000),
        (true, 1, 256, 60_000),
    ] {
        bench.store.close();
        bench.store = open(batch, lanes);
        bench.commit(2000, 2 * batch * lanes, chosen_ids);
        let (ours, theirs, begun) = (cpu("self").0 * 10, tree(&server), Instant::now());
        let took = bench.commit(turns, 2 * batch * lanes, chosen_ids);
        let elapsed = begun.elapsed().as_secs_f64();
        let each = |before: u64, after: u64| (after - before) as f64 * 1000.0 / turns as f64;
        println!(
            "| {} | {lanes} | {batch} | {:.0} | {:.1} | {:.1} | {:.1} | {:.1} |",
            if chosen_ids { "chosen" } else { "generated" },
            turns as f64 / elapsed,
            each(ours, cpu("self").0 * 10),
            each(theirs, tree(&server)),
            took[took.len() / 2].as_secs_f64() * 1000.0,
            took[took.len() * 99 / 100].as_secs_f64() * 1000.0,
        );
    }
    bench.store.close();
}
