//! Thinking with a language model, against a server that misbehaves on purpose.
//!
//! [`Standin`] is a stand-in for a provider: it speaks enough HTTP/1.1 to answer each call as the test wrote down, byte for
//! byte. A real server is asked by hand with `cargo run --example model`; what it measured stands in `docs/engines.md`.
//! Not here: parsers and state machines, tested at the foot of their files.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use sophont::{
    cognition::{Action, Engine, Engines, Error, Progress, Question, Thought, answer::Extractive},
    config,
    memory::Memory,
    runtime::clock::Clock,
    scaling::cache::{Options, TieredCache},
    store::{Done, Fence, Head, Unit, Work, Writer, memory::MemoryStore},
    types::{
        Channel, EpisodeId, Fault, InstanceId, InstanceKey, Kind, Millis, Outcome, Profile, RawJson, Reply, Source,
        StateChange, StateDoc, Stimulus, TenantId, TurnRecord, Usage, chat::CHAT_TYPE, profile::EngineName,
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::support::{PATIENCE, wait_until};

/// One thing the stand-in does with a call.
#[derive(Debug, Clone)]
enum Do {
    /// Sends these bytes as one write.
    Send(Vec<u8>),
    /// Says nothing for so long, unless the other side gives up.
    Dawdle(Duration),
    /// Waits until there were so many calls.
    Calls(usize),
    /// Waits until the other side closes the connection.
    Hang,
}

/// A stand-in for a provider: the n-th call gets the n-th script, the last one again and again.
struct Standin {
    base_url: String,
    calls: Arc<Mutex<Vec<Call>>>,
    /// Connections the other side closed while a script hung.
    given_up: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
}

#[derive(Debug, Clone)]
struct Call {
    at: Instant,
    authorization: Option<String>,
    body: Value,
}

impl Standin {
    async fn start(scripts: Vec<Vec<Do>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let standin = Self {
            base_url: format!("http://{}/v1", listener.local_addr().unwrap()),
            calls: Arc::default(),
            given_up: Arc::default(),
            open: Arc::default(),
        };
        let (calls, given_up, open) = (standin.calls.clone(), standin.given_up.clone(), standin.open.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (calls, given_up, open, scripts) = (calls.clone(), given_up.clone(), open.clone(), scripts.clone());
                tokio::spawn(async move {
                    open.fetch_add(1, Ordering::SeqCst);
                    serve(stream, &calls, &given_up, &scripts).await;
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        standin
    }

    fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    /// An engine with this as its only provider.
    fn engine(&self, change: impl FnOnce(&mut config::Provider)) -> Arc<dyn Engine> {
        let mut provider = config::Provider {
            base_url: self.base_url.clone(),
            api_key_env: String::new(),
            model: String::from("small"),
            max_concurrent: 4,
            max_waiting: 100,
            idle_seconds: 5,
            max_tokens: 50,
            context_tokens: 8192,
        };
        change(&mut provider);
        engine(provider)
    }
}

fn engine(provider: config::Provider) -> Arc<dyn Engine> {
    let config = config::Cognition {
        default_engine: EngineName::Llm,
        default_provider: String::new(),
        think_seconds: 60,
        max_steps: 100,
        max_tokens_per_turn: 1_000_000,
        providers: BTreeMap::from([(String::from("standin"), provider)]),
    };
    Engines::new(&config, &TieredCache::new(Options::default())).unwrap().get(EngineName::Llm).clone()
}

async fn serve(mut stream: TcpStream, calls: &Mutex<Vec<Call>>, given_up: &AtomicUsize, scripts: &[Vec<Do>]) {
    let Some(call) = read_call(&mut stream).await else { return };
    let number = {
        let mut calls = calls.lock().unwrap();
        calls.push(call);
        calls.len() - 1
    };
    for step in &scripts[number.min(scripts.len() - 1)] {
        match step {
            Do::Send(bytes) => {
                if stream.write_all(bytes).await.is_err() {
                    given_up.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
            Do::Dawdle(time) => {
                if tokio::time::timeout(*time, stream.read(&mut [0; 64])).await.is_ok() {
                    given_up.fetch_add(1, Ordering::SeqCst);
                    return;
                }
            }
            Do::Calls(count) => {
                while calls.lock().unwrap().len() < *count {
                    tokio::task::yield_now().await;
                }
            }
            Do::Hang => {
                if matches!(stream.read(&mut [0; 64]).await, Ok(0) | Err(_)) {
                    given_up.fetch_add(1, Ordering::SeqCst);
                }
                return;
            }
        }
    }
}

async fn read_call(stream: &mut TcpStream) -> Option<Call> {
    let mut bytes = Vec::new();
    let mut portion = [0; 4096];
    loop {
        let read = stream.read(&mut portion).await.ok()?;
        if read == 0 {
            return None;
        }
        bytes.extend_from_slice(&portion[..read]);
        let Some(head) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
        assert!(text.starts_with("POST /v1/chat/completions HTTP/1.1"), "{text}");
        let header = |name: &str| {
            text.lines().find_map(|line| {
                let (field, value) = line.split_once(':')?;
                field.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        let length: usize = header("content-length").unwrap().parse().unwrap();
        if bytes.len() >= head + 4 + length {
            let body = serde_json::from_slice(&bytes[head + 4..head + 4 + length]).unwrap();
            return Some(Call { at: Instant::now(), authorization: header("authorization"), body });
        }
    }
}

/// The head of an event stream whose end is the end of the connection.
fn stream_head() -> Do {
    Do::Send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n".to_vec())
}

fn refusal(status: &str, headers: &str, body: &str) -> Vec<Do> {
    let length = body.len();
    vec![Do::Send(
        format!("HTTP/1.1 {status}\r\n{headers}content-length: {length}\r\nconnection: close\r\n\r\n{body}")
            .into_bytes(),
    )]
}

fn said(piece: &str) -> String {
    format!("data: {}\n\n", json!({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": null}]}))
}

const STOP: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
const USAGE: &str = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":2}}\n\n";
const DONE: &str = "data: [DONE]\n\n";

/// A well-behaved answer: `Hello` in two pieces, with usage.
fn hello() -> Vec<Do> {
    vec![stream_head(), Do::Send([&said("Hel"), &said("lo"), STOP, USAGE, DONE].concat().into_bytes())]
}

/// What an engine said while thinking.
#[derive(Default)]
struct Heard(Mutex<(Vec<(Instant, String)>, usize)>);

impl Heard {
    fn words(&self) -> Vec<String> {
        self.0.lock().unwrap().0.iter().map(|(_, text)| text.clone()).collect()
    }
    fn restarts(&self) -> usize {
        self.0.lock().unwrap().1
    }
}

impl Progress for Heard {
    fn token(&self, text: &str) {
        self.0.lock().unwrap().0.push((Instant::now(), text.to_owned()));
    }
    fn restart(&self) {
        let mut heard = self.0.lock().unwrap();
        heard.0.clear();
        heard.1 += 1;
    }
}

fn question(text: &str, deadline: Duration) -> Question {
    Question {
        key: InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap()),
        profile: Arc::new(Profile { persona: Some(String::from("You are brief.")), ..Profile::default() }),
        stimulus: Arc::new(Stimulus::text(Source::Http, Channel::new("chat").unwrap(), text, Millis(0))),
        state: StateDoc::default(),
        recollection: vec![],
        recent: vec![],
        now: Millis(1_795_237_853_120),
        deadline,
        tools: std::sync::Arc::new(sophont::cognition::toolbox::Empty),
        steps: Vec::new(),
        bounds: sophont::cognition::Bounds { steps: 100, tokens: 1_000_000 },
    }
}

async fn ask(engine: &Arc<dyn Engine>, heard: &Heard) -> Result<Thought, Error> {
    engine.think(question("hello?", PATIENCE), heard).await
}

#[track_caller]
fn assert_hello(thought: Result<Thought, Error>, heard: &Heard) {
    let thought = thought.unwrap();
    assert_eq!(thought.actions, [Action::Reply(Reply { content: Some(String::from("Hello")), data: None })]);
    assert_eq!(thought.usage, Some(Usage { input_tokens: 11, output_tokens: 2 }));
    assert_eq!(thought.model.as_deref(), Some("standin/small"));
    assert_eq!(heard.words().concat(), "Hello");
}

#[tokio::test]
async fn a_request_that_was_made_before_is_answered_again_where_the_profile_says_so() {
    let standin = Standin::start(vec![hello()]).await;
    let engine = standin.engine(|_| ());
    let asked = async |change: fn(&mut Question)| {
        let (mut question, heard) = (question("hello?", PATIENCE), Heard::default());
        let profile = Profile { cache_answers: true, ..(*question.profile).clone() };
        question.profile = Arc::new(profile);
        change(&mut question);
        let thought = engine.think(question, &heard).await.unwrap();
        assert_eq!(thought.actions, [Action::Reply(Reply { content: Some(String::from("Hello")), data: None })]);
        assert_eq!(heard.words(), ["Hel", "lo"], "it is said as it was said first");
        (standin.calls().len(), thought.usage.unwrap().output_tokens)
    };
    assert_eq!(asked(|_| ()).await, (1, 2));
    assert_eq!(asked(|_| ()).await, (1, 0), "what was answered before consumes nothing");
    assert_eq!(asked(|question| question.now = question.now.plus(60_000)).await.0, 1, "a minute later");
    assert_eq!(asked(|question| question.now = question.now.plus(86_400_000)).await.0, 2, "another day");
    let elsewhere = |question: &mut Question| question.key.tenant = TenantId::new("other").unwrap();
    assert_eq!(asked(elsewhere).await.0, 3, "another tenant's answers are its own");
    let unlike = |question: &mut Question| {
        question.stimulus = Arc::new(Stimulus::text(Source::Http, Channel::new("chat").unwrap(), "hi?", Millis(0)));
    };
    assert_eq!(asked(unlike).await.0, 4, "another question");
    let forbidden = |question: &mut Question| question.profile = Arc::new(Profile::default());
    assert_eq!((asked(forbidden).await.0, asked(forbidden).await.0), (5, 6));
}

#[tokio::test]
async fn an_answer_is_streamed_with_its_usage() {
    let standin = Standin::start(vec![hello()]).await;
    let heard = Heard::default();
    assert_hello(ask(&standin.engine(|_| ()), &heard).await, &heard);
    assert_eq!(heard.words(), ["Hel", "lo"]);
    let body = &standin.calls()[0].body;
    assert_eq!((&body["model"], &body["stream"], &body["max_tokens"]), (&json!("small"), &json!(true), &json!(50)));
    assert_eq!(body["stream_options"], json!({"include_usage": true}));
    assert_eq!(body["messages"][0]["role"], "system");
    assert_eq!(body["messages"].as_array().unwrap().last().unwrap(), &json!({"role": "user", "content": "hello?"}));
    assert_eq!(standin.calls()[0].authorization, None);
}

#[tokio::test]
async fn what_is_told_is_remembered_what_is_asked_is_not() {
    let standin = Standin::start(vec![hello()]).await;
    let engine = standin.engine(|_| ());
    let thought = engine.think(question("the key is red", PATIENCE), &Heard::default()).await.unwrap();
    assert!(
        matches!(&thought.actions[..], [Action::Remember(draft), Action::Reply(_)] if draft.content == "the key is red")
    );
}

#[tokio::test]
async fn any_portions_and_line_ends_are_read() {
    let text = [&said("Hel"), ": a comment\n\n", &said("lo"), STOP, USAGE, DONE].concat();
    for text in [text.replace('\n', "\r\n"), text.replace('\n', "\r"), text] {
        let bytes = text.into_bytes().chunks(7).map(|chunk| Do::Send(chunk.to_vec())).collect::<Vec<_>>();
        let standin = Standin::start(vec![[vec![stream_head()], bytes].concat()]).await;
        let heard = Heard::default();
        assert_hello(ask(&standin.engine(|_| ()), &heard).await, &heard);
    }
}

#[tokio::test]
async fn retry_after_is_respected() {
    let busy = refusal("429 Too Many Requests", "retry-after: 1\r\n", r#"{"error":{"message":"slow down"}}"#);
    let standin = Standin::start(vec![busy, hello()]).await;
    let heard = Heard::default();
    assert_hello(ask(&standin.engine(|_| ()), &heard).await, &heard);
    let calls = standin.calls();
    assert_eq!(calls.len(), 2);
    assert!(calls[1].at - calls[0].at >= Duration::from_secs(1), "{:?}", calls[1].at - calls[0].at);
    assert_eq!(heard.restarts(), 0, "nothing was said, so nothing is taken back");
}

#[tokio::test]
async fn a_wait_beyond_the_deadline_is_not_begun() {
    let busy = refusal("429 Too Many Requests", "retry-after: 3600\r\n", "{}");
    let standin = Standin::start(vec![busy]).await;
    let begun = Instant::now();
    let error = ask(&standin.engine(|_| ()), &Heard::default()).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable(reason) if reason.contains("HTTP 429")), "{error}");
    assert!(begun.elapsed() < PATIENCE / 2 && error.kind().is_retryable());
    assert_eq!(standin.calls().len(), 1);
}

#[tokio::test]
async fn server_errors_are_tried_again_and_in_the_end_told() {
    let broken = refusal("500 Internal Server Error", "", r#"{"error":"out of memory"}"#);
    let standin = Standin::start(vec![broken.clone(), broken.clone(), hello()]).await;
    let heard = Heard::default();
    assert_hello(ask(&standin.engine(|_| ()), &heard).await, &heard);
    assert_eq!(standin.calls().len(), 3);

    let standin = Standin::start(vec![broken]).await;
    let error = ask(&standin.engine(|_| ()), &Heard::default()).await.unwrap_err();
    assert_eq!(error.to_string(), "the model provider is unavailable: standin: HTTP 500: out of memory");
    assert_eq!(standin.calls().len(), 4, "one call and three repeats");
}

#[tokio::test]
async fn a_refusal_is_final_and_hides_the_key() {
    // The variable is set for the whole test run by cargo itself, so it stands in for a secret here.
    let key = std::env::var("CARGO_MANIFEST_DIR").unwrap();
    let body = json!({"error": {"message": format!("incorrect API key provided: {key}")}}).to_string();
    let standin = Standin::start(vec![refusal("401 Unauthorized", "", &body)]).await;
    let engine = standin.engine(|provider| provider.api_key_env = String::from("CARGO_MANIFEST_DIR"));
    let error = ask(&engine, &Heard::default()).await.unwrap_err();
    assert_eq!((error.kind(), standin.calls().len()), (Kind::Invalid, 1));
    assert_eq!(standin.calls()[0].authorization.as_deref(), Some(format!("Bearer {key}").as_str()));
    assert!(error.to_string().contains("incorrect API key provided: (key)"), "{error}");
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_taken_back_and_begun_again() {
    let cut = vec![stream_head(), Do::Send(said("Wrong ").into_bytes())];
    let error = [&said("Worse "), "data: {\"error\":{\"message\":\"overloaded\"}}\n\n"].concat();
    let within = vec![stream_head(), Do::Send(error.into_bytes()), Do::Hang];
    let standin = Standin::start(vec![cut, within, hello()]).await;
    let heard = Heard::default();
    assert_hello(ask(&standin.engine(|_| ()), &heard).await, &heard);
    assert_eq!((standin.calls().len(), heard.restarts()), (3, 2));
}

#[tokio::test]
async fn a_connection_dropped_without_an_answer_is_tried_again() {
    let standin = Standin::start(vec![vec![], hello()]).await;
    let heard = Heard::default();
    assert_hello(ask(&standin.engine(|_| ()), &heard).await, &heard);
    assert_eq!(standin.calls().len(), 2);
}

#[tokio::test]
async fn silence_is_noticed_and_slowness_is_borne() {
    let silent = vec![stream_head(), Do::Hang];
    let mut slow = hello();
    slow.insert(1, Do::Dawdle(Duration::from_millis(600)));
    let standin = Standin::start(vec![silent, slow]).await;
    let heard = Heard::default();
    assert_hello(ask(&standin.engine(|provider| provider.idle_seconds = 1), &heard).await, &heard);
    let calls = standin.calls();
    assert_eq!(calls.len(), 2);
    assert!(calls[1].at - calls[0].at >= Duration::from_secs(1));
    wait_until("the silent connection to be closed", PATIENCE, async || standin.given_up.load(Ordering::SeqCst) == 1)
        .await;
}

#[tokio::test]
async fn the_deadline_ends_the_call_and_the_connection() {
    let standin = Standin::start(vec![vec![stream_head(), Do::Send(said("He").into_bytes()), Do::Hang]]).await;
    let heard = Heard::default();
    let begun = Instant::now();
    let error = standin.engine(|_| ()).think(question("hello?", Duration::from_millis(400)), &heard).await.unwrap_err();
    assert!(matches!(error, Error::Timeout(_)), "{error}");
    assert!(begun.elapsed() < PATIENCE / 2);
    assert_eq!((heard.words().len(), heard.restarts()), (0, 1), "what was said is taken back");
    wait_until("the connection to be closed", PATIENCE, async || standin.given_up.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_dropped_thought_closes_its_connection_and_frees_its_place() {
    let standin = Standin::start(vec![vec![stream_head(), Do::Send(said("He").into_bytes()), Do::Hang], hello()]).await;
    let engine = standin.engine(|provider| provider.max_concurrent = 1);
    let heard = Arc::new(Heard::default());
    let task = tokio::spawn({
        let (engine, heard) = (engine.clone(), heard.clone());
        async move { ask(&engine, &heard).await }
    });
    wait_until("the first word", PATIENCE, async || !heard.words().is_empty()).await;
    task.abort();
    wait_until("the connection to be closed", PATIENCE, async || standin.given_up.load(Ordering::SeqCst) == 1).await;
    let heard = Heard::default();
    assert_hello(ask(&engine, &heard).await, &heard);
}

#[tokio::test]
async fn usage_may_be_refused_or_missing() {
    let refuses = refusal("400 Bad Request", "", r#"{"error":{"message":"unknown field stream_options"}}"#);
    let wants_other = refusal("400 Bad Request", "", r#"{"error":{"message":"use max_completion_tokens instead"}}"#);
    let without = vec![stream_head(), Do::Send([&said("Hel"), &said("lo"), STOP, DONE].concat().into_bytes())];
    let standin = Standin::start(vec![refuses, wants_other, without]).await;
    let engine = standin.engine(|_| ());
    let thought = ask(&engine, &Heard::default()).await.unwrap();
    let usage = thought.usage.unwrap();
    assert_eq!(usage.output_tokens, 2, "a piece of the stream is taken for a token");
    assert!(usage.input_tokens > 5 && usage.input_tokens < 100, "{usage:?}");
    ask(&engine, &Heard::default()).await.unwrap();
    let bodies: Vec<Value> = standin.calls().into_iter().map(|call| call.body).collect();
    assert_eq!(bodies.len(), 4, "the server's wishes are remembered");
    assert!(bodies[0].get("stream_options").is_some() && bodies[1].get("stream_options").is_none());
    assert_eq!((bodies[3].get("max_tokens"), bodies[3].get("max_completion_tokens")), (None, Some(&json!(50))));
}

/// Calls that are under way while the first refusal comes are refused for the same reason, and go on as the first does.
#[tokio::test]
async fn calls_under_way_learn_what_the_first_one_learnt() {
    let refuses = refusal("400 Bad Request", "", r#"{"error":{"message":"unknown field stream_options"}}"#);
    let held = vec![Do::Calls(2), refuses[0].clone()];
    let standin = Standin::start(vec![held.clone(), held, hello()]).await;
    let engine = standin.engine(|_| ());
    let (one, other) = (Heard::default(), Heard::default());
    let (first, second) = tokio::join!(ask(&engine, &one), ask(&engine, &other));
    assert_hello(first, &one);
    assert_hello(second, &other);
    assert_eq!(standin.calls().len(), 4);
}

#[tokio::test]
async fn a_wrong_tool_of_one_client_takes_nobody_elses_away() {
    let wrong = r#"{"error":{"message":"Invalid 'tools[0].function.name': string does not match pattern"}}"#;
    let toolless = r#"{"error":{"message":"small does not support tools"}}"#;
    let standin = Standin::start(vec![
        refusal("400 Bad Request", "", wrong),
        hello(),
        refusal("404 Not Found", "", toolless),
        hello(),
    ])
    .await;
    let engine = standin.engine(|_| ());
    let with_tool = async || {
        let mut question = question("hello?", PATIENCE);
        let tool = json!({"name": "look", "description": "", "parameters": null});
        let chat = json!({"instructions": null, "earlier": [], "results": [], "tools": [tool], "options": {}});
        let mut stimulus = (*question.stimulus).clone();
        stimulus.data = Some(RawJson::of(&chat));
        stimulus.content_type = Some(String::from(CHAT_TYPE));
        question.stimulus = Arc::new(stimulus);
        engine.think(question, &Heard::default()).await
    };
    let error = with_tool().await.unwrap_err();
    assert!(error.to_string().contains("tools[0].function.name"), "{error}");
    with_tool().await.unwrap();
    with_tool().await.unwrap();
    let tools: Vec<bool> = standin.calls().iter().map(|call| call.body.get("tools").is_some()).collect();
    assert_eq!(tools, [true, true, true, false], "the one that says so is asked without");
}

#[tokio::test]
async fn a_server_that_does_not_stream_is_understood() {
    let body = json!({"choices": [{"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
                      "usage": {"prompt_tokens": 11, "completion_tokens": 2}});
    let standin =
        Standin::start(vec![refusal("200 OK", "content-type: application/json\r\n", &body.to_string())]).await;
    let heard = Heard::default();
    assert_hello(ask(&standin.engine(|_| ()), &heard).await, &heard);
}

#[tokio::test]
async fn endless_lines_and_answers_take_no_memory() {
    let line = vec![stream_head(), Do::Send(vec![b'x'; 2 * 1024 * 1024]), Do::Hang];
    let standin = Standin::start(vec![line]).await;
    let error = ask(&standin.engine(|_| ()), &Heard::default()).await.unwrap_err();
    assert!(error.to_string().contains("longer than 262144 bytes"), "{error}");
    assert_eq!((error.kind(), standin.calls().len()), (Kind::Invalid, 1));

    let flood = said(&"x".repeat(50_000)).repeat(20).into_bytes();
    let standin = Standin::start(vec![vec![stream_head(), Do::Send(flood), Do::Hang]]).await;
    let thought = ask(&standin.engine(|_| ()), &Heard::default()).await.unwrap();
    let [Action::Reply(Reply { content: Some(text), .. })] = &thought.actions[..] else { panic!("{thought:?}") };
    assert_eq!(text.len(), 256 * 1024, "the answer is cut");
}

#[tokio::test]
async fn calls_at_once_and_calls_waiting_are_bounded() {
    let standin = Standin::start(vec![vec![stream_head(), Do::Send(said("He").into_bytes()), Do::Hang]]).await;
    let engine = standin.engine(|provider| (provider.max_concurrent, provider.max_waiting) = (2, 3));
    let tasks: Vec<_> = (0..5)
        .map(|_| {
            let engine = engine.clone();
            tokio::spawn(async move { ask(&engine, &Heard::default()).await })
        })
        .collect();
    wait_until("two calls under way", PATIENCE, async || standin.calls().len() == 2).await;
    let error = ask(&engine, &Heard::default()).await.unwrap_err();
    assert!(matches!(error, Error::Overloaded(ref name) if name == "standin"), "{error}");
    assert_eq!((error.kind(), standin.open.load(Ordering::SeqCst)), (Kind::Overloaded, 2));
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn a_broken_provider_is_left_alone_for_a_while() {
    let standin = Standin::start(vec![refusal("503 Service Unavailable", "", "")]).await;
    let engine = standin.engine(|_| ());
    let first = ask(&engine, &Heard::default()).await.unwrap_err();
    assert!(first.to_string().contains("HTTP 503"), "{first}");
    let second = ask(&engine, &Heard::default()).await.unwrap_err();
    assert!(second.to_string().contains("left alone"), "{second}");
    let calls = standin.calls().len();
    let begun = Instant::now();
    let third = ask(&engine, &Heard::default()).await.unwrap_err();
    assert!(third.to_string().contains("left alone") && third.kind() == Kind::Unavailable, "{third}");
    assert_eq!(standin.calls().len(), calls, "nothing is asked of it meanwhile");
    assert!(begun.elapsed() < Duration::from_secs(2), "and nobody waits");
}

#[tokio::test]
async fn an_address_where_nobody_listens_is_unavailable() {
    let port = crate::support::free_port();
    let standin = Standin::start(vec![hello()]).await;
    let engine = standin.engine(|provider| provider.base_url = format!("http://127.0.0.1:{port}/v1"));
    let error = ask(&engine, &Heard::default()).await.unwrap_err();
    assert!(error.to_string().contains("cannot connect"), "{error}");
    assert_eq!(error.kind(), Kind::Unavailable);
}

#[tokio::test]
async fn what_was_told_answers_a_later_question_without_a_model() {
    let store = MemoryStore::new();
    let mut head = Head::default();
    for text in ["The spare key hangs behind the boiler.", "Anna likes black tea", "where is the key?"] {
        let told = question(text, PATIENCE);
        let thought = Extractive.think(told.clone(), &Heard::default()).await.unwrap();
        let episodes = thought.actions.into_iter().filter_map(|action| match action {
            Action::Remember(draft) => Some(draft),
            _ => None,
        });
        let turn = TurnRecord {
            turn: head.turn + 1,
            version: 0,
            stimulus: (*told.stimulus).clone(),
            outcome: Outcome::Silent,
            reply: None,
            effects: vec![],
            state: StateChange::None,
            episodes: episodes.collect(),
            steps: 0,
            engine: String::from("reflex"),
            model: None,
            usage: None,
            error: None,
            decided_at: Millis(1_795_237_853_120),
            epoch: 0,
        };
        let (done, end) = Done::channel();
        let work = Work::Turns { head, turns: vec![Arc::new(turn)] };
        store.submit(Unit { key: told.key, fence: Fence::default(), work, done });
        head = end.await.unwrap().unwrap().head;
    }
    let (settings, cache) = (config::Config::default().memory, TieredCache::new(Options::default()));
    let memory = Memory::new(&settings, Arc::new(store.clone()), Clock::System, &cache).unwrap();
    let answers = async |text: &str| {
        let mut asked = question(text, PATIENCE);
        asked.recollection = memory.recall(&asked.key, text, 8, PATIENCE).await.unwrap();
        let known: Vec<String> = asked.recollection.iter().map(|episode| EpisodeId(episode.id).to_string()).collect();
        let thought = Extractive.think(asked, &Heard::default()).await.unwrap();
        let [Action::Reply(reply)] = &thought.actions[..] else { panic!("{thought:?}") };
        let data = reply.data.as_ref().unwrap().value();
        for id in data["episodes"].as_array().unwrap() {
            assert!(known.iter().any(|known| id == known), "{id} is no episode of {known:?}");
        }
        (reply.content.clone().unwrap(), data["episodes"].as_array().unwrap().len())
    };
    let (text, episodes) = answers("Where are the spare keys?").await;
    assert!(text.starts_with("I remember: \u{201c}The spare key hangs behind the boiler\u{201d} (episode "), "{text}");
    assert_eq!(episodes, 1, "the question itself was not remembered");
    assert_eq!(answers("What does Anna like?").await.1, 1);
    assert_eq!(answers("Where is the ladder?").await, (String::from("I remember nothing about that."), 0));
    assert_eq!(answers("What is it?").await.1, 0);
}
