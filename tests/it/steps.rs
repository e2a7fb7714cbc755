//! Turns that take steps: tools are called, every step is committed before the next begins, and a turn that was interrupted
//! goes on from its last step (promise 6).
//!
//! `outside.rs` has the model and the tools, which write down how often they were called. Not here: what stores do with steps
//! (`store_steps.rs`), how a model's answers are read (`thinking.rs`).

pub mod outside;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use reqwest::Method;
use serde_json::{Value, json};
use sophont::{
    cognition::{
        Action, Bounds, Engines, Error, Progress, Question, Thought,
        toolbox::{Invocation, Outcome, Rehearsed, Toolbox},
    },
    config::Config,
    scaling::cache::{Options, TieredCache},
    types::{
        Channel, EpisodeDraft, InstanceId, InstanceKey, Millis, Profile, Reply, Source, StateDoc, Step, Stimulus,
        StimulusId, TenantId, ToolResult, ToolSpec, profile::EngineName,
    },
};

use self::outside::{Outside, Point, Said, Stop};
use crate::support::{Http, Node, PATIENCE, cluster::Cluster, wait_until};

/// Rounds of a call and its result: twenty steps before the last answer.
const ROUNDS: usize = 10;

/// Touches something in every round, and says what it does.
fn touching(round: usize, _: usize) -> Said {
    match round {
        ROUNDS.. => Said::Answer("All done.", vec![]),
        _ => Said::Answer("I touch it.", vec![("touch", json!({"n": round}))]),
    }
}

/// Everything that is said in such a turn.
fn all_said() -> String {
    [vec!["I touch it."; ROUNDS], vec!["All done."]].concat().join("\n\n")
}

#[track_caller]
fn assert_touched_once(outside: &Outside, times: usize) {
    let called = outside.called();
    let numbers: Vec<usize> = called.iter().map(|call| call.number).collect();
    assert_eq!(numbers, (0..times).collect::<Vec<_>>(), "each tool was called once, in order");
    let keys: HashSet<&str> = called.iter().map(|call| call.key.as_str()).collect();
    assert!(keys.len() == times && keys.iter().all(|key| key.len() == 32), "{keys:?}");
}

/// Twenty steps, and a kill -9 at every boundary between them: while the model is asked, while a tool is at work, and right
/// after it was done.
#[tokio::test]
async fn a_turn_of_twenty_steps_is_killed_at_every_boundary() {
    let outside = Outside::start(touching).await;
    let mut node = Node::builder().config(&outside.config()).start().await;
    let (mut kills, mut slowest) = (0, Duration::ZERO);
    let boundaries = (0..ROUNDS).flat_map(|round| {
        let tool = if round % 2 == 0 { Stop::Before(Point::Tool(round)) } else { Stop::After(Point::Tool(round)) };
        [Stop::Before(Point::Model(round)), tool]
    });
    for stop in boundaries.chain([Stop::Before(Point::Model(ROUNDS))]) {
        outside.stop(stop);
        if kills == 0 {
            node.client().drop_in("house", &json!({"id": "s1", "content": "look after it"})).await.expect(202);
        } else {
            let known = outside.asked().len() + outside.called().len();
            let begun = Instant::now();
            node.start_again().await;
            wait_until("it goes on", PATIENCE, async || outside.asked().len() + outside.called().len() > known).await;
            slowest = slowest.max(begun.elapsed());
        }
        outside.until_stopped().await;
        node.kill9().await;
        kills += 1;
    }
    outside.go();
    node.start_again().await;
    let turn = node.client().until_status("s1", "decided").await["turn"].clone();
    println!(
        "{kills} kills, the slowest resume {slowest:?} with the start of the process, asked {:?}",
        outside.asked()
    );
    assert_touched_once(&outside, ROUNDS);
    let asked = outside.asked();
    for round in 0..=ROUNDS {
        let times = asked.iter().filter(|asked| **asked == round).count();
        // One kill while it is asked; one more may come when the kill before was right after a tool was done.
        let after_tool = round > 0 && round % 2 == 0;
        assert!(
            (1..=2 + usize::from(after_tool)).contains(&times),
            "round {round} was asked for {times} times: {asked:?}"
        );
    }
    assert!(asked.len() <= ROUNDS + 1 + kills, "at most one repeated call for each kill: {asked:?}");
    assert_eq!(turn["reply"]["content"], all_said());
    assert_eq!(turn["steps"], 2 * ROUNDS + 1);
    assert_eq!(node.client().turns("house").await.len(), 1);
    let last = outside.bodies().last().unwrap()["messages"].as_array().unwrap().clone();
    let told = |n: usize| {
        last.iter().find(|m| m["role"] == "tool" && m["content"].as_str().unwrap().contains(&format!("done {n}")))
    };
    let unknown =
        last.iter().filter(|m| m["role"] == "tool" && m["content"].as_str().unwrap().starts_with("unknown")).count();
    assert!(unknown >= ROUNDS / 2, "a call that was cut off is told as unknown: {last:?}");
    assert!(told(0).is_none(), "{last:?}");
}

/// The other node goes on with the steps of the one that was killed.
#[tokio::test]
async fn another_node_goes_on_where_a_killed_one_was() {
    let outside = Outside::start(touching).await;
    let config = outside.config();
    let mut cluster = Cluster::build(2, false, |builder| builder.config(&config)).await;
    outside.stop(Stop::Before(Point::Tool(3)));
    let door = cluster.client(0);
    door.drop_in("house", &json!({"id": "s1", "content": "look after it"})).await.expect(202);
    outside.until_stopped().await;
    let owner = door.get("/v1/instances/house").await.expect(200)["node"].as_str().unwrap_or("n0").to_owned();
    let victim = usize::from(owner == "n1");
    cluster.nodes[victim].kill9().await;
    outside.go();
    cluster.client(1 - victim).until_status("s1", "decided").await;
    assert_touched_once(&outside, ROUNDS);
    let (asked, turns) = (outside.asked(), cluster.client(1 - victim).turns("house").await);
    assert!(asked.len() <= ROUNDS + 2, "{asked:?}");
    assert_eq!((turns.len(), &turns[0]["reply"]["content"]), (1, &json!(all_said())));
}

/// A profile with a script of twenty steps.
fn scripted() -> Value {
    let line = |n: usize| json!({"say": "I touch it.", "call": [{"tool": "touch", "arguments": {"n": n}}]});
    let steps: Vec<Value> = (0..ROUNDS).map(line).collect();
    json!({"engine": "scripted", "script": {"reply": "All done.", "steps": steps}})
}

#[tokio::test]
async fn a_script_takes_its_steps_and_a_kill_in_between_repeats_none() {
    let outside = Outside::start(touching).await;
    let mut node = Node::builder().config(&outside.config()).start().await;
    node.client().put_instance("house", &scripted()).await;
    outside.stop(Stop::Before(Point::Tool(4)));
    node.client().drop_in("house", &json!({"id": "s1", "content": "look after it"})).await.expect(202);
    outside.until_stopped().await;
    node.kill9().await;
    outside.go();
    node.start_again().await;
    let turn = node.client().until_status("s1", "decided").await["turn"].clone();
    assert_touched_once(&outside, ROUNDS);
    assert_eq!((&turn["reply"]["content"], &turn["steps"]), (&json!(all_said()), &json!(2 * ROUNDS + 1)));
}

/// The events that are there to their end.
fn whole(text: &str) -> &str {
    &text[..text.rfind("\n\n").map_or(0, |at| at + 2)]
}

/// Words after the last restart, and whether there was one.
fn words(text: &str) -> (String, bool) {
    let mut words = String::new();
    let mut restarted = false;
    for data in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
        let data: Value = serde_json::from_str(data).unwrap();
        if data["step"] == "restart" {
            (words, restarted) = (String::new(), true);
        }
        words.push_str(data["text"].as_str().unwrap_or_default());
    }
    (words, restarted)
}

/// A client that comes back after the node was killed gets what follows the words it has, none twice.
#[tokio::test]
async fn a_stream_goes_on_after_a_kill_where_committed_words_end() {
    let outside = Outside::start(touching).await;
    let mut node = Node::builder().stable_ports().config(&outside.config()).start().await;
    outside.stop(Stop::Before(Point::Tool(2)));
    let body = json!({"id": "s1", "content": "look after it"});
    let events = |http: &Http, method, path: &str| http.request(method, path).header("accept", "text/event-stream");
    let asked = events(&node.client(), Method::POST, "/v1/instances/house/stimuli").json(&body);
    let mut stream = Http::open(asked).await;
    outside.until_stopped().await;
    let said = ["I touch it."; 3].join("\n\n");
    let mut first = String::new();
    while words(whole(&first)).0 != said {
        first = stream.more().await.to_owned();
    }
    node.kill9().await;
    node.start_again().await;
    let last = whole(&first).lines().filter_map(|line| line.strip_prefix("id: ")).next_back().unwrap().to_owned();
    let resumed = events(&node.client(), Method::GET, "/v1/stimuli/s1?instance=house").header("last-event-id", last);
    let mut stream = Http::open(resumed).await;
    // Not before somebody listens: who comes after the turn is told the turn.
    let asked = outside.asked().len();
    wait_until("it goes on", PATIENCE, async || outside.asked().len() >= asked.max(4)).await;
    outside.go();
    let rest = stream.until("event: turn").await.to_owned();
    let rest = whole(rest.split("event: turn").next().unwrap());
    let ((had, _), (got, restarted)) = (words(whole(&first)), words(rest));
    assert!(!restarted, "nothing is taken back: {rest}");
    assert_eq!(had + &got, all_said());
}

#[tokio::test]
async fn a_thought_that_is_tried_again_goes_on_from_its_journal() {
    let outside = Outside::start(|round, again| match (round, again) {
        (2, 0..4) => Said::Status(503),
        _ => touching(round, again),
    })
    .await;
    let node = Node::builder().config(&outside.config()).start().await;
    node.client().drop_in("house", &json!({"id": "s1", "content": "look after it"})).await.expect(202);
    node.client().until_status("s1", "decided").await;
    assert_touched_once(&outside, ROUNDS);
    let asked = outside.asked();
    assert_eq!(asked.len(), ROUNDS + 1 + 4, "only the round that failed is asked for again: {asked:?}");
}

#[tokio::test]
async fn a_turn_goes_no_further_than_it_may() {
    let outside = Outside::start(touching).await;
    let node = Node::builder().config(&outside.config()).start().await;
    let http = node.client();
    http.put_instance("short", &json!({"engine": "llm", "limits": {"max_steps": 5}})).await;
    http.drop_in("short", &json!({"id": "s1", "content": "look after it"})).await.expect(202);
    let turn = http.until_status("s1", "decided").await["turn"].clone();
    assert_eq!(turn["steps"], 5, "{turn}");
    assert_eq!(outside.called().len(), 2);
    let tools: Vec<bool> = outside.bodies().iter().map(|body| body["tools"].is_array()).collect();
    assert_eq!(tools, [true, true, false], "the last answer is asked for without tools");

    http.put_instance("poor", &json!({"engine": "llm", "limits": {"max_tokens_per_turn": 200}})).await;
    http.drop_in("poor", &json!({"id": "s2", "content": "look after it"})).await.expect(202);
    let dead = http.until_status("s2", "dead").await;
    assert!(dead["reason"].as_str().unwrap().contains("220 tokens in one turn, the limit is 200"), "{dead}");
}

/// Keeps what an engine commits.
#[derive(Default)]
struct Journal(Mutex<Vec<Arc<Step>>>);

#[async_trait::async_trait]
impl Progress for Journal {
    fn token(&self, _: &str) {}
    fn restart(&self) {}
    async fn commit(&self, steps: Vec<Step>) -> Result<(), Error> {
        self.0.lock().unwrap().extend(steps.into_iter().map(Arc::new));
        Ok(())
    }
}

fn question(tools: Arc<dyn Toolbox>, steps: Vec<Arc<Step>>) -> Question {
    let stimulus = Stimulus::text(Source::Http, Channel::new("chat").unwrap(), "well?", Millis(0));
    Question {
        key: InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap()),
        profile: Arc::new(Profile::default()),
        stimulus: Arc::new(stimulus.with_repeatable_id(StimulusId::new("s1").unwrap())),
        state: StateDoc::default(),
        recollection: vec![],
        recent: vec![],
        now: Millis(1_795_237_853_120),
        deadline: PATIENCE,
        tools,
        steps,
        bounds: Bounds { steps: 100, tokens: 1_000_000 },
    }
}

fn tools() -> Rehearsed {
    let remembered = EpisodeDraft { content: "seen".into(), data: None, tags: vec![], reward: None, occurred_at: None };
    let look = Outcome { result: ToolResult::of("a door"), actions: vec![Action::Remember(remembered)] };
    let touch = Outcome::of(ToolResult::of("it moved"));
    Rehearsed::new([(Rehearsed::tool("look", true), look), (Rehearsed::tool("touch", false), touch)])
}

/// The engine over the outside model.
async fn think(
    outside: &Outside,
    tools: &(impl Toolbox + Clone + 'static),
    steps: Vec<Arc<Step>>,
    journal: &Journal,
) -> Result<Thought, Error> {
    let mut config = Config::default().cognition;
    let provider = format!("base_url = \"{}/v1\"\nmodel = \"plan\"\n", outside.url);
    config.providers.insert(String::from("outside"), toml::from_str(&provider).unwrap());
    let engine = Engines::new(&config, &TieredCache::new(Options::default())).unwrap().get(EngineName::Llm).clone();
    engine.think(question(Arc::new(tools.clone()), steps), journal).await
}

/// Parallel calls, a tool that is not there, arguments that are no JSON: each has its result.
fn muddled(round: usize, _: usize) -> Said {
    match round {
        0 => Said::Answer("", vec![("look", json!({})), ("touch", json!({"n": 1}))]),
        1 => Said::Answer("Hm.", vec![("jump", json!({})), ("look", json!("{no json"))]),
        2 => Said::Answer("", vec![("touch", json!(""))]),
        _ => Said::Answer("Well.", vec![]),
    }
}

#[tokio::test]
async fn every_call_has_a_result_that_the_model_reads() {
    let outside = Outside::start(muddled).await;
    let (tools, journal) = (tools(), Journal::default());
    let thought = think(&outside, &tools, vec![], &journal).await.unwrap();
    let heard: Vec<String> = tools.heard().into_iter().map(|call| call.name).collect();
    assert_eq!(heard, ["look", "touch", "touch"]);
    let bodies = outside.bodies();
    let results: Vec<&str> = bodies[3]["messages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|m| m["role"] == "tool")
        .filter_map(|m| m["content"].as_str())
        .collect();
    assert_eq!(results[..3], ["a door", "it moved", "there is no tool 'jump'"]);
    assert!(results[3].starts_with("not called: the arguments are not JSON"), "{results:?}");
    assert_eq!(results[4], "it moved", "no arguments are an empty object");
    let [Action::Remember(_), Action::Reply(Reply { content, .. })] = &thought.actions[..] else {
        panic!("{thought:?}")
    };
    assert_eq!(content.as_deref(), Some("Hm.\n\nWell."));
    assert_eq!((thought.steps, thought.usage.unwrap().input_tokens), (3 + 5 + 1, 400));
}

/// Cut off after any step, the turn comes to the same end, and nothing that may not be repeated is.
#[tokio::test]
async fn a_turn_goes_on_from_any_step() {
    let outside = Outside::start(muddled).await;
    let (whole, first) = (tools(), Journal::default());
    let thought = think(&outside, &whole, vec![], &first).await.unwrap();
    let steps = first.0.lock().unwrap().clone();
    assert!(steps.len() > 10, "{steps:?}");
    for cut in 0..=steps.len() {
        let (tools, journal) = (tools(), Journal::default());
        let asked = outside.asked().len();
        let again = think(&outside, &tools, steps[..cut].to_vec(), &journal).await.unwrap();
        assert_eq!(again.actions, thought.actions, "cut off after {cut} steps");
        let done = |steps: &[Arc<Step>]| steps.iter().filter(|step| matches!(***step, Step::Answered(_))).count();
        assert_eq!(outside.asked().len() - asked, 4 - done(&steps[..cut]), "cut off after {cut} steps");
        let was_calling = steps[..cut].iter().fold(0, |open, step| match &**step {
            Step::Calling { .. } => 1,
            // Of the two calls side by side, the second may not be made twice.
            Step::Returned { call, .. } if open == 1 && (*call == 1 || done(&steps[..cut]) > 1) => 0,
            _ => open,
        }) == 1;
        let all = [&steps[..cut], &journal.0.lock().unwrap()[..]].concat();
        let hidden = all
            .iter()
            .any(|step| matches!(&**step, Step::Returned { result, .. } if result.content.starts_with("unknown")));
        assert_eq!(hidden, was_calling, "cut off after {cut} steps");
        let keys: Vec<String> = tools.heard().into_iter().map(|call| call.key).collect();
        let known: Vec<String> = whole.heard().into_iter().map(|call| call.key).collect();
        assert!(keys.iter().all(|key| known.contains(key)), "{keys:?} of {known:?}");
    }
}

/// Three calls of one answer: the middle one may be repeated.
fn three(round: usize, _: usize) -> Said {
    match round {
        0 => Said::Answer("", vec![("touch", json!({"n": 0})), ("look", json!({"n": 1})), ("touch", json!({"n": 2}))]),
        _ => Said::Answer("Well.", vec![]),
    }
}

/// What the model was told last of what came of its calls, in their order.
fn results(outside: &Outside) -> Vec<String> {
    let bodies = outside.bodies();
    let messages = bodies.last().unwrap()["messages"].as_array().unwrap();
    let results = messages.iter().filter(|message| message["role"] == "tool");
    results.map(|message| message["content"].as_str().unwrap().to_owned()).collect()
}

/// All are at work when the node is killed. Those that may not be repeated are not; the model is told of each.
#[tokio::test]
async fn calls_of_one_answer_are_made_side_by_side_and_a_kill_repeats_only_what_may_be() {
    let outside = Outside::start(three).await;
    let mut node = Node::builder().config(&outside.config()).start().await;
    outside.stop(Stop::Tools);
    node.client().drop_in("house", &json!({"id": "s1", "content": "look after it"})).await.expect(202);
    wait_until("all three are called before one returns", PATIENCE, async || outside.called().len() == 3).await;
    node.kill9().await;
    outside.go();
    node.start_again().await;
    let turn = node.client().until_status("s1", "decided").await["turn"].clone();
    let numbers = |tool: &str| -> Vec<usize> {
        let mut numbers: Vec<usize> =
            outside.called().iter().filter(|call| call.tool == tool).map(|call| call.number).collect();
        numbers.sort_unstable();
        numbers
    };
    assert_eq!((numbers("touch"), numbers("look")), (vec![0, 2], vec![1, 1]));
    let keys: HashSet<String> = outside.called().into_iter().map(|call| call.key).collect();
    assert_eq!(keys.len(), 3, "the one that was repeated has the key it had");
    let results = results(&outside);
    assert!(results[0].starts_with("unknown") && results[2].starts_with("unknown"), "{results:?}");
    assert_eq!((results[1].as_str(), &turn["steps"]), ("done 1", &json!(5)), "{turn}");
    assert_eq!(outside.asked(), [0, 1], "no model call is repeated");
}

/// Tools that return in the opposite order, at most so many at once; more are not made at the same time.
#[derive(Debug, Clone)]
struct Backwards {
    calls: u64,
    most: u64,
    seen: Arc<Mutex<(Vec<u64>, u64, u64)>>,
    changed: Arc<tokio::sync::Notify>,
}

#[async_trait::async_trait]
impl Toolbox for Backwards {
    async fn offered(&self, _: &InstanceKey, _: &Profile) -> Vec<ToolSpec> {
        vec![Rehearsed::tool("look", true)]
    }

    async fn call(&self, call: Invocation<'_>) -> Outcome {
        let number = call.arguments["n"].as_u64().unwrap();
        {
            let mut seen = self.seen.lock().unwrap();
            seen.1 += 1;
            seen.2 = seen.2.max(seen.1);
        }
        let last = (number / self.most + 1) * self.most;
        let before = last.min(self.calls) - number - 1;
        let is_due = || {
            let seen = self.seen.lock().unwrap();
            seen.0.iter().filter(|other| (number + 1..last).contains(other)).count() as u64 == before
        };
        loop {
            let changed = self.changed.notified();
            if is_due() {
                break;
            }
            changed.await;
        }
        {
            let mut seen = self.seen.lock().unwrap();
            seen.0.push(number);
            seen.1 -= 1;
        }
        self.changed.notify_waiters();
        let content = number.to_string();
        let remembered =
            EpisodeDraft { content: content.clone(), data: None, tags: vec![], reward: None, occurred_at: None };
        Outcome { result: ToolResult::of(content), actions: vec![Action::Remember(remembered)] }
    }
}

#[tokio::test]
async fn results_stand_in_the_order_of_their_calls_and_not_too_many_are_made_at_once() {
    const CALLS: u64 = 10;
    let outside = Outside::start(|round, _| match round {
        0 => Said::Answer("", (0..CALLS).map(|n| ("look", json!({"n": n}))).collect()),
        _ => Said::Answer("Well.", vec![]),
    })
    .await;
    let tools = Backwards { calls: CALLS, most: 8, seen: Arc::default(), changed: Arc::default() };
    let journal = Journal::default();
    let thought = think(&outside, &tools, vec![], &journal).await.unwrap();
    let (order, _, most) = tools.seen.lock().unwrap().clone();
    assert_eq!((order, most), (vec![7, 6, 5, 4, 3, 2, 1, 0, 9, 8], 8));
    let in_order: Vec<String> = (0..CALLS).map(|n| n.to_string()).collect();
    assert_eq!(results(&outside), in_order);
    let remembered: Vec<&str> = thought
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Remember(episode) => Some(episode.content.as_str()),
            _ => None,
        })
        .collect();
    assert_eq!(remembered, in_order);
}
