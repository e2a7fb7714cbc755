//! Builds side by side: which of them go together, and the way from one to the next.
//!
//! What stands for the older build is this one under a setting that makes it claim only protocol 1 (`faults.protocol`).
//! `SOPHONT_TEST_OLD=PATH` has an older build take its place, to see a real upgrade.

use std::{path::PathBuf, sync::atomic::Ordering};

use nix::sys::signal::Signal;

use crate::support::{
    PATIENCE,
    cluster::{Cluster, all_open, check_history, run_flow},
    metric,
    node::{Builder, Node},
    wait_until,
};

const CLAIM: &str = "SOPHONT__FAULTS__PROTOCOL";
const OLD: &str = "SOPHONT_TEST_OLD";

fn old(builder: Builder) -> Builder {
    match std::env::var_os(OLD) {
        Some(path) => builder.program(Some(PathBuf::from(path))),
        None => builder.env(CLAIM, "1"),
    }
}

fn new(builder: Builder) -> Builder {
    builder.program(None).without_env(CLAIM)
}

/// Messages that came with protocol 2 and 3.
async fn told(node: &Node) -> f64 {
    let mut sum = 0.0;
    for kind in ["report", "check"] {
        sum += metric(&node.client(), &format!("sophont_cluster_bus_received_total{{kind=\"{kind}\"}}")).await;
    }
    sum
}

#[tokio::test]
async fn a_rolling_upgrade_fails_no_request() {
    let mut cluster = Cluster::build(3, true, old).await;
    let shut = all_open(3);
    let doors: Vec<_> = cluster.nodes.iter().map(Node::client).collect();
    let senders = run_flow(doors, 12, &shut, async {
        for number in 0..3 {
            cluster.retire(number, &shut[number]).await;
            cluster.nodes[number].change(new);
            cluster.nodes[number].start_again().await;
            shut[number].store(false, Ordering::Release);
            cluster.until_even().await;
            if number < 2 {
                let rows = cluster.rows(number).await;
                let speaks = |what: &str| rows.iter().any(|row| row["status"] == "live" && row["protocol"] == what);
                let ours = sophont::cluster::PROTOCOL.to_string();
                assert!(speaks("1") && speaks(&ours), "both are there: {rows:?}");
                assert!(told(&cluster.nodes[number]).await <= 0.0, "an older build is told nothing new");
            }
        }
    })
    .await;
    let is_real = std::env::var_os(OLD).is_some();
    for node in &cluster.nodes {
        let waited = node.log().contains("did not finish");
        assert!(is_real || !waited, "a node that handed everything over has nothing to wait for");
        wait_until("nodes tell each other their loads", PATIENCE, async || told(node).await > 0.0).await;
    }
    for sender in &senders {
        assert!(sender.failures.is_empty(), "sender {}: {:?}", sender.number, sender.failures);
    }
    check_history(&cluster.client(0), &senders).await;
    println!("{} stimuli, none refused", senders.iter().map(|sender| sender.sent).sum::<usize>());
}

#[tokio::test]
async fn a_build_that_is_too_far_away_is_refused_and_told_what_to_do() {
    for (there, joins, why, todo) in [
        ("1", "3", "speaks cluster protocol 1, this build speaks 3", "bring all nodes to a release between"),
        ("3", "1", "speaks cluster protocol 3, this build speaks 1", "start one that speaks cluster protocol 3"),
    ] {
        let mut cluster = Cluster::build_uneven(1, false, |_, builder| builder.env(CLAIM, there)).await;
        let mut other = cluster.nodes[0].twin().env(CLAIM, joins).launch();
        assert!(!other.wait_exit(PATIENCE).await.success());
        let log = other.log();
        assert!(log.contains(why) && log.contains(todo) && log.contains("n0."), "{log}");
        cluster.client(0).get("/health/ready").await.expect(200);
        // Once nobody is there that speaks otherwise, it may come.
        cluster.nodes[0].signal(Signal::SIGTERM);
        assert!(cluster.nodes[0].wait_exit(PATIENCE).await.success());
        other.start_again().await;
        other.client().get("/health/ready").await.expect(200);
    }
}
