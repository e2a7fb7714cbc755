//! The simulated world: time, a network that delays and loses, processes that stop, and what moves in it.
//!
//! Everything that happens is an event at a moment; events of one moment happen in the order they were made. All chance comes
//! from the seed, so a seed is a whole history.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use futures_util::FutureExt as _;
use sophont::{
    cluster::lease::{Due, Lease, Moves, Terms},
    instance::{Error, Receipt, Until, inbox::Waiter},
    runtime::clock::Clock,
    store::{
        Committed, Done, Fence, Known, Loaded, Reader as _, Rejection, Scope, Unit, Work, Writer as _,
        memory::MemoryStore,
        ownership::{self, Claim, Joining, Ownership as _, Renewal, View},
    },
    types::{
        Channel, InstanceId, InstanceKey, Load, Millis, NodeId, Protocol, Roles, Source, Stimulus, StimulusId, TenantId,
    },
};
use tokio::sync::oneshot;

use crate::{
    history::{Ack, History, Wrong},
    instance::{Home, Instance, Wish},
    random::Random,
};

mod faults;
mod membership;
mod stimuli;
mod store;

pub const SHARDS: u32 = 4;
const TERMS: Terms = Terms { lease: Duration::from_secs(3), every: Duration::from_secs(1), moves: 2, shared: true };
const LOOK: u64 = 250;
const RESTLESS: u64 = 50;
/// How long a gateway waits for another node before it lodges a stimulus itself.
const FORWARD: u64 = 300;
/// How long a sender waits before it sends again, under the same id.
const PATIENCE: u64 = 2_000;
/// Between two scans for what waits in the store.
const SCAN: u64 = 2_000;
/// Nothing goes wrong any more: by then everybody must have been served.
const CALM: u64 = 60_000;

/// What is switched off, and which history.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub seed: u64,
    /// The store compares epochs.
    pub fence: bool,
    /// The store recognises repeats.
    pub dedupe: bool,
    /// The store keeps an owner behind what was lodged from deciding what came later.
    pub behind: bool,
}

/// What a history came to.
#[derive(Debug)]
pub struct Outcome {
    pub found: BTreeSet<Wrong>,
    pub details: Vec<String>,
    pub commits: usize,
    pub events: usize,
    pub faults: usize,
    pub taken: u64,
}

/// A call of the store by a node.
enum Call {
    Join,
    Renew,
    Gone,
    Take(Vec<Claim>),
    Release(Vec<Fence>),
    Load { epoch: u64, key: InstanceKey },
    Unit { fence: Fence, key: InstanceKey, work: Work },
    Lodge { request: u64, shard: u32, key: InstanceKey, stimulus: Stimulus },
    Scan(Vec<u32>),
}

/// What reaches a node.
enum News {
    Tick,
    Look,
    Scan,
    View(u64, Result<View, ownership::Error>),
    Gone(u64, Vec<NodeId>),
    Taken(u64, Result<Vec<Fence>, ownership::Error>),
    Released(u64),
    /// A call of the membership took too long.
    Late(u64),
    Loaded(u64, InstanceKey, u64, Option<Loaded>),
    Ended(u64, InstanceKey, u64, Result<Committed, Rejection>),
    Thought(u32, u64, InstanceKey),
    Rested(u64, InstanceKey),
    Scanned(Vec<InstanceKey>),
    Ask {
        request: u64,
        sender: usize,
        key: InstanceKey,
        stimulus: Stimulus,
        until: Until,
    },
    Forward {
        from: usize,
        request: u64,
        key: InstanceKey,
        stimulus: Stimulus,
        until: Until,
    },
    Answer(u64, Answer),
    Deadline(u64),
    Lodged(u64, Result<Committed, Rejection>),
    Wake(InstanceKey),
}

/// What became of a stimulus.
#[derive(Clone, Copy)]
enum Answer {
    Yes(Ack),
    NotMine,
    No,
}

enum Event {
    Node(usize, u32, News),
    Store(usize, u32, u64, Call),
    Sender(usize, u64, Option<Ack>),
    Fault,
    Restart(usize),
    NoticeCrash(NodeId),
}

/// Who waits for a stimulus at a node that has the shard.
struct Pending {
    to: Origin,
    end: oneshot::Receiver<Result<Receipt, Error>>,
}

#[derive(Clone, Copy)]
enum Origin {
    Sender(usize, u64),
    Node(usize, u32, u64),
}

/// A stimulus that a gateway was given and has not answered.
struct Asked {
    sender: usize,
    key: InstanceKey,
    stimulus: Stimulus,
    lodging: bool,
}

struct Node {
    up: bool,
    life: u32,
    lease: Lease,
    /// Its own clock: what it shows at the start and how fast it goes, in thousandths.
    offset: u64,
    rate: u64,
    paused_until: u64,
    cut_until: u64,
    /// The call of the membership that is out.
    call: Option<(u64, Duration)>,
    moves: Moves,
    releases: Vec<Fence>,
    homes: BTreeMap<u32, Home>,
    routes: Vec<Option<NodeId>>,
    pending: Vec<Pending>,
    asked: BTreeMap<u64, Asked>,
}

struct Sender {
    key: InstanceKey,
    count: u64,
    next: u64,
    attempt: u64,
    done: bool,
}

pub struct World {
    settings: Settings,
    random: Random,
    now: u64,
    made: u64,
    queue: BTreeMap<(u64, u64), Event>,
    clock: Clock,
    store: MemoryStore,
    nodes: Vec<Node>,
    senders: Vec<Sender>,
    history: History,
    faults_until: u64,
    lossy_until: u64,
    faults: usize,
    calls: u64,
}

fn named(node: usize, life: u32) -> NodeId {
    NodeId::new(format!("n{node}.{life}")).unwrap()
}

fn key(n: u64) -> InstanceKey {
    InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(format!("i{n}")).unwrap())
}

/// What a future of the store in memory says, which never waits.
fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().unwrap()
}

impl World {
    pub fn new(settings: Settings) -> Self {
        let mut random = Random::new(settings.seed);
        let clock = Clock::manual(Millis(1_000_000));
        let store = MemoryStore::shared(settings.dedupe, 100_000, 1, clock.clone());
        store.faults().fence_off(!settings.fence);
        store.faults().behind_off(!settings.behind);
        let count = 2 + random.index(3);
        let faults_until = random.within(8_000..14_000);
        let mut world = Self {
            settings,
            now: 0,
            made: 0,
            queue: BTreeMap::new(),
            clock,
            store,
            nodes: Vec::new(),
            senders: Vec::new(),
            history: History::default(),
            faults_until,
            lossy_until: 0,
            faults: 0,
            calls: 0,
            random,
        };
        for at in 0..count {
            let node = world.born(at, 1);
            world.nodes.push(node);
            world.start(at);
        }
        for at in 0..6 {
            let key = key(world.random.within(0..4));
            let count = world.random.within(5..10);
            world.senders.push(Sender { key, count, next: 0, attempt: 0, done: false });
            let delay = world.random.within(0..1_000);
            world.after(delay, Event::Sender(at, 0, None));
        }
        world.after(500, Event::Fault);
        world
    }

    /// A process that begins.
    fn born(&mut self, at: usize, life: u32) -> Node {
        Node {
            up: true,
            life,
            lease: Lease::new(named(at, life), TERMS),
            offset: self.random.within(0..1_000_000),
            rate: self.random.within(970..1_031),
            paused_until: 0,
            cut_until: 0,
            call: None,
            moves: Moves::default(),
            releases: Vec::new(),
            homes: BTreeMap::new(),
            routes: vec![None; SHARDS as usize],
            pending: Vec::new(),
            asked: BTreeMap::new(),
        }
    }

    fn start(&mut self, at: usize) {
        self.tell(at, 0, News::Tick);
        self.tell(at, LOOK, News::Look);
        self.tell(at, SCAN, News::Scan);
    }

    // Time and the network.

    fn after(&mut self, delay: u64, event: Event) {
        self.made += 1;
        self.queue.insert((self.now + delay, self.made), event);
    }

    fn tell(&mut self, at: usize, delay: u64, news: News) {
        let life = self.nodes[at].life;
        self.after(delay, Event::Node(at, life, news));
    }

    fn rough(&self) -> bool {
        self.now < self.faults_until
    }

    /// Mostly quick, sometimes slow.
    fn delay(&mut self) -> u64 {
        match self.random.within(0..100) {
            0..90 => self.random.within(1..10),
            90..98 => self.random.within(10..200),
            _ if self.rough() => self.random.within(200..4_000),
            _ => self.random.within(10..200),
        }
    }

    /// Between nodes: lost, doubled or delayed.
    fn bus(&mut self, to: usize, life: u32, make: impl Fn() -> News) {
        let loss = if self.now < self.lossy_until {
            60
        } else if self.rough() {
            5
        } else {
            0
        };
        let times = if self.random.percent(loss) { 0 } else { 1 + u64::from(self.random.percent(3)) };
        for _ in 0..times {
            let delay = self.delay();
            self.after(delay, Event::Node(to, life, make()));
        }
    }

    fn local(&self, at: usize) -> Duration {
        let node = &self.nodes[at];
        Duration::from_millis(node.offset + self.now * node.rate / 1_000)
    }

    /// How long until the node's clock shows this.
    fn until(&self, at: usize, moment: Duration) -> u64 {
        let left = moment.saturating_sub(self.local(at)).as_millis() as u64;
        left * 1_000 / self.nodes[at].rate + 1
    }

    /// A call of the store: late, or lost, when the node is cut off from it.
    fn call(&mut self, at: usize, id: u64, call: Call) {
        let node = &self.nodes[at];
        let (life, cut) = (node.life, node.cut_until.saturating_sub(self.now));
        let delay = self.delay();
        // A single connection may break as well.
        let broken = cut == 0 && self.rough() && self.random.percent(2);
        if cut == 0 && !broken {
            return self.after(delay, Event::Store(at, life, id, call));
        }
        let cut = if broken { self.random.within(1..3_000) } else { cut };
        // The connection breaks: the caller hears of a failure, and what it sent may still arrive.
        let failure = self.failure(id, &call);
        let soon = self.random.within(200..1_000);
        if let Some(failure) = failure {
            self.after(soon, Event::Node(at, life, failure));
        }
        if self.random.percent(50) {
            self.after(cut + delay, Event::Store(at, life, id, call));
        }
    }

    /// What a caller hears when its connection breaks; those with a deadline of their own hear nothing.
    fn failure(&self, id: u64, call: &Call) -> Option<News> {
        let broken = || Err(Rejection::Failed(sophont::store::Error::Closed));
        match call {
            Call::Load { epoch, key } => Some(News::Loaded(*epoch, key.clone(), id, None)),
            Call::Unit { fence, key, .. } => Some(News::Ended(fence.epoch, key.clone(), id, broken())),
            Call::Lodge { request, .. } => Some(News::Lodged(*request, broken())),
            Call::Join | Call::Renew | Call::Gone | Call::Take(_) | Call::Release(_) | Call::Scan(_) => None,
        }
    }

    // The loop.

    fn node(&mut self, at: usize, life: u32, news: News) {
        let node = &self.nodes[at];
        if node.life != life || !node.up {
            return;
        }
        if node.paused_until > self.now {
            let delay = node.paused_until - self.now;
            return self.after(delay, Event::Node(at, life, news));
        }
        match news {
            News::Tick => self.tick(at),
            News::Late(id) => {
                if self.ends(at, id).is_some() {
                    self.tick(at);
                }
            }
            News::View(id, view) => {
                if let Some(asked) = self.ends(at, id) {
                    self.viewed(at, asked, view);
                }
            }
            News::Taken(id, fences) => {
                if self.ends(at, id).is_some() {
                    self.taken(at, fences);
                }
            }
            News::Released(id) => {
                if self.ends(at, id).is_some() {
                    self.tick(at);
                }
            }
            News::Gone(id, gone) => {
                if self.ends(at, id).is_some() {
                    if gone.iter().any(|node| self.nodes[at].routes.contains(&Some(node.clone()))) {
                        self.nodes[at].lease.hurry();
                    }
                    self.tick(at);
                }
            }
            News::Look => {
                if self.nodes[at].call.is_none() {
                    self.ask(at, Call::Gone);
                }
                self.tell(at, LOOK, News::Look);
            }
            News::Scan => {
                let shards: Vec<u32> = self.nodes[at].homes.keys().copied().collect();
                self.call(at, 0, Call::Scan(shards));
                self.tell(at, SCAN, News::Scan);
            }
            News::Scanned(keys) => keys.iter().for_each(|key| self.wake(at, key)),
            News::Wake(key) => self.wake(at, &key),
            News::Loaded(epoch, key, call, loaded) => {
                self.touch(at, &key, Some(epoch), |instance, _, random| {
                    Ok(instance.loaded(call, loaded, random).into_iter().collect())
                });
            }
            News::Ended(epoch, key, call, end) => {
                self.touch(at, &key, Some(epoch), |instance, lodged, random| instance.ended(call, end, lodged, random));
            }
            News::Thought(shard, epoch, key) => {
                self.touch(at, &key, Some(epoch), |instance, _, random| {
                    Ok(instance.thought(random).into_iter().collect())
                });
                let thinks = self.home(at, shard, epoch).and_then(|home| home.instances.get(&key));
                if thinks.is_some_and(Instance::thinks) {
                    self.tell(at, 20, News::Thought(shard, epoch, key));
                }
            }
            News::Rested(epoch, key) => {
                self.touch(at, &key, Some(epoch), |instance, _, random| {
                    Ok(instance.rested(random).into_iter().collect())
                });
            }
            News::Ask { request, sender, key, stimulus, until } => {
                self.asked(at, request, Asked { sender, key, stimulus, lodging: false }, until);
            }
            News::Forward { from, request, key, stimulus, until } => {
                let life = self.nodes[from].life;
                if self.has_open(at, key.shard(SHARDS)) {
                    self.deliver(at, Origin::Node(from, life, request), &key, &stimulus, until);
                } else {
                    self.bus(from, life, || News::Answer(request, Answer::NotMine));
                }
            }
            News::Answer(request, answer) => {
                let Some(asked) = self.nodes[at].asked.get(&request).filter(|asked| !asked.lodging) else { return };
                let sender = asked.sender;
                let asked = self.nodes[at].asked.remove(&request);
                match (answer, asked) {
                    (Answer::NotMine, Some(asked)) => self.lodge(at, request, asked),
                    (Answer::Yes(ack), _) => self.answer(at, sender, request, Some(ack)),
                    (Answer::No | Answer::NotMine, _) => self.answer(at, sender, request, None),
                }
            }
            News::Deadline(request) => {
                if self.nodes[at].asked.get(&request).is_some_and(|asked| !asked.lodging)
                    && let Some(asked) = self.nodes[at].asked.remove(&request)
                {
                    self.lodge(at, request, asked);
                }
            }
            News::Lodged(request, end) => self.lodged(at, request, end),
        }
        self.pass_on(at);
        let closing = self.nodes[at].homes.values().any(|home| home.closing.is_some());
        if closing {
            self.tick(at);
        }
    }

    fn wake(&mut self, at: usize, key: &InstanceKey) {
        self.touch(at, key, None, |instance, lodged, random| {
            Ok(instance.called(*lodged, random).into_iter().collect())
        });
    }

    /// Lives through the whole history.
    pub fn run(mut self) -> Outcome {
        let mut events = 0;
        let end = self.faults_until + CALM;
        let mut served_at = None;
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.now = at;
            events += 1;
            match event {
                Event::Node(at, life, news) => self.node(at, life, news),
                Event::Store(at, life, id, call) => self.serve(at, life, id, call),
                Event::Sender(sender, attempt, ack) => self.send(sender, attempt, ack),
                Event::Fault => self.fault(),
                Event::Restart(at) => self.restart(at),
                Event::NoticeCrash(node) => self.store.faults().set_alive(&node, false),
            }
            if !self.rough() && self.senders.iter().all(|sender| sender.done) {
                let served = *served_at.get_or_insert(self.now);
                // Time for what was only accepted to be decided, and for shards to find their owners.
                if self.now > served.max(self.faults_until) + 12_000 {
                    break;
                }
            }
            if self.now > end {
                let open = self.senders.iter().filter(|sender| !sender.done).count();
                self.history.wrong(Wrong::Stuck, || format!("{open} senders are not served"));
                break;
            }
        }
        self.judge(events)
    }

    fn judge(mut self, events: usize) -> Outcome {
        for n in 0..4 {
            let turns = now(self.store.turns(&key(n), 0, 10_000)).unwrap();
            self.history.check(&key(n), &turns);
        }
        let view = now(self.store.view()).unwrap();
        for row in &view.shards {
            let holds = |at: &usize| {
                let node = &self.nodes[*at];
                let open = node.homes.get(&row.shard).is_some_and(|home| home.epoch == row.epoch);
                node.up && open && node.lease.open().any(|open| open == (row.shard, row.epoch))
            };
            let holders: Vec<NodeId> =
                (0..self.nodes.len()).filter(holds).map(|at| named(at, self.nodes[at].life)).collect();
            if holders != row.node.iter().cloned().collect::<Vec<_>>() || holders.len() != 1 {
                self.history.wrong(Wrong::Orphaned, || format!("{row:?} is open at {holders:?}"));
            }
        }
        let _ = self.settings;
        Outcome {
            found: self.history.found,
            details: self.history.details,
            commits: self.history.commits,
            events,
            faults: self.faults,
            taken: view.shards.iter().map(|row| row.epoch).sum(),
        }
    }
}
