//! The HTTP door over the wire, against a real node: instances, stimuli, streams, history, the twin, dead letters, pages.
//!
//! Not here: bad input, bad clients and who may do what (`hostile.rs`).

use std::time::Duration;

use futures_util::StreamExt;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use crate::support::{About, Answer, Http, Node, PATIENCE, wait_for, wait_until};

/// An event of a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub name: String,
    id: Option<String>,
    pub data: Value,
}

/// A stream of events being read.
pub struct Events {
    bytes: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    text: String,
}

impl Events {
    pub async fn open(request: RequestBuilder) -> Self {
        let answer = request.header("accept", "text/event-stream").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["content-type"], "text/event-stream");
        Self { bytes: Box::pin(answer.bytes_stream()), text: String::new() }
    }

    /// The next event, `None` at the end of the stream (or when the node is gone).
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((frame, rest)) = self.text.split_once("\n\n") {
                let event = parse(frame);
                self.text = rest.to_owned();
                match event {
                    Some(event) => return Some(event),
                    None => continue,
                }
            }
            let chunk = tokio::time::timeout(PATIENCE, self.bytes.next()).await.expect("an event in time");
            self.text.push_str(std::str::from_utf8(&chunk?.ok()?).unwrap());
        }
    }

    pub async fn until(&mut self, name: &str) -> Vec<Event> {
        let mut seen = Vec::new();
        loop {
            let event = self.next().await.unwrap_or_else(|| panic!("the stream ended before {name}: {seen:?}"));
            let last = event.name == name;
            seen.push(event);
            if last {
                return seen;
            }
        }
    }
}

fn parse(frame: &str) -> Option<Event> {
    let (mut name, mut id, mut data) = (None, None, Vec::new());
    for line in frame.lines() {
        match line.split_once(": ") {
            Some(("event", value)) => name = Some(value.to_owned()),
            Some(("id", value)) => id = Some(value.to_owned()),
            Some(("data", value)) => data.push(value),
            _ => assert_eq!(line, ":", "a comment or a field"),
        }
    }
    Some(Event { name: name?, id, data: serde_json::from_str(&data.join("\n")).unwrap() })
}

fn words(events: &[Event]) -> String {
    events.iter().filter(|event| event.name == "token").map(|event| event.data["text"].as_str().unwrap()).collect()
}

/// What a client has after these events: words after the last restart.
fn text_shown(events: &[Event]) -> String {
    let restart = events.iter().rposition(|event| event.data["step"] == "restart").map_or(0, |at| at + 1);
    words(&events[restart..])
}

const STORY: &str = "one two three four five six seven eight nine ten eleven twelve";

/// An instance that answers with [`STORY`], word by word over `delay_ms`.
async fn storyteller(http: &Http, id: &str, delay_ms: u64) {
    let profile = json!({"engine": "scripted", "script": {"reply": STORY, "delay_ms": delay_ms}});
    http.put(&format!("/v1/instances/{id}"), &profile).await.expect(201);
}

async fn say(http: &Http, id: &str, body: Value) -> Answer {
    http.post(&format!("/v1/instances/{id}/stimuli"), &body).await
}

#[tokio::test]
async fn an_instance_is_created_listed_and_forgotten() {
    let node = Node::start().await;
    let http = node.client();
    for (id, room) in [("b", "hall"), ("a", "hall"), ("c", "attic")] {
        let profile = json!({"persona": "a lamp", "engine": "reflex", "labels": {"room": room}});
        let created = http.put(&format!("/v1/instances/{id}"), &profile).await.expect(201);
        assert_eq!((&created["id"], &created["profile"]["labels"]["room"]), (&json!(id), &json!(room)));
    }
    let replaced = http.put("/v1/instances/a", &json!({"persona": "a fan", "labels": {"room": "hall"}})).await;
    assert_eq!(replaced.expect(200)["profile"]["persona"], "a fan");

    let shown = http.get("/v1/instances/a").await.expect(200);
    assert_eq!((&shown["turn"], &shown["version"], &shown["inbox"]), (&json!(0), &json!(0), &json!(0)));
    assert!(shown["created_at"].as_str().unwrap().ends_with('Z') && shown["node"].is_string());

    let ids = |page: &Value| page["items"].as_array().unwrap().iter().map(|i| i["id"].clone()).collect::<Vec<_>>();
    let first = http.get("/v1/instances?limit=2").await.expect(200);
    assert_eq!((ids(&first), &first["next"]), (vec![json!("a"), json!("b")], &json!("b")));
    let second = http.get("/v1/instances?limit=2&after=b").await.expect(200);
    assert_eq!((ids(&second), &second["next"]), (vec![json!("c")], &Value::Null));
    let hall = http.get("/v1/instances?label=room%3Dhall&consistency=eventual").await.expect(200);
    assert_eq!(ids(&hall), vec![json!("a"), json!("b")]);

    assert_eq!(http.delete("/v1/instances/a").await.status, 204);
    for path in ["", "/turns", "/state", "/dead-letters"] {
        http.get(&format!("/v1/instances/a{path}")).await.problem(404, "INSTANCE_NOT_FOUND");
    }
    http.delete("/v1/instances/a").await.problem(404, "INSTANCE_NOT_FOUND");
}

#[tokio::test]
async fn a_stimulus_is_decided_once_under_its_id() {
    let node = Node::start().await;
    let http = node.client();
    let rules = json!({"reflexes": [{"when": "stimulus.channel == 'temperature' && stimulus.data.celsius > 30.0",
        "do": [{"reply": "hot: {{stimulus.data.celsius}}"}, {"set": {"reported.hot": true}},
               {"publish": {"channel": "fan", "data": {"on": true}}}]}]});
    http.put("/v1/instances/room", &rules).await.expect(201);
    let body = json!({"data": {"celsius": 31.5}, "channel": "temperature", "id": "m-1", "sender": "probe"});
    let first = say(&http, "room", body.clone()).await;
    let turn = first.expect(200);
    assert_eq!((&turn["turn"], &turn["outcome"], &turn["engine"]), (&json!(1), &json!("replied"), &json!("reflex")));
    assert_eq!(turn["reply"]["content"], "hot: 31.5");
    assert_eq!(turn["stimulus"]["data"], json!({"celsius": 31.5}));
    assert_eq!((&turn["stimulus"]["sender"], &turn["version"]), (&json!("probe"), &json!(1)));
    let publish = turn["effects"].as_array().unwrap().iter().find(|effect| effect["kind"] == "publish").unwrap();
    assert_eq!((&publish["channel"], &publish["data"]), (&json!("fan"), &json!({"on": true})));
    assert_eq!(first.header("idempotent-replayed"), "");

    let again = say(&http, "room", body).await;
    assert_eq!((again.expect(200), again.header("idempotent-replayed")), (turn.clone(), "true"));
    let by_header = http.request(Method::POST, "/v1/instances/room/stimuli").header("idempotency-key", "\"m-1\"");
    assert_eq!(Http::send(by_header.json(&json!({"content": "else"}))).await.expect(200), turn);

    let found = http.get("/v1/stimuli/m-1").await.expect(200);
    assert_eq!((&found["status"], &found["instance"], &found["turn"]), (&json!("decided"), &json!("room"), &turn));
    let turns = http.get("/v1/instances/room/turns").await.expect(200);
    assert_eq!((&turns["items"], &turns["next"]), (&json!([turn]), &Value::Null));

    // The same id in another instance is another stimulus; then the id alone does not say which.
    say(&http, "hall", json!({"content": "x", "id": "m-1"})).await.expect(200);
    let problem = http.get("/v1/stimuli/m-1").await.problem(409, "STIMULUS_AMBIGUOUS");
    assert!(problem["hint"].as_str().unwrap().contains("?instance="));
    assert_eq!(http.get("/v1/stimuli/m-1?instance=hall").await.expect(200)["instance"], "hall");
}

#[tokio::test]
async fn history_comes_in_pages() {
    let node = Node::start().await;
    let http = node.client();
    for number in 1..=5 {
        say(&http, "log", json!({"content": format!("message {number}")})).await.expect(200);
    }
    let mut numbers = Vec::new();
    let mut after = String::from("0");
    loop {
        let page = http.get(&format!("/v1/instances/log/turns?limit=2&after={after}")).await.expect(200);
        numbers.extend(page["items"].as_array().unwrap().iter().map(|turn| turn["turn"].as_u64().unwrap()));
        match page["next"].as_str() {
            Some(next) => after = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
}

#[tokio::test]
async fn nobody_waits_longer_than_they_asked() {
    let node = Node::start().await;
    let http = node.client();
    storyteller(&http, "slow", 1500).await;
    // On a busy machine it may take longer than that to be accepted: who is told so repeats it.
    let late = wait_for("it is accepted within the wait", PATIENCE, async || {
        let told = http.post("/v1/instances/slow/stimuli?wait=0.05", &json!({"content": "tell", "id": "s-1"})).await;
        (told.status != 504).then_some(told)
    })
    .await;
    let accepted = late.expect(202);
    assert!(["accepted", "thinking"].contains(&accepted["status"].as_str().unwrap()), "{accepted}");
    assert_eq!(late.header("location"), "/v1/stimuli/s-1?instance=slow");
    let never = http.post("/v1/instances/slow/stimuli?wait=0", &json!({"content": "more"})).await;
    never.expect(202);
    wait_until("the node thinks", PATIENCE, async || {
        http.get("/v1/stimuli/s-1").await.expect(200)["status"] == "thinking"
    })
    .await;
    for location in [late.header("location"), never.header("location")] {
        wait_until("it is decided", PATIENCE, async || {
            let found = http.get(location).await.expect(200);
            found["status"] == "decided" && found["turn"]["reply"]["content"] == STORY
        })
        .await;
    }
    // A fast turn with wait=0 is not waited for either, though it is done by then.
    let fast = http.post("/v1/instances/fast/stimuli?wait=0", &json!({"content": "x"})).await;
    assert_eq!(fast.expect(202)["status"], "decided");
}

#[tokio::test]
async fn an_answer_is_streamed_word_by_word() {
    let node = Node::start().await;
    let http = node.client();
    storyteller(&http, "teller", 300).await;
    let request =
        http.request(Method::POST, "/v1/instances/teller/stimuli").json(&json!({"content": "go", "id": "t-1"}));
    let mut stream = Events::open(request).await;
    let events = stream.until("turn").await;
    assert_eq!((&*events[0].name, &events[0].data["id"]), ("accepted", &json!("t-1")));
    assert_eq!(events[0].id.as_deref(), Some("t-1:0"));
    assert_eq!(words(&events), STORY);
    let indexes: Vec<_> = events.iter().filter_map(|event| event.data["index"].as_u64()).collect();
    assert_eq!(indexes, (0..indexes.len() as u64).collect::<Vec<_>>());
    let turn = events.last().unwrap();
    assert_eq!((turn.id.as_deref(), &turn.data["reply"]["content"]), (Some("t-1:turn"), &json!(STORY)));
    assert_eq!(stream.next().await, None);

    // A client that has everything is told to stop asking; one that has nothing of a decided stimulus gets the turn.
    let path = "/v1/stimuli/t-1?instance=teller";
    let all = http.request(Method::GET, path).header("accept", "text/event-stream").header("last-event-id", "t-1:turn");
    assert_eq!(Http::send(all).await.status, 204);
    let events = Events::open(http.request(Method::GET, path)).await.until("turn").await;
    assert_eq!(events.iter().map(|event| &*event.name).collect::<Vec<_>>(), ["accepted", "turn"]);

    // A turn that needs no thought streams as well.
    let fast = http.request(Method::POST, "/v1/instances/fast/stimuli").header("content-type", "application/json");
    let fast = fast.body("{\"data\": [1,\r\n\n 2]}");
    let events = Events::open(fast).await.until("turn").await;
    assert_eq!(events.last().unwrap().data["stimulus"]["data"], json!([1, 2]));
}

#[tokio::test]
async fn a_stream_resumes_after_its_client_failed() {
    let node = Node::start().await;
    let http = node.client();
    storyteller(&http, "teller", 1200).await;
    let request =
        || http.request(Method::POST, "/v1/instances/teller/stimuli").json(&json!({"content": "go", "id": "t-1"}));
    let mut seen = Vec::new();
    let mut stream = Events::open(request()).await;
    while words(&seen).split(' ').count() < 4 {
        seen.push(stream.next().await.unwrap());
    }
    drop(stream);
    let last = seen.iter().rev().find_map(|event| event.id.clone()).unwrap();
    // Whether it comes back while the answer is thought or when the turn is there, it gets the words it lacks, and no others.
    for _ in ["thinking", "decided"] {
        let mut stream = Events::open(request().header("last-event-id", &last)).await;
        let rest = stream.until("turn").await;
        assert!(rest.iter().all(|event| event.name != "accepted" && event.data["step"] != "restart"), "{rest:?}");
        assert_eq!(format!("{}{}", words(&seen), words(&rest)), STORY);
    }
    assert_eq!(http.get("/v1/instances/teller").await.expect(200)["turn"], 1);
    // One that has other words is told to forget them.
    let other = format!("t-1:1:{:x}:3:{:x}", 7, 7);
    let anew = Events::open(request().header("last-event-id", &other)).await.until("turn").await;
    assert_eq!((&anew[0].data["step"], words(&anew)), (&json!("restart"), String::from(STORY)));
}

#[tokio::test]
async fn a_stream_resumes_after_the_node_was_killed() {
    let mut node = Node::builder().stable_ports().start().await;
    let http = node.client();
    storyteller(&http, "teller", 1500).await;
    let request = || http.request(Method::POST, "/v1/instances/teller/stimuli").json(&json!({"content": "go"}));
    let mut seen = Vec::new();
    let mut stream = Events::open(request()).await;
    while words(&seen).split(' ').count() < 4 {
        seen.push(stream.next().await.unwrap());
    }
    node.kill9().await;
    while let Some(event) = stream.next().await {
        seen.push(event);
    }
    node.start_again().await;
    let last = seen.iter().rev().find_map(|event| event.id.clone()).unwrap();
    let mut stream = Events::open(request().header("last-event-id", &last)).await;
    seen.extend(stream.until("turn").await);
    assert_eq!(text_shown(&seen), STORY);
    assert_eq!(http.get("/v1/instances/teller").await.expect(200)["turn"], 1, "decided once");
}

#[tokio::test]
async fn everything_that_happens_can_be_followed_and_resumed() {
    let node = Node::start().await;
    let http = node.client();
    for number in 1..=3 {
        say(&http, "ada", json!({"content": format!("{number}")})).await.expect(200);
    }
    let path = "/v1/instances/ada/events";
    let mut stream = Events::open(http.request(Method::GET, path).header("last-event-id", "1")).await;
    let turns = async |stream: &mut Events, count: usize| {
        let mut numbers = Vec::new();
        while numbers.len() < count {
            let event = stream.next().await.unwrap();
            if event.name == "turn" {
                assert_eq!(event.id.as_deref(), Some(&*event.data["turn"].to_string()));
                numbers.push(event.data["turn"].as_u64().unwrap());
            }
        }
        numbers
    };
    assert_eq!(turns(&mut stream, 2).await, [2, 3]);
    // Live, while others write at the same time: every turn once and in order.
    let writers = (0..4).map(|writer| {
        let http = http.clone();
        tokio::spawn(async move {
            for number in 0..25 {
                say(&http, "ada", json!({"content": format!("{writer}/{number}")})).await.expect(200);
            }
        })
    });
    let writers: Vec<_> = writers.collect();
    let mut late = Events::open(http.request(Method::GET, "/v1/instances/ada/events?after=0")).await;
    assert_eq!(turns(&mut stream, 100).await, (4..=103).collect::<Vec<_>>());
    assert_eq!(turns(&mut late, 103).await, (1..=103).collect::<Vec<_>>());
    for writer in writers {
        writer.await.unwrap();
    }
    http.put("/v1/instances/ada", &json!({"persona": "new"})).await.expect(200);
    assert_eq!(stream.next().await.unwrap().name, "profile");
    assert_eq!(http.delete("/v1/instances/ada").await.status, 204);
    assert_eq!(stream.next().await.unwrap().name, "forgotten");
    assert_eq!(stream.next().await, None);
}

#[tokio::test]
async fn the_twin_is_read_and_changed_by_version() {
    let node = Node::start().await;
    let http = node.client();
    let path = "/v1/instances/lamp/state";
    http.get(path).await.problem(404, "INSTANCE_NOT_FOUND");
    let patch = |body: Value| http.request(Method::PATCH, path).json(&body);
    let first = Http::send(patch(json!({"desired": {"on": true, "level": 3}}))).await;
    assert_eq!((first.expect(200)["version"].clone(), first.header("etag")), (json!(1), "\"1\""));
    let merge = http.request(Method::PATCH, path).header("content-type", "application/merge-patch+json");
    let merge = merge.json(&json!({"reported": {"on": true}, "desired": {"level": null}}));
    let second = Http::send(merge.header("if-match", "\"1\"")).await;
    let expected = json!({"version": 2, "desired": {"on": true}, "reported": {"on": true}, "delta": {}});
    assert_eq!(second.expect(200), expected);

    let stale = patch(json!({"desired": {"on": false}})).header("if-match", "\"1\"");
    Http::send(stale).await.problem(412, "VERSION_MISMATCH");
    let read = http.get(path).await;
    assert_eq!((read.expect(200), read.header("etag")), (expected, "\"2\""));
    let cached = Http::send(http.request(Method::GET, path).header("if-none-match", "\"2\"")).await;
    assert_eq!((cached.status.as_u16(), &*cached.text, cached.header("etag")), (304, "", "\"2\""));
    assert_eq!(Http::send(http.request(Method::GET, path).header("if-none-match", "\"1\"")).await.status, 200);

    Http::send(patch(json!({"wanted": {}}))).await.problem(400, "INVALID");
    Http::send(patch(json!([1]))).await.problem(400, "INVALID");
    Http::send(patch(json!({"desired": 1}))).await.problem(400, "INVALID");
    let channel = say(&http, "lamp", json!({"data": {}, "channel": "state/patch"})).await;
    channel.problem(400, "CHANNEL_RESERVED");
    assert_eq!(http.get(path).await.expect(200)["version"], 2);
}

#[tokio::test]
async fn a_poisonous_stimulus_is_listed_and_tried_again() {
    let node = Node::builder().config("[faults]\npanic_on = \"boom\"").start().await;
    let http = node.client();
    say(&http, "ada", json!({"content": "fine"})).await.expect(200);
    let problem = say(&http, "ada", json!({"content": "boom", "id": "p-1"})).await.problem(422, "DEAD_LETTER");
    assert!(problem["hint"].as_str().unwrap().contains("/dead-letters/p-1/retry"));
    let path = "/v1/instances/ada/dead-letters";
    let dead = http.get(path).await.expect(200);
    assert_eq!((&dead["items"][0]["stimulus"]["id"], &dead["next"]), (&json!("p-1"), &Value::Null));
    assert!(dead["items"][0]["tries"].as_u64().unwrap() >= 1, "{dead}");
    let status = http.get("/v1/stimuli/p-1").await.expect(200);
    assert_eq!(status["status"], "dead");
    assert!(status["reason"].is_string());
    // The instance lives on.
    assert_eq!(say(&http, "ada", json!({"content": "still there?"})).await.expect(200)["outcome"], "replied");

    let retried = http.post(&format!("{path}/p-1/retry"), &Value::Null).await;
    assert_eq!(retried.expect(202)["status"], "accepted");
    assert_eq!(retried.header("location"), "/v1/stimuli/p-1?instance=ada");
    wait_until("it is given up again", PATIENCE, async || {
        http.get("/v1/stimuli/p-1").await.expect(200)["status"] == "dead"
    })
    .await;
    http.post(&format!("{path}/nobody/retry"), &Value::Null).await.problem(404, "DEAD_LETTER_NOT_FOUND");
}

#[tokio::test]
async fn pages_are_there_for_people_programs_and_prometheus() {
    let node = Node::builder().about(About::Process).start().await;
    let http = node.client();
    assert_eq!(http.get("/health/live").await.expect(200), json!({"status": "live"}));
    let ready = http.get("/health/ready").await.expect(200);
    let checks = json!({"store": "ok", "membership": "ok", "bus": "ok", "load": "ok", "pools": "ok"});
    assert_eq!(ready, json!({"status": "ready", "checks": checks}));
    let start = http.get("/").await;
    for link in ["/docs/", "/openapi.json", "/health/ready", "/metrics", &node.http().to_string()] {
        assert!(start.text.contains(link), "{link}");
    }
    assert!(!start.text.contains("//") || !start.text.contains("src="), "nothing is fetched from elsewhere");
    let docs = http.get("/docs").await;
    assert!(docs.text.contains("swagger-ui") && docs.header("content-type").starts_with("text/html"));
    assert!(http.get("/docs/swagger-initializer.js").await.text.contains("/openapi.json"));
    http.get("/docs/nothing.js").await.problem(404, "NOT_FOUND");
    let document = http.get("/openapi.json").await.expect(200);
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));

    say(&http, "secret-name", json!({"content": "x"})).await.expect(200);
    http.get("/v1/instances/secret-name").await.expect(200);
    let metrics = http.get("/metrics").await;
    let series = |parts: &[&str]| metrics.text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
    let route = "route=\"/v1/instances/{id}/stimuli\"";
    assert!(series(&["sophont_http_requests_total{", route, "status=\"2xx\"", "method=\"POST\""]), "{}", metrics.text);
    assert!(series(&["sophont_http_request_seconds", route]));
    assert!(!metrics.text.contains("secret-name"), "no instance id in a label");
}

#[tokio::test]
async fn every_answer_has_an_id_and_traces_go_through() {
    let node = Node::start().await;
    let http = node.client();
    let own = http.get("/health/live").await.header("x-request-id").to_owned();
    assert!(!own.is_empty() && own != http.get("/nowhere").await.header("x-request-id"));
    let given = Http::send(http.request(Method::GET, "/nowhere").header("x-request-id", "mine-1")).await;
    assert_eq!((given.header("x-request-id"), &given.json()["request_id"]), ("mine-1", &json!("mine-1")));
    let silly = Http::send(http.request(Method::GET, "/").header("x-request-id", "a b")).await;
    assert_ne!(silly.header("x-request-id"), "a b");
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let traced = http.request(Method::POST, "/v1/instances/ada/stimuli").header("traceparent", trace);
    Http::send(traced.json(&json!({"content": "x"}))).await.expect(200);
}

#[tokio::test]
async fn a_drain_answers_what_is_in_hand_and_ends_streams() {
    let mut node = Node::start().await;
    let http = node.client();
    storyteller(&http, "teller", 1000).await;
    let mut stream = Events::open(http.request(Method::GET, "/v1/instances/teller/events")).await;
    let asked = http.clone();
    let answer = tokio::spawn(async move { say(&asked, "teller", json!({"content": "go", "id": "d-1"})).await });
    wait_for("the node thinks", PATIENCE, async || (stream.next().await?.name == "token").then_some(())).await;
    node.term();
    let mut last = None;
    while let Some(event) = stream.next().await {
        last = Some(event);
    }
    assert_eq!(last.map(|event| event.name).as_deref(), Some("error"), "the stream says why it ends");
    let answer = answer.await.unwrap();
    assert_eq!(answer.expect(200)["reply"]["content"], STORY, "a waiting caller is answered");
    assert!(node.wait_exit(Duration::from_secs(30)).await.success());
}
