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
