//! kill -9 under mixed HTTP and MQTT load, again and again on the same data folder, while the load goes on: nothing that was
//! acknowledged is lost, nothing is decided twice, each sender's order holds (promises 1 to 3), and no reply speaks of a
//! turn that is not there (promise 5).
//!
//! `support/load` has the senders and what they wrote down, `replies.rs` the device that listens. Each negative control breaks
//! one promise on purpose and must be caught; without them a green run would prove little.
//! `SOPHONT_CRASH_ROUNDS` sets the number of kills.

mod replies;

use std::{
    collections::HashMap,
    sync::atomic::{AtomicU64, Ordering},
};

use serde_json::Value;
use sophont::cli::check_history::check::{Seen, Stored, Verdict};

use tokio::task::LocalSet;

use crate::support::{
    Node, PATIENCE,
    load::{self, Book, Doors, FAST, Load, Shape, instances},
    wait_for,
};
use replies::Replies;

/// Kills when nobody says how many.
const ROUNDS: u64 = 5;
/// Rounds in which a broken promise must have been caught.
const CONTROL_ROUNDS: u64 = 25;

fn rounds() -> u64 {
    let text = std::env::var("SOPHONT_CRASH_ROUNDS");
    text.map_or(ROUNDS, |text| text.parse().expect("SOPHONT_CRASH_ROUNDS is a number"))
}

/// How many acknowledgements to wait for before the next kill: varied, so that kills fall into different moments.
fn next_target() -> u64 {
    static STATE: AtomicU64 = AtomicU64::new(0x9e37_79b9_7f4a_7c15);
    let state = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    100 + (mixed >> 40) % 300
}

/// Turns of every instance, by instance.
async fn read_back(node: &Node) -> HashMap<String, Vec<Value>> {
    let http = node.client();
    let mut all = HashMap::new();
    for instance in instances() {
        all.insert(instance.clone(), http.turns(&instance).await);
    }
    all
}

/// Holds the senders' log against the turns.
fn check(load: &Load, turns: &HashMap<String, Vec<Value>>) -> Verdict {
    let mut verdict = Verdict::default();
    load.book().read(|log| {
        for instance in log.instances() {
            let turns = turns[instance].iter().map(|turn| Seen {
                turn: turn["turn"].as_u64().expect("a turn's number"),
                id: turn["stimulus"]["id"].as_str().expect("a stimulus's id").to_owned(),
                content: turn["stimulus"]["content"].as_str().map(str::to_owned),
                reply: turn["reply"]["content"].as_str().map(str::to_owned),
                epoch: None,
            });
            let stored = Stored { turns: turns.collect(), ..Stored::default() };
            verdict.check_instance(instance, log.sent(instance), &stored);
        }
    });
    verdict
}

/// Waits until what was accepted is decided, and checks. What is still missing at the deadline is lost.
async fn settle(load: &Load, node: &Node) -> (Verdict, HashMap<String, Vec<Value>>) {
    let http = node.client();
    for instance in instances() {
        wait_for(&format!("the inbox of {instance} is empty"), 2 * PATIENCE, async || {
            let shown = http.get(&format!("/v1/instances/{instance}")).await.expect(200);
            (shown["inbox"].as_u64().expect("the depth of the inbox") == 0).then_some(())
        })
        .await;
    }
    let turns = read_back(node).await;
    (check(load, &turns), turns)
}

#[tokio::test]
async fn kill_9_under_load_loses_doubles_and_disorders_nothing() {
    LocalSet::new().run_until(kill_again_and_again()).await;
}

async fn kill_again_and_again() {
    let mut node = Node::builder().stable_ports().start().await;
    Shape::default().prepare(&node.client()).await;
    let replies = Replies::start(node.mqtt());
    replies.until_listening().await;
    let load = Load::start(&Doors::of(&node), "main", &Shape { twins: true, ..Shape::default() }, Book::default());
    for round in 0..rounds() {
        load.until_accepted(next_target()).await;
        node.kill9().await;
        if round % 3 == 2 {
            node.start_and_kill_early(round % 2 == 0).await;
        }
        node.start_again().await;
    }
    load.until_accepted(next_target()).await;
    let load = load.finish().await;
    let (verdict, turns) = settle(&load, &node).await;
    println!("after {} kills: {verdict:?}", rounds());
    assert!(verdict.is_clean(), "{verdict:#?}");
    assert!(verdict.acked >= 100 * rounds(), "{verdict:?}");
    assert_eq!(verdict.foreign, 0, "every turn was asked for: {verdict:?}");
    assert_eq!(load.book().surprises(), Vec::<String>::new());
    assert_eq!(load.book().forgotten_sessions(), 0, "a device's session did not survive a kill");
    assert_state_follows_turns(&node, &turns).await;
    replies.until_answered(&load.sent_by_devices(), &turns).await;

    // What was shown was on disk, not only in memory.
    node.kill9().await;
    node.start_again().await;
    assert!(read_back(&node).await == turns, "the history changed with one more kill");
    assert_state_follows_turns(&node, &turns).await;
}

/// The twin's last word is the last turn's, and its version too.
async fn assert_state_follows_turns(node: &Node, turns: &HashMap<String, Vec<Value>>) {
    for n in 0..FAST {
        let instance = load::fast(n);
        let state = node.client().get(&format!("/v1/instances/{instance}/state")).await.expect(200);
        let last = turns[&instance].last().expect("turns");
        assert_eq!(state["reported"]["last"], last["stimulus"]["content"], "{instance}");
        assert_eq!(state["version"], last["version"], "{instance}");
    }
}

/// Runs load with a fault and kills until the checker complains. Without twins: only repeats after a kill may be to blame.
async fn until_caught(fault: &str, caught: impl Fn(&Verdict) -> u64) {
    let mut node = Node::builder().stable_ports().config(&format!("[faults]\n{fault} = true")).start().await;
    Shape::default().prepare(&node.client()).await;
    for round in 0..CONTROL_ROUNDS {
        let load = Load::start(&Doors::of(&node), &format!("r{round}"), &Shape::default(), Book::default());
        load.until_accepted(next_target()).await;
        node.kill9().await;
        node.start_again().await;
        let load = load.finish().await;
        let (verdict, _) = settle(&load, &node).await;
        if caught(&verdict) > 0 {
            println!("{fault} was caught in round {round}: {verdict:?}");
            return;
        }
    }
    panic!("{fault} was not caught in {CONTROL_ROUNDS} rounds: the crash test proves nothing");
}

#[tokio::test]
async fn an_acknowledgement_before_the_commit_is_caught() {
    LocalSet::new().run_until(until_caught("ack_before_commit", |verdict| verdict.lost)).await;
}

#[tokio::test]
async fn a_repeat_that_is_not_recognised_is_caught() {
    LocalSet::new().run_until(until_caught("dedupe_off", |verdict| verdict.doubled)).await;
}
