//! What the cache's users save: each against what they would do without it, and two that have no place in it.
//!
//! `cargo bench --bench cache` prints a table, median and 99th percentile of one at a time and CPU for 1,000 (the whole process,
//! in ticks of 10 ms): instances brought back from SQLite with and without a snapshot of what they were, for several numbers of
//! turns since the whole state was written; a profile's rules compiled, against looking the compiled ones up; finding a token
//! among many. Figures and what follows from them: `docs/adr/0022-users-of-the-cache.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, clippy::cast_precision_loss)]

use std::{
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use sophont::{
    cognition::reflex::RuleSet,
    config::{self, Auth, Token},
    gateway::auth::Authenticator,
    runtime::clock::Clock,
    scaling::cache::{Kind, Local, Options, Slot, TieredCache},
    store::{Done, Fence, Head, Reader as _, Snapshot, Store as _, Unit, Work, Writer as _, sqlite::SqliteStore},
    types::{
        Channel, InstanceId, InstanceKey, Outcome, RawJson, Scope, Source, StateChange, Stimulus, TenantId, TurnRecord,
        profile::RuleSpec,
    },
};

const INSTANCES: usize = 2000;
const ROUNDS: usize = 5;

/// User and system time of this process so far.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10) // 100 ticks a second on Linux
}

fn row(name: &str, mut times: Vec<Duration>, cpu: Duration) {
    let count = times.len() as f64;
    times.sort_unstable();
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    println!("| {name} | {:.1} | {:.1} | {:.1} |", at(0.5), at(0.99), cpu.as_secs_f64() * 1e6 / count);
}

fn key(number: usize) -> InstanceKey {
    InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(format!("i{number}")).unwrap())
}

/// A turn that sets a number of a state of about half a kilobyte.
fn turn(number: u64) -> TurnRecord {
    let pad = "x".repeat(400);
    let state = match number {
        1 => StateChange::Full(
            RawJson::parse(&format!(r#"{{"desired":{{"pad":"{pad}"}},"reported":{{"n":1}}}}"#)).unwrap(),
        ),
        _ => StateChange::Patch(RawJson::parse(&format!(r#"{{"reported":{{"n":{number}}}}}"#)).unwrap()),
    };
    TurnRecord {
        turn: number,
        version: number,
        stimulus: Stimulus::text(Source::Http, Channel::new("chat").unwrap(), "a plain stimulus", Clock::System.now()),
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
    }
}

/// Instances brought back so many turns after their whole state was written.
async fn bring_back(since: u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = config::Config::default().store;
    settings.durability = config::Durability::Off;
    let store = SqliteStore::open(folder.path(), &settings, Clock::System).unwrap();
    let mut heads = vec![Head::default(); INSTANCES];
    for number in 1..=since + 1 {
        let mut ends = Vec::new();
        for (instance, head) in heads.iter().enumerate() {
            let (done, end) = Done::channel();
            let work = Work::Turns { head: *head, turns: vec![Arc::new(turn(number))] };
            store.submit(Unit { key: key(instance), fence: Fence::default(), work, done });
            ends.push(end);
        }
        for (head, end) in heads.iter_mut().zip(ends) {
            *head = end.await.unwrap().unwrap().head;
        }
    }
    store.settle().await.unwrap();
    let mut snapshots = Vec::new();
    for (instance, head) in heads.iter().enumerate() {
        let loaded = store.load(&key(instance)).await.unwrap();
        assert_eq!(loaded.head, *head);
        let turns_since_full = loaded.turns_since_full;
        snapshots.push(Arc::new(Snapshot { head: *head, state: loaded.state, turns_since_full }));
    }
    let (began, mut times) = (cpu(), Vec::new());
    for instance in (0..INSTANCES).cycle().take(INSTANCES * ROUNDS) {
        let at = Instant::now();
        black_box(store.load(&key(instance)).await.unwrap());
        times.push(at.elapsed());
    }
    row(&format!("an instance, {since} turns since its whole state"), times, cpu() - began);
    let (began, mut times) = (cpu(), Vec::new());
    for instance in (0..INSTANCES).cycle().take(INSTANCES * ROUNDS) {
        let at = Instant::now();
        let loaded = store.load_with(&key(instance), snapshots[instance].clone()).await.unwrap();
        assert_eq!(black_box(loaded).state.version, since + 1);
        times.push(at.elapsed());
    }
    row("the same with its snapshot", times, cpu() - began);
    store.close();
}

fn profiles() {
    let rule = |n: usize| RuleSpec {
        when: format!("stimulus.channel == 'c{n}' && has(stimulus.data.t) && stimulus.data.t > {n}.5"),
        actions: vec![serde_json::json!({"reply": "Hello {{ stimulus.content }}"})],
        salience: None,
        stop: false,
    };
    let cache = TieredCache::new(Options::default());
    for rules in [1, 10] {
        let specs: Vec<RuleSpec> = (0..rules).map(rule).collect();
        let (began, mut times) = (cpu(), Vec::new());
        for _ in 0..2000 {
            let at = Instant::now();
            black_box(RuleSet::compile(&specs).unwrap());
            times.push(at.elapsed());
        }
        row(&format!("a profile with {rules} rules, compiled"), times, cpu() - began);
        let slot =
            |text: &[u8]| Slot::new(Kind::Profile, &TenantId::new("t").unwrap(), blake3::hash(text).to_hex().as_str());
        let value = Local { value: Arc::new(RuleSet::compile(&specs).unwrap()), bytes: 10_000 };
        cache.put(&slot(&serde_json::to_vec(&specs).unwrap()), 0, value);
        let (began, mut times) = (cpu(), Vec::new());
        for _ in 0..20_000 {
            let at = Instant::now();
            let slot = slot(&serde_json::to_vec(&specs).unwrap());
            assert!(black_box(cache.get::<Local<Arc<RuleSet>>>(&slot, 0)).is_some());
            times.push(at.elapsed());
        }
        row("the same, written out, hashed and found", times, cpu() - began);
    }
}

fn tokens() {
    let tenant = TenantId::new("t").unwrap();
    for count in [1, 100, 1000] {
        let token = |n: usize| Token {
            token: Some(format!("secret-{n}").into()),
            token_env: String::new(),
            tenant: tenant.clone(),
            name: format!("user-{n}"),
            device: false,
            instance: None,
            scopes: vec![Scope::Read],
        };
        let auth = Auth { default_tenant: tenant.clone(), tokens: (0..count).map(token).collect() };
        let known = Authenticator::new(&auth).unwrap();
        let (began, mut times) = (cpu(), Vec::new());
        for n in 0..20_000 {
            let secret = format!("secret-{}", n % count);
            let at = Instant::now();
            assert!(black_box(known.authenticate(&secret)).is_some());
            times.push(at.elapsed());
        }
        row(&format!("a token among {count}"), times, cpu() - began);
    }
}

fn main() {
    println!("| what | p50 us | p99 us | CPU us |\n|---|---|---|---|");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        for since in [0, 8, 15] {
            bring_back(since).await;
        }
    });
    profiles();
    tokens();
}
