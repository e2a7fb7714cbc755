//! Nodes that forward to each other: real shards and instances of several nodes in this process, over one store in memory
//! that fences, and a bus that loses, doubles and holds on demand; and once over Redis.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use actix_rt::Arbiter;
use sophont::{
    cluster::{
        bus::{
            Bus, Inlet, Message, Off,
            message::{Fate, Outcome, Question, Results, Told},
            process::{Course, Network},
            redis::{Options, RedisBus},
        },
        forward::{Forwarder, Local, Owner, Owners, Parts},
        shard::What,
        shards::Shards,
        watch::Watches,
    },
    config::Config,
    instance::{
        Error, Receipt, Until,
        environment::Environment,
        events::{Event, Hub},
        inbox::{Line, Waiter, Waiting},
    },
    runtime::{clock::Clock, drain::Drain},
    store::{
        Reader as _, Scope,
        memory::MemoryStore,
        ownership::{Claim, Joining, Ownership as _},
    },
    types::{
        Channel, InstanceId, InstanceKey, Load, Millis, NodeId, Profile, Protocol, RawJson, Roles, Source, Stimulus,
        StimulusId, TenantId, TurnRecord, profile::EngineName,
    },
};
use tokio::{runtime::Handle, sync::oneshot};

use crate::support::{PATIENCE, redis::Redis, wait_until};

const SHARDS: u32 = 4;
const ANSWER: Duration = Duration::from_millis(300);

type End = oneshot::Receiver<Result<Receipt, Error>>;

/// Who owns what, as one node sees it. Nobody is asked: tests say what it sees.
struct Table {
    me: NodeId,
    shards: Mutex<Vec<(Option<NodeId>, u64)>>,
    leaving: Mutex<HashSet<u32>>,
    here: Shards,
    doubted: AtomicBool,
}

impl Owners for Table {
    fn shard_of(&self, key: &InstanceKey) -> u32 {
        (key.stable_hash() % u64::from(SHARDS)) as u32
    }
    fn owner(&self, shard: u32) -> Owner {
        if self.leaving.lock().unwrap().contains(&shard) || self.here.is_leaving(shard) {
            return Owner::Leaving;
        }
        match self.shards.lock().unwrap()[shard as usize].clone() {
            (None, _) => Owner::Nobody,
            (Some(node), _) if node == self.me => Owner::Here,
            (Some(node), epoch) => Owner::Node { node, epoch },
        }
    }
    fn epoch(&self, shard: u32) -> u64 {
        self.shards.lock().unwrap()[shard as usize].1
    }
    fn doubt(&self, _: u32) {
        self.doubted.store(true, Ordering::Release);
    }
}

struct Node {
    id: NodeId,
    table: Arc<Table>,
    shards: Shards,
    forwarder: Forwarder,
    drain: Drain,
    arbiters: Vec<Arbiter>,
    news: Arc<Mutex<Vec<(NodeId, Message)>>>,
    hub: Hub,
    watches: Watches,
}

/// Several nodes, their store, and what connects them.
struct Cluster {
    store: MemoryStore,
    nodes: Vec<Node>,
}

impl Cluster {
    /// Nodes of which the first owns every shard.
    async fn over(buses: Vec<(Arc<dyn Bus>, Inlet)>) -> Self {
        let store = MemoryStore::shared(true, 65_536, SHARDS, Clock::System);
        let mut nodes = Vec::new();
        for (bus, inlet) in buses {
            nodes.push(Node::start(&store, bus, inlet).await);
        }
        let cluster = Self { store, nodes };
        for shard in 0..SHARDS {
            cluster.give(shard, 0).await;
        }
        cluster
    }

    async fn of(network: &Network, names: &[&str]) -> Self {
        Self::over(names.iter().map(|name| network.join(NodeId::generate(name))).collect()).await
    }

    /// Another node takes a shard, and everybody knows.
    async fn give(&self, shard: u32, to: usize) {
        let epoch = self.take(shard, to).await;
        for node in &self.nodes {
            node.sees(shard, Some(&self.nodes[to].id), epoch);
        }
    }

    /// Another node takes a shard from a dead or absent owner, and only it knows.
    async fn take(&self, shard: u32, to: usize) -> u64 {
        let seen = self.store.view().await.unwrap();
        let row = &seen.shards[shard as usize];
        if let Some(owner) = &row.node {
            self.store.release(owner, &[row.fence()]).await.unwrap();
        }
        let taker = &self.nodes[to];
        let claim = Claim { shard, epoch: row.epoch };
        let fence = self.store.take(&taker.id, &[claim]).await.unwrap().pop().expect("the shard is free");
        let elsewhere = Arc::new(taker.forwarder.clone());
        taker.shards.open(fence, Some(elsewhere)).await.unwrap();
        taker.sees(shard, Some(&taker.id), fence.epoch);
        // Whoever opens a shard looks for what waits.
        let waiting = self.store.waiting(&Scope::of(SHARDS, [shard]), None, 1000).await.unwrap();
        for key in waiting {
            assert!(taker.shards.tell(&key, What::Wake).is_ok());
        }
        fence.epoch
    }

    /// The turns of an instance, in order.
    async fn turns(&self, key: &InstanceKey) -> Vec<Arc<TurnRecord>> {
        self.store.turns(key, 0, 100_000).await.unwrap()
    }

    async fn contents(&self, key: &InstanceKey) -> Vec<String> {
        self.turns(key).await.iter().map(|turn| turn.stimulus.content.clone().unwrap()).collect()
    }
}

impl Node {
    async fn start(store: &MemoryStore, bus: Arc<dyn Bus>, inlet: Inlet) -> Self {
        let mut config = Config::default();
        config.cognition.default_engine = EngineName::Scripted;
        let id = bus.node().clone();
        let joining = Joining {
            node: id.clone(),
            cluster: "test".into(),
            shards: SHARDS,
            addresses: Vec::new(),
            roles: Roles::default(),
            weight: 100,
            protocol: Protocol { min: 1, max: 1 },
            lease: Duration::from_secs(3600),
        };
        store.join(&joining).await.unwrap();
        let environment = Arc::new(Environment::new(&config, Arc::new(store.clone()), Clock::System).unwrap());
        let arbiters: Vec<_> = (0..2).map(|_| Arbiter::new()).collect();
        let shards = Shards::new(environment.clone(), SHARDS, arbiters.iter().map(Arbiter::handle).collect());
        let table = Arc::new(Table {
            me: id.clone(),
            shards: Mutex::new(vec![(None, 0); SHARDS as usize]),
            leaving: Mutex::default(),
            here: shards.clone(),
            doubted: AtomicBool::new(false),
        });
        let forwarder = Forwarder::new(Parts {
            bus,
            owners: table.clone(),
            store: Arc::new(store.clone()),
            answer: ANSWER,
            handle: Handle::current(),
        });
        let (drain, news) = (Drain::default(), Arc::new(Mutex::new(Vec::new())));
        let hub = environment.hub.clone();
        let watches = Watches::start(&hub, &forwarder, &drain, &Handle::current());
        let (heard, watching) = (news.clone(), watches.clone());
        let hear = move |from: NodeId, message| {
            if let Err(message) = watching.hear(from.clone(), message) {
                heard.lock().unwrap().push((from, message));
            }
        };
        let local = Local::new(shards.clone(), environment, Box::new(move |from, _, message| hear(from, message)));
        forwarder.serve(inlet, Arc::new(local), &drain);
        Self { id, table, shards, forwarder, drain, arbiters, news, hub, watches }
    }

    /// From now on this node believes this of a shard.
    fn sees(&self, shard: u32, owner: Option<&NodeId>, epoch: u64) {
        self.table.shards.lock().unwrap()[shard as usize] = (owner.cloned(), epoch);
        self.table.leaving.lock().unwrap().remove(&shard);
        self.forwarder.moved();
        self.watches.moved();
    }

    fn send(&self, key: &InstanceKey, stimulus: Stimulus, until: Until) -> End {
        let (waiter, end) = Waiter::new(until, None);
        self.forwarder.forward(key, Waiting::arrived(stimulus, None, waiter));
        end
    }

    /// By the door: to the instance if its shard is here, as the router does it.
    fn submit(&self, key: &InstanceKey, stimulus: Stimulus) -> End {
        let (waiter, end) = Waiter::new(Until::Accepted, None);
        let forward = |stimulus, expected, waiter| {
            self.forwarder.forward(key, Waiting::arrived(stimulus, expected, waiter));
        };
        if self.forwarder.holds(key, stimulus.sender.as_deref()) || self.shards.is_leaving(self.shards.shard_of(key)) {
            forward(stimulus, None, waiter);
        } else if let Err(What::Deliver(stimulus, expected, waiter)) =
            self.shards.tell(key, What::Deliver(stimulus, None, waiter))
        {
            forward(stimulus, expected, waiter);
        }
        end
    }

    async fn decided(&self, key: &InstanceKey, text: &str) -> Arc<TurnRecord> {
        match ended(self.send(key, stimulus(text), Until::Decided)).await {
            Ok(Receipt::Decided { turn, repeated: false }) => turn,
            other => panic!("a decision on {text} was due, not {other:?}"),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.drain.stop();
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
    }
}

async fn ended(end: End) -> Result<Receipt, Error> {
    tokio::time::timeout(PATIENCE, end).await.expect("whoever waits is answered").unwrap_or(Err(Error::Crashed))
}

fn key(instance: &str) -> InstanceKey {
    InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(instance).unwrap())
}

/// A key in that shard.
fn key_in(shard: u32) -> InstanceKey {
    (0..).map(|n| key(&format!("i{n}"))).find(|key| key.stable_hash() % u64::from(SHARDS) == u64::from(shard)).unwrap()
}

fn stimulus(text: &str) -> Stimulus {
    let mut stimulus = Stimulus::text(Source::Mqtt, Channel::new("c").unwrap(), text, Millis(1));
    stimulus.sender = Some("device".into());
    stimulus
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("n{n}")).collect()
}

#[actix_rt::test]
async fn a_stimulus_is_decided_by_its_owner_wherever_it_came_in() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b", "c"]).await;
    cluster.give(1, 2).await;
    for (node, shard) in [(1, 0), (2, 0), (0, 1), (1, 1)] {
        let key = key_in(shard);
        let turn = cluster.nodes[node].decided(&key, "hello").await;
        assert!(turn.stimulus.repeatable && turn.reply.is_some());
        assert!(matches!(
            ended(cluster.nodes[node].send(&key, stimulus("again"), Until::Accepted)).await,
            Ok(Receipt::Decided { .. } | Receipt::Accepted { .. })
        ));
    }
    assert!(cluster.nodes.iter().all(|node| node.forwarder.is_empty()));
    let turn = cluster.nodes[0].decided(&key_in(0), "from here").await;
    assert_eq!(turn.turn, 5, "what turns out to be here is delivered here");
}

#[actix_rt::test]
async fn many_of_one_sender_keep_their_order_while_the_bus_loses_doubles_and_holds() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    let mut state = 7_u64;
    network.rule(move |_, _, message| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        match (message, state >> 60) {
            (Message::Work(_) | Message::Results(_), 0 | 1) => Course::Drop,
            (Message::Work(_) | Message::Results(_), 2) => Course::Double,
            (Message::Work(_) | Message::Results(_), 3) => Course::Hold,
            (Message::Work(_), 4) => Course::Refuse,
            _ => Course::Deliver,
        }
    });
    let key = key_in(0);
    let mut ends = Vec::new();
    for (n, text) in numbers(300).iter().enumerate() {
        let until = if n % 3 == 0 { Until::Decided } else { Until::Accepted };
        ends.push(cluster.nodes[1].send(&key, stimulus(text), until));
        if n % 10 == 0 {
            network.release();
            tokio::task::yield_now().await;
        }
    }
    for end in ends {
        assert!(matches!(ended(end).await, Ok(Receipt::Decided { .. } | Receipt::Accepted { .. })));
    }
    network.heal();
    network.release();
    cluster.nodes[1].decided(&key, "last").await;
    let contents = cluster.contents(&key).await;
    assert_eq!(contents, [numbers(300), vec!["last".into()]].concat(), "each once, in order");
}

#[actix_rt::test]
async fn without_a_bus_all_goes_by_the_store() {
    let id = || NodeId::generate("n");
    let off = |id| {
        let (bus, inlet) = Off::new(id);
        (bus as Arc<dyn Bus>, inlet)
    };
    let cluster = Cluster::over(vec![off(id()), off(id())]).await;
    let key = key_in(0);
    let mut ends: Vec<End> =
        numbers(20).iter().map(|text| cluster.nodes[1].send(&key, stimulus(text), Until::Accepted)).collect();
    ends.push(cluster.nodes[1].send(&key, stimulus("last"), Until::Decided));
    let last = ends.pop().unwrap();
    for end in ends {
        assert!(matches!(ended(end).await, Ok(Receipt::Accepted { repeated: false })));
    }
    // The owner's scan, or, as here, its next own work, finds what waits; and that comes first.
    let turn = cluster.nodes[0].decided(&key, "own").await;
    assert!(matches!(ended(last).await, Ok(Receipt::Decided { .. })));
    assert_eq!(turn.stimulus.content.as_deref(), Some("own"));
    assert_eq!(cluster.contents(&key).await, [numbers(20), vec!["last".into(), "own".into()]].concat());
    let question = cluster.nodes[1].forwarder.ask(&key, Question::Observe, ANSWER).await;
    assert!(matches!(question, Err(Error::Fenced)));
}

#[actix_rt::test]
async fn a_dead_owner_costs_a_moment_and_its_successor_decides_in_order() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b", "c"]).await;
    let key = key_in(0);
    cluster.nodes[1].decided(&key, "before").await;
    // It is there and says nothing: as a stopped process.
    let dead = cluster.nodes[0].id.clone();
    network.rule(move |_, to, _| if *to == dead { Course::Drop } else { Course::Deliver });
    let mut ends: Vec<(Until, End)> = Vec::new();
    for (n, text) in numbers(10).iter().enumerate() {
        let until = if n % 2 == 0 { Until::Decided } else { Until::Accepted };
        ends.push((until, cluster.nodes[1].send(&key, stimulus(text), until)));
    }
    let (_, accepted) = ends.remove(1);
    assert!(matches!(ended(accepted).await, Ok(Receipt::Accepted { .. })), "by the store, before there is a new owner");
    let epoch = cluster.take(0, 2).await;
    // The sender's node learns it only from the new owner's refusals and its own table later.
    cluster.nodes[1].sees(0, Some(&cluster.nodes[2].id), epoch);
    for (until, end) in ends {
        let end = ended(end).await;
        assert!(
            matches!((until, &end), (_, Ok(Receipt::Decided { .. })) | (Until::Accepted, Ok(Receipt::Accepted { .. }))),
            "{end:?}"
        );
    }
    cluster.nodes[1].decided(&key, "after").await;
    assert_eq!(cluster.contents(&key).await, [vec!["before".into()], numbers(10), vec!["after".into()]].concat());
}

#[actix_rt::test]
async fn a_node_with_an_old_table_is_told_who_owns_it_now() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b", "c"]).await;
    let key = key_in(0);
    let epoch = cluster.take(0, 2).await;
    cluster.nodes[0].shards.drop_now(0);
    cluster.nodes[0].sees(0, Some(&cluster.nodes[2].id), epoch);
    // Before that it would not say who the next owner is.
    let settled = async || !cluster.nodes[0].shards.is_leaving(0);
    wait_until("nothing of the shard is in hand any more", PATIENCE, settled).await;
    let turn = cluster.nodes[1].decided(&key, "hello").await;
    assert_eq!(turn.turn, 1);
    let stats = cluster.store.stats().await.unwrap();
    assert_eq!(stats.inbox, 0);
    let owner = cluster.nodes[1].table.owner(0);
    assert!(matches!(owner, Owner::Node { node, .. } if node == cluster.nodes[0].id), "nobody told the table");
}

#[actix_rt::test]
async fn what_an_owner_hands_over_goes_before_what_waits_for_that() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    let key = key_in(0);
    let a = &cluster.nodes[0];
    // Commits are held, so that work in hand stays in hand while the shard is given away.
    cluster.store.faults().hold();
    let first: Vec<End> = numbers(3).iter().map(|text| a.send(&key, stimulus(text), Until::Accepted)).collect();
    a.table.leaving.lock().unwrap().insert(0);
    let shards = a.shards.clone();
    let closing = tokio::spawn(async move { shards.close(0, Duration::from_millis(50)).await });
    let later: Vec<End> = ["x", "y"].map(|text| a.send(&key, stimulus(text), Until::Accepted)).into();
    tokio::time::timeout(PATIENCE, closing).await.unwrap().unwrap();
    assert_eq!(a.forwarder.len(), 2, "what is new waits while the shard is given away");
    cluster.store.faults().release();
    cluster.give(0, 1).await;
    for end in first.into_iter().chain(later) {
        assert!(ended(end).await.is_ok());
    }
    cluster.nodes[1].decided(&key, "last").await;
    assert_eq!(cluster.contents(&key).await, ["n0", "n1", "n2", "x", "y", "last"]);
}

#[actix_rt::test]
async fn an_owner_that_is_fenced_before_its_table_knows_keeps_the_order() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    let key = key_in(0);
    let a = &cluster.nodes[0];
    cluster.store.faults().hold();
    let all = numbers(400);
    let mut ends: Vec<End> = all[..6].iter().map(|text| a.submit(&key, stimulus(text))).collect();
    wait_until("a unit is with the store", PATIENCE, async || cluster.store.faults().waiting() > 0).await;
    let epoch = cluster.take(0, 1).await;
    cluster.store.faults().release();
    wait_until("the commit is refused", PATIENCE, async || a.table.doubted.load(Ordering::Acquire)).await;
    // As long as the table says that the shard is here.
    for text in &all[6..] {
        ends.push(a.submit(&key, stimulus(text)));
        tokio::task::yield_now().await;
    }
    a.shards.drop_now(0);
    a.sees(0, Some(&cluster.nodes[1].id), epoch);
    for (text, end) in all.iter().zip(ends) {
        let end = ended(end).await;
        assert!(end.is_ok(), "{text}: {end:?}");
    }
    cluster.nodes[1].decided(&key, "last").await;
    let decided = cluster.contents(&key).await;
    assert_eq!(decided.split_last().unwrap().1, all);
}

#[actix_rt::test]
async fn whoever_waits_for_a_slow_decision_holds_nobody_up() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    let key = key_in(0);
    let slow = RawJson::parse(r#"{"engine": "scripted", "script": {"reply": "slow", "delay_ms": 1500}}"#).unwrap();
    let told = cluster.nodes[1].forwarder.ask(&key, Question::PutProfile(slow), PATIENCE).await;
    assert_eq!(told.unwrap(), Told::Stored { created: true });
    let thought = cluster.nodes[1].send(&key, stimulus("think"), Until::Decided);
    let accepted = ended(cluster.nodes[1].send(&key, stimulus("and this"), Until::Accepted)).await;
    assert!(matches!(accepted, Ok(Receipt::Accepted { .. })), "{accepted:?}");
    let turns = cluster.turns(&key).await;
    assert!(turns.is_empty(), "it was accepted while the first was being thought about");
    let Ok(Receipt::Decided { turn, repeated: false }) = ended(thought).await else { panic!("a decision was due") };
    assert_eq!(turn.stimulus.content.as_deref(), Some("think"));
    let told = cluster.nodes[1].forwarder.ask(&key, Question::Observe, PATIENCE).await;
    assert!(matches!(told, Ok(Told::Presence { active: true, .. })));
}

#[actix_rt::test]
async fn a_decision_nobody_tells_is_read_in_the_store() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    // Only acceptance is told: the decision that follows is lost.
    network.rule(|_, _, message| match message {
        Message::Results(Results { what: Fate::Each(each), .. }) if each.iter().all(|(_, o)| *o != Outcome::Taken) => {
            Course::Drop
        }
        _ => Course::Deliver,
    });
    let key = key_in(0);
    let slow = RawJson::parse(r#"{"engine": "scripted", "script": {"reply": "slow", "delay_ms": 50}}"#).unwrap();
    cluster.nodes[1].forwarder.ask(&key, Question::PutProfile(slow), PATIENCE).await.unwrap();
    cluster.nodes[1].decided(&key, "think").await;
    assert_eq!(cluster.contents(&key).await, ["think"]);
}

#[actix_rt::test]
async fn refusals_of_an_owner_reach_the_sender_and_a_broken_line_stays_broken() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    let (key, b) = (key_in(0), &cluster.nodes[1]);
    let (waiter, end) = Waiter::new(Until::Decided, None);
    b.forwarder.forward(&key, Waiting::arrived(stimulus("patch"), Some(41), waiter));
    assert!(matches!(ended(end).await, Err(Error::VersionMismatch { expected: 41, actual: 0 })));
    let told = b.forwarder.ask(&key, Question::Revive(StimulusId::new("none").unwrap()), PATIENCE).await;
    assert!(matches!(told, Err(Error::NoDeadLetter)), "{told:?}");
    let bad = RawJson::parse(r#"{"reflexes": [{"when": "1 +", "do": []}]}"#).unwrap();
    assert!(matches!(b.forwarder.ask(&key, Question::PutProfile(bad), PATIENCE).await, Err(Error::Invalid(_))));

    let full = Profile {
        limits: sophont::types::profile::Limits { max_inbox: Some(0), ..Default::default() },
        ..Profile::default()
    };
    let json = RawJson::from_serialize(&full).unwrap();
    b.forwarder.ask(&key, Question::PutProfile(json), PATIENCE).await.unwrap();
    let line = Line::default();
    let ends: Vec<End> = numbers(5)
        .iter()
        .map(|text| {
            let (waiter, end) = Waiter::new(Until::Accepted, Some(line.clone()));
            b.forwarder.forward(&key, Waiting::arrived(stimulus(text), None, waiter));
            end
        })
        .collect();
    for end in ends {
        let end = ended(end).await;
        assert!(matches!(end, Err(Error::InboxFull(_) | Error::Overloaded(_))), "{end:?}");
    }
    assert!(line.is_broken() && cluster.turns(&key).await.is_empty());
}

#[actix_rt::test]
async fn results_larger_than_a_message_are_read_in_the_store() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    let key = key_in(0);
    let large = "x".repeat(sophont::types::limits::MAX_BUS_MESSAGE_BYTES);
    let (one, two) = (
        cluster.nodes[1].send(&key, stimulus(&large), Until::Decided),
        cluster.nodes[1].send(&key, stimulus("small"), Until::Decided),
    );
    cluster.nodes[0].decided(&key, "own").await;
    for end in [one, two] {
        assert!(matches!(ended(end).await, Ok(Receipt::Decided { .. })));
    }
    let sizes: Vec<usize> = cluster.contents(&key).await.iter().map(String::len).collect();
    assert_eq!(sizes.iter().filter(|size| **size == large.len()).count(), 1, "{sizes:?}");
}

#[actix_rt::test]
async fn other_messages_reach_whoever_wants_them() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b"]).await;
    let load = Message::Load(Load { busy_permille: 5, ..Load::default() });
    cluster.nodes[0].forwarder.bus().broadcast(&load).unwrap();
    wait_until("the news arrive", PATIENCE, async || !cluster.nodes[1].news.lock().unwrap().is_empty()).await;
    assert_eq!(*cluster.nodes[1].news.lock().unwrap(), [(cluster.nodes[0].id.clone(), load)]);
}

/// The next thing a watch tells, as a word; what is of no matter here is passed over.
async fn told(watch: &mut sophont::instance::events::Watch) -> String {
    loop {
        let event = tokio::time::timeout(PATIENCE, watch.events.recv()).await.expect("something is told").unwrap();
        return match event {
            Event::Thinking(_) => "thinking".into(),
            Event::Token { index, text, .. } => format!("{index}{text}"),
            Event::Restart(_) => "restart".into(),
            Event::Turn(turn) => format!("turn {}", turn.turn),
            _ => continue,
        };
    }
}

#[actix_rt::test]
async fn what_happens_to_an_instance_is_watched_from_another_node_and_after_a_move() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b", "c"]).await;
    let (key, id) = (key_in(0), StimulusId::generate());
    let [a, b, c] = &cluster.nodes[..] else { panic!("three nodes") };
    a.hub.begin_draft(&key, &id, Vec::new());
    a.hub.token(&key, "x");
    let mut watch = b.hub.watch(&key);
    assert_eq!((told(&mut watch).await, told(&mut watch).await), ("thinking".into(), "0x".into()));
    a.hub.token(&key, "y");
    assert_eq!(told(&mut watch).await, "1y");
    let late = b.hub.watch(&key);
    assert_eq!(late.draft.as_ref().unwrap().tokens.len(), 2, "the answer so far is here, too");
    a.hub.end_draft(&key);
    a.decided(&key, "hello").await;
    assert_eq!(told(&mut watch).await, "turn 1");

    cluster.give(0, 2).await;
    a.shards.drop_now(0);
    wait_until("the new owner is watched", PATIENCE, async || !c.hub.is_empty()).await;
    c.decided(&key, "again").await;
    assert_eq!(told(&mut watch).await, "turn 2");
    drop((watch, late));
    wait_until("nobody watches any more", PATIENCE, async || c.hub.is_empty() && b.hub.is_empty()).await;
}

/// Waits until the watch says that the store should be asked.
async fn told_to_look(watch: &mut sophont::instance::events::Watch) {
    let missed = async { while !matches!(watch.events.recv().await.unwrap(), Event::Missed) {} };
    tokio::time::timeout(PATIENCE, missed).await.expect("whoever watches is told to look into the store");
}

#[actix_rt::test]
async fn an_instance_whose_shard_is_on_its_way_out_is_watched_where_it_still_thinks() {
    let network = Network::default();
    let cluster = Cluster::of(&network, &["a", "b", "c"]).await;
    let (key, id) = (key_in(0), StimulusId::generate());
    let [a, b, c] = &cluster.nodes[..] else { panic!("three nodes") };
    a.hub.begin_draft(&key, &id, Vec::new());
    a.table.leaving.lock().unwrap().insert(0);
    let mut watch = b.hub.watch(&key);
    assert_eq!(told(&mut watch).await, "thinking");
    a.hub.token(&key, "x");
    assert_eq!(told(&mut watch).await, "0x");
    told_to_look(&mut watch).await;

    // What the new owner did before it heard of the watch is in the store, and whoever watches is told to look there.
    a.hub.end_draft(&key);
    cluster.give(0, 2).await;
    a.shards.drop_now(0);
    c.decided(&key, "before").await;
    told_to_look(&mut watch).await;
}

#[actix_rt::test]
async fn over_redis_order_holds_while_it_is_killed_and_comes_back() {
    let mut redis = Redis::start().await;
    let bus = |name: &str| {
        let options = Options {
            url: redis.url().into(),
            ca: None,
            keys: String::from("sophont:forward"),
            timeout: Duration::from_millis(500),
            max_queue: 65_536,
            max_queue_bytes: 64 * 1024 * 1024,
            mailbox_entries: 10_000,
        };
        let (bus, inlet) = RedisBus::start(options, NodeId::generate(name), &Handle::current()).unwrap();
        (bus as Arc<dyn Bus>, inlet)
    };
    let buses = ["a", "b", "c"].map(bus);
    for (bus, _) in &buses {
        wait_until("the bus is up", PATIENCE, async || bus.health() == sophont::cluster::bus::Health::Up).await;
    }
    let cluster = Cluster::over(buses.into()).await;
    cluster.give(1, 1).await;
    let keys = [key_in(0), key_in(1)];
    let mut ends = Vec::new();
    let mut sent: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for round in 0..4 {
        for n in 0..200 {
            let text = format!("r{round}-{n}");
            for (at, key) in keys.iter().enumerate() {
                ends.push(cluster.nodes[2].send(key, stimulus(&text), Until::Accepted));
                sent.entry(at).or_default().push(text.clone());
            }
            if n == 100 {
                match round {
                    1 => redis.kill().await,
                    2 => redis.start_again().await,
                    _ => {}
                }
            }
        }
        // Half of the rounds with a bus, half without.
        cluster.nodes[2].forwarder.len();
        tokio::task::yield_now().await;
    }
    for end in ends {
        assert!(ended(end).await.is_ok());
    }
    for (at, key) in keys.iter().enumerate() {
        cluster.nodes[at].decided(key, "last").await;
        sent.entry(at).or_default().push("last".into());
        let contents = cluster.contents(key).await;
        assert!(contents == sent[&at], "{} of {} in order", contents.len(), sent[&at].len());
    }
}
