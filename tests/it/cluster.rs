//! Three nodes as processes over PostgreSQL and Redis: any node takes any stimulus, and nodes come, go, hang and die.

use std::sync::atomic::Ordering;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::{
    http::Events,
    support::{
        PATIENCE,
        cluster::{Cluster, all_open, check_history, run_flow, under_flow},
        http::{echo, slow},
        metric, node, wait_for, wait_until,
    },
};

#[tokio::test]
async fn any_node_serves_any_instance() {
    let cluster = Cluster::start().await;
    for instance in ["a", "b", "c", "d", "e", "f"] {
        cluster.client(0).put_instance(instance, &echo()).await;
        for node in 0..3 {
            let turn = cluster.client(node).say(instance, &format!("{instance}{node}"), "hi").await.expect(200);
            assert_eq!((&turn["turn"], &turn["reply"]["content"]), (&json!(node + 1), &json!("hi")));
            // What one node acknowledged, every other node reads at once.
            let state = cluster.client(node + 1).get(&format!("/v1/instances/{instance}/state")).await.expect(200);
            assert_eq!(state["version"], turn["version"]);
        }
        let again = cluster.client(1).say(instance, &format!("{instance}0"), "other").await.expect(200);
        assert_eq!(
            (&again["turn"], &again["stimulus"]["content"]),
            (&json!(1), &json!("hi")),
            "a repeat by another node"
        );
        let path = format!("/v1/instances/{instance}/state");
        let patched = cluster.client(2).patch(&path, &json!({"desired": {"on": true}})).await.expect(200);
        assert_eq!(cluster.client(0).get(&path).await.expect(200), patched);
    }
    let owners: Vec<usize> =
        futures_util::future::join_all(["a", "b", "c", "d", "e", "f"].map(|i| cluster.owner(i))).await;
    assert!(owners.iter().any(|owner| *owner != owners[0]), "they are spread: {owners:?}");
    for node in 0..3 {
        let instance = ["a", "b", "c"][node];
        cluster.client(node).delete(&format!("/v1/instances/{instance}")).await.expect(204);
        assert_eq!(cluster.client(node + 1).get(&format!("/v1/instances/{instance}")).await.status, 404);
    }
}

#[tokio::test]
async fn a_stream_at_any_node_has_each_word_as_it_is_thought() {
    let cluster = Cluster::start().await;
    let script = json!({"reply": "one two three four five six", "delay_ms": 1500, "tokens": 6});
    cluster.client(0).put_instance("far", &json!({"engine": "scripted", "script": script})).await;
    let other = cluster.owner("far").await + 1;
    let client = cluster.client(other);
    let path = "/v1/instances/far/stimuli";
    let request = client.request(reqwest::Method::POST, path).json(&json!({"channel": "chat", "content": "count"}));
    let events = Events::open(request).await.until("turn").await;
    let words: Vec<&str> =
        events.iter().filter(|event| event.name == "token").filter_map(|event| event.data["text"].as_str()).collect();
    assert_eq!((words.len(), words.concat()), (6, "one two three four five six".into()), "{events:?}");
    assert_eq!(events.last().unwrap().data["reply"]["content"], "one two three four five six");
}

#[tokio::test]
async fn what_a_killed_node_had_goes_on_elsewhere() {
    let mut cluster = Cluster::start().await;
    let shut = all_open(3);
    cluster.client(0).put_instance("i3", &slow(20)).await;
    let doors: Vec<_> = cluster.nodes.iter().map(crate::support::Node::client).collect();
    let senders = run_flow(doors, 12, &shut, async {
        for victim in [1, 2, 0] {
            let before = cluster.rows(victim + 1).await.len();
            cluster.nodes[victim].kill9().await;
            let asked = (victim + 1) % 3;
            wait_until("the others own everything", PATIENCE, async || {
                let rows = cluster.rows(asked).await;
                rows.iter().filter(|row| row["status"] == "live").filter_map(|row| row["shards"].as_u64()).sum::<u64>()
                    == 24
            })
            .await;
            assert!(before >= 3);
            cluster.nodes[victim].start_again().await;
            cluster.until_even().await;
        }
    })
    .await;
    check_history(&cluster.client(2), &senders).await;
}

#[tokio::test]
async fn a_rolling_restart_fails_no_request() {
    let mut cluster = Cluster::start().await;
    let shut = all_open(3);
    let doors: Vec<_> = cluster.nodes.iter().map(crate::support::Node::client).collect();
    let senders = run_flow(doors, 12, &shut, async {
        for number in 0..3 {
            cluster.retire(number, &shut[number]).await;
            cluster.nodes[number].start_again().await;
            shut[number].store(false, Ordering::Release);
        }
    })
    .await;
    for sender in &senders {
        assert!(sender.failures.is_empty(), "sender {}: {:?}", sender.number, sender.failures);
    }
    check_history(&cluster.client(0), &senders).await;
}

#[tokio::test]
async fn a_node_that_hung_wakes_up_fenced() {
    let cluster = Cluster::start().await;
    let shut = all_open(3);
    let senders = under_flow(&cluster, 9, &shut, async {
        shut[2].store(true, Ordering::Release);
        cluster.nodes[2].signal(Signal::SIGSTOP);
        wait_until("the others own everything", PATIENCE, async || {
            let rows = cluster.rows(0).await;
            let live = rows.iter().filter(|row| row["name"] != "n2");
            live.filter_map(|row| row["shards"].as_u64()).sum::<u64>() == 24
        })
        .await;
        cluster.nodes[2].signal(Signal::SIGCONT);
        shut[2].store(false, Ordering::Release);
        cluster.until_even().await;
    })
    .await;
    check_history(&cluster.client(1), &senders).await;
}

#[tokio::test]
async fn without_a_bus_nodes_go_on_by_inbox_and_scan() {
    let cluster = Cluster::build(2, false, |builder| builder.config("[instances]\nscan_seconds = 1")).await;
    let shut = all_open(2);
    let senders = under_flow(&cluster, 6, &shut, async {
        tokio::task::yield_now().await;
        wait_until("some stimuli were lodged", PATIENCE, async || {
            let shards = cluster.client(0).get("/v1/cluster/shards").await.expect(200);
            shards["items"].as_array().into_iter().flatten().filter_map(|row| row["lodged"].as_u64()).sum::<u64>() > 20
        })
        .await;
    })
    .await;
    check_history(&cluster.client(0), &senders).await;
}

#[tokio::test]
async fn redis_may_die_and_come_back_under_flow() {
    let mut cluster = Cluster::start().await;
    let mut redis = cluster.redis.take().unwrap();
    let shut = all_open(3);
    let senders = under_flow(&cluster, 9, &shut, async {
        redis.kill().await;
        let bus = |node: usize| {
            let client = cluster.client(node);
            async move { client.get("/health/ready").await.json()["checks"]["bus"].clone() }
        };
        wait_until("health says that the bus is down", PATIENCE, async || bus(0).await != "ok").await;
        redis.start_again().await;
        for node in 0..3 {
            wait_until("the bus is up again", PATIENCE, async || bus(node).await == "ok").await;
        }
    })
    .await;
    for sender in &senders {
        assert!(sender.failures.is_empty(), "without Redis it is slower, not refused: {:?}", sender.failures);
    }
    check_history(&cluster.client(0), &senders).await;
}

#[tokio::test]
async fn an_operator_drains_a_node_and_nobody_notices() {
    let cluster = Cluster::start().await;
    let shut = all_open(3);
    let url = format!("http://{}", cluster.nodes[0].http());
    let senders = under_flow(&cluster, 9, &shut, async {
        let ended = node::run(&["node", "drain", "n1", "--url", &url]).await;
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    })
    .await;
    for sender in &senders {
        assert!(sender.failures.is_empty(), "{:?}", sender.failures);
    }
    let rows = cluster.rows(0).await;
    let drained = rows.iter().find(|row| row["name"] == "n1").unwrap();
    assert_eq!((&drained["shards"], &drained["status"]), (&json!(0), &json!("draining")));
    check_history(&cluster.client(1), &senders).await;
}

#[tokio::test]
async fn a_node_that_stops_names_another_that_stays() {
    let mut cluster = Cluster::build_uneven(3, true, |number, builder| {
        builder.env("SOPHONT__HTTP__ADVERTISE", format!("http://n{number}.test:80"))
    })
    .await;
    cluster.until_even().await;
    let (first, second) = (cluster.client(0), cluster.client(1));
    let refused = async |door: &crate::support::Http| {
        let answer = door.get("/health/ready").await;
        (answer.status == 503).then(|| answer.json()["elsewhere"].clone())
    };
    cluster.nodes[0].signal(Signal::SIGTERM);
    let named = wait_for("readiness says no", PATIENCE, async || refused(&first).await).await;
    assert!([json!("http://n1.test:80"), json!("http://n2.test:80")].contains(&named), "{named}");
    assert!(cluster.nodes[0].wait_exit(PATIENCE).await.success());
    cluster.nodes[1].signal(Signal::SIGTERM);
    let named = wait_for("readiness says no", PATIENCE, async || refused(&second).await).await;
    assert_eq!(named, json!("http://n2.test:80"));
}

#[tokio::test]
async fn a_light_node_has_less_and_one_that_is_burdened_sheds_without_a_failed_request() {
    // The load of the burdened one is averaged over a second, so that the test need not wait for long.
    let cluster = Cluster::build_uneven(3, true, |number, builder| {
        let [weight, busy, window] = [["100", "100", "0"], ["50", "100", "0"], ["100", "1000", "1"]][number];
        builder
            .env("SOPHONT__NODE__WEIGHT", weight)
            .env("SOPHONT__FAULTS__BUSY_PERMILLE", busy)
            .env("SOPHONT__SCALING__LOAD_SECONDS", window)
    })
    .await;
    let shut = all_open(3);
    let senders = under_flow(&cluster, 9, &shut, async {
        // Of 24 shards: 100, 50 and 63 parts of 213.
        wait_until("shares follow weights and loads", PATIENCE, async || {
            let rows = cluster.rows(0).await;
            let of =
                |name: &str, what: &str| rows.iter().find(|row| row["name"] == name).and_then(|row| row[what].as_u64());
            let shares = ["n0", "n1", "n2"].map(|name| of(name, "shards").unwrap_or_default());
            of("n2", "weight") == Some(63)
                && (11..=12).contains(&shares[0])
                && (5..=6).contains(&shares[1])
                && (7..=8).contains(&shares[2])
        })
        .await;
    })
    .await;
    for sender in &senders {
        assert!(sender.failures.is_empty(), "{:?}", sender.failures);
    }
    check_history(&cluster.client(1), &senders).await;
    let moved = metric(&cluster.client(2), "sophont_cluster_moved_shards_total{reason=\"weight\"}").await;
    assert!(moved > 0.0, "{moved}");
    let rows = cluster.rows(0).await;
    let row = rows.iter().find(|row| row["name"] == "n2").unwrap();
    assert_eq!((&row["report"]["busy_permille"], &row["load"]["busy_permille"]), (&json!(1000), &json!(1000)));
    wait_until("the bus tells loads", PATIENCE, async || {
        cluster.rows(0).await.iter().any(|row| row["name"] == "n2" && row["report"]["by"] == "bus")
    })
    .await;
}
