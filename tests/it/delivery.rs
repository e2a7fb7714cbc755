//! Promise 5 from the sending end: effects leave after their commit, in order, at least once, and nothing holds the log.
//!
//! Real stores (in memory, and SQLite where the store matters), real courier, a real web server; the doors are fakes that fail on demand. Crashes are the end of the
//! courier's task at a moment of the test's choosing: what it kept in memory is gone, what it wrote stays.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use sophont::{
    config::{self, Config},
    delivery::{Acceptor, Courier, Message, Observed, Parts, Publisher},
    runtime::{clock::Clock, drain::Drain},
    store::{
        Committed, Done, Feed, Fence, Head, Reader as _, Rejection, Scope, Store, Unit, Work, Writer as _,
        memory::{Faults, MemoryStore},
        sqlite::SqliteStore,
    },
    types::{
        Channel, Effect, EffectKind, InstanceId, InstanceKey, Millis, Outcome, RawJson, Reply, Source, StateChange,
        Stimulus, TenantId, TurnRecord,
    },
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::{Semaphore, oneshot::Receiver},
};

use crate::support::{PATIENCE, wait_for, wait_until};

const START: Millis = Millis(1_800_000_000_000);

fn key(instance: &str) -> InstanceKey {
    InstanceKey::new(TenantId::new("acme").unwrap(), InstanceId::new(instance).unwrap())
}

fn say(channel: &str, content: impl Into<String>) -> EffectKind {
    EffectKind::Publish {
        channel: Channel::new(channel).unwrap(),
        content: Some(content.into()),
        data: None,
        retain: false,
    }
}

/// What the doors saw, and how they behave.
#[derive(Default)]
struct Door {
    taken: Mutex<Vec<(String, String)>>,
    accepted: Mutex<Vec<(InstanceKey, Stimulus)>>,
    /// Instances whose publishes fail.
    broken: Mutex<HashSet<String>>,
    /// Acceptances that fail before one succeeds.
    refusals: AtomicUsize,
    tries: AtomicUsize,
    /// With some, each publish takes a permit and keeps it.
    permits: Mutex<Option<Arc<Semaphore>>>,
}

impl Door {
    /// Contents published by an instance, in order.
    fn of(&self, instance: &str) -> Vec<String> {
        let topic = format!("sophont/acme/{instance}/");
        let taken = self.taken.lock().unwrap();
        taken.iter().filter(|(name, _)| name.starts_with(&topic)).map(|(_, content)| content.clone()).collect()
    }

    fn count(&self) -> usize {
        self.taken.lock().unwrap().len()
    }

    fn fail(&self, instance: &str) {
        self.broken.lock().unwrap().insert(instance.into());
    }

    fn mend(&self) {
        self.broken.lock().unwrap().clear();
    }
}

#[async_trait]
impl Publisher for Door {
    async fn publish(&self, message: Message) -> Result<(), String> {
        self.tries.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
        let instance = message.topic.split('/').nth(2).unwrap().to_owned();
        if self.broken.lock().unwrap().contains(&instance) {
            return Err("broken".into());
        }
        let permits = self.permits.lock().unwrap().clone();
        if let Some(permits) = permits {
            permits.acquire().await.unwrap().forget();
        }
        let payload: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
        let content = payload["content"].as_str().unwrap_or_default().to_owned();
        self.taken.lock().unwrap().push((message.topic, content));
        Ok(())
    }
}

#[async_trait]
impl Acceptor for Door {
    async fn accept(&self, key: InstanceKey, stimulus: Stimulus) -> Result<(), String> {
        self.tries.fetch_add(1, Ordering::SeqCst);
        let refused = self.refusals.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        if refused.is_ok() {
            return Err("overloaded".into());
        }
        self.accepted.lock().unwrap().push((key, stimulus));
        Ok(())
    }
}

/// A store, a door, a clock, and the courier between them.
struct Bench {
    store: Arc<dyn Store>,
    faults: Faults,
    folder: Option<TempDir>,
    door: Arc<Door>,
    clock: Clock,
    config: config::Delivery,
    heads: HashMap<InstanceKey, Head>,
    scope: Scope,
    running: Option<(Courier, Drain)>,
}

impl Bench {
    fn new() -> Self {
        let config = config::Delivery { webhook_allow: Vec::new(), webhook_seconds: 5, max_tries: 20, max_hops: 16 };
        let (memory, door, clock) = (MemoryStore::new(), Arc::default(), Clock::manual(START));
        let (faults, store) = (memory.faults(), Arc::new(memory));
        Self {
            store,
            faults,
            folder: None,
            door,
            clock,
            config,
            heads: HashMap::new(),
            scope: Scope::all(),
            running: None,
        }
    }

    /// On SQLite in a folder of its own.
    fn on_disk() -> Self {
        let mut bench = Self::new();
        let folder = TempDir::new().unwrap();
        bench.store = SqliteStore::open(folder.path(), &Config::default().store, bench.clock.clone()).unwrap();
        bench.folder = Some(folder);
        bench
    }

    /// Closes the file and opens it again.
    fn open_again(&mut self) {
        self.store.close();
        self.store = Arc::new(MemoryStore::new());
        let folder = self.folder.as_ref().unwrap();
        self.store = SqliteStore::open(folder.path(), &Config::default().store, self.clock.clone()).unwrap();
    }

    fn start(&mut self) {
        let drain = Drain::default();
        let parts = Parts {
            store: self.store.clone(),
            scope: self.scope.clone(),
            publisher: Some(self.door.clone()),
            acceptor: self.door.clone(),
            config: self.config.clone(),
            clock: self.clock.clone(),
            drain: drain.clone(),
            handle: tokio::runtime::Handle::current(),
        };
        self.running = Some((Courier::start(parts).unwrap(), drain));
    }

    /// The process dies: nothing more is written, all memory is gone.
    async fn crash(&mut self) {
        let (courier, drain) = self.running.take().unwrap();
        drain.stop();
        courier.finish(PATIENCE).await;
    }

    fn observe(&self) -> Observed {
        self.running.as_ref().unwrap().0.observe()
    }

    /// Commits a turn with these effects, and returns its number.
    async fn turn(&mut self, instance: &str, kinds: Vec<EffectKind>) -> u64 {
        let end = self.submit(instance, vec![kinds]);
        let Committed { head, .. } = end.await.unwrap().unwrap();
        self.heads.insert(key(instance), head);
        head.turn
    }

    /// Submits turns of an instance, the effects of each given.
    fn submit(&self, instance: &str, turns: Vec<Vec<EffectKind>>) -> Receiver<Result<Committed, Rejection>> {
        let key = key(instance);
        let head = self.heads.get(&key).copied().unwrap_or_default();
        let turns = (head.turn + 1..).zip(turns).map(|(number, kinds)| Arc::new(self.record(number, kinds))).collect();
        let (done, end) = Done::channel();
        self.store.submit(Unit { key, fence: Fence::default(), work: Work::Turns { head, turns }, done });
        end
    }

    fn record(&self, turn: u64, kinds: Vec<EffectKind>) -> TurnRecord {
        let now = self.clock.now();
        TurnRecord {
            turn,
            version: 0,
            stimulus: Stimulus::text(Source::Http, Channel::new("chat").unwrap(), "hi", now),
            outcome: Outcome::Replied,
            reply: Some(Reply { content: Some("a reply".into()), data: None }),
            effects: kinds.into_iter().zip(0..).map(|(kind, index)| Effect { index, kind }).collect(),
            state: StateChange::None,
            episodes: Vec::new(),
            steps: 0,
            engine: "scripted".into(),
            model: None,
            usage: None,
            error: None,
            decided_at: now,
            epoch: 0,
        }
    }

    async fn last_position(&self) -> i64 {
        self.store.outgoing(&[(Feed(0), 0)], 1_000_000).await.unwrap().last().map_or(0, |outgoing| outgoing.position)
    }

    async fn wait_shipped(&self) {
        let last = self.last_position().await;
        wait_until("the position follows the log", PATIENCE, async || {
            self.store.shipped(&[Feed(0)]).await.unwrap() == [last]
        })
        .await;
    }

    async fn wait_taken(&self, count: usize) {
        let what = format!("{count} messages at the door");
        wait_until(&what, PATIENCE, async || self.door.count() >= count).await;
    }

    async fn pending(&self) -> u64 {
        self.store.stats().await.unwrap().pending
    }
}

fn numbers(range: std::ops::RangeInclusive<u64>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn effects_leave_in_commit_order_and_the_position_follows() {
    let mut bench = Bench::new();
    bench.start();
    for n in 1..=100u64 {
        for instance in ["a", "b", "c"] {
            bench.turn(instance, vec![say("x", n.to_string())]).await;
        }
    }
    bench.wait_taken(300).await;
    for instance in ["a", "b", "c"] {
        assert_eq!(bench.door.of(instance), numbers(1..=100));
    }
    bench.wait_shipped().await;
    assert_eq!(bench.pending().await, 0, "what is delivered at once needs no row");
}

#[tokio::test]
async fn a_reply_the_twin_and_a_publish_of_one_turn_keep_their_order() {
    let mut bench = Bench::new();
    let delta = RawJson::parse("{\"on\":true}").unwrap();
    let twin = EffectKind::Twin { version: 1, desired: Some(delta.clone()), delta };
    bench.turn("a", vec![EffectKind::Reply { to: None }, twin, say("fan", "on")]).await;
    bench.start();
    bench.wait_taken(4).await;
    let topics: Vec<String> = bench.door.taken.lock().unwrap().iter().map(|(topic, _)| topic.clone()).collect();
    let below = |name: &str| format!("sophont/acme/a/{name}");
    assert_eq!(topics, ["out/reply", "state/desired", "state/delta", "out/fan"].map(below));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_crash_nothing_is_lost_and_what_was_written_down_is_not_sent_again() {
    let mut bench = Bench::new();
    bench.start();
    for n in 1..=50u64 {
        bench.turn("a", vec![say("x", n.to_string())]).await;
    }
    bench.wait_shipped().await;
    // From here on the door takes ten and then hangs, in the middle of things.
    *bench.door.permits.lock().unwrap() = Some(Arc::new(Semaphore::new(10)));
    for n in 51..=100u64 {
        for instance in ["a", "b"] {
            bench.turn(instance, vec![say("x", n.to_string())]).await;
        }
    }
    bench.wait_taken(60).await;
    bench.crash().await;
    let before = bench.door.count();
    *bench.door.permits.lock().unwrap() = None;
    bench.start();
    bench.wait_shipped().await;
    let (a, b) = (bench.door.of("a"), bench.door.of("b"));
    let once: HashSet<&String> = a.iter().collect();
    assert_eq!(once.len(), 100, "nothing is lost");
    assert_eq!(a.iter().filter(|n| n.parse::<u64>().unwrap() <= 50).count(), 50, "nothing written down comes again");
    assert_eq!(b.iter().collect::<HashSet<_>>().len(), 50);
    assert!(bench.door.count() >= before + 90, "what hung is sent by the next life");
    // Each life keeps the order: after the crash the sequence begins anew at most once.
    for sequence in [a, b] {
        let falls = sequence.windows(2).filter(|two| two[1].parse::<u64>().unwrap() <= two[0].parse().unwrap()).count();
        assert!(falls <= 1, "{sequence:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_taken_is_put_off_in_order_and_holds_nobody_else() {
    let mut bench = Bench::new();
    bench.door.fail("a");
    bench.start();
    for n in 1..=5u64 {
        bench.turn("a", vec![say("x", n.to_string())]).await;
        bench.turn("b", vec![say("x", n.to_string())]).await;
    }
    bench.wait_taken(5).await;
    assert_eq!(bench.door.of("b"), numbers(1..=5));
    bench.wait_shipped().await;
    assert_eq!(bench.pending().await, 5, "all of them wait in the store, the log is free");
    bench.door.mend();
    bench.turn("a", vec![say("x", "6")]).await;
    wait_until("the new one waits behind", PATIENCE, async || bench.pending().await == 6).await;
    bench.clock.advance(1000);
    let taken = wait_for("all of them", PATIENCE, async || {
        bench.clock.advance(100);
        Some(bench.door.of("a")).filter(|taken| taken.len() >= 6)
    });
    assert_eq!(taken.await, numbers(1..=6));
    wait_until("nothing is pending", PATIENCE, async || bench.pending().await == 0).await;
    bench.turn("a", vec![say("x", "7")]).await;
    bench.wait_taken(12).await;
    assert_eq!(bench.door.of("a"), numbers(1..=7), "each of them once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_off_keeps_its_place_over_a_crash() {
    let mut bench = Bench::on_disk();
    bench.door.fail("a");
    bench.start();
    for n in 1..=12u64 {
        bench.turn("a", vec![say("x", n.to_string())]).await;
    }
    let due = bench.clock.now().plus(3_600_000);
    bench.turn("b", vec![EffectKind::Remind { due, content: None, data: None }, say("x", "1")]).await;
    wait_until("all is put off", PATIENCE, async || bench.pending().await == 13).await;
    bench.wait_shipped().await;
    bench.crash().await;
    bench.door.mend();
    bench.turn("a", vec![say("x", "13")]).await;
    bench.open_again();
    bench.start();
    wait_until("the new one waits behind", PATIENCE, async || bench.pending().await == 14).await;
    assert!(bench.door.of("a").is_empty());
    let taken = wait_for("all of them", PATIENCE, async || {
        bench.clock.advance(200);
        Some(bench.door.of("a")).filter(|taken| taken.len() >= 13)
    });
    assert_eq!(taken.await, numbers(1..=13));
    assert_eq!(bench.door.of("b"), ["1"], "what was delivered before is not sent again");
    wait_until("the reminder is left", PATIENCE, async || bench.pending().await == 1).await;
    bench.clock.advance(3_600_000);
    wait_until("it comes", PATIENCE, async || bench.pending().await == 0).await;
    assert_eq!(bench.door.accepted.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_publish_nobody_takes_is_given_up_after_its_tries() {
    let mut bench = Bench::new();
    bench.config.max_tries = 3;
    bench.door.fail("a");
    bench.start();
    bench.turn("a", vec![say("x", "1")]).await;
    wait_until("it is given up", PATIENCE, async || {
        bench.clock.advance(1000);
        bench.observe().given_up == 1 && bench.pending().await == 0
    })
    .await;
    assert_eq!(bench.door.tries.load(Ordering::SeqCst), 3);
    assert_eq!(bench.observe().failures, 3);
    bench.door.mend();
    bench.turn("a", vec![say("x", "2")]).await;
    bench.wait_taken(1).await;
    assert_eq!(bench.door.of("a"), ["2"], "the lane is free again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hanging_publish_holds_its_lane_only_until_its_deadline() {
    let mut bench = Bench::new();
    bench.clock = Clock::System;
    bench.start();
    bench.turn("b", vec![say("x", "0")]).await;
    bench.wait_taken(1).await;
    let gate = Arc::new(Semaphore::new(0));
    *bench.door.permits.lock().unwrap() = Some(gate.clone());
    bench.turn("a", vec![say("x", "1")]).await;
    bench.turn("a", vec![say("x", "2")]).await;
    wait_until("the first hangs", PATIENCE, async || bench.door.tries.load(Ordering::SeqCst) == 2).await;
    *bench.door.permits.lock().unwrap() = None;
    bench.turn("b", vec![say("x", "1")]).await;
    wait_until("others go on", PATIENCE, async || bench.door.of("b").len() == 2).await;
    bench.wait_shipped().await;
    wait_until("the lane goes on", PATIENCE, async || bench.door.of("a").len() == 2).await;
    assert_eq!(bench.door.of("a"), numbers(1..=2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_store_delays_and_loses_nothing() {
    let mut bench = Bench::new();
    bench.door.fail("a");
    bench.turn("a", vec![say("x", "1")]).await;
    bench.turn("b", vec![say("x", "1")]).await;
    bench.faults.fail_reads(2, sophont::store::Error::Backend("a read".into()));
    bench.faults.fail_next(2, sophont::store::Error::Full("a write".into()));
    bench.start();
    bench.wait_taken(1).await;
    bench.wait_shipped().await;
    assert_eq!(bench.pending().await, 1);
    bench.door.mend();
    wait_until("the rest", PATIENCE, async || {
        bench.clock.advance(200);
        bench.door.of("a") == ["1"]
    })
    .await;
}

#[tokio::test]
async fn a_reminder_comes_when_it_is_due_and_once() {
    let mut bench = Bench::new();
    let due = START.plus(60_000);
    bench.start();
    bench.turn("a", vec![EffectKind::Remind { due, content: Some("tea".into()), data: None }]).await;
    bench.wait_shipped().await;
    assert_eq!(bench.pending().await, 1);
    bench.crash().await;
    bench.clock.advance(59_000);
    bench.start();
    // A second reminder that is due at once shows that the first had its chance to come too early.
    let soon = EffectKind::Remind { due: bench.clock.now(), content: Some("now".into()), data: None };
    bench.turn("a", vec![soon]).await;
    let door = bench.door.clone();
    let accepted = move || door.accepted.lock().unwrap().clone();
    wait_until("the one that is due", PATIENCE, async || accepted().len() == 1).await;
    bench.clock.advance(1000);
    wait_until("the other", PATIENCE, async || accepted().len() == 2).await;
    wait_until("both are settled", PATIENCE, async || bench.pending().await == 0).await;
    let all = accepted();
    assert_eq!(all[0].1.content.as_deref(), Some("now"));
    let (to, tea) = &all[1];
    assert_eq!((to, tea.source, tea.channel.as_str()), (&key("a"), Source::Timer, "reminder"));
    assert_eq!((tea.content.as_deref(), tea.repeatable), (Some("tea"), true));
    bench.crash().await;
    bench.clock.advance(600_000);
    bench.start();
    bench.turn("a", vec![say("x", "after")]).await;
    bench.wait_taken(1).await;
    bench.wait_shipped().await;
    assert_eq!(accepted().len(), 2, "a settled reminder never comes again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_reminders_due_at_once_come_each_once() {
    const COUNT: u64 = 3000;
    let mut bench = Bench::new();
    bench.start();
    let due = START.plus(60_000);
    for n in 0..COUNT {
        let instance = format!("i{}", n % 100);
        bench.turn(&instance, vec![EffectKind::Remind { due, content: None, data: None }]).await;
    }
    bench.wait_shipped().await;
    assert_eq!(bench.pending().await, COUNT);
    bench.clock.advance(60_000);
    wait_until("all are settled", PATIENCE, async || bench.pending().await == 0).await;
    let accepted = bench.door.accepted.lock().unwrap().clone();
    let distinct: HashSet<String> = accepted.iter().map(|(key, stimulus)| format!("{key} {}", stimulus.id)).collect();
    assert_eq!((accepted.len() as u64, distinct.len() as u64), (COUNT, COUNT));
}

#[tokio::test]
async fn a_send_reaches_the_other_instance_under_one_id_however_often_it_is_refused() {
    let mut bench = Bench::new();
    bench.config.max_tries = 2;
    bench.door.refusals.store(5, Ordering::SeqCst);
    bench.start();
    let send = |content: &str| EffectKind::Send {
        instance: InstanceId::new("b").unwrap(),
        channel: Channel::new("orders").unwrap(),
        content: Some(content.into()),
        data: None,
    };
    bench.turn("a", vec![send("1"), send("2")]).await;
    wait_until("both are accepted", PATIENCE, async || {
        bench.clock.advance(2000);
        bench.door.accepted.lock().unwrap().len() == 2
    })
    .await;
    let accepted = bench.door.accepted.lock().unwrap().clone();
    let contents: Vec<&str> = accepted.iter().map(|(_, stimulus)| stimulus.content.as_deref().unwrap()).collect();
    assert_eq!(contents, ["1", "2"]);
    assert!(accepted.iter().all(|(to, stimulus)| *to == key("b") && stimulus.sender.as_deref() == Some("a")));
    assert_eq!(bench.observe().given_up, 0, "a stimulus for an instance is never given up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_graceful_end_delivers_the_log_and_stores_the_position() {
    let mut bench = Bench::new();
    bench.start();
    for n in 1..=200u64 {
        bench.turn("a", vec![say("x", n.to_string())]).await;
    }
    let (courier, _drain) = bench.running.take().unwrap();
    courier.finish(PATIENCE).await;
    assert_eq!(bench.door.of("a"), numbers(1..=200));
    assert_eq!(bench.store.shipped(&[Feed(0)]).await.unwrap(), [bench.last_position().await]);
}

/// Prints how fast 20,000 effects of 1,000 instances leave, and checks the order of each.
async fn twenty_thousand(mut bench: Bench, name: &str) {
    let ends: Vec<_> = (0..1000)
        .map(|instance| {
            bench.submit(&format!("i{instance}"), (1..=20).map(|n| vec![say("x", n.to_string())]).collect())
        })
        .collect();
    for end in ends {
        end.await.unwrap().unwrap();
    }
    let started = std::time::Instant::now();
    bench.start();
    bench.wait_taken(20_000).await;
    let took = started.elapsed();
    bench.wait_shipped().await;
    println!("20,000 effects from {name} in {took:?}: {:.0}/s", 20_000.0 / took.as_secs_f64());
    let mut by_topic: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (topic, content) in bench.door.taken.lock().unwrap().iter() {
        by_topic.entry(topic.clone()).or_default().push(content.clone());
    }
    assert_eq!(by_topic.len(), 1000);
    assert!(by_topic.values().all(|contents| *contents == numbers(1..=20)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_effects_leave_a_store_in_memory_in_order() {
    twenty_thousand(Bench::new(), "memory").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_effects_leave_sqlite_in_order() {
    twenty_thousand(Bench::on_disk(), "SQLite").await;
}

/// One request as a web host saw it.
#[derive(Debug, Clone)]
struct Seen {
    line: String,
    headers: String,
    body: String,
}

/// A web host on loopback that gives the listed answers, then 200.
struct Host {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Host {
    async fn start(answers: Vec<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = seen.clone();
        tokio::spawn(async move {
            let mut answers = answers.into_iter();
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut bytes = Vec::new();
                let (head, length) = loop {
                    if stream.read_buf(&mut bytes).await.unwrap() == 0 {
                        return;
                    }
                    let text = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
                    if let Some(end) = text.find("\r\n\r\n") {
                        let length = text[..end].split("content-length: ").nth(1).unwrap();
                        let length: usize = length.split("\r\n").next().unwrap().parse().unwrap();
                        break (end, length);
                    }
                };
                while bytes.len() < head + 4 + length {
                    assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0);
                }
                let text = String::from_utf8(bytes).unwrap();
                let (line, headers) = text[..head].split_once("\r\n").unwrap();
                let seen =
                    Seen { line: line.into(), headers: headers.to_ascii_lowercase(), body: text[head + 4..].into() };
                log.lock().unwrap().push(seen);
                let answer = answers.next().unwrap_or_else(|| "200 OK".into());
                let answer = format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Self { address, seen }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

fn hook(to: SocketAddr, body: &str) -> EffectKind {
    EffectKind::Webhook { url: format!("http://{to}/hook?a=b"), body: RawJson::parse(body).unwrap() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_webhook_is_posted_with_its_key_until_the_host_takes_it() {
    let host = Host::start(vec!["503 Busy\r\nretry-after: 1".into(), "429 Slow".into()]).await;
    let mut bench = Bench::new();
    bench.config.webhook_allow = vec![host.address.to_string()];
    bench.start();
    bench.turn("a", vec![hook(host.address, "{\"n\":1}"), hook(host.address, "{\"n\":2}")]).await;
    wait_until("all is settled", PATIENCE, async || {
        bench.clock.advance(1000);
        host.seen().len() == 4 && bench.pending().await == 0
    })
    .await;
    bench.wait_shipped().await;
    let seen = host.seen();
    let bodies: Vec<&str> = seen.iter().map(|seen| seen.body.as_str()).collect();
    assert_eq!(bodies, ["{\"n\":1}", "{\"n\":1}", "{\"n\":1}", "{\"n\":2}"], "in order, repeats included");
    assert_eq!(seen[0].line, "POST /hook?a=b HTTP/1.1");
    for (seen, effect) in seen.iter().zip(["acme/a/1-0", "acme/a/1-0", "acme/a/1-0", "acme/a/1-1"]) {
        assert!(seen.headers.contains(&format!("idempotency-key: {effect}")), "{seen:?}");
        assert!(seen.headers.contains(&format!("sophont-effect: {effect}")), "{seen:?}");
        assert!(seen.headers.contains("content-type: application/json"), "{seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn webhooks_are_closed_by_default_and_follow_nobody() {
    let inner = Host::start(vec![]).await;
    let outer = Host::start(vec![format!("307 Elsewhere\r\nlocation: http://{}/hook", inner.address)]).await;
    let mut bench = Bench::new();
    bench.config.webhook_allow = vec![outer.address.to_string()];
    bench.start();
    bench.turn("a", vec![hook(inner.address, "1"), hook(outer.address, "2")]).await;
    wait_until("both are given up", PATIENCE, async || bench.observe().given_up == 2 && bench.pending().await == 0)
        .await;
    bench.wait_shipped().await;
    assert_eq!(outer.seen().len(), 1, "the allowed host is asked once");
    assert!(inner.seen().is_empty(), "nobody else is");
    bench.crash().await;
    bench.config.webhook_allow = Vec::new();
    bench.start();
    bench.turn("a", vec![hook(outer.address, "3")]).await;
    wait_until("it is given up", PATIENCE, async || bench.observe().given_up == 1 && bench.pending().await == 0).await;
    assert_eq!(outer.seen().len(), 1, "an empty list allows nobody");
}

/// Commits a turn with a publish, in the shard's feed.
async fn publish_in(store: &MemoryStore, bench: &Bench, instance: &InstanceKey, number: u64, head: Head) -> Head {
    let (done, end) = Done::channel();
    let turns = vec![Arc::new(bench.record(number, vec![say("x", number.to_string())]))];
    let fence = Fence { shard: instance.shard(4), ..Fence::default() };
    store.submit(Unit { key: instance.clone(), fence, work: Work::Turns { head, turns }, done });
    end.await.unwrap().unwrap().head
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_courier_follows_the_shards_it_owns_and_no_others() {
    let mut bench = Bench::new();
    let memory = MemoryStore::shared(true, 1024, 4, bench.clock.clone());
    (bench.store, bench.scope) = (Arc::new(memory.clone()), Scope::of(4, [1, 2]));
    let in_shard = |shard| (0..).map(|n| key(&format!("i{n}"))).find(|key| key.shard(4) == shard).unwrap();
    let keys: Vec<InstanceKey> = (0..4).map(in_shard).collect();
    let name = |shard: usize| keys[shard].instance.as_str();
    let mut heads = [Head::default(); 4];
    bench.start();
    for shard in 0..4 {
        heads[shard] = publish_in(&memory, &bench, &keys[shard], 1, heads[shard]).await;
    }
    let shipped = async |feed| memory.shipped(&[Feed(feed)]).await.unwrap()[0];
    wait_until("its two feeds are shipped", PATIENCE, async || shipped(1).await > 0 && shipped(2).await > 0).await;
    assert_eq!((bench.door.of(name(1)), bench.door.of(name(2))), (numbers(1..=1), numbers(1..=1)));
    // A call for shard 2 is under way when the shard is lost; shard 3 is gained.
    let permits = Arc::new(Semaphore::new(0));
    *bench.door.permits.lock().unwrap() = Some(permits.clone());
    let before = shipped(2).await;
    publish_in(&memory, &bench, &keys[2], 2, heads[2]).await;
    wait_until("the call is under way", PATIENCE, async || bench.observe().under_way == 1).await;
    bench.running.as_ref().unwrap().0.own(Scope::of(4, [1, 3]));
    wait_until("the lost one is forgotten", PATIENCE, async || {
        bench.observe().feeds == 2 && bench.observe().under_way == 2
    })
    .await;
    permits.add_permits(10);
    publish_in(&memory, &bench, &keys[1], 2, heads[1]).await;
    wait_until("what is owned is shipped", PATIENCE, async || {
        shipped(3).await > 0 && bench.door.of(name(1)) == numbers(1..=2) && bench.observe().open == 0
    })
    .await;
    assert_eq!(shipped(2).await, before, "nothing is written of a lost shard");
    assert_eq!(bench.pending().await, 0);
    assert!(bench.door.of(name(0)).is_empty() && shipped(0).await == 0);
    // Regained, it goes on from the durable position; what was under way then comes again.
    bench.running.as_ref().unwrap().0.own(Scope::of(4, [0, 1, 2, 3]));
    wait_until("all is shipped", PATIENCE, async || shipped(0).await > 0 && shipped(2).await > before).await;
    assert_eq!(bench.door.of(name(2)), ["1", "2", "2"]);
    assert_eq!((bench.door.of(name(0)), bench.door.of(name(3))), (numbers(1..=1), numbers(1..=1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_is_let_go_when_nothing_of_it_is_in_hand() {
    let mut bench = Bench::new();
    let memory = MemoryStore::shared(true, 1024, 4, bench.clock.clone());
    (bench.store, bench.scope) = (Arc::new(memory.clone()), Scope::held(4, [(1, 1), (2, 1)]));
    let in_shard = |shard| (0..).map(|n| key(&format!("i{n}"))).find(|key| key.shard(4) == shard).unwrap();
    let (leaves, stays) = (in_shard(1), in_shard(2));
    let permits = Arc::new(Semaphore::new(0));
    *bench.door.permits.lock().unwrap() = Some(permits.clone());
    bench.start();
    let leaving = bench.running.as_ref().unwrap().0.leaving();
    // One call is under way and one waits behind it, when the shard is to be let go.
    let mut head = publish_in(&memory, &bench, &leaves, 1, Head::default()).await;
    head = publish_in(&memory, &bench, &leaves, 2, head).await;
    wait_until("a call is under way, another waits", PATIENCE, async || {
        bench.observe().under_way == 1 && bench.observe().open == 2
    })
    .await;
    let settling = tokio::spawn({
        let leaving = leaving.clone();
        async move { leaving.settle(1, 1).await }
    });
    // Another epoch is another time: nothing of that is in hand.
    leaving.settle(1, 7).await;
    leaving.settle(3, 1).await;
    // What is committed for others goes on; of the shard nothing more is begun.
    permits.add_permits(10);
    settling.await.unwrap();
    let shipped = async |feed| memory.shipped(&[Feed(feed)]).await.unwrap()[0];
    let position = shipped(1).await;
    assert_eq!(memory.outgoing(&[(Feed(1), position)], 9).await.unwrap().len(), 0, "the position says so");
    assert_eq!(bench.door.of(leaves.instance.as_str()), numbers(1..=2));
    publish_in(&memory, &bench, &leaves, 3, head).await;
    publish_in(&memory, &bench, &stays, 1, Head::default()).await;
    wait_until("the other shard goes on", PATIENCE, async || shipped(2).await > 0).await;
    assert_eq!(bench.door.of(leaves.instance.as_str()), numbers(1..=2), "the next owner sends the third");
    // It comes back under a new epoch, and the third leaves, no other.
    let owned = bench.running.as_ref().unwrap();
    owned.0.own(Scope::held(4, [(1, 2), (2, 1)]));
    wait_until("the third leaves", PATIENCE, async || shipped(1).await > position).await;
    assert_eq!(bench.door.of(leaves.instance.as_str()), numbers(1..=3));
}
