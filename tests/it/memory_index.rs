//! The index over a memory's vectors, kept in the store on every backend: what is asked after a restart finds what it found
//! before; one that is damaged, missing or of other vectors, and what becomes of it when something is forgotten.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use serde_json::{Value, json};
use sophont::{
    config::{self, Embedder},
    memory::{Ask, Memory},
    runtime::clock::Clock,
    scaling::cache::{Options as CacheOptions, TieredCache},
    store::{Done, Head, Keep, Piece, Store, sqlite::Options},
    types::{
        EpisodeId, InstanceKey,
        memory::{Extra, Vector, Written},
    },
};

use crate::{
    memory_contract::{forgetting, remembering},
    store_contract::{Subject, key, turns},
    support::{Http, Node, metric, wait_until},
};

const NUMBERS: usize = 12;
/// Vectors of a turn, and turns.
const TURN: usize = 800;
const TURNS: usize = 3;
const QUESTIONS: usize = 25;
const TOP: usize = 10;

/// A memory that knows nothing yet.
fn memory(store: &Arc<dyn Store>) -> Memory {
    let settings = config::Memory { exact_vectors: 1000, embedder: Embedder::Off, ..config::Config::default().memory };
    let cache = TieredCache::new(CacheOptions::default());
    Memory::new(&settings, store.clone(), Clock::System, &cache).unwrap()
}

/// splitmix64.
fn dice(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed;
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        f32::from(u16::try_from((z ^ (z >> 31)) >> 48).unwrap()) / 32_768.0 - 1.0
    }
}

/// Vectors of length one around a hundred topics.
fn vectors(seed: u64, count: usize) -> Vec<Vec<f32>> {
    let (mut topic, mut own) = (dice(7), dice(seed));
    let topics: Vec<Vec<f32>> = (0..100).map(|_| (0..NUMBERS).map(|_| topic()).collect()).collect();
    let around = |nth: usize| -> Vec<f32> { topics[nth * 37 % 100].iter().map(|n| n + 0.3 * own()).collect() };
    let unit = |numbers: Vec<f32>| {
        let length = numbers.iter().map(|n| n * n).sum::<f32>().sqrt();
        numbers.iter().map(|n| n / length).collect()
    };
    (0..count).map(around).map(unit).collect()
}

/// Remembers vectors in turns behind a head.
async fn remember(store: &Arc<dyn Store>, key: &InstanceKey, head: Head, vectors: &[Vec<f32>]) -> Head {
    let mut head = head;
    for some in vectors.chunks(TURN) {
        let turn = head.turn + 1;
        let written = some.iter().zip(0..).map(|(numbers, nth)| Written {
            content: format!("number {nth} of turn {turn}"),
            data: None,
            tags: Vec::new(),
            reward: None,
            occurred_at: None,
            extra: Extra { embedding: Vector::of(numbers), ..Extra::default() },
        });
        let record = remembering(turn, written.collect());
        head = turns(&**store, key, head, vec![record]).await.unwrap();
    }
    head
}

/// What a memory answers to some questions.
async fn answers(memory: &Memory, key: &InstanceKey) -> Vec<Vec<u64>> {
    let mut all = Vec::new();
    for question in vectors(99, QUESTIONS) {
        let ask = Ask { embedding: Vector::of(&question), limit: TOP, ..Ask::default() };
        let found = memory.search(key, ask).await.unwrap();
        all.push(found.episodes.into_iter().map(|found| found.episode.id).collect());
    }
    all
}

/// Which share of the exact ten they found.
fn share(answers: &[Vec<u64>], vectors: &[Vec<f32>]) -> f64 {
    let mut hits = 0;
    for (question, found) in self::vectors(99, QUESTIONS).iter().zip(answers) {
        let score = |vector: &[f32]| vector.iter().zip(question).map(|(a, b)| a * b).sum::<f32>();
        let mut exact: Vec<(f32, usize)> = vectors.iter().map(|vector| score(vector)).zip(0..).collect();
        exact.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        let id = |at: usize| EpisodeId::new(u64::try_from(at / TURN + 1).unwrap(), at % TURN).0;
        hits += exact[..TOP].iter().filter(|(_, at)| found.contains(&id(*at))).count();
    }
    f64::from(u32::try_from(hits).unwrap()) / f64::from(u32::try_from(QUESTIONS * TOP).unwrap())
}

async fn keep(store: &Arc<dyn Store>, key: &InstanceKey, seen: u64, rec: Bytes) {
    let life = store.spans(key).await.unwrap().life;
    let (done, end) = Done::channel();
    store.keep(Keep { key: key.clone(), life, seen, piece: Piece::Index(rec) }, done);
    end.await.unwrap().unwrap();
}

async fn kept(store: &Arc<dyn Store>, key: &InstanceKey) -> Option<u64> {
    let index = store.index(key).await.unwrap();
    let upto = index.map(|index| index.upto);
    assert_eq!(store.spans(key).await.unwrap().index, upto);
    upto
}

async fn a_cold_memory_begins_with_its_index(mut subject: Subject) {
    let (key, other) = (key("a"), crate::store_contract::key("b"));
    let all = vectors(1, TURN * TURNS);
    let head = remember(&subject.store, &key, Head::default(), &all).await;
    let warm = memory(&subject.store);
    let told = answers(&warm, &key).await;
    assert!(warm.figures(&key).await.unwrap().indexed);
    assert!(share(&told, &all) >= 0.95, "{}", share(&told, &all));
    assert_eq!(kept(&subject.store, &key).await, None);
    memory(&subject.store).checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(&subject.store, &key).await, None, "nobody makes one for this alone");
    warm.checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(&subject.store, &key).await, Some(3));
    drop(warm);
    if subject.is_durable() {
        subject.reopen(true).await;
    }
    let store = &subject.store;
    let cold = memory(store);
    assert_eq!(answers(&cold, &key).await, told);
    // It was read, not made: it is not kept again.
    let good = store.index(&key).await.unwrap().unwrap().rec;
    keep(store, &key, u64::MAX, Bytes::new()).await;
    cold.checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(store, &key).await, None);
    // Without one, as an earlier build leaves it, it is made.
    let cold = memory(store);
    assert_eq!(answers(&cold, &key).await, told);
    cold.checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(store, &key).await, Some(3));
    assert!(store.index(&key).await.unwrap().unwrap().rec == good);

    // Damage is no error, and is made good; one of turns that are not there is not looked at.
    for bad in [good.slice(..good.len() - 1), Bytes::from([&[2], &good[1..]].concat())] {
        keep(store, &key, 3, bad).await;
        let cold = memory(store);
        assert_eq!(answers(&cold, &key).await, told);
        assert_eq!(kept(store, &key).await, None);
        cold.checkpoint(&key, true).await.unwrap();
        assert_eq!(kept(store, &key).await, Some(3));
    }
    keep(store, &key, 9, Bytes::from_static(b"of later")).await;
    assert_eq!(store.index(&key).await.unwrap(), None);

    // The index is what is read: with one of other vectors in its place less is found.
    let turned: Vec<Vec<f32>> = all.iter().rev().cloned().collect();
    let theirs = remember(store, &other, Head::default(), &turned).await;
    memory(store).checkpoint(&other, true).await.unwrap();
    keep(store, &key, 3, store.index(&other).await.unwrap().unwrap().rec).await;
    let found = share(&answers(&memory(store), &key).await, &all);
    assert!(found < 0.9, "{found}");
    // One that awaits more vectors than come is let go.
    remember(store, &other, theirs, &turned[..TURN]).await;
    memory(store).checkpoint(&other, true).await.unwrap();
    let longer = store.index(&other).await.unwrap().unwrap().rec;
    keep(store, &key, 3, longer.clone()).await;
    let cold = memory(store);
    let found = share(&answers(&cold, &key).await, &all);
    assert!(found >= 0.95, "{found}");
    cold.checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(store, &key).await, Some(3));
    assert!(store.index(&key).await.unwrap().unwrap().rec != longer);

    // What comes later is found, and when it is much the index is kept again.
    let more = vectors(2, TURN);
    remember(store, &key, head, &more).await;
    let all = [all, more].concat();
    let cold = memory(store);
    let told = answers(&cold, &key).await;
    assert!(share(&told, &all) >= 0.95, "{}", share(&told, &all));
    assert_eq!(kept(store, &key).await, Some(3));
    cold.checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(store, &key).await, Some(4));
    assert_eq!(answers(&memory(store), &key).await, told);
}

async fn what_is_forgotten_takes_the_index_along(subject: Subject) {
    let (store, key) = (&subject.store, key("a"));
    let mut all = vectors(1, TURN * TURNS);
    let head = remember(store, &key, Head::default(), &all).await;
    let warm = memory(store);
    let told = answers(&warm, &key).await;
    warm.checkpoint(&key, false).await.unwrap();
    let before = store.index(&key).await.unwrap().unwrap();
    // The best answers go.
    let gone: Vec<EpisodeId> = told.iter().map(|found| EpisodeId(found[0])).collect();
    turns(&**store, &key, head, vec![forgetting(4, &gone)]).await.unwrap();
    assert_eq!(kept(store, &key).await, None, "with the commit");
    // One that was made before and comes late is left out.
    keep(store, &key, 3, before.rec.clone()).await;
    assert_eq!(kept(store, &key).await, None);
    let now = answers(&warm, &key).await;
    for id in &gone {
        let at = usize::try_from(id.turn() - 1).unwrap() * TURN + id.place();
        all[at] = vec![0.0; NUMBERS];
    }
    assert!(now.iter().flatten().all(|id| !gone.contains(&EpisodeId(*id))));
    assert!(share(&now, &all) >= 0.95, "{}", share(&now, &all));
    // It is kept again by who asked, and found good by others.
    warm.checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(store, &key).await, Some(4));
    assert!(store.index(&key).await.unwrap().unwrap().rec != before.rec);
    let cold = memory(store);
    assert_eq!(answers(&cold, &key).await, now);
    keep(store, &key, u64::MAX, Bytes::new()).await;
    cold.checkpoint(&key, false).await.unwrap();
    assert_eq!(kept(store, &key).await, None, "it was read, not made");
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
    a_cold_memory_begins_with_its_index
    what_is_forgotten_takes_the_index_along
}

/// What the metrics page says of indexes.
async fn indexes(http: &Http, result: &str) -> f64 {
    metric(http, &format!("sophont_memory_indexes_total{{result=\"{result}\"}}")).await
}

async fn top(http: &Http) -> Vec<Value> {
    let asked = json!({"query": "what does the note number 437 say?", "top_k": 5});
    let found = http.post("/v1/instances/ann/recall", &asked).await.expect(200);
    found["episodes"].as_array().unwrap().iter().map(|episode| episode["id"].clone()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_the_index_is_read() {
    let mut node = Node::builder().config("[memory]\nexact_vectors = 1000").start().await;
    let http = node.client();
    for batch in 0..2 {
        let some = (0..600).map(|n| json!({"content": format!("note number {} of many", 600 * batch + n)}));
        let many: Vec<Value> = some.collect();
        http.post("/v1/instances/ann/episodes/batch", &json!({"episodes": many})).await.expect(201);
    }
    let told = top(&http).await;
    // It is kept by itself.
    wait_until("an index", Duration::from_secs(60), async || indexes(&http, "written").await >= 1.0).await;
    http.post("/v1/instances/ann/memory/checkpoint", &json!({})).await.expect(200);
    node.kill9().await;
    node.start_again().await;
    let http = node.client();
    assert_eq!(top(&http).await, told);
    assert!((indexes(&http, "read").await - 1.0).abs() < 0.5);
    http.post("/v1/instances/ann/memory/checkpoint", &json!({})).await.expect(200);
    assert!(indexes(&http, "written").await < 0.5, "it is the one that was read");
}
