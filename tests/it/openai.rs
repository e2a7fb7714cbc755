//! The door for clients of the OpenAI chat protocol, with the official clients (`openai/suite.py`, `openai/suite.mjs`) and by hand.
//!
//! The model behind it is the plan of `steps/outside.rs`. Not here: what a request means, field by field, tested at the foot of
//! `gateway/http/chat/wire.rs`.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::{
    steps::outside::{Outside, Point, Said, Stop},
    support::{Http, Node, http::echo, program, root},
};

/// Longest run of the client's suite.
const SUITE: Duration = Duration::from_secs(120);

/// Asks for the client's thermometer, and then knows.
fn weather(round: usize, again: usize) -> Said {
    match (round, again) {
        (0, _) | (1, 1) => Said::Answer("", vec![("look", json!({"city": "Oslo"}))]),
        _ => Said::Answer("It is mild.", vec![]),
    }
}

/// A node with the instances the clients' suites ask.
async fn asked(outside: &Outside) -> Node {
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    let rules = echo();
    let again = json!({"engine": "reflex", "reflexes": rules["reflexes"]});
    http.put_instance("echo", &again).await;
    for n in 0..20 {
        http.put_instance(&format!("echo-{n}"), &again).await;
    }
    let script = json!({"reply": "one two three four", "delay_ms": 60, "tokens": 4});
    http.put_instance("slow", &json!({"engine": "scripted", "script": script})).await;
    http.put_instance("weather", &json!({"engine": "llm"})).await;
    let line = json!({"say": "one two", "call": [{"tool": "look"}]});
    let limits = json!({"max_tokens_per_turn": 1});
    http.put_instance("poor", &json!({"engine": "scripted", "script": {"steps": [line, line]}, "limits": limits}))
        .await;
    node
}

#[tokio::test]
async fn the_official_client_works_unmodified() {
    let outside = Outside::start(weather).await;
    let node = asked(&outside).await;
    let mut command = Command::new(program::python());
    command.arg(root().join("tests/it/openai/suite.py")).arg(format!("http://{}/v1", node.http()));
    assert_eq!(program::succeed(command, SUITE).await.trim(), "ok");
    // The conversation lives in the instance: four turns of words and results, each told behind the ones before.
    let turns = node.client().turns("weather").await;
    assert_eq!(turns.len(), 4, "{turns:?}");
    let last = outside.bodies().last().unwrap()["messages"].clone();
    let roles: Vec<&str> = last.as_array().unwrap().iter().filter_map(|message| message["role"].as_str()).collect();
    let exchange = ["user", "assistant", "tool", "assistant"];
    assert_eq!(roles, [&["system"][..], &exchange, &exchange[..3]].concat(), "{last}");
}

#[tokio::test]
async fn the_official_client_for_node_js_works_unmodified() {
    let outside = Outside::start(weather).await;
    let node = asked(&outside).await;
    let packages = root().join("target/test-node");
    assert!(packages.join("node_modules/openai").is_dir(), "the openai package is not installed: run tests/install");
    let mut command = Command::new(program::find("node"));
    command.arg(root().join("tests/it/openai/suite.mjs")).arg(format!("http://{}/v1", node.http())).arg(packages);
    assert_eq!(program::succeed(command, SUITE).await.trim(), "ok");
}

/// Messages of the request before the last, as the model was told them.
async fn told(outside: &Outside, http: &Http, messages: &Value) -> Vec<String> {
    let answer = http.post("/v1/chat/completions", &json!({"model": "ada", "messages": messages})).await;
    answer.expect(200);
    let body = outside.bodies().pop().unwrap();
    let all = body["messages"].as_array().unwrap().iter().skip(1);
    all.map(|message| message["content"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test]
async fn earlier_messages_count_only_without_a_history() {
    let outside = Outside::start(|_, _| Said::Answer("Yes.", vec![])).await;
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    let user = |text: &str| json!({"role": "user", "content": text});
    let said = json!({"role": "assistant", "content": "hi"});
    let first = told(&outside, &http, &json!([user("hello"), said, user("still there?")])).await;
    assert_eq!(first, ["hello", "hi", "still there?"]);
    let second = told(&outside, &http, &json!([user("made up"), said, user("and now?")])).await;
    assert_eq!(second, ["still there?", "Yes.", "and now?"]);
}

#[tokio::test]
async fn refusals_have_the_protocols_form() {
    let node = Node::start().await;
    let answer = node.client().post("/v1/chat/completions", &json!({"model": "ada", "messages": []})).await;
    let error = answer.expect(400)["error"].clone();
    assert_eq!((&error["type"], &error["code"]), (&json!("invalid_request_error"), &json!("invalid")), "{error}");
    assert!(error["message"].as_str().unwrap().contains("the last one must be of user or tool"), "{error}");
    assert!(!answer.header("x-request-id").is_empty() && answer.header("content-type") == "application/json");
    let answer = Http::send(node.client().request(Method::POST, "/v1/chat/completions").body("{}")).await;
    assert_eq!(answer.expect(415)["error"]["code"], "unsupported_media_type");
}

/// Words of whole chunks, and the last id.
fn words(text: &str) -> (String, String) {
    let whole = &text[..text.rfind("\n\n").map_or(0, |at| at + 2)];
    let mut words = String::new();
    for data in whole.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
        let data: Value = serde_json::from_str(data).unwrap();
        assert!(data["error"].is_null(), "{data}");
        words.push_str(data["choices"][0]["delta"]["content"].as_str().unwrap_or_default());
    }
    let id = whole.lines().filter_map(|line| line.strip_prefix("id: ")).next_back().unwrap_or_default();
    (words, id.to_owned())
}

/// The node is killed in the middle of a turn that calls tools; the stream goes on where committed words end.
#[tokio::test]
async fn a_stream_goes_on_by_the_id_of_its_last_chunk() {
    let outside = Outside::start(|round, _| match round {
        0..4 => Said::Answer("I touch it.", vec![("touch", json!({"n": round}))]),
        _ => Said::Answer("All done.", vec![]),
    })
    .await;
    let mut node = Node::builder().stable_ports().config(&outside.config()).start().await;
    outside.stop(Stop::Before(Point::Tool(2)));
    let body = json!({"model": "house", "stream": true, "messages": [{"role": "user", "content": "look after it"}]});
    let asked = |node: &Node| {
        let request = node.client().request(Method::POST, "/v1/chat/completions").json(&body);
        request.header("idempotency-key", "s1")
    };
    let mut stream = Http::open(asked(&node)).await;
    outside.until_stopped().await;
    let said = ["I touch it."; 3].join("\n\n");
    let mut first = String::new();
    while words(&first).0 != said {
        first = stream.more().await.to_owned();
    }
    node.kill9().await;
    outside.go();
    node.start_again().await;
    let mut stream = Http::open(asked(&node).header("last-event-id", words(&first).1)).await;
    let rest = stream.until("data: [DONE]\n\n").await.to_owned();
    let reply = [&said, "I touch it.", "All done."].join("\n\n");
    assert_eq!(words(&first).0 + &words(&rest).0, reply, "{rest}");
    assert_eq!(outside.called().len(), 4);
    // Asked again, it is the same turn, whole and from any place.
    let again = Http::send(asked(&node)).await.text;
    assert_eq!(words(&again).0, reply);
    assert_eq!(node.client().turns("house").await.len(), 1);
}
