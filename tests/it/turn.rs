//! Turns over HTTP: one per stimulus id, serial, ordered, behind their tenant's wall, and nothing leaves before the commit
//! (promises 2, 3, 5 and 7).

use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use sophont::telemetry::metric::DELIVERY_GIVEN_UP;

use crate::support::{
    Http, Node, PATIENCE,
    http::{blockable, echo, slow},
    metric, mosquitto, wait_until,
};

/// Longer than anything a test does while an instance is blocked.
const BLOCKED_MS: u64 = 4_000;

#[tokio::test]
async fn a_turn_says_what_it_decided() {
    let node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let turn = http.say("lamp", "s1", "hello").await.expect(200);
    assert_eq!(turn["turn"], 1, "{turn}");
    assert_eq!(turn["outcome"], "replied", "{turn}");
    assert_eq!(turn["reply"]["content"], "hello", "{turn}");
    assert_eq!(turn["stimulus"]["id"], "s1", "{turn}");
    assert_eq!(turn["engine"], "reflex", "{turn}");
    assert_eq!(http.turns("lamp").await, std::slice::from_ref(&turn), "history shows what the sender was told");
    let stimulus = http.stimulus("s1").await.expect(200);
    assert_eq!(stimulus["status"], "decided", "{stimulus}");
    assert_eq!(stimulus["instance"], "lamp", "{stimulus}");
    assert_eq!(stimulus["turn"], turn, "{stimulus}");
}

#[tokio::test]
async fn a_repeated_id_returns_the_first_result() {
    let mut node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let first = http.say("lamp", "s1", "one").await.expect(200);
    assert_eq!(http.say("lamp", "s1", "one").await.expect(200), first);
    assert_eq!(http.say("lamp", "s1", "other words").await.expect(200), first, "the id decides, not the content");
    let by_header = http.request(Method::POST, "/v1/instances/lamp/stimuli").header("Idempotency-Key", "s1");
    assert_eq!(Http::send(by_header.json(&json!({"content": "one"}))).await.expect(200), first);
    assert_eq!(
        http.say("other", "s1", "elsewhere").await.expect(200)["turn"],
        1,
        "an id is unique within its instance"
    );

    node.restart().await;
    let http = node.client();
    assert_eq!(http.say("lamp", "s1", "after a restart").await.expect(200), first);
    assert_eq!(http.decided("lamp").await, ["one"]);
    assert_eq!(http.say("lamp", "s2", "two").await.expect(200)["turn"], 2);
}

#[tokio::test]
async fn the_same_id_from_many_at_once_is_decided_once() {
    let node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let answers = join_all((0..64).map(|n| {
        let http = http.clone();
        async move { http.say("lamp", "s1", &format!("from {n}")).await.expect(200) }
    }))
    .await;
    assert!(answers.iter().all(|answer| *answer == answers[0]), "all are told the same turn");
    assert_eq!(http.turns("lamp").await, answers[..1]);
}

#[tokio::test]
async fn the_same_id_while_the_first_is_thought_about_is_decided_once() {
    let node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &slow(500)).await;
    let answers = join_all((0..16).map(|n| {
        let http = http.clone();
        async move { http.say("lamp", "s1", &format!("from {n}")).await.expect(200) }
    }))
    .await;
    assert!(answers.iter().all(|answer| *answer == answers[0]), "all are told the same turn");
    assert_eq!(http.turns("lamp").await.len(), 1);
}

#[tokio::test]
async fn concurrent_stimuli_become_serial_turns_in_each_senders_order() {
    const SENDERS: usize = 8;
    const EACH: usize = 40;
    let node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let told: Vec<Vec<Value>> = join_all((0..SENDERS).map(|sender| {
        let http = http.clone();
        async move {
            let mut told = Vec::new();
            for n in 0..EACH {
                let text = format!("{sender} {n:03}");
                told.push(http.say("lamp", &format!("s{sender}-{n}"), &text).await.expect(200));
            }
            told
        }
    }))
    .await;

    let turns = http.turns("lamp").await;
    let numbers: Vec<u64> = turns.iter().filter_map(|turn| turn["turn"].as_u64()).collect();
    assert_eq!(numbers, (1..=(SENDERS * EACH) as u64).collect::<Vec<_>>(), "numbered from 1 without gaps");
    for (sender, told) in told.iter().enumerate() {
        let prefix = format!("{sender} ");
        let own = |turn: &&Value| turn["stimulus"]["content"].as_str().is_some_and(|text| text.starts_with(&prefix));
        assert_eq!(turns.iter().filter(own).collect::<Vec<_>>(), told.iter().collect::<Vec<_>>(), "sender {sender}");
    }
    let state = http.get("/v1/instances/lamp/state").await.expect(200);
    assert_eq!(state["reported"]["last"], turns.last().expect("turns")["stimulus"]["content"]);
    assert_eq!(state["version"], turns.last().expect("turns")["version"]);
}

#[tokio::test]
async fn what_waits_is_decided_by_priority_then_arrival() {
    let node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &blockable(BLOCKED_MS)).await;
    http.drop_in("lamp", &json!({"id": "block", "content": "block"})).await.expect(202);
    http.until_status("block", "thinking").await;
    for (content, priority) in [
        ("b1", "background"),
        ("t1", "timer"),
        ("d1", "device"),
        ("h1", "human"),
        ("b2", "background"),
        ("t2", "timer"),
        ("d2", "device"),
        ("h2", "human"),
    ] {
        let stimulus = json!({"id": content, "content": content, "priority": priority});
        http.drop_in("lamp", &stimulus).await.expect(202);
    }
    assert_ne!(http.stimulus("block").await.expect(200)["status"], "decided", "all arrived while it was busy");
    let decided = http.until_decided("lamp", 9).await;
    assert_eq!(decided, ["block", "h1", "h2", "d1", "d2", "t1", "t2", "b1", "b2"]);
}

#[tokio::test]
async fn a_wait_that_is_too_short_ends_with_a_place_to_ask() {
    let node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &slow(1_500)).await;
    let path = "/v1/instances/lamp/stimuli?wait=0.1";
    let answer = http.post(path, &json!({"id": "s1", "content": "think"})).await;
    answer.expect(202);
    let place = answer.header("location").to_owned();
    assert!(place.starts_with("/v1/stimuli/s1"), "{place}");
    let waiting = http.get(&place).await.expect(200);
    assert!(waiting["status"] == "accepted" || waiting["status"] == "thinking", "{waiting}");
    assert!(waiting["accepted_at"].is_string(), "{waiting}");
    let turn = http.until_status("s1", "decided").await["turn"].clone();
    assert_eq!(turn["reply"]["content"], "done", "{turn}");
    assert_eq!(http.say("lamp", "s1", "again").await.expect(200), turn);

    let unnamed = http.post("/v1/instances/lamp/stimuli?wait=0", &json!({"content": "no id"})).await;
    unnamed.expect(202);
    let place = unnamed.header("location").to_owned();
    wait_until("the place of a stimulus without an id shows its turn", PATIENCE, async || {
        http.get(&place).await.expect(200)["status"] == "decided"
    })
    .await;
    http.stimulus("nobody").await.problem(404, "STIMULUS_NOT_FOUND");
}

#[tokio::test]
async fn history_comes_in_pages() {
    let node = Node::start().await;
    let http = node.client();
    for n in 1..=7 {
        http.say("lamp", &format!("s{n}"), &format!("{n}")).await.expect(200);
    }
    let page = http.get("/v1/instances/lamp/turns?limit=3").await.expect(200);
    assert_eq!(numbers(&page), [1, 2, 3]);
    let page = http.get("/v1/instances/lamp/turns?after=3&limit=3").await.expect(200);
    assert_eq!(numbers(&page), [4, 5, 6]);
    let page = http.get("/v1/instances/lamp/turns?after=6&limit=3").await.expect(200);
    assert_eq!((numbers(&page), &page["next"]), (vec![7], &Value::Null));
}

fn numbers(page: &Value) -> Vec<u64> {
    page["items"].as_array().expect("a list").iter().filter_map(|turn| turn["turn"].as_u64()).collect()
}

#[tokio::test]
async fn the_twin_is_patched_under_its_version() {
    let mut node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let path = "/v1/instances/lamp/state";
    let state = http.patch(path, &json!({"desired": {"on": true, "level": 3}})).await.expect(200);
    let version = state["version"].as_u64().expect("a version");
    assert_eq!(
        (&state["desired"], &state["delta"]),
        (&json!({"on": true, "level": 3}), &json!({"on": true, "level": 3}))
    );

    let matching = |version: u64| http.request(Method::PATCH, path).header("If-Match", format!("\"{version}\""));
    let reported = json!({"reported": {"on": true}, "desired": {"level": null}});
    let next = Http::send(matching(version).json(&reported)).await.expect(200);
    assert_eq!(next["version"], version + 1);
    assert_eq!((&next["desired"], &next["delta"]), (&json!({"on": true}), &json!({})));
    let stale = Http::send(matching(version).json(&json!({"desired": {"on": false}}))).await;
    stale.problem(412, "VERSION_MISMATCH");
    assert_eq!(http.get(path).await.expect(200), next, "a refused patch changes nothing");
    http.patch(path, &json!({"wished": {}})).await.problem(400, "INVALID");

    // Of many who read the same version, one wins.
    let race = (0..16).map(|n| Http::send(matching(version + 1).json(&json!({"desired": {"n": n}}))));
    let won = join_all(race).await.iter().filter(|answer| answer.status == 200).count();
    assert_eq!(won, 1);
    let last = http.get(path).await.expect(200);
    node.restart().await;
    assert_eq!(node.client().get(path).await.expect(200), last);
}

#[tokio::test]
async fn a_rule_that_fails_does_not_swallow_a_patch() {
    let node = Node::start().await;
    let http = node.client();
    let rule = json!({"when": "true", "do": [{"set": {"reported.last": "{{stimulus.content}}"}}], "stop": true});
    http.put_instance("lamp", &json!({"reflexes": [rule]})).await;
    let path = "/v1/instances/lamp/state";
    let told = http.patch(path, &json!({"desired": {"on": true}})).await.expect(200);
    assert_eq!(told["desired"], json!({"on": true}), "a patch has no content, which the rule asks for: {told}");
    assert_eq!(http.get(path).await.expect(200), told);
    let turns = http.turns("lamp").await;
    assert!(turns[0]["error"].as_str().is_some_and(|error| error.contains("content")), "it is on record: {turns:?}");
}

#[tokio::test]
async fn a_forgotten_instance_leaves_nothing() {
    let node = Node::start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    http.say("lamp", "s1", "secret").await.expect(200);
    assert!(http.delete("/v1/instances/lamp").await.status.is_success());
    http.get("/v1/instances/lamp").await.problem(404, "INSTANCE_NOT_FOUND");
    http.stimulus("s1").await.problem(404, "STIMULUS_NOT_FOUND");
    http.delete("/v1/instances/lamp").await.problem(404, "INSTANCE_NOT_FOUND");
    let anew = http.say("lamp", "s1", "anew").await.expect(200);
    assert_eq!((&anew["turn"], &anew["stimulus"]["content"]), (&json!(1), &json!("anew")));
}

const TWO_TENANTS: &str = r#"
[[auth.tokens]]
token = "token-of-ann"
tenant = "red"
name = "ann"

[[auth.tokens]]
token = "token-of-bob"
tenant = "blue"
name = "bob"

[[auth.tokens]]
token = "token-of-eve"
tenant = "red"
name = "eve"
scopes = ["read"]

[[auth.tokens]]
token = "token-of-lamp"
tenant = "red"
name = "lamp"
device = true
instance = "lamp"
"#;

#[tokio::test]
async fn tenants_are_walls() {
    let node = Node::builder().config(TWO_TENANTS).start().await;
    let (ann, bob) = (node.client().with_token("token-of-ann"), node.client().with_token("token-of-bob"));
    ann.put_instance("lamp", &echo()).await;
    ann.say("lamp", "s1", "a secret of red").await.expect(200);

    // What is not his looks to Bob like what is nowhere.
    for path in ["", "/turns", "/state", "/dead-letters"] {
        let hers = bob.get(&format!("/v1/instances/lamp{path}")).await.problem(404, "INSTANCE_NOT_FOUND");
        let nowhere = bob.get(&format!("/v1/instances/nowhere{path}")).await.problem(404, "INSTANCE_NOT_FOUND");
        assert_eq!(hers["detail"], nowhere["detail"], "{path}");
    }
    let mut events = Http::open(bob.request(Method::GET, "/v1/instances/lamp/events")).await;
    ann.say("lamp", "s2", "another secret of red").await.expect(200);
    bob.stimulus("s1").await.problem(404, "STIMULUS_NOT_FOUND");
    bob.delete("/v1/instances/lamp").await.problem(404, "INSTANCE_NOT_FOUND");
    assert_eq!(bob.get("/v1/instances").await.expect(200)["items"], json!([]));

    // The same names in his tenant are his own things.
    let his = bob.say("lamp", "s1", "blue").await.expect(200);
    assert_eq!((&his["turn"], &his["stimulus"]["content"]), (&json!(1), &json!("blue")));
    let seen = events.until("blue").await;
    assert!(!seen.contains("secret"), "{seen}");
    bob.patch("/v1/instances/lamp/state", &json!({"desired": {"colour": "blue"}})).await.expect(200);
    let secrets = ["a secret of red", "another secret of red"];
    assert_eq!(ann.decided("lamp").await, secrets);
    assert_eq!(ann.get("/v1/instances/lamp/state").await.expect(200)["desired"], json!({}));
    assert_eq!(ann.stimulus("s1").await.expect(200)["turn"]["stimulus"]["content"], "a secret of red");
    assert!(bob.delete("/v1/instances/lamp").await.status.is_success());
    assert_eq!(ann.decided("lamp").await, secrets);
}

#[tokio::test]
async fn a_token_opens_what_it_says_and_nothing_else() {
    let node = Node::builder().config(TWO_TENANTS).start().await;
    let nobody = node.client();
    nobody.get("/v1/instances").await.problem(401, "UNAUTHENTICATED");
    nobody.with_token("token-of-nobody").get("/v1/instances").await.problem(401, "UNAUTHENTICATED");

    let ann = nobody.with_token("token-of-ann");
    ann.put_instance("lamp", &echo()).await;
    let eve = nobody.with_token("token-of-eve");
    eve.get("/v1/instances/lamp").await.expect(200);
    eve.say("lamp", "s1", "x").await.problem(403, "FORBIDDEN");
    eve.put("/v1/instances/lamp", &echo()).await.problem(403, "FORBIDDEN");
    eve.patch("/v1/instances/lamp/state", &json!({"desired": {}})).await.problem(403, "FORBIDDEN");
    eve.delete("/v1/instances/lamp").await.problem(403, "FORBIDDEN");
    let lamp = nobody.with_token("token-of-lamp");
    lamp.say("lamp", "s2", "it is me").await.expect(200);
    let other = lamp.say("door", "s3", "open").await;
    assert!(matches!(other.status.as_u16(), 403 | 404), "{} {}", other.status, other.text);
    assert_eq!(ann.decided("lamp").await, ["it is me"]);
}

#[tokio::test]
async fn nothing_leaves_before_its_commit() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let full = home.path().join("disk-is-full");
    let faults = format!("[faults]\ndisk_full_file = {:?}", full.display().to_string());
    let node = Node::builder().config(&faults).start().await;
    let http = node.client();
    http.put_instance("lamp", &echo()).await;
    let replies = mosquitto::Subscriber::start(node.mqtt(), &["-t", "sophont/default/lamp/out/#", "-F", "%p"]).await;
    let devices = ["-t", "sophont/default/lamp/in/text", "-q", "1", "-m"];
    mosquitto::publish(node.mqtt(), &[&devices[..], &["before"]].concat()).await;
    replies.wait(1).await;

    std::fs::write(&full, "").expect("the disk is full now");
    let refused = http.say("lamp", "s1", "while it is full").await.problem(503, "STORE_FULL");
    assert!(refused["hint"].is_string(), "{refused}");
    assert_eq!(replies.messages().len(), 1, "{:?}", replies.messages());
    assert_eq!(http.decided("lamp").await, ["before"], "the log can be read and has nothing new");

    std::fs::remove_file(&full).expect("the disk has room again");
    http.say("lamp", "s1", "while it is full").await.expect(200);
    mosquitto::publish(node.mqtt(), &[&devices[..], &["after"]].concat()).await;
    let told = replies.wait(2).await;
    assert!(told[1].contains("after"), "{told:?}");
    assert_eq!(http.decided("lamp").await, ["before", "while it is full", "after"]);
}

/// Two that answer whatever they hear from each other: the count of hops goes with the stimulus, wherever it is decided.
#[tokio::test]
async fn two_instances_that_answer_each_other_come_to_an_end() {
    const HOPS: usize = 6;
    let node = Node::builder().config(&format!("[delivery]\nmax_hops = {HOPS}")).start().await;
    let http = node.client();
    for (own, other) in [("ping", "pong"), ("pong", "ping")] {
        let answer =
            json!([{"when": "true", "do": [{"send": {"instance": other, "channel": "ball", "content": "yours"}}]}]);
        http.put_instance(own, &json!({"engine": "reflex", "reflexes": answer})).await;
    }
    for round in 1_u8..=2 {
        http.say("ping", &format!("serve{round}"), "play").await.expect(200);
        wait_until("the last one is given up", PATIENCE, async || {
            metric(&http, &format!("{DELIVERY_GIVEN_UP}{{kind=\"send\"}}")).await >= f64::from(round)
        })
        .await;
        let (ping, pong) = (http.turns("ping").await, http.turns("pong").await);
        assert_eq!(ping.len() + pong.len(), usize::from(round) * (1 + HOPS), "each round is as long: {ping:?}");
        let last = ping.last().unwrap()["stimulus"]["id"].as_str().unwrap();
        assert!(last.starts_with(&format!("fx{HOPS}.pong.")), "{last}");
    }
}
