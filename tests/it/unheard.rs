//! A thought nobody waits for any more is cancelled where the profile says so (`limits.cancel_unheard_seconds`): by each door, at any
//! node, and never while somebody may still want the answer.
//!
//! The model is the one of `steps/outside.rs`: it hangs where a test wants it to, and sees when its caller closes the connection.

use reqwest::Method;
use serde_json::{Value, json};
use sophont::telemetry::metric as name;

use crate::{
    steps::outside::{Outside, Point, Said, Stop},
    support::{About, Http, Node, PATIENCE, cluster::Cluster, metric, wait_until},
};

fn answering(_: usize, _: usize) -> Said {
    Said::Answer("Here I am.", vec![])
}

/// Whose thoughts are cancelled as soon as nobody waits.
fn attentive() -> Value {
    json!({"engine": "llm", "limits": {"cancel_unheard_seconds": 0}})
}

/// The ways to wait for an answer.
#[derive(Debug, Clone, Copy)]
enum Way {
    Wait,
    Stream,
    Chat,
    ChatStream,
}

/// A stimulus whose text and id are `id`.
fn request(http: &Http, way: Way, instance: &str, id: &str) -> reqwest::RequestBuilder {
    let stimuli = || {
        let request = http.request(Method::POST, &format!("/v1/instances/{instance}/stimuli"));
        request.json(&json!({"id": id, "content": id}))
    };
    let chat = |stream: bool| {
        let messages = json!([{"role": "user", "content": id}]);
        let body = json!({"model": instance, "messages": messages, "stream": stream});
        http.request(Method::POST, "/v1/chat/completions").header("idempotency-key", id).json(&body)
    };
    match way {
        Way::Wait => stimuli(),
        Way::Stream => stimuli().header("accept", "text/event-stream"),
        Way::Chat => chat(false),
        Way::ChatStream => chat(true),
    }
}

/// Listens to a stimulus that somebody else sent.
fn follow(http: &Http, id: &str) -> reqwest::RequestBuilder {
    http.request(Method::GET, &format!("/v1/stimuli/{id}")).header("accept", "text/event-stream")
}

/// Sends it and stays until it is thought about. Aborting what is returned closes the connection.
async fn begin(outside: &Outside, request: reqwest::RequestBuilder, id: &str) -> tokio::task::JoinHandle<()> {
    let client = tokio::spawn(async move {
        if let Ok(mut answer) = request.send().await {
            while let Ok(Some(_)) = answer.chunk().await {}
        }
    });
    wait_until(&format!("{id} is thought about"), PATIENCE, async || outside.heard().iter().any(|said| said == id))
        .await;
    client
}

/// The turn of a stimulus that was given up.
async fn cancelled(http: &Http, id: &str) -> Value {
    let turn = http.until_status(id, "decided").await["turn"].clone();
    assert!(turn["error"].as_str().unwrap_or_default().starts_with("cancelled"), "{id}: {turn}");
    assert_eq!((&turn["outcome"], &turn["reply"]), (&json!("silent"), &Value::Null), "{id}: {turn}");
    turn
}

/// The same where the model was being asked.
async fn is_cancelled(http: &Http, outside: &Outside, id: &str) -> Value {
    let turn = cancelled(http, id).await;
    wait_until("the model's connection is closed", PATIENCE, async || outside.given_up().iter().any(|said| said == id))
        .await;
    turn
}

#[tokio::test]
async fn whoever_leaves_by_whichever_door_ends_the_thought_and_the_stimulus_has_a_turn() {
    let outside = Outside::start(answering).await;
    let node = Node::builder().about(About::Process).config(&outside.config()).start().await;
    let http = node.client();
    http.put_instance("ada", &attentive()).await;
    for (way, id) in [(Way::Wait, "w"), (Way::Stream, "s"), (Way::Chat, "c"), (Way::ChatStream, "cs")] {
        outside.stop(Stop::Before(Point::Model(0)));
        begin(&outside, request(&http, way, "ada", id), id).await.abort();
        let turn = is_cancelled(&http, &outside, id).await;
        assert_eq!((&turn["engine"], &turn["stimulus"]["content"]), (&json!("llm"), &json!(id)));
        // Who asks again under the same key gets that turn, which is no answer to a chat.
        let again = Http::send(request(&http, way, "ada", id)).await;
        match way {
            Way::Wait => assert_eq!(again.expect(200)["error"], turn["error"]),
            Way::Chat => assert_eq!(again.expect(422)["error"]["code"], "no_answer"),
            Way::Stream => assert!(again.text.contains("event: turn"), "{}", again.text),
            Way::ChatStream => assert!(again.text.contains("\"no_answer\"") && !again.text.contains("DONE")),
        }
        outside.go();
        let next = http.say("ada", &format!("{id}-next"), "and now?").await.expect(200);
        assert_eq!(next["reply"]["content"], "Here I am.", "the instance goes on: {next}");
    }
    assert_eq!(outside.heard().len(), 8, "nobody was asked twice");
    assert_eq!(http.turns("ada").await.len(), 8);
    let dead = http.get("/v1/instances/ada/dead-letters").await.expect(200);
    assert_eq!(dead["items"], json!([]), "what was cancelled is no dead letter");
}

#[tokio::test]
async fn what_somebody_may_still_want_is_thought_to_its_end() {
    let outside = Outside::start(answering).await;
    // As many are asked at the same time as there are instances here.
    let config = outside.config() + "max_concurrent = 16\n";
    let node = Node::builder().about(About::Process).config(&config).start().await;
    let http = node.client();
    let plain = json!({"engine": "llm"});
    let patient = json!({"engine": "llm", "limits": {"cancel_unheard_seconds": 3600}});
    for (instance, profile) in [
        ("plain", &plain),
        ("patient", &patient),
        ("followed", &attentive()),
        ("told", &attentive()),
        ("dropped-in", &attentive()),
        ("last", &attentive()),
    ] {
        http.put_instance(instance, profile).await;
    }
    outside.stop(Stop::Before(Point::Model(0)));
    // No limit, or a longer one: nothing is cancelled, at least not yet.
    for instance in ["plain", "patient"] {
        begin(&outside, request(&http, Way::Stream, instance, instance), instance).await.abort();
    }
    // Somebody else follows it.
    let sender = begin(&outside, request(&http, Way::Stream, "followed", "followed"), "followed").await;
    let mut other = Http::open(follow(&http, "followed")).await;
    other.until("thinking").await;
    sender.abort();
    // The wait was over before the answer came: the sender was told that it is thought about.
    let path = "/v1/instances/told/stimuli?wait=1";
    http.post(path, &json!({"id": "told", "content": "told"})).await.expect(202);
    // Nobody ever waited, and whoever only looked does not matter.
    http.drop_in("dropped-in", &json!({"id": "dropped-in", "content": "dropped-in"})).await.expect(202);
    let mut looked = Http::open(follow(&http, "dropped-in")).await;
    looked.until("thinking").await;
    drop(looked);
    // All of them were looked at when this one, which came last, is cancelled.
    begin(&outside, request(&http, Way::Stream, "last", "last"), "last").await.abort();
    is_cancelled(&http, &outside, "last").await;
    assert_eq!(outside.given_up(), ["last"]);
    drop(other);
    is_cancelled(&http, &outside, "followed").await;
    outside.go();
    for id in ["plain", "patient", "told", "dropped-in"] {
        let turn = http.until_status(id, "decided").await["turn"].clone();
        assert_eq!(turn["reply"]["content"], "Here I am.", "{id}: {turn}");
    }
}

/// The tool that may not be called twice is let finish; then the turn ends with what was done, and no model is asked further.
#[tokio::test]
async fn a_cancelled_turn_keeps_its_steps_and_interrupts_no_tool() {
    let outside = Outside::start(|round, _| match round {
        0 => Said::Answer("I touch it.", vec![("touch", json!({"n": 0}))]),
        _ => Said::Answer("Done.", vec![]),
    })
    .await;
    let node = Node::builder().about(About::Process).config(&outside.config()).start().await;
    let http = node.client();
    http.put_instance("house", &attentive()).await;
    http.put_instance("last", &attentive()).await;
    outside.stop(Stop::Before(Point::Tool(0)));
    let sender = begin(&outside, request(&http, Way::Stream, "house", "s1"), "s1").await;
    outside.until_stopped().await;
    sender.abort();
    begin(&outside, request(&http, Way::Stream, "last", "last"), "last").await.abort();
    is_cancelled(&http, &outside, "last").await;
    assert_eq!(http.stimulus("s1").await.expect(200)["status"], "thinking", "its tool is at work");
    outside.stop(Stop::Before(Point::Model(1)));
    outside.pass();
    // Whether the model hears of it once more or not.
    let turn = cancelled(&http, "s1").await;
    assert_eq!((&turn["steps"], &turn["usage"]["input_tokens"]), (&json!(2), &json!(100)), "{turn}");
    assert_eq!(outside.called().len(), 1);
}

#[tokio::test]
async fn what_committed_steps_wished_for_is_done_though_the_turn_is_cancelled() {
    let outside = Outside::start(|round, _| match round {
        0 => Said::Answer("I note it.", vec![("remember", json!({"content": "somebody was here"}))]),
        _ => Said::Answer("Done.", vec![]),
    })
    .await;
    // With the node's own tools.
    let config = outside.config();
    let (_, models) = config.split_once("[cognition]").unwrap();
    let node = Node::builder().about(About::Process).config(&format!("[cognition]{models}")).start().await;
    let http = node.client();
    let profile = json!({"engine": "llm", "tools": ["remember"], "limits": {"cancel_unheard_seconds": 0}});
    http.put_instance("ada", &profile).await;
    outside.stop(Stop::Before(Point::Model(1)));
    let sender = begin(&outside, request(&http, Way::Stream, "ada", "s1"), "s1").await;
    outside.until_stopped().await;
    sender.abort();
    let turn = is_cancelled(&http, &outside, "s1").await;
    assert_eq!(turn["steps"], 2, "{turn}");
    let found = http.post("/v1/instances/ada/recall", &json!({"query": "who was here?"})).await.expect(200);
    assert_eq!(found["episodes"][0]["content"], "somebody was here", "{found}");
}

/// The client is at a node that does not own the instance.
#[tokio::test]
async fn whoever_leaves_at_another_node_ends_the_thought_too() {
    let outside = Outside::start(answering).await;
    let config = outside.config();
    let cluster = Cluster::build(2, true, |builder| builder.config(&config)).await;
    cluster.client(0).put_instance("ada", &attentive()).await;
    cluster.until_even().await;
    let owner = cluster.owner("ada").await;
    let (here, there) = (cluster.client(owner), cluster.client(1 - owner));
    for (way, id) in [(Way::Wait, "w"), (Way::Stream, "s"), (Way::Chat, "c"), (Way::ChatStream, "cs")] {
        outside.stop(Stop::Before(Point::Model(0)));
        let client = begin(&outside, request(&there, way, "ada", id), id).await;
        // The sender at the owner's leaves, and the one at the other node keeps it alive.
        let same = tokio::spawn(request(&here, Way::Stream, "ada", id).send());
        same.await.unwrap().unwrap();
        client.abort();
        is_cancelled(&here, &outside, id).await;
        outside.go();
    }
    assert_eq!(outside.heard().len(), 4);
}

/// Nodes do not hear who listens elsewhere.
const DEAF: &str = "SOPHONT__FAULTS__DROP_LISTENS";

/// Until a node asked the others about a thought that nobody waited for there, with this answer, more than so often.
async fn asked(owner: &Http, answer: &str, before: f64) {
    let name = format!("{}{{answer=\"{answer}\"}}", name::HARKED);
    let what = format!("the others were asked: {answer}");
    wait_until(&what, PATIENCE, async || metric(owner, &name).await > before).await;
}

#[tokio::test]
async fn a_lost_word_of_who_listens_cancels_no_thought() {
    let outside = Outside::start(answering).await;
    let config = outside.config() + "max_concurrent = 16\n";
    let cluster = Cluster::build(3, true, |builder| builder.config(&config).env(DEAF, "true")).await;
    cluster.client(0).put_instance("ada", &attentive()).await;
    let owner = cluster.owner("ada").await;
    let (here, there) = (cluster.client(owner), cluster.client((owner + 1) % 3));
    outside.stop(Stop::Before(Point::Model(0)));
    let sender = begin(&outside, request(&here, Way::Stream, "ada", "first"), "first").await;
    let mut other = Http::open(follow(&there, "first")).await;
    other.until("thinking").await;
    // One that waits behind it is asked about before its thought begins, or soon after.
    let behind = tokio::spawn(request(&here, Way::Stream, "ada", "second").send());
    here.until_status("second", "accepted").await;
    let second = Http::open(follow(&there, "second")).await;
    behind.abort();
    sender.abort();
    asked(&here, "somebody", 0.0).await;
    assert_eq!(outside.given_up(), [""; 0]);
    outside.go();
    for id in ["first", "second"] {
        assert_eq!(here.until_status(id, "decided").await["turn"]["reply"]["content"], "Here I am.", "{id}");
    }
    drop((other, second));
    // They are asked in vain, and then there is nobody.
    outside.stop(Stop::Before(Point::Model(0)));
    let sender = begin(&outside, request(&here, Way::Stream, "ada", "third"), "third").await;
    let mut other = Http::open(follow(&there, "third")).await;
    other.until("thinking").await;
    sender.abort();
    drop(other);
    is_cancelled(&here, &outside, "third").await;
}

#[tokio::test]
async fn while_other_nodes_cannot_be_asked_a_thought_goes_on() {
    let outside = Outside::start(answering).await;
    let config = outside.config();
    let mut cluster = Cluster::build(2, true, |builder| builder.config(&config).env(DEAF, "true")).await;
    cluster.client(0).put_instance("ada", &attentive()).await;
    let owner = cluster.owner("ada").await;
    let (here, there) = (cluster.client(owner), cluster.client(1 - owner));
    outside.stop(Stop::Before(Point::Model(0)));
    let sender = begin(&outside, request(&here, Way::Stream, "ada", "deaf"), "deaf").await;
    let redis = cluster.redis.as_mut().unwrap();
    redis.kill().await;
    let other = Http::open(follow(&there, "deaf")).await;
    sender.abort();
    asked(&here, "unknown", 0.0).await;
    assert_eq!(outside.given_up(), [""; 0]);
    redis.start_again().await;
    // Now the other node says who listens there.
    asked(&here, "somebody", 0.0).await;
    drop(other);
    is_cancelled(&here, &outside, "deaf").await;
}
