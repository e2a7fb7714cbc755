//! A panic in one instance's turn touches nobody else, and a poison stimulus ends in the dead letters (promise 8, and the
//! isolation of ARCHITECTURE section 3).

use futures_util::future::join_all;
use serde_json::json;

use crate::support::{Node, PATIENCE, http::echo, wait_until};

/// All instances live on one shard and one thread, so that a panic has every chance to take neighbours along.
const ONE_SHARD: &str = "[node]\narbiters = 1\n[cluster]\nshards = 1\n";
const POISON: &str = "[faults]\npanic_on = 'poison'\n";

#[tokio::test]
async fn neighbours_answer_while_an_instance_panics() {
    let node = Node::builder().config(ONE_SHARD).config(POISON).start().await;
    let http = node.client();
    let names: Vec<String> = (0..8).map(|n| format!("neighbour-{n}")).collect();
    join_all(names.iter().map(|name| http.say(name, "s0", "hello"))).await.iter().for_each(|answer| {
        answer.expect(200);
    });
    let poisoner = async {
        for n in 0..10 {
            http.say("victim", &format!("poison-{n}"), "poison").await.problem(422, "DEAD_LETTER");
        }
    };
    let neighbour = async |name: &String| {
        for n in 1..=25 {
            http.say(name, &format!("s{n}"), &format!("{n}")).await.expect(200);
        }
    };
    tokio::join!(poisoner, join_all(names.iter().map(neighbour)));
    for name in &names {
        assert_eq!(http.turns(name).await.len(), 26, "{name}");
    }
    let metrics = http.get("/metrics").await.text;
    assert!(metrics.contains("sophont_instance_panics_total"), "the panics are counted");
    http.get("/health/ready").await.expect(200);
}

#[tokio::test]
async fn a_poison_stimulus_ends_in_the_dead_letters_and_its_instance_lives_on() {
    let mut node = Node::builder().config(ONE_SHARD).config(POISON).start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    http.say("lamp", "s1", "before").await.expect(200);
    http.drop_in("lamp", &json!({"id": "bad", "content": "poison"})).await;
    http.say("lamp", "s2", "after").await.expect(200);
    let dead = http.until_status("bad", "dead").await;
    assert_eq!(dead["instance"], "lamp", "{dead}");
    assert_eq!(http.decided("lamp").await, ["before", "after"]);
    assert_eq!(http.get("/v1/instances/lamp/state").await.expect(200)["reported"]["last"], "after");

    let listed = http.get("/v1/instances/lamp/dead-letters").await.expect(200);
    let letter = &listed["items"][0];
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(
        (&letter["stimulus"]["id"], &letter["stimulus"]["content"]),
        (&json!("bad"), &json!("poison")),
        "{listed}"
    );
    assert_eq!(letter["tries"], u64::from(sophont::types::limits::MAX_TRIES), "{listed}");
    assert!(letter["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{listed}");
    http.say("lamp", "bad", "poison").await.problem(422, "DEAD_LETTER");

    // Tried again while the fault is there, it dies again.
    let retry = "/v1/instances/lamp/dead-letters/bad/retry";
    assert!(http.post(retry, &json!({})).await.status.is_success());
    http.until_status("bad", "dead").await;

    // The fault is mended: the dead letter survived the restart, is tried again and decided.
    node.term();
    assert!(node.wait_exit(PATIENCE).await.success());
    node.reconfigure(|builder| builder.config(ONE_SHARD));
    node.start_again().await;
    let http = node.client();
    assert_eq!(http.get("/v1/instances/lamp/dead-letters").await.expect(200)["items"][0]["stimulus"]["id"], "bad");
    assert!(http.post(retry, &json!({})).await.status.is_success());
    let decided = http.until_status("bad", "decided").await;
    assert_eq!(decided["turn"]["reply"]["content"], "poison", "{decided}");
    assert_eq!(http.decided("lamp").await, ["before", "after", "poison"]);
    assert_eq!(http.get("/v1/instances/lamp/dead-letters").await.expect(200)["items"], json!([]));
    http.post(retry, &json!({})).await.problem(404, "DEAD_LETTER_NOT_FOUND");
}

#[tokio::test]
async fn stimuli_that_waited_behind_a_poison_are_decided() {
    let node = Node::builder().config(ONE_SHARD).config(POISON).start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let texts: Vec<String> = (0..60).map(|n| if n % 20 == 7 { "poison".into() } else { format!("{n:02}") }).collect();
    let sent = texts.iter().enumerate().map(|(n, text)| {
        let http = http.clone();
        async move { http.say("lamp", &format!("s{n}"), text).await }
    });
    for (answer, text) in join_all(sent).await.iter().zip(&texts) {
        if text == "poison" {
            answer.problem(422, "DEAD_LETTER");
        } else {
            answer.expect(200);
        }
    }
    let mut decided = http.decided("lamp").await;
    decided.sort();
    let healthy: Vec<_> = texts.iter().filter(|text| *text != "poison").cloned().collect();
    assert_eq!(decided, healthy, "each healthy one once");
    wait_until("three dead letters", PATIENCE, async || {
        let listed = http.get("/v1/instances/lamp/dead-letters").await.expect(200);
        listed["items"].as_array().is_some_and(|items| items.len() == 3)
    })
    .await;
}
