//! Instances behind a router, in this process, over the store in memory with faults on demand.

use std::{sync::Arc, time::Duration};

use actix_rt::Arbiter;
use serde_json::json;
use sophont::{
    cluster::{Router, shards::Shards},
    config::Config,
    instance::{Error, Receipt, Until, environment::Environment, inbox::Line},
    runtime::clock::Clock,
    store::{
        self, Done, Fence, Reader as _, Scope, Unit, Work, Writer as _,
        memory::MemoryStore,
        ownership::{Joining, Ownership as _},
    },
    types::{
        Channel, InstanceId, InstanceKey, Millis, Priority, Profile, RawJson, Source, Stimulus, StimulusId, TenantId,
        TurnRecord,
    },
};

struct House {
    router: Router,
    store: MemoryStore,
    arbiters: Vec<Arbiter>,
}

impl House {
    async fn build(change: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::default();
        change(&mut config);
        let store = MemoryStore::new();
        Self::over(store, &config).await
    }

    async fn over(store: MemoryStore, config: &Config) -> Self {
        let environment = Environment::new(config, Arc::new(store.clone()), Clock::System).unwrap();
        let arbiters: Vec<_> = (0..2).map(|_| Arbiter::new()).collect();
        let handles = arbiters.iter().map(Arbiter::handle).collect();
        let environment = Arc::new(environment);
        let shards = Shards::new(environment.clone(), 8, handles);
        for shard in 0..8 {
            shards.open(Fence { shard, ..Fence::default() }, None).await.unwrap();
        }
        let router = Router::new(environment, shards, None);
        Self { router, store, arbiters }
    }

    async fn send(&self, key: &InstanceKey, stimulus: Stimulus) -> Result<Receipt, Error> {
        tokio::time::timeout(Duration::from_secs(20), self.router.deliver(key, stimulus, Until::Decided)).await.unwrap()
    }

    async fn decided(&self, key: &InstanceKey, stimulus: Stimulus) -> (Arc<TurnRecord>, bool) {
        match self.send(key, stimulus).await.unwrap() {
            Receipt::Decided { turn, repeated } => (turn, repeated),
            other => panic!("a decision was due, not {other:?}"),
        }
    }
}

impl Drop for House {
    fn drop(&mut self) {
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
    }
}

fn key(instance: &str) -> InstanceKey {
    InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(instance).unwrap())
}

fn text(content: &str) -> Stimulus {
    Stimulus::text(Source::Http, Channel::new("chat").unwrap(), content, Millis(1_000))
}

fn named(id: &str, content: &str) -> Stimulus {
    text(content).with_repeatable_id(StimulusId::new(id).unwrap())
}

fn counter() -> Profile {
    serde_json::from_value(json!({"reflexes": [{
        "when": "true",
        "do": [{"set": {"reported.last": "{{stimulus.content}}"}}, {"reply": "got {{stimulus.content}}"}],
    }]}))
    .unwrap()
}

fn slow(delay_ms: u64) -> Profile {
    serde_json::from_value(json!({"engine": "scripted", "script": {"reply": "thought", "delay_ms": delay_ms}})).unwrap()
}

#[actix_rt::test]
async fn a_stimulus_becomes_one_turn_and_a_repeat_gets_the_first_result() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    assert!(house.router.put_profile(&key, counter()).await.unwrap());
    let (turn, repeated) = house.decided(&key, named("x", "one")).await;
    assert_eq!((turn.turn, turn.version, repeated), (1, 1, false));
    assert_eq!(turn.reply.as_ref().unwrap().content.as_deref(), Some("got one"));
    let (again, repeated) = house.decided(&key, named("x", "other")).await;
    assert_eq!((again.turn, repeated), (1, true));
    assert_eq!(again.reply, turn.reply);
    let (second, _) = house.decided(&key, named("y", "two")).await;
    assert_eq!((second.turn, second.version), (2, 2));
    assert_eq!(house.store.turns(&key, 0, 10).await.unwrap().len(), 2);
}

#[actix_rt::test]
async fn turns_are_serial_and_in_order_of_arrival() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, counter()).await.unwrap();
    let answers: Vec<_> =
        (0..200).map(|n| house.router.submit(&key, text(&n.to_string()), None, Until::Decided).unwrap()).collect();
    for (n, answer) in answers.into_iter().enumerate() {
        let Ok(Ok(Receipt::Decided { turn, .. })) = answer.await else { panic!("a decision was due") };
        assert_eq!(turn.turn, n as u64 + 1);
        assert_eq!(turn.stimulus.content.as_deref(), Some(&*n.to_string()));
    }
    let state = house.router.state(&key).await.unwrap().unwrap();
    assert_eq!((state.version, state.doc.get()), (200, r#"{"desired":{},"reported":{"last":"199"}}"#));
}

#[actix_rt::test]
async fn nothing_is_answered_before_its_commit() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, counter()).await.unwrap();
    let faults = house.store.faults();
    faults.hold();
    let mut answer = house.router.submit(&key, text("x"), None, Until::Accepted).unwrap();
    while faults.waiting() == 0 {
        tokio::task::yield_now().await;
    }
    assert!(answer.try_recv().is_err(), "answered before the commit");
    faults.release();
    assert!(matches!(answer.await, Ok(Ok(Receipt::Decided { .. }))));
}

#[actix_rt::test]
async fn a_failed_commit_refuses_and_leaves_no_trace() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, counter()).await.unwrap();
    house.decided(&key, text("before")).await;
    house.store.faults().fail_next(1, store::Error::Full("disk".into()));
    let refused = house.send(&key, text("lost")).await;
    assert!(matches!(refused, Err(Error::Store(store::Error::Full(_)))), "{refused:?}");
    let (turn, _) = house.decided(&key, text("after")).await;
    assert_eq!((turn.turn, turn.version), (2, 2));
    let state = house.router.state(&key).await.unwrap().unwrap();
    assert_eq!(state.doc.get(), r#"{"desired":{},"reported":{"last":"after"}}"#);
}

#[actix_rt::test]
async fn behind_a_refusal_nothing_of_the_same_line_is_taken() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, counter()).await.unwrap();
    let faults = house.store.faults();
    let line = Line::default();
    let in_line = |content: &str| house.router.submit_in_line(&key, text(content), Until::Accepted, &line).unwrap();
    faults.hold();
    let first = in_line("1");
    while faults.waiting() == 0 {
        tokio::task::yield_now().await;
    }
    let (second, other) = (in_line("2"), house.router.submit(&key, text("other"), None, Until::Decided).unwrap());
    faults.fail_next(1, store::Error::Full("disk".into()));
    faults.release();
    assert!(matches!(first.await, Ok(Err(Error::Store(_)))));
    assert!(matches!(second.await, Ok(Err(Error::Overloaded(_)))));
    assert!(matches!(in_line("3").await, Ok(Err(Error::Overloaded(_)))));
    assert!(matches!(other.await, Ok(Ok(Receipt::Decided { .. }))));
    let again = Line::default();
    let receipt = house.router.submit_in_line(&key, text("1"), Until::Decided, &again).unwrap().await;
    assert!(matches!(receipt, Ok(Ok(Receipt::Decided { .. }))));
    let turns = house.store.turns(&key, 0, 10).await.unwrap();
    let order: Vec<_> = turns.iter().map(|turn| turn.stimulus.content.as_deref().unwrap()).collect();
    assert_eq!(order, ["other", "1"]);
}

#[actix_rt::test]
async fn a_slow_stimulus_is_durable_before_it_is_thought_about() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, slow(60_000)).await.unwrap();
    let receipt = house.router.deliver(&key, named("s", "think"), Until::Accepted).await.unwrap();
    assert!(matches!(receipt, Receipt::Accepted { repeated: false }));
    assert_eq!(house.store.waiting(&Scope::all(), None, 10).await.unwrap(), std::slice::from_ref(&key));
    let again = house.router.deliver(&key, named("s", "think"), Until::Accepted).await.unwrap();
    assert!(matches!(again, Receipt::Accepted { repeated: true }));

    // Another house over the same store stands for the next start: the stimulus is found and decided.
    house.router.put_profile(&key, slow(1)).await.unwrap();
    let next = House::over(house.store.clone(), &Config::default()).await;
    assert_eq!(next.router.wake_waiting().await.unwrap(), 1);
    let mut watch = next.router.hub().watch(&key);
    loop {
        if let Some(store::Known::Decided(turn)) = next.store.find(&key, &StimulusId::new("s").unwrap()).await.unwrap()
        {
            assert_eq!(turn.reply.as_ref().unwrap().content.as_deref(), Some("thought"));
            break;
        }
        drop(tokio::time::timeout(Duration::from_secs(10), watch.events.recv()).await.unwrap());
    }
}

#[actix_rt::test]
async fn priority_comes_before_arrival_while_a_thought_lasts() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, slow(50)).await.unwrap();
    let send = |content: &str, priority: Priority| {
        let mut stimulus = text(content);
        stimulus.priority = priority;
        house.router.submit(&key, stimulus, None, Until::Decided).unwrap()
    };
    let answers = [
        send("first", Priority::Background),
        send("later", Priority::Background),
        send("device", Priority::Device),
        send("human", Priority::Human),
    ];
    for answer in answers {
        assert!(matches!(answer.await, Ok(Ok(Receipt::Decided { .. }))));
    }
    let turns = house.store.turns(&key, 0, 10).await.unwrap();
    let order: Vec<_> = turns.iter().map(|turn| turn.stimulus.content.as_deref().unwrap()).collect();
    let position = |what| order.iter().position(|content| *content == what).unwrap();
    assert!(position("human") < position("device") && position("device") < position("later"), "{order:?}");
}

#[actix_rt::test]
async fn a_panicking_turn_is_buried_and_neighbours_live_on() {
    let house = House::build(|config| config.faults.panic_on = String::from("poison")).await;
    let (victim, neighbour) = (key("a"), key("b"));
    house.router.put_profile(&victim, counter()).await.unwrap();
    house.router.put_profile(&neighbour, counter()).await.unwrap();
    house.decided(&victim, text("fine")).await;
    let receipt = house.send(&victim, named("p", "poison")).await.unwrap();
    let Receipt::Dead(letter) = receipt else { panic!("a dead letter was due, not {receipt:?}") };
    assert_eq!(letter.tries, 3);
    assert_eq!(house.decided(&neighbour, text("hello")).await.0.turn, 1);
    assert_eq!(house.decided(&victim, text("still here")).await.0.turn, 2);
    assert_eq!(house.store.dead_letters(&victim, None, 10).await.unwrap().len(), 1);

    let id = StimulusId::new("p").unwrap();
    house.router.revive(&victim, &id).await.unwrap();
    assert!(matches!(house.router.revive(&victim, &StimulusId::new("q").unwrap()).await, Err(Error::NoDeadLetter)));
}

#[actix_rt::test]
async fn a_revival_during_a_thought_does_not_repeat_the_thought() {
    let house = House::build(|config| config.faults.panic_on = String::from("poison")).await;
    let key = key("a");
    house.router.put_profile(&key, counter()).await.unwrap();
    assert!(matches!(house.send(&key, named("p", "poison")).await, Ok(Receipt::Dead(_))));
    house.router.put_profile(&key, slow(200)).await.unwrap();
    let thought = house.router.submit(&key, text("think"), None, Until::Decided).unwrap();
    while house.store.waiting(&Scope::all(), None, 1).await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    house.router.revive(&key, &StimulusId::new("p").unwrap()).await.unwrap();
    assert!(matches!(thought.await, Ok(Ok(Receipt::Decided { .. }))));
    // The revived one is given up again; only then has everything that waited been taken.
    while house.store.dead_letters(&key, None, 1).await.unwrap().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(house.store.turns(&key, 0, 10).await.unwrap().len(), 1);
}

#[actix_rt::test]
async fn a_patch_insists_on_its_version_and_a_bad_one_is_refused() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    let patch = |data: &str| {
        let mut stimulus = Stimulus::empty(Source::Http, Channel::new(Router::PATCH_CHANNEL).unwrap(), Millis(1));
        stimulus.data = Some(RawJson::parse(data).unwrap());
        stimulus
    };
    let state = house.router.patch(&key, patch(r#"{"desired":{"on":true}}"#), Some(0)).await.unwrap();
    assert_eq!((state.version, state.doc.get()), (1, r#"{"desired":{"on":true},"reported":{}}"#));
    let stale = house.router.patch(&key, patch(r#"{"desired":{"on":false}}"#), Some(0)).await;
    assert!(matches!(stale, Err(Error::VersionMismatch { expected: 0, actual: 1 })), "{stale:?}");
    let bad = house.router.patch(&key, patch(r#"{"wanted":{}}"#), None).await;
    assert!(matches!(bad, Err(Error::Invalid(_))), "{bad:?}");
    assert_eq!(house.router.state(&key).await.unwrap().unwrap().version, 1);
}

#[actix_rt::test]
async fn instances_leave_when_the_house_is_full_and_come_back_unchanged() {
    let house = House::build(|config| config.scaling.limits.max_consciousness_instances = 20).await;
    for round in 1..=2u64 {
        for n in 0..200 {
            let key = key(&format!("i{n}"));
            if round == 1 {
                house.router.put_profile(&key, counter()).await.unwrap();
            }
            let turn = loop {
                match house.send(&key, text(&format!("{round}"))).await {
                    Ok(Receipt::Decided { turn, .. }) => break turn,
                    Err(Error::Overloaded(_)) => tokio::task::yield_now().await,
                    other => panic!("{other:?}"),
                }
            };
            assert_eq!((turn.turn, turn.version), (round, round));
        }
    }
    assert!(house.router.environment().active.load(std::sync::atomic::Ordering::Acquire) <= 20 + 3 + 16);
}

#[actix_rt::test]
async fn a_burst_for_an_instance_that_is_not_in_memory_is_taken() {
    let house = House::build(|_| {}).await;
    let key = key("burst");
    let ends: Vec<_> = (0..500)
        .map(|n| house.router.submit(&key, text(&n.to_string()), None, Until::Decided).expect("it is on its way"))
        .collect();
    for (n, end) in ends.into_iter().enumerate() {
        let end = tokio::time::timeout(Duration::from_secs(20), end).await.unwrap().unwrap();
        assert!(end.is_ok(), "{n}: {end:?}");
    }
}

#[actix_rt::test]
async fn a_full_inbox_refuses() {
    let house = House::build(|config| config.instances.max_inbox = 4).await;
    let key = key("a");
    house.router.put_profile(&key, slow(60_000)).await.unwrap();
    let mut full = 0;
    for n in 0..10 {
        let waiting = house.router.deliver(&key, text(&n.to_string()), Until::Accepted);
        full += usize::from(matches!(waiting.await, Err(Error::InboxFull(4))));
    }
    assert_eq!(full, 5, "one is thought about, four wait");
}

#[actix_rt::test]
async fn a_forgotten_instance_begins_anew() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    assert!(matches!(house.router.forget(&key).await, Err(Error::NotFound)));
    house.router.put_profile(&key, counter()).await.unwrap();
    house.decided(&key, named("x", "one")).await;
    house.router.forget(&key).await.unwrap();
    assert!(house.router.state(&key).await.unwrap().is_none());
    let (turn, repeated) = house.decided(&key, named("x", "again")).await;
    assert_eq!((turn.turn, repeated), (1, false));
}

#[actix_rt::test]
async fn a_draining_router_refuses() {
    let house = House::build(|_| ()).await;
    house.router.drain();
    assert!(matches!(house.send(&key("a"), text("x")).await, Err(Error::Draining)));
}

/// Commits what the instance in memory is not told of.
async fn behind_its_back(house: &House, key: &InstanceKey, work: Work) {
    let (done, end) = Done::channel();
    let fence = Fence { shard: key.shard(8), epoch: 0, lodged: 0 };
    house.store.submit(Unit { key: key.clone(), fence, work, done });
    end.await.unwrap().unwrap();
}

#[actix_rt::test]
async fn a_wake_makes_an_idle_instance_look_into_the_store() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, counter()).await.unwrap();
    house.decided(&key, named("one", "one")).await;
    behind_its_back(&house, &key, Work::Lodge { stimuli: vec![Arc::new(named("two", "two"))] }).await;
    assert_eq!(house.router.wake_waiting().await.unwrap(), 1);
    crate::support::wait_until("the lodged one is decided", Duration::from_secs(20), async || {
        house.store.turns(&key, 1, 9).await.unwrap().len() == 1
    })
    .await;
}

#[actix_rt::test]
async fn what_waits_in_the_store_and_not_in_memory_is_decided_when_it_comes_again() {
    let house = House::build(|_| ()).await;
    let key = key("a");
    house.router.put_profile(&key, slow(1)).await.unwrap();
    house.decided(&key, named("one", "one")).await;
    behind_its_back(&house, &key, Work::Accept { stimuli: vec![Arc::new(named("two", "two"))] }).await;
    let told = house.router.deliver(&key, named("two", "two"), Until::Accepted).await.unwrap();
    assert!(matches!(told, Receipt::Accepted { repeated: true }), "{told:?}");
    let (three, _) = house.decided(&key, named("three", "three")).await;
    assert_eq!(three.turn, 3);
    assert_eq!(house.decided(&key, named("two", "two")).await.0.turn, 2);
}

#[actix_rt::test]
async fn what_another_node_lodged_is_decided_before_what_came_later() {
    let house = House::build(|_| ()).await;
    let joining = Joining { shards: 8, ..crate::ownership_contract::joining("a") };
    house.store.join(&joining).await.unwrap();
    let key = key("a");
    house.router.put_profile(&key, counter()).await.unwrap();
    house.decided(&key, named("one", "one")).await;
    let (done, end) = Done::channel();
    let stimuli = vec![Arc::new(named("two", "two")), Arc::new(named("three", "three"))];
    let fence = Fence { shard: key.shard(8), epoch: 99, lodged: 0 };
    house.store.submit(Unit { key: key.clone(), fence, work: Work::Lodge { stimuli }, done });
    end.await.unwrap().unwrap();
    // The owner is told nothing; what comes next makes it look.
    let (turn, _) = house.decided(&key, named("four", "four")).await;
    assert_eq!(turn.turn, 4);
    let turns = house.store.turns(&key, 0, 9).await.unwrap();
    let order: Vec<_> = turns.iter().map(|turn| turn.stimulus.id.as_str()).collect();
    assert_eq!(order, ["one", "two", "three", "four"]);
    assert!(house.store.waiting(&Scope::all(), None, 9).await.unwrap().is_empty());
    assert_eq!(house.decided(&key, named("two", "again")).await.0.turn, 2);
}
