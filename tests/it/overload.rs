//! Limits refuse in words, with a time to try again, and spare the others (promise 8); a full disk acknowledges nothing
//! (promise 1).

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::steps::outside::{Outside, Point, Said, Stop};
use crate::support::{
    Answer, Node, PATIENCE,
    http::{blockable, echo},
    wait_until,
};

/// A model that answers when it is let.
async fn held_model() -> Outside {
    let outside = Outside::start(|_, _| Said::Answer("done", vec![])).await;
    outside.stop(Stop::Before(Point::Model(0)));
    outside
}

/// An instance whose thoughts about "block" take as long as the model is held.
fn held() -> Value {
    json!({"engine": "llm", "reflexes": blockable(0)["reflexes"]})
}

/// A refusal that may be repeated says when.
#[track_caller]
fn assert_retryable(answer: &Answer, status: u16, code: &str) {
    let problem = answer.problem(status, code);
    let seconds = answer.header("retry-after").parse::<u64>();
    assert!(seconds.is_ok_and(|seconds| (1..=60).contains(&seconds)), "{:?}", answer.headers);
    assert!(problem["hint"].is_string() && problem["title"].is_string() && problem["type"].is_string(), "{problem}");
}

#[tokio::test]
async fn a_full_inbox_is_refused_and_others_are_served() {
    const LIMIT: usize = 5;
    let outside = held_model().await;
    let config = format!("{}[instances]\nmax_inbox = {LIMIT}\n", outside.config());
    let node = Node::builder().config(&config).start().await;
    let http = node.client();
    http.put_instance("busy", &held()).await;
    http.put_instance("calm", &echo()).await;
    http.drop_in("busy", &json!({"id": "block", "content": "block"})).await.expect(202);
    http.until_status("block", "thinking").await;
    let mut accepted = Vec::new();
    let mut refused = 0;
    for n in 0..3 * LIMIT {
        let id = format!("s{n:02}");
        let answer = http.drop_in("busy", &json!({"id": id, "content": id})).await;
        if answer.status == 202 {
            accepted.push(id);
        } else {
            assert_retryable(&answer, 503, "INBOX_FULL");
            refused += 1;
        }
    }
    assert!((LIMIT - 1..=LIMIT).contains(&accepted.len()), "accepted {accepted:?} with a limit of {LIMIT}");
    assert_eq!(refused, 3 * LIMIT - accepted.len());
    for n in 0..20 {
        http.say("calm", &format!("s{n}"), "hello").await.expect(200);
    }
    assert_ne!(http.stimulus("block").await.expect(200)["status"], "decided", "it was busy all the while");
    outside.go();

    // What was accepted is decided, what was refused is not, and there is room again.
    http.until_decided("busy", 1 + accepted.len()).await;
    http.say("busy", "later", "later").await.expect(200);
    let mut expected = vec![String::from("block")];
    expected.extend(accepted);
    expected.push("later".into());
    assert_eq!(http.decided("busy").await, expected);
}

#[tokio::test]
async fn a_profile_may_have_its_own_inbox_limit() {
    let outside = held_model().await;
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    let mut profile = held();
    profile["limits"] = json!({"max_inbox": 2});
    http.put_instance("busy", &profile).await;
    http.drop_in("busy", &json!({"id": "block", "content": "block"})).await.expect(202);
    http.until_status("block", "thinking").await;
    let sent =
        join_all((0..10).map(|n| {
            let http = http.clone();
            // Each has a sender of its own: what is sent behind a refused one is refused for that.
            async move {
                http.drop_in("busy", &json!({"id": format!("s{n}"), "sender": format!("d{n}"), "content": "x"})).await
            }
        }))
        .await;
    let refused: Vec<_> = sent.iter().filter(|answer| answer.status != 202).collect();
    assert!(refused.len() >= 8, "{} of 10 were refused with a limit of 2", refused.len());
    refused.iter().for_each(|answer| assert_retryable(answer, 503, "INBOX_FULL"));
}

#[tokio::test]
async fn a_full_disk_acknowledges_nothing_and_passes() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let full = home.path().join("disk-is-full");
    let faults = format!("[faults]\ndisk_full_file = {:?}", full.display().to_string());
    let mut node = Node::builder().config(&faults).start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    http.put_instance("thinker", &blockable(10)).await;
    http.say("lamp", "s0", "before").await.expect(200);

    std::fs::write(&full, "").expect("the disk is full now");
    for n in 1..=20 {
        assert_retryable(&http.say("lamp", &format!("s{n}"), "during").await, 503, "STORE_FULL");
        let slow = http.drop_in("thinker", &json!({"id": format!("t{n}"), "content": "block"})).await;
        assert_retryable(&slow, 503, "STORE_FULL");
    }
    assert_retryable(&http.put("/v1/instances/new", &echo()).await, 503, "STORE_FULL");
    assert_eq!(http.decided("lamp").await, ["before"], "reads go on");
    http.get("/health/live").await.expect(200);

    std::fs::remove_file(&full).expect("the disk has room again");
    for n in 1..=20 {
        http.say("lamp", &format!("s{n}"), "after").await.expect(200);
    }
    assert_eq!(http.turns("lamp").await.len(), 21);
    wait_until("the node is ready again", PATIENCE, async || http.get("/health/ready").await.status == 200).await;

    // What was refused was not kept anywhere either.
    node.kill9().await;
    node.start_again().await;
    let http = node.client();
    assert_eq!(http.turns("lamp").await.len(), 21);
    assert_eq!(http.turns("thinker").await.len(), 0);
    http.get("/v1/instances/new").await.problem(404, "INSTANCE_NOT_FOUND");
}
