//! Attention on a real node: what is held back is remembered, what is alike shares a thought, a person interrupts, and
//! whatever happens each stimulus is decided once.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sophont::telemetry::metric::{ATTENTION_SAVED, ATTENTION_STIMULI, INTERRUPTED};

use crate::{
    steps::outside::{Outside, Point, Said, Stop},
    support::{Http, Node, PATIENCE, metric, wait_until},
};

/// A profile whose engine takes so long, with attention.
fn attentive(delay_ms: u64, attention: Value) -> Value {
    json!({
        "engine": "scripted",
        "script": {"reply": "done", "delay_ms": delay_ms},
        "reflexes": [{"when": "stimulus.content == 'ping'", "do": [{"reply": "pong"}], "stop": true}],
        "attention": attention,
    })
}

/// A stimulus of a stream.
fn report(id: &str, sender: &str, content: &str) -> Value {
    json!({"id": id, "sender": sender, "channel": "stream", "priority": "device", "content": content})
}

async fn fate(http: &Http, fate: &str) -> f64 {
    metric(http, &format!("{ATTENTION_STIMULI}{{fate=\"{fate}\"}}")).await
}

/// The engine of each decided stimulus, by id; every id once.
async fn engines(http: &Http, instance: &str) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    for (turn, at) in http.turns(instance).await.iter().zip(1_u64..) {
        assert_eq!(turn["turn"].as_u64(), Some(at), "turns have no gaps");
        if let Some(first) = turn["decided_with"].as_u64() {
            assert!(turn["engine"] == "merged" && first < at && at - first < 32, "{turn}");
        }
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let again = all.insert(text(&turn["stimulus"]["id"]), text(&turn["engine"]));
        assert_eq!(again, None, "decided twice: {turn}");
    }
    all
}

#[tokio::test]
async fn wrong_settings_are_refused_when_the_profile_is_stored() {
    let node = Node::start().await;
    let http = node.client();
    for (settings, reason) in [
        (json!({"threshold": 2}), "attention.threshold lies between 0 and 1, this is 2"),
        (json!({"merge": 3}), "unknown field `merge`"),
    ] {
        let problem = http.put("/v1/instances/i", &attentive(10, settings)).await.problem(400, "INVALID");
        assert!(problem["detail"].as_str().unwrap().contains(reason), "{problem}");
    }
}

#[tokio::test]
async fn what_does_not_matter_is_remembered_and_no_engine_is_asked() {
    let node = Node::start().await;
    let http = node.client();
    // A thought would outlast the test.
    http.put_instance("i", &attentive(600_000, json!({"threshold": 0.6}))).await;
    let held = http.post("/v1/instances/i/stimuli", &report("r1", "s", "the cellar is damp")).await.expect(200);
    assert_eq!((held["outcome"].as_str(), held["engine"].as_str()), (Some("silent"), Some("attention")), "{held}");
    assert_eq!(http.say("i", "p", "ping").await.expect(200)["reply"]["content"], "pong", "rules decide as before");
    let again = http.post("/v1/instances/i/stimuli", &report("r1", "s", "the cellar is damp")).await.expect(200);
    assert_eq!(again["turn"], held["turn"], "a repeat gets the first result");
    assert_eq!(http.stimulus("r1").await.expect(200)["status"], "decided");
    assert_eq!((fate(&http, "held_back").await, fate(&http, "thought").await), (1.0, 0.0));
    assert!((metric(&http, ATTENTION_SAVED).await - 1.0).abs() < f64::EPSILON);
    // The extractive engine answers from what is remembered.
    http.put_instance("i", &json!({"engine": "reflex"})).await;
    let answer = http.say("i", "q", "How is the cellar?").await.expect(200);
    assert!(answer["reply"]["content"].as_str().unwrap().contains("damp"), "{answer}");
}

#[tokio::test]
async fn what_is_alike_shares_one_thought_and_each_is_decided_under_its_id() {
    let node = Node::start().await;
    let http = node.client();
    let attention = json!({"threshold": 0.0, "merge_below": 1.0, "merge_window_ms": 60_000, "merge_max": 4});
    http.put_instance("i", &attentive(50, attention)).await;
    for (id, sender) in [("a1", "a"), ("b1", "b"), ("a2", "a")] {
        http.drop_in("i", &report(id, sender, &format!("news {id}"))).await.expect(202);
    }
    assert_eq!(http.stimulus("a1").await.expect(200)["status"], "accepted", "they wait for others like them");
    assert_eq!(http.say("i", "p", "ping").await.expect(200)["turn"], 1, "and hold nobody up");
    let last = http.post("/v1/instances/i/stimuli", &report("c1", "c", "news c1")).await.expect(200);
    assert_eq!((last["engine"].as_str(), &last["reply"]["content"]), (Some("merged"), &json!("done")), "{last}");
    assert_eq!(last["decided_with"], 2, "{last}");
    let turns = http.turns("i").await;
    let ids: Vec<_> = turns.iter().map(|turn| turn["stimulus"]["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["p", "a1", "b1", "a2", "c1"], "in the order of arrival");
    assert_eq!((&turns[1]["engine"], turns[1].get("decided_with")), (&json!("scripted"), None));
    assert!(
        turns[2..].iter().all(|turn| turn["decided_with"] == 2),
        "a reader sees whose thought they shared: {turns:?}"
    );
    // The scripted engine counts the words it was asked: those of a list of all four.
    assert!(turns[1]["usage"]["input_tokens"].as_u64().unwrap() > 20, "{}", turns[1]);
    for (id, turn) in [("a1", 2), ("b1", 3), ("a2", 4), ("c1", 5)] {
        let found = http.stimulus(id).await.expect(200);
        assert_eq!(
            (found["status"].as_str(), found["turn"]["turn"].as_u64()),
            (Some("decided"), Some(turn)),
            "{found}"
        );
        let again = http.post("/v1/instances/i/stimuli", &report(id, "x", "again")).await.expect(200);
        assert_eq!(again["turn"], turn, "a repeat gets the first result");
    }
    assert_eq!((fate(&http, "thought").await, fate(&http, "merged").await), (1.0, 3.0));
    assert!((metric(&http, ATTENTION_SAVED).await - 0.75).abs() < f64::EPSILON);
}

#[tokio::test]
async fn of_what_waits_the_more_salient_comes_first() {
    let (outside, _node, http) = with_model(json!({"threshold": 0.0, "merge_max": 1})).await;
    outside.stop(Stop::Before(Point::Model(0)));
    http.drop_in("i", &report("first", "s0", "first")).await.expect(202);
    outside.until_stopped().await;
    for (id, sender, salience) in [("low", "s1", 0.2), ("high", "s2", 0.9), ("behind", "s1", 1.0)] {
        let mut stimulus = report(id, sender, id);
        stimulus["salience"] = json!(salience);
        http.drop_in("i", &stimulus).await.expect(202);
    }
    outside.go();
    let order = http.until_decided("i", 4).await;
    assert_eq!(order, ["first", "high", "low", "behind"], "no sender overtakes itself");
}

#[tokio::test]
async fn a_kill_in_the_middle_of_a_shared_thought_loses_and_doubles_nothing() {
    const STREAMS: usize = 6;
    const EACH: usize = 4;
    let outside = Outside::start(|_, _| Said::Answer("done", vec![])).await;
    let config = format!("[instances]\nscan_seconds = 1\n{}", outside.config());
    let mut node = Node::builder().config(&config).start().await;
    let attention = json!({"threshold": 0.0, "merge_below": 1.0, "merge_window_ms": 1000, "merge_max": 8});
    node.client().put_instance("i", &json!({"engine": "llm", "attention": attention})).await;
    let mut sent = Vec::new();
    for round in 0..3 {
        let http = node.client();
        outside.stop(Stop::Before(Point::Model(0)));
        for n in 0..STREAMS * EACH {
            let id = format!("r{round}-{n}");
            let stimulus = report(&id, &format!("s{}", n % STREAMS), &format!("text {id}"));
            http.drop_in("i", &stimulus).await.expect(202);
            sent.push(id);
        }
        outside.until_stopped().await;
        node.kill9().await;
        outside.go();
        node.start_again().await;
    }
    let http = node.client();
    let decided = http.until_decided("i", sent.len()).await;
    let engines = engines(&http, "i").await;
    assert_eq!(engines.len(), sent.len());
    assert!(sent.iter().all(|id| engines.contains_key(id)), "{engines:?}");
    let thoughts = engines.values().filter(|engine| *engine == "llm").count();
    assert!(thoughts < sent.len() / 2, "{thoughts} thoughts for {}", sent.len());
    for sender in 0..STREAMS {
        let of_sender = |text: &&String| {
            let number = text.rsplit('-').next().and_then(|n| n.parse::<usize>().ok()).unwrap();
            number % STREAMS == sender
        };
        let of_sender: Vec<&String> = decided.iter().filter(of_sender).collect();
        let sent: Vec<String> =
            sent.iter().map(|id| format!("text {id}")).filter(|text| of_sender.contains(&text)).collect();
        assert_eq!(of_sender, sent.iter().collect::<Vec<_>>(), "the order of one sender");
    }
}

/// A node whose instance `i` thinks with a model that answers when it is told to.
async fn with_model(attention: Value) -> (Outside, Node, Http) {
    let outside = Outside::start(|_, _| Said::Answer("done", vec![])).await;
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    http.put_instance("i", &json!({"engine": "llm", "attention": attention})).await;
    (outside, node, http)
}

/// Waits until the model was asked so often.
async fn until_asked(outside: &Outside, times: usize) {
    wait_until(&format!("the model was asked {times} times"), PATIENCE, async || outside.asked().len() >= times).await;
}

#[tokio::test]
async fn a_person_does_not_wait_for_a_streams_thought_where_the_profile_says_so() {
    let (outside, _node, http) = with_model(json!({"merge_max": 1, "interrupt": "cancel"})).await;
    outside.stop(Stop::Before(Point::Model(0)));
    http.drop_in("i", &report("noise", "s", "something new")).await.expect(202);
    outside.until_stopped().await;
    http.drop_in("i", &json!({"id": "q", "sender": "ann", "content": "hello?"})).await.expect(202);
    until_asked(&outside, 2).await;
    outside.go();
    let turn = http.until_status("q", "decided").await["turn"].clone();
    assert_eq!((turn["turn"].as_u64(), &turn["reply"]["content"]), (Some(1), &json!("done")));
    assert_eq!(http.until_status("noise", "decided").await["turn"]["turn"], 2, "it is thought about afterwards");
    assert!(metric(&http, &format!("{INTERRUPTED}{{policy=\"cancel\"}}")).await >= 1.0);

    // The same person says something else: the first stays without an answer, and a stranger waits.
    let asked = outside.asked().len();
    outside.stop(Stop::Before(Point::Model(0)));
    http.drop_in("i", &json!({"id": "p1", "sender": "ann", "content": "one"})).await.expect(202);
    outside.until_stopped().await;
    http.drop_in("i", &json!({"id": "p2", "sender": "ann", "content": "two"})).await.expect(202);
    until_asked(&outside, asked + 2).await;
    http.drop_in("i", &json!({"id": "p3", "sender": "bob", "content": "three"})).await.expect(202);
    outside.go();
    let found = http.until_status("p3", "decided").await;
    assert_eq!(found["turn"]["turn"], 5);
    let turns = http.turns("i").await;
    assert_eq!((&turns[2]["engine"], &turns[2]["outcome"]), (&json!("attention"), &json!("silent")));
    assert_eq!((&turns[3]["stimulus"]["id"], &turns[3]["reply"]["content"]), (&json!("p2"), &json!("done")));
}

/// Its steps are on record and were told without whoever comes now: it is let finish.
#[tokio::test]
async fn a_thought_that_took_steps_is_not_interrupted() {
    let plan = |round: usize, _: usize| match round {
        0 => Said::Answer("I touch it.", vec![("touch", json!({"n": 0}))]),
        _ => Said::Answer("Done.", vec![]),
    };
    for policy in ["merge", "cancel"] {
        let outside = Outside::start(plan).await;
        let node = Node::builder().config(&outside.config()).start().await;
        let http = node.client();
        http.put_instance(
            "i",
            &json!({"engine": "llm", "attention": {"merge_max": 2, "merge_window_ms": 0, "interrupt": policy}}),
        )
        .await;
        outside.stop(Stop::Before(Point::Model(1)));
        http.drop_in("i", &report("noise", "s", "something new")).await.expect(202);
        outside.until_stopped().await;
        let asked = outside.asked().len();
        http.drop_in("i", &json!({"id": "q", "sender": "ann", "content": "hello?"})).await.expect(202);
        assert_eq!(outside.asked().len(), asked, "{policy}: nobody else is thought about meanwhile");
        outside.go();
        http.until_decided("i", 2).await;
        let turns = http.turns("i").await;
        assert_eq!(
            (&turns[0]["stimulus"]["id"], &turns[0]["steps"]),
            (&json!("noise"), &json!(3)),
            "{policy}: {turns:?}"
        );
        assert_eq!(turns[0]["reply"]["content"], "I touch it.\n\nDone.");
        assert_eq!(metric(&http, &format!("{INTERRUPTED}{{policy=\"{policy}\"}}")).await, 0.0);
    }
}

#[tokio::test]
async fn a_person_joins_the_thought_in_hand_where_the_profile_says_so() {
    let (outside, _node, http) = with_model(json!({"interrupt": "merge"})).await;
    outside.stop(Stop::Before(Point::Model(0)));
    http.drop_in("i", &json!({"id": "p1", "sender": "ann", "content": "one"})).await.expect(202);
    outside.until_stopped().await;
    http.drop_in("i", &json!({"id": "p2", "sender": "ann", "content": "two"})).await.expect(202);
    until_asked(&outside, 2).await;
    outside.go();
    let turn = http.until_status("p2", "decided").await["turn"].clone();
    assert_eq!((turn["engine"].as_str(), &turn["reply"]["content"]), (Some("merged"), &json!("done")));
    assert_eq!(turn["decided_with"], 1);
    let first = http.stimulus("p1").await.expect(200);
    assert_eq!(first["turn"]["turn"], 1);
    assert_eq!(first["turn"]["reply"]["content"], "done");
    assert_eq!(metric(&http, &format!("{INTERRUPTED}{{policy=\"merge\"}}")).await, 1.0);
    let told = outside.bodies().last().unwrap()["messages"].as_array().unwrap().last().unwrap()["content"].clone();
    assert!(told.as_str().unwrap().contains("one") && told.as_str().unwrap().contains("two"), "{told}");

    // Later the model is told of both as one exchange.
    http.say("i", "p4", "and now?").await.expect(200);
    let bodies = outside.bodies();
    let told: Vec<&str> = bodies.last().unwrap()["messages"]
        .as_array()
        .unwrap()
        .iter()
        .skip(1)
        .map(|m| m["content"].as_str().unwrap())
        .collect();
    assert_eq!(told, ["1. [default] one\n2. [default] two\n", "done", "and now?"]);
}

/// What was said is told to the model later, however much was reported in between, and after a kill, too.
#[tokio::test]
async fn a_conversation_is_not_lost_among_reports() {
    let outside = Outside::start(|_, _| Said::Answer("done", vec![])).await;
    let mut node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    http.put_instance("i", &json!({"engine": "llm", "attention": {"threshold": 0.6}})).await;
    let reports = async |round: u32| {
        let http = node.client();
        for n in 0..30 {
            let report = report(&format!("r{round}-{n}"), "s", "nothing new");
            http.post("/v1/instances/i/stimuli", &report).await.expect(200);
        }
    };
    let told = || {
        let bodies = outside.bodies();
        let messages = bodies.last().unwrap()["messages"].as_array().unwrap().clone();
        messages.iter().skip(1).map(|message| message["content"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    http.say("i", "q1", "I am Ann.").await.expect(200);
    reports(1).await;
    http.say("i", "q2", "Who am I?").await.expect(200);
    assert_eq!(told(), ["I am Ann.", "done", "Who am I?"]);
    reports(2).await;
    node.kill9().await;
    node.start_again().await;
    node.client().say("i", "q3", "And now?").await.expect(200);
    assert_eq!(told(), ["I am Ann.", "done", "Who am I?", "done", "And now?"]);
    node.client().say("i", "q4", "Still?").await.expect(200);
    assert_eq!(told().len(), 7, "{:?}", told());
}
