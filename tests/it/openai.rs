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

#[tokio::test]
async fn what_no_server_would_take_is_refused_before_it_is_accepted() {
    let outside = Outside::start(|_, _| Said::Answer("Yes.", vec![])).await;
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    let user = json!({"role": "user", "content": "hello"});
    for (field, value) in [
        ("max_tokens", json!("many")),
        ("max_completion_tokens", json!(0)),
        ("temperature", json!("hot")),
        ("n", json!(2)),
        ("tools[0].function.parameters", json!(null)),
        ("messages[0].content", json!(null)),
    ] {
        let mut body = json!({"model": "ada", "messages": [user]});
        match field {
            "messages[0].content" => body["messages"][0]["content"] = json!(5),
            "tools[0].function.parameters" => {
                body["tools"] = json!([{"type": "function", "function": {"name": "look", "parameters": "none"}}]);
            }
            field => body[field] = value,
        }
        let error = http.post("/v1/chat/completions", &body).await.expect(400)["error"].clone();
        assert_eq!((&error["param"], &error["code"]), (&json!(field), &json!("invalid")), "{error}");
    }
    http.get("/v1/instances/ada").await.problem(404, "INSTANCE_NOT_FOUND");
    // Where there is no such call, its clients are told so in words they show.
    for (method, path) in [(Method::POST, "/v1/responses"), (Method::DELETE, "/v1/models/ada")] {
        let answer = Http::send(http.request(method, path)).await;
        assert!(answer.json()["error"]["message"].is_string(), "{answer:?}");
    }
}

/// Whole and streamed, an answer that reached its limit says so, and so does its turn.
#[tokio::test]
async fn an_answer_that_was_cut_short_says_so() {
    let outside = Outside::start(|_, again| match again {
        0 => Said::Cut("It is as far as", "length"),
        1 => Said::Cut("", "length"),
        2 => Said::Cut("One must", "content_filter"),
        _ => Said::Answer("All of it.", vec![]),
    });
    let outside = outside.await;
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    let ask = |stream: bool| json!({"model": "ada", "messages": [{"role": "user", "content": "how far?"}], "max_tokens": 5, "stream": stream});
    for (content, finish) in [("It is as far as", "length"), ("", "length")] {
        let choice = http.post("/v1/chat/completions", &ask(false)).await.expect(200)["choices"][0].clone();
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(content), &json!(finish)));
    }
    for finish in ["content_filter", "stop"] {
        let stream = http.request(Method::POST, "/v1/chat/completions").json(&ask(true)).send().await.unwrap();
        let text = stream.text().await.unwrap();
        assert!(text.contains(&format!("\"finish_reason\":\"{finish}\"")), "{text}");
    }
    let turns = http.turns("ada").await;
    let told: Vec<_> = turns.iter().map(|turn| (turn["outcome"].as_str().unwrap(), turn["error"].as_str())).collect();
    let [length, filter] = ["length", "content_filter"].map(|why| format!("the answer was cut short: {why}"));
    let [length, filter] = [Some(length.as_str()), Some(filter.as_str())];
    assert_eq!(told, [("replied", length), ("silent", length), ("replied", filter), ("replied", None)]);
}

/// What a server finds wrong with one tool of one client is no reason to ask without tools from then on.
#[tokio::test]
async fn one_clients_bad_tool_takes_nobody_elses_away() {
    let outside = Outside::start(|_, again| match again {
        0 => Said::Refused("Invalid schema for function 'look' in tools[0].function.parameters: not supported"),
        _ => Said::Answer("Fine.", vec![]),
    });
    let outside = outside.await;
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    let tool = json!({"type": "function", "function": {"name": "look", "parameters": {"type": "nonsense"}}});
    let ask = json!({"model": "ada", "messages": [{"role": "user", "content": "hello"}], "tools": [tool]});
    let error = http.post("/v1/chat/completions", &ask).await.expect(422)["error"].clone();
    assert!(error["message"].as_str().unwrap().contains("tools[0].function.parameters"), "{error}");
    http.post("/v1/chat/completions", &ask).await.expect(200);
    let offered = outside.bodies().last().unwrap()["tools"].clone();
    assert!(offered.to_string().contains("\"look\""), "{offered}");
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
