//! Chaos: real processes under load, hurt in ways and at moments that a seed decides; then the history checker judges.
//!
//! `fault.rs` draws what goes wrong, `world.rs` does it, `proxy.rs` stands on every way, `outage.rs` says how long each
//! instance was out of reach; the senders are those of `tests/it/support/load`. The negative controls break a promise on
//! purpose and must be caught. `SOPHONT_CHAOS_FAULTS` and `SOPHONT_CHAOS_SEED` choose length and seed (`docs/testing.md`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod fault;
mod outage;
mod proxy;
#[path = "../it/support/mod.rs"]
mod support;
mod world;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{sync::Mutex, task::LocalSet};

use fault::{Fault, Terrain, only, plan};
use outage::{Strike, table};
use support::{
    PATIENCE,
    load::{Book, FAST, Load, Shape},
    node, program, wait_for,
};
use world::World;

/// Faults of a run when nobody says how many: each kind about once.
const FAULTS: u64 = 8;
const SEED: u64 = 1;
/// Acceptances between two faults.
const BETWEEN: u64 = 60;
/// Rounds in which a broken promise must have been caught.
const CONTROL_ROUNDS: u64 = 25;

/// Longest time the checker may take over a long history.
const CHECKING: Duration = Duration::from_secs(300);

/// One world at a time: they would disturb each other's times.
static TURN: Mutex<()> = Mutex::const_new(());

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Each instance has five senders at that pace: forty instances and 100 ms are 2,000 stimuli a second.
fn shape() -> Shape {
    let fast = usize::try_from(number("SOPHONT_CHAOS_INSTANCES", FAST as u64)).unwrap();
    let pace = Duration::from_millis(number("SOPHONT_CHAOS_PACE_MS", 20));
    Shape { fast, twins: true, nameless: true, patience: Duration::from_secs(3), pace, ..Shape::default() }
}

/// What `sophont check-history` says about a log.
async fn check(world: &World, log: &Path) -> Value {
    let urls = world.urls();
    let mut arguments = vec!["check-history", "--json", log.to_str().unwrap()];
    urls.iter().for_each(|url| arguments.extend(["--url", url]));
    let mut command = tokio::process::Command::new(node::program());
    command.args(&arguments);
    let output = program::run(command, CHECKING).await;
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// The verdict once everything accepted had time to be decided. What is still missing at the deadline is lost.
async fn settled(world: &World, log: &Path, shape: &Shape) -> Value {
    world.until_decided(&shape.instances()).await;
    let mut last = Value::Null;
    let started = Instant::now();
    wait_for("nothing is on its way", 3 * CHECKING, async || {
        last = check(world, log).await;
        // A broker may still hold what it accepted for us.
        (last["lost"] == 0 || started.elapsed() > PATIENCE).then_some(())
    })
    .await;
    last
}

fn violations(verdict: &Value) -> u64 {
    let kinds = ["lost", "doubled", "moved", "altered", "disordered", "gaps", "interleaved", "diverged"];
    kinds.iter().map(|kind| verdict[kind].as_u64().unwrap()).sum()
}

/// Hurts a world under load as planned, and expects every promise kept.
async fn survives(mut world: World, shape: Shape, seed: u64, faults: Vec<Fault>) {
    shape.prepare(&world.http(0)).await;
    let log = world.home().join("history.jsonl");
    let load = Load::start(&world.doors(), "c", &shape, Book::in_file(&log));
    load.until_accepted(BETWEEN).await;
    let between = number("SOPHONT_CHAOS_BETWEEN", BETWEEN);
    let mut strikes = Vec::new();
    for (at, fault) in faults.iter().enumerate() {
        println!("seed {seed}, fault {at}: {fault}");
        let from = Instant::now();
        world.suffer(*fault).await;
        let to = Instant::now();
        load.until_each_is_served().await;
        strikes.push(Strike { kind: fault.kind(), from, to, calm: Instant::now() });
        load.until_accepted(between).await;
    }
    let load = load.finish().await;
    load.book().flush();
    println!("{}", table(&strikes, &load.book().served()));
    let verdict = settled(&world, &log, &shape).await;
    keep_evidence(&verdict, &log, seed);
    assert_eq!(violations(&verdict), 0, "seed {seed}: {verdict:#}");
    assert_eq!(load.book().surprises(), Vec::<String>::new(), "seed {seed}");
    assert_eq!(load.book().forgotten_sessions(), 0, "seed {seed}: a device's session was forgotten");
    assert!(verdict["acked"].as_u64().unwrap() >= BETWEEN * faults.len() as u64, "{verdict:#}");

    // What was shown was on disk, not only in memory.
    world.kill_all().await;
    let again = settled(&world, &log, &shape).await;
    assert_eq!(again, verdict, "seed {seed}: the history changed with one more kill");
    let [sent, accepted, turns] = ["sent", "acked", "turns"].map(|name| verdict[name].clone());
    println!("seed {seed}: {} faults, {sent} sent, {accepted} accepted, {turns} turns, no violation", faults.len());
}

/// A log that proves something is kept where it can be looked at.
fn keep_evidence(verdict: &Value, log: &Path, seed: u64) {
    if violations(verdict) > 0 {
        let kept = std::env::temp_dir().join(format!("sophont-chaos-{seed}-{}.jsonl", std::process::id()));
        std::fs::copy(log, &kept).expect("the log is kept");
        println!("the log is kept in {}", kept.display());
    }
}

/// So many of all kinds, or only those that are asked for: `SOPHONT_CHAOS_ONLY="kill -9=30,drain=10"`.
fn faults(seed: u64, terrain: &Terrain) -> Vec<Fault> {
    let Ok(wanted) = std::env::var("SOPHONT_CHAOS_ONLY") else {
        return plan(seed, usize::try_from(number("SOPHONT_CHAOS_FAULTS", FAULTS)).unwrap(), terrain);
    };
    let pairs = wanted.split(',').map(|pair| pair.split_once('=').expect("KIND=COUNT"));
    let wanted: Vec<(&str, usize)> = pairs.map(|(kind, count)| (kind.trim(), count.parse().unwrap())).collect();
    only(seed, terrain, &wanted)
}

async fn run(world: impl Future<Output = World>, shape: Shape) {
    let _turn = TURN.lock().await;
    let seed = number("SOPHONT_CHAOS_SEED", SEED);
    let world = world.await;
    let faults = faults(seed, &world.terrain());
    LocalSet::new().run_until(survives(world, shape, seed, faults)).await;
}

#[tokio::test]
async fn one_node_keeps_its_promises() {
    run(World::one_node(""), shape()).await;
}

#[tokio::test]
async fn one_node_behind_a_broker_keeps_its_promises() {
    run(World::behind_a_broker(""), Shape { through_broker: true, ..shape() }).await;
}

#[tokio::test]
async fn one_node_on_postgres_keeps_its_promises() {
    run(World::on_postgres(""), shape()).await;
}

#[tokio::test]
async fn three_nodes_keep_their_promises() {
    run(World::cluster(3, ""), shape()).await;
}

/// Runs load with a promise broken on purpose, and hurts node 0 until the checker complains.
async fn is_caught(mut world: World, kind: &str, fault: Fault) {
    // Without twins and paces: only repeats after a fault may be to blame, and much is to be in flight.
    let shape = Shape { patience: Duration::from_secs(3), ..Shape::default() };
    shape.prepare(&world.http(0)).await;
    for round in 0..CONTROL_ROUNDS {
        let log = world.home().join(format!("history-{round}.jsonl"));
        let load = Load::start(&world.doors(), &format!("r{round}"), &shape, Book::in_file(&log));
        load.until_accepted(150 + 37 * round % 100).await;
        world.suffer(fault).await;
        load.until_accepted(BETWEEN).await;
        let load = load.finish().await;
        load.book().flush();
        world.until_decided(&shape.instances()).await;
        let verdict = check(&world, &log).await;
        if verdict[kind].as_u64().unwrap() > 0 {
            println!("caught in round {round}: {} {kind}", verdict[kind]);
            return;
        }
    }
    panic!("not caught in {CONTROL_ROUNDS} rounds: the chaos test proves nothing");
}

const KILL: Fault = Fault::one(fault::What::Kill(0), Duration::ZERO);

#[tokio::test]
async fn an_acknowledgement_before_the_commit_is_caught() {
    let _turn = TURN.lock().await;
    let world = World::one_node("[faults]\nack_before_commit = true").await;
    LocalSet::new().run_until(is_caught(world, "lost", KILL)).await;
}

#[tokio::test]
async fn a_repeat_that_is_not_recognised_is_caught() {
    let _turn = TURN.lock().await;
    let world = World::one_node("[faults]\ndedupe_off = true").await;
    LocalSet::new().run_until(is_caught(world, "doubled", KILL)).await;
}

/// A node sleeps through the end of its lease, wakes, and goes on writing beside its successor.
#[tokio::test]
async fn an_owner_that_writes_after_another_took_over_is_caught() {
    let _turn = TURN.lock().await;
    let world = World::cluster(3, "[faults]\nfence_off = true").await;
    let nap = Fault::one(fault::What::Freeze(0), Duration::from_secs(5));
    LocalSet::new().run_until(is_caught(world, "interleaved", nap)).await;
}
