//! Checkpoints of memories: parts in the store instead of the log, on every backend, and what becomes of damaged and
//! forgotten ones.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Value, json};
use sophont::{
    config,
    memory::{Ask, Memory},
    runtime::clock::Clock,
    scaling::cache::{Options as CacheOptions, TieredCache},
    store::{Done, Head, Keep, Part, Piece, Store, Work, sqlite::Options},
    types::{EpisodeId, InstanceKey, TurnRecord},
};

use crate::{
    memory_contract::forgetting,
    store_contract::{Subject, commit, episode, key, record, stimulus, turns},
    support::{Http, Node, metric, wait_until},
};

fn memory(store: &Arc<dyn Store>) -> Memory {
    let cache = TieredCache::new(CacheOptions::default());
    Memory::new(&config::Config::default().memory, store.clone(), Clock::System, &cache).unwrap()
}

/// A turn that remembers these texts.
fn writing(turn: u64, texts: &[&str]) -> TurnRecord {
    TurnRecord { episodes: texts.iter().map(|text| episode(text)).collect(), ..record(turn, stimulus(None)) }
}

/// Ids and texts of what a memory that knows nothing yet answers.
async fn cold(store: &Arc<dyn Store>, key: &InstanceKey, text: &str) -> Vec<(u64, String)> {
    let ask = Ask { query: Some(text.into()), limit: 5, ..Ask::default() };
    let found = memory(store).search(key, ask).await.unwrap();
    found.episodes.into_iter().map(|found| (found.episode.id, found.episode.content)).collect()
}

async fn keep(store: &Arc<dyn Store>, key: &InstanceKey, life: i64, seen: u64, part: Part) {
    let (done, end) = Done::channel();
    store.keep(Keep { key: key.clone(), life, seen, piece: Piece::Part(part) }, done);
    end.await.unwrap().unwrap();
}

async fn fruits(store: &Arc<dyn Store>, key: &InstanceKey) -> Head {
    let mut head = Head::default();
    for (number, texts) in (1..).zip([["apples are red", "pears are green"], ["plums are blue", "figs are purple"]]) {
        head = turns(&**store, key, head, vec![writing(number, &texts)]).await.unwrap();
    }
    head
}

async fn a_cold_memory_begins_with_its_parts(mut subject: Subject) {
    let (key, other) = (key("a"), crate::store_contract::key("b"));
    assert_eq!(subject.store.spans(&key).await.unwrap().life, 0);
    let head = fruits(&subject.store, &key).await;
    let told = cold(&subject.store, &key, "are figs purple?").await;
    assert_eq!(told[0].1, "figs are purple");
    let made = memory(&subject.store).checkpoint(&key, false).await.unwrap();
    assert_eq!((made.written, made.parts), (0, 0), "so few are read from the log");
    let made = memory(&subject.store).checkpoint(&key, true).await.unwrap();
    assert_eq!((made.written, made.parts, made.upto), (1, 1, 2));
    assert_eq!(memory(&subject.store).checkpoint(&key, true).await.unwrap().written, 0, "it is all there");
    turns(&*subject.store, &key, head, vec![writing(3, &["figs are sweet"])]).await.unwrap();
    if subject.is_durable() {
        subject.reopen(true).await;
    }
    let now = cold(&subject.store, &key, "are figs purple?").await;
    assert_eq!(now[0], told[0]);
    assert!(now.iter().any(|(_, text)| text == "figs are sweet"), "parts, then the end of the log: {now:?}");

    // The part is what is read: with that of another memory in its place the answer is another.
    turns(&*subject.store, &other, Head::default(), vec![writing(1, &["figs are a lie", "x"]), writing(2, &["y"])])
        .await
        .unwrap();
    memory(&subject.store).checkpoint(&other, true).await.unwrap();
    let theirs = subject.store.parts(&other, 0, 9).await.unwrap().parts.remove(0);
    let life = subject.store.parts(&key, 0, 9).await.unwrap().life;
    keep(&subject.store, &key, life, 9, theirs).await;
    assert_eq!(cold(&subject.store, &key, "figs lie").await[0].1, "figs are a lie");

    // Damage is no error, and is made good.
    keep(&subject.store, &key, life, 9, Part { after: 0, upto: 2, rec: Bytes::from_static(b"\x01junk") }).await;
    assert_eq!(cold(&subject.store, &key, "are figs purple?").await, now);
    assert!(subject.store.spans(&key).await.unwrap().spans.is_empty(), "it is gone");
    let made = memory(&subject.store).checkpoint(&key, true).await.unwrap();
    assert_eq!((made.written, made.upto), (1, 3));
    assert_eq!(cold(&subject.store, &key, "are figs purple?").await, now);
    // One that reaches beyond the last turn is of another history.
    let mut ahead = subject.store.parts(&key, 0, 9).await.unwrap().parts.remove(0);
    ahead.upto = 9;
    keep(&subject.store, &key, life, 9, ahead).await;
    assert!(subject.store.parts(&key, 0, 9).await.unwrap().parts.is_empty());
    assert_eq!(cold(&subject.store, &key, "are figs purple?").await, now);
}

async fn what_is_forgotten_takes_its_parts_along(subject: Subject) {
    let (store, key) = (&subject.store, key("a"));
    let mut head = fruits(store, &key).await;
    memory(store).checkpoint(&key, true).await.unwrap();
    head = turns(&**store, &key, head, vec![writing(3, &["a lemon is yellow"])]).await.unwrap();
    memory(store).checkpoint(&key, true).await.unwrap();
    let before = store.parts(&key, 0, 9).await.unwrap();
    assert_eq!(store.spans(&key).await.unwrap().spans, [(0, 2), (2, 3)]);
    head = turns(&**store, &key, head, vec![forgetting(4, &[EpisodeId::new(1, 0)])]).await.unwrap();
    assert_eq!(store.spans(&key).await.unwrap().spans, [(2, 3)], "that of the lemon stays");
    // One that was read before and comes late is left out.
    keep(store, &key, before.life, 3, before.parts[0].clone()).await;
    assert_eq!(store.spans(&key).await.unwrap().spans, [(2, 3)]);
    let found = cold(store, &key, "apples pears plums lemon").await;
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found.iter().all(|(_, text)| !text.contains("apples")));
    // What is missing between is made again, without it.
    let made = memory(store).checkpoint(&key, true).await.unwrap();
    assert_eq!((made.written, made.upto), (2, 4));
    assert_eq!(store.spans(&key).await.unwrap().spans, [(0, 2), (2, 3), (3, 4)]);
    let behind = async |turn: u64, limit| {
        let found = store.parts(&key, turn, limit).await.unwrap().parts;
        found.iter().map(|part| part.after).collect::<Vec<_>>()
    };
    let runs = (behind(0, 9).await, behind(0, 1).await, behind(1, 9).await, behind(2, 1).await, behind(4, 9).await);
    assert_eq!(runs, (vec![0, 2, 3], vec![0], vec![0, 2, 3], vec![2], vec![]), "and none that ends before");
    assert_eq!(cold(store, &key, "apples pears plums lemon").await, found);
    let bytes = store.parts(&key, 0, 9).await.unwrap().parts.remove(0).rec;
    let has = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(has("pears") && !has("apples"));

    // Another life has none, and takes none of the one before.
    turns(&**store, &key, head, vec![writing(5, &["more"])]).await.unwrap();
    commit(&**store, &key, Work::Forget).await.unwrap();
    assert_eq!(store.spans(&key).await.unwrap().life, 0);
    fruits(store, &key).await;
    assert!(store.spans(&key).await.unwrap().spans.is_empty());
    keep(store, &key, before.life, 9, before.parts[0].clone()).await;
    assert!(store.spans(&key).await.unwrap().spans.is_empty());
}

macro_rules! contract {
    ($($name:ident)*) => {
        mod memory_store { $(#[tokio::test] async fn $name() { super::$name(super::Subject::memory()).await; })* }
        mod sqlite {
            $(#[tokio::test] async fn $name() { super::$name(super::Subject::sqlite(super::Options::default())).await; })*
        }
        mod on_postgres { $(#[tokio::test] async fn $name() { super::$name(super::Subject::postgres().await).await; })* }
    };
}

contract! {
    a_cold_memory_begins_with_its_parts
    what_is_forgotten_takes_its_parts_along
}

async fn top(http: &Http) -> Value {
    let asked = json!({"query": "what does the note number 437 say?", "top_k": 3});
    let found = http.post("/v1/instances/ann/recall", &asked).await.expect(200);
    let ids: Vec<Value> = found["episodes"].as_array().unwrap().iter().map(|e| e["id"].clone()).collect();
    json!(ids)
}

/// What the metrics page says of parts.
async fn parts(http: &Http, result: &str) -> f64 {
    metric(http, &format!("sophont_memory_parts_total{{result=\"{result}\"}}")).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_the_first_question_is_answered_from_a_checkpoint() {
    let mut node = Node::start().await;
    let http = node.client();
    let many: Vec<Value> = (0..600).map(|n| json!({"content": format!("note number {n} of many")})).collect();
    http.post("/v1/instances/ann/episodes/batch", &json!({"episodes": many})).await.expect(201);
    // It comes by itself when much was remembered.
    let mut made = Value::Null;
    wait_until("a checkpoint", Duration::from_secs(30), async || parts(&http, "written").await >= 1.0).await;
    let told = top(&http).await;
    http.post("/v1/instances/ann/episodes", &json!({"content": "one more note"})).await.expect(201);
    for _ in 0..2 {
        made = http.post("/v1/instances/ann/memory/checkpoint", &json!({})).await.expect(200);
    }
    assert_eq!((&made["written"], &made["parts"], &made["upto"]), (&json!(0), &json!(2), &json!(2)));
    http.post("/v1/instances/nobody/memory/checkpoint", &json!({})).await.problem(404, "INSTANCE_NOT_FOUND");
    node.kill9().await;
    node.start_again().await;
    let http = node.client();
    assert_eq!(top(&http).await, told);
    assert!((parts(&http, "read").await - 2.0).abs() < 0.5, "both parts");
    assert!(parts(&http, "damaged").await < 0.5);
}
