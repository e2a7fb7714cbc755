//! What every store promises of the steps of turns under way, one suite over all backends (promise 6).
//!
//! As `store_contract.rs`, whose subjects these are. Not here: what a turn makes of its steps (`steps.rs`).

use std::sync::Arc;

use sophont::{
    store::{Fence, Head, Rejection, Store, Unit, Work},
    types::{InstanceKey, Message, Speaker, Step, Stimulus, ToolCall, ToolResult, Usage, step::Answered},
};

use crate::store_contract::{Subject, commit, fence, key, key_of, record, stimulus, turns};

macro_rules! contract {
    ($($name:ident)*) => {
        mod memory {
            use crate::store_contract::Subject;
            $(#[tokio::test] async fn $name() { super::$name(Subject::memory()).await; })*
        }
        mod sqlite {
            use crate::store_contract::Subject;
            $(#[tokio::test] async fn $name() { super::$name(Subject::sqlite(Default::default())).await; })*
        }
        mod on_postgres {
            use crate::store_contract::Subject;
            $(#[tokio::test] async fn $name() { super::$name(Subject::postgres().await).await; })*
        }
        mod through_pgbouncer {
            use crate::store_contract::Subject;
            $(#[tokio::test] async fn $name() { super::$name(Subject::pgbouncer().await).await; })*
        }
    };
}

contract! {
    steps_are_read_back_in_order_after_a_crash
    steps_go_with_their_turn_and_with_nothing_else
    steps_go_with_burial_and_with_the_instance
    a_step_written_again_stands_as_the_later_one
    a_former_owner_writes_no_steps
    a_hundred_steps_cost_little_more_than_what_is_different_in_them
}

/// A step with a long text, of which two are alike.
fn returned(n: usize) -> Step {
    let content = format!("{} {}", n % 2, "nothing to be seen ".repeat(30));
    Step::Returned { call: 0, result: ToolResult::of(content), actions: String::from("[]") }
}

fn beginning() -> Vec<Step> {
    let calls = vec![ToolCall { id: "a".into(), name: "look".into(), arguments: "{}".into() }];
    let answer = Answered {
        text: "I look.".into(),
        pieces: vec![7],
        calls,
        model: Some("p/m".into()),
        usage: Usage { input_tokens: 1, output_tokens: 2 },
    };
    vec![Step::Asked(vec![Message::said(Speaker::System, "scene ".repeat(100))]), Step::Answered(answer)]
}

fn work(stimulus: &Stimulus, first: u32, steps: &[Step]) -> Work {
    let steps = steps.iter().cloned().map(Arc::new).collect();
    Work::Step { head: Head::default(), stimulus: stimulus.id.clone(), first, steps }
}

async fn accept(store: &dyn Store, key: &InstanceKey, stimuli: &[&Stimulus]) {
    let stimuli = stimuli.iter().map(|&stimulus| Arc::new(stimulus.clone())).collect();
    commit(store, key, Work::Accept { stimuli }).await.unwrap();
}

/// The steps of a stimulus.
async fn journal(store: &dyn Store, key: &InstanceKey, stimulus: &Stimulus) -> Vec<Step> {
    let journals = store.load(key).await.unwrap().journals;
    let own = journals.into_iter().find(|(id, _)| *id == stimulus.id);
    own.map(|(_, steps)| steps.iter().map(|step| (**step).clone()).collect()).unwrap_or_default()
}

async fn steps_are_read_back_in_order_after_a_crash(mut subject: Subject) {
    let (key, one) = (key("house"), stimulus(Some("one")));
    let mut all = beginning();
    {
        let store = &*subject.store;
        accept(store, &key, &[&one]).await;
        commit(store, &key, work(&one, 0, &all)).await.unwrap();
        for n in 0..12 {
            commit(store, &key, work(&one, 2 + n, &[returned(n as usize)])).await.unwrap();
        }
    }
    all.extend((0..12).map(returned));
    assert_eq!(journal(&*subject.store, &key, &one).await, all);
    if subject.is_durable() {
        subject.reopen(true).await;
        assert_eq!(journal(&*subject.store, &key, &one).await, all);
    }
}

async fn steps_go_with_their_turn_and_with_nothing_else(subject: Subject) {
    let store = &*subject.store;
    let (mine, yours) = (key_of("mine", "house"), key_of("yours", "house"));
    let (one, two) = (stimulus(Some("one")), stimulus(Some("two")));
    for key in [&mine, &yours] {
        accept(store, key, &[&one, &two]).await;
        commit(store, key, work(&one, 0, &beginning())).await.unwrap();
        commit(store, key, work(&two, 0, &[returned(1), returned(2)])).await.unwrap();
    }
    let head = turns(store, &mine, Head::default(), vec![record(1, one.clone())]).await.unwrap();
    assert_eq!(journal(store, &mine, &one).await, []);
    assert_eq!(journal(store, &mine, &two).await, [returned(1), returned(2)], "its texts are still there");
    turns(store, &mine, head, vec![record(2, two.clone())]).await.unwrap();
    assert!(store.load(&mine).await.unwrap().journals.is_empty());
    assert_eq!(journal(store, &yours, &one).await, beginning(), "tenants are walls");
}

async fn steps_go_with_burial_and_with_the_instance(subject: Subject) {
    let store = &*subject.store;
    let (key, one, two) = (key("house"), stimulus(Some("one")), stimulus(Some("two")));
    accept(store, &key, &[&one, &two]).await;
    for stimulus in [&one, &two] {
        commit(store, &key, work(stimulus, 0, &beginning())).await.unwrap();
    }
    let (at, buried) = (one.accepted_at, Arc::new(one.clone()));
    let bury = Work::Bury { stimulus: buried, reason: String::from("poison"), tries: 3, at };
    commit(store, &key, bury).await.unwrap();
    assert_eq!(journal(store, &key, &one).await, []);
    commit(store, &key, Work::Revive { stimulus: one.id.clone() }).await.unwrap();
    assert_eq!(journal(store, &key, &one).await, [], "a revived one begins anew");
    assert_eq!(journal(store, &key, &two).await, beginning());
    commit(store, &key, Work::Forget).await.unwrap();
    accept(store, &key, &[&two]).await;
    assert!(store.load(&key).await.unwrap().journals.is_empty(), "nothing of a former life is left");
}

async fn a_step_written_again_stands_as_the_later_one(subject: Subject) {
    let store = &*subject.store;
    let (key, one) = (key("house"), stimulus(Some("one")));
    accept(store, &key, &[&one]).await;
    for step in [returned(1), returned(2)] {
        commit(store, &key, work(&one, 0, &[step])).await.unwrap();
    }
    assert_eq!(journal(store, &key, &one).await, [returned(2)]);
    turns(store, &key, Head::default(), vec![record(1, one.clone())]).await.unwrap();
    assert!(store.load(&key).await.unwrap().journals.is_empty());
}

async fn a_former_owner_writes_no_steps(subject: Subject) {
    let (key, one) = (key("house"), stimulus(Some("one")));
    accept(&*subject.store, &key, &[&one]).await;
    if !subject.set_epoch(fence(&key).shard, 2).await {
        return; // SQLite has one owner
    }
    let store = &*subject.store;
    let (done, end) = sophont::store::Done::channel();
    let work = work(&one, 0, &beginning());
    store.submit(Unit { key: key.clone(), fence: Fence { epoch: 1, ..fence(&key) }, work, done });
    assert!(matches!(end.await.unwrap(), Err(Rejection::Fenced)));
    assert_eq!(journal(store, &key, &one).await, []);
}

/// Prose of about so many bytes that stands nowhere else.
fn prose(seed: &mut u64, bytes: usize) -> String {
    const WORDS: &str = "the lamp in hall was broken and nobody had seen it before evening when Anna came home to find that every \
                         window of old house stood open though wind blew from sea with rain so cold she closed them one by one";
    let words: Vec<&str> = WORDS.split(' ').collect();
    let mut text = String::new();
    while text.len() < bytes {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push_str(words[(*seed >> 33) as usize % words.len()]);
        text.push(' ');
    }
    text
}

/// A turn of a hundred steps: fifty answers in pieces as a model streams them, each with a call, and what came of it; every fifth
/// result was there before. And the bytes of all that is different in it.
fn long_turn(result: usize) -> (Vec<Step>, usize) {
    let mut seed = 7;
    let mut unique = std::collections::HashSet::new();
    let mut keep = |text: &str| {
        unique.insert(text.to_owned());
    };
    let (scene, task) = (prose(&mut seed, 3000), prose(&mut seed, 200));
    let mut steps =
        vec![Step::Asked(vec![Message::said(Speaker::System, &scene), Message::said(Speaker::User, &task)])];
    keep(&scene);
    keep(&task);
    let mut results: Vec<String> = Vec::new();
    for n in 0..50 {
        let text = prose(&mut seed, 300);
        let pieces = text.split_inclusive(' ').map(|word| word.len() as u32).collect();
        let arguments = format!(r#"{{"path":"/srv/house/rooms/{n}/report.txt","lines":[{n},{}]}}"#, n + 20);
        let id = format!("call_{n:024}");
        keep(&text);
        keep(&format!("{id}{arguments}"));
        let calls = vec![ToolCall { id, name: "read_file".into(), arguments }];
        let model = Some(String::from("local/small"));
        let usage = Usage { input_tokens: 1000 + n, output_tokens: 100 };
        steps.push(Step::Answered(Answered { text, pieces, calls, model, usage }));
        let content = if n % 5 == 4 { results[n as usize / 2].clone() } else { prose(&mut seed, result) };
        keep(&content);
        results.push(content.clone());
        steps.push(Step::Returned { call: 0, result: ToolResult::of(content), actions: String::new() });
    }
    (steps, unique.iter().map(String::len).sum())
}

/// What the rows of the steps and their texts take, and the pages or files they lie in, keys and indexes included.
async fn cost(subject: &Subject) -> (i64, i64) {
    if let Some(folder) = subject.folder() {
        let db = rusqlite::Connection::open(folder.join("sophont.db")).unwrap();
        let one = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        let rows = one("SELECT (SELECT sum(length(tenant) + length(instance) + length(stimulus) + 2 + length(rec)) FROM turn_steps)
            + (SELECT sum(length(tenant) + length(instance) + length(hash) + length(bytes)) FROM blobs)");
        let pages = one("SELECT sum(pgsize) FROM dbstat WHERE name LIKE '%turn_steps%' OR name LIKE '%blobs%'");
        return (rows, pages);
    }
    let client = crate::support::postgres::connect(&subject.url().unwrap()).await;
    let one = async |sql: &str| client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0);
    let rows = one(
        "SELECT (SELECT sum(pg_column_size(s.*)) FROM turn_steps s) + (SELECT sum(pg_column_size(b.*)) FROM blobs b)",
    )
    .await;
    let files = one("SELECT pg_total_relation_size('turn_steps') + pg_total_relation_size('blobs')").await;
    (rows, files)
}

/// What is stored of a long turn grows with what is different in it.
async fn a_hundred_steps_cost_little_more_than_what_is_different_in_them(subject: Subject) {
    let (steps, unique) = long_turn(2000);
    let (key, one) = (key("house"), stimulus(None));
    let store = &*subject.store;
    accept(store, &key, &[&one]).await;
    for (n, step) in (0..).zip(&steps) {
        commit(store, &key, work(&one, n, std::slice::from_ref(step))).await.unwrap();
    }
    assert_eq!(journal(store, &key, &one).await, steps);
    if subject.is_durable() {
        let (rows, pages) = cost(&subject).await;
        println!("{} steps, {unique} bytes different: rows {rows}, pages {pages}", steps.len());
        assert!(rows * 10 <= unique as i64 * 13, "{rows} bytes for {unique}");
    }
}
