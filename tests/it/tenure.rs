//! Shards that change hands between two owners in this process, over one store with real fences, while stimuli flow.

use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use actix_rt::Arbiter;
use serde_json::json;
use sophont::{
    cluster::{Router, shard::What, shards::Shards},
    config::Config,
    instance::{
        Error, Receipt, Until,
        environment::Environment,
        inbox::{Waiter, Waiting},
        tenure::Elsewhere,
    },
    runtime::clock::Clock,
    store::{
        Known, Reader as _,
        memory::MemoryStore,
        ownership::{Claim, Joining, Ownership as _},
    },
    types::{Channel, InstanceId, InstanceKey, Millis, NodeId, Profile, Source, Stimulus, StimulusId, TenantId},
};
use tokio::sync::mpsc;

use crate::ownership_contract::joining;

const SHARDS: u32 = 8;
const INSTANCES: usize = 24;
const STIMULI: usize = 30;

/// One owner.
struct Side {
    node: NodeId,
    shards: Shards,
    router: Router,
    arbiters: Vec<Arbiter>,
}

impl Drop for Side {
    fn drop(&mut self) {
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
    }
}

/// What one side may not decide goes to whoever may, in order. Stands for the bus.
struct Passage {
    sides: OnceLock<[Shards; 2]>,
    store: MemoryStore,
    moved: mpsc::Sender<(InstanceKey, Waiting)>,
    handed: Mutex<usize>,
    lost: Mutex<usize>,
}

impl Elsewhere for Passage {
    fn take(&self, key: &InstanceKey, waiting: Waiting) {
        *self.handed.lock().unwrap() += 1;
        self.moved.try_send((key.clone(), waiting)).unwrap();
    }

    fn lost(&self, shard: u32, epoch: u64) {
        *self.lost.lock().unwrap() += 1;
        for shards in self.sides.get().unwrap().iter().filter(|shards| shards.epoch(shard) == Some(epoch)) {
            shards.drop_now(shard);
        }
    }
}

impl Passage {
    async fn carry(self: Arc<Self>, mut moved: mpsc::Receiver<(InstanceKey, Waiting)>) {
        while let Some((key, waiting)) = moved.recv().await {
            if waiting.accepted {
                tokio::spawn(self.clone().follow(key, waiting));
                continue;
            }
            for waiter in waiting.waiters {
                let mut what = What::Deliver((*waiting.stimulus).clone(), waiting.expected, waiter);
                'there: loop {
                    for shards in self.sides.get().unwrap() {
                        match shards.tell(&key, what) {
                            Ok(()) => break 'there,
                            Err(back) => what = back,
                        }
                    }
                    tokio::task::yield_now().await;
                }
            }
        }
    }

    /// Those who wait for a stimulus that stands in the store's inbox hear of its turn.
    async fn follow(self: Arc<Self>, key: InstanceKey, mut waiting: Waiting) {
        loop {
            if let Ok(Some(Known::Decided(turn))) = self.store.find(&key, &waiting.stimulus.id).await {
                return waiting.tell(&Ok(Receipt::Decided { turn, repeated: false }));
            }
            tokio::task::yield_now().await;
        }
    }
}

struct Pair {
    sides: [Side; 2],
    store: MemoryStore,
    passage: Arc<Passage>,
    decided: AtomicUsize,
}

impl Pair {
    async fn build() -> Self {
        let store = MemoryStore::new();
        let (moved, carried) = mpsc::channel(100_000);
        let passage = Arc::new(Passage {
            sides: OnceLock::new(),
            store: store.clone(),
            moved,
            handed: Mutex::default(),
            lost: Mutex::default(),
        });
        let mut sides = Vec::new();
        for name in ["a", "b"] {
            let joining = Joining { shards: SHARDS, lease: Duration::from_secs(3600), ..joining(name) };
            store.join(&joining).await.unwrap();
            let environment = Environment::new(&Config::default(), Arc::new(store.clone()), Clock::System).unwrap();
            let environment = Arc::new(environment);
            let arbiters: Vec<_> = (0..2).map(|_| Arbiter::new()).collect();
            let shards = Shards::new(environment.clone(), SHARDS, arbiters.iter().map(Arbiter::handle).collect());
            let router = Router::new(environment, shards.clone(), None);
            sides.push(Side { node: joining.node, shards, router, arbiters });
        }
        let sides: [Side; 2] = sides.try_into().ok().unwrap();
        assert!(passage.sides.set([sides[0].shards.clone(), sides[1].shards.clone()]).is_ok());
        tokio::spawn(passage.clone().carry(carried));
        let pair = Self { sides, store, passage, decided: AtomicUsize::new(0) };
        for shard in 0..SHARDS {
            pair.open(0, shard).await;
        }
        pair
    }

    async fn open(&self, side: usize, shard: u32) {
        let side = &self.sides[side];
        let epoch = self.store.view().await.unwrap().shards[shard as usize].epoch;
        let fences = self.store.take(&side.node, &[Claim { shard, epoch }]).await.unwrap();
        side.shards.open(fences[0], Some(self.passage.clone())).await.unwrap();
        side.router.wake_waiting().await.unwrap();
    }

    /// Lets the senders get on, so that moves fall everywhere into their way.
    async fn some_progress(&self, round: u32) {
        let until = (round as usize * INSTANCES * STIMULI / 50).min(INSTANCES * STIMULI);
        while self.decided.load(Ordering::Acquire) < until {
            tokio::task::yield_now().await;
        }
    }

    /// Moves a shard in good order.
    async fn hand_off(&self, shard: u32) {
        let from = usize::from(self.sides[0].shards.epoch(shard).is_none());
        self.sides[from].shards.close(shard, Duration::from_secs(20)).await;
        let row = self.store.view().await.unwrap().shards[shard as usize].clone();
        self.store.release(&self.sides[from].node, &[row.fence()]).await.unwrap();
        self.open(1 - from, shard).await;
    }

    /// The other side takes a shard while its owner goes on, unknowing.
    async fn wrest(&self, shard: u32) {
        let owner = self.store.view().await.unwrap().shards[shard as usize].node.clone().unwrap();
        let from = usize::from(self.sides[0].node != owner);
        self.store.faults().set_alive(&owner, false);
        self.open(1 - from, shard).await;
        self.store.faults().set_alive(&owner, true);
    }
}

fn key(number: usize) -> InstanceKey {
    InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new(format!("i{number}")).unwrap())
}

fn stimulus(number: usize) -> Stimulus {
    let text = format!("n{number}");
    Stimulus::text(Source::Http, Channel::new("chat").unwrap(), text.clone(), Millis(1))
        .with_repeatable_id(StimulusId::new(text).unwrap())
}

/// Sends one after the other, by whichever side, again under the same id when it was refused; the last is told.
async fn send(pair: &Pair, number: usize) {
    let key = key(number);
    for at in 0..STIMULI {
        for attempt in 0.. {
            let there = &pair.sides[(number + at + attempt) % 2].router;
            let end = tokio::time::timeout(Duration::from_secs(30), there.deliver(&key, stimulus(at), Until::Decided));
            match end.await.expect("nobody is left waiting") {
                Ok(Receipt::Decided { .. }) => {
                    pair.decided.fetch_add(1, Ordering::AcqRel);
                    break;
                }
                Ok(other) => panic!("{other:?}"),
                Err(Error::Fenced | Error::Overloaded(_)) => tokio::task::yield_now().await,
                Err(error) => panic!("{key} {at}: {error}"),
            }
        }
    }
}

async fn all_in_order(pair: &Pair) {
    for number in 0..INSTANCES {
        let turns = pair.store.turns(&key(number), 0, STIMULI * 2).await.unwrap();
        let decided: Vec<_> = turns.iter().map(|turn| turn.stimulus.id.to_string()).collect();
        assert_eq!(decided, (0..STIMULI).map(|at| format!("n{at}")).collect::<Vec<_>>(), "instance {number}");
    }
}

/// Every third instance thinks, so that work is in hand when its shard moves.
async fn profiles(pair: &Pair) {
    for number in (0..INSTANCES).step_by(3) {
        let slow: Profile =
            serde_json::from_value(json!({"engine": "scripted", "script": {"reply": "x", "delay_ms": 3}})).unwrap();
        pair.sides[0].router.put_profile(&key(number), slow).await.unwrap();
    }
}

#[actix_rt::test]
async fn shards_that_are_handed_off_lose_double_and_refuse_nothing() {
    let pair = Pair::build().await;
    profiles(&pair).await;
    let senders = futures_util::future::join_all((0..INSTANCES).map(|number| send(&pair, number)));
    let moves = async {
        for round in 0..40u32 {
            pair.some_progress(round).await;
            pair.hand_off(round % SHARDS).await;
        }
    };
    tokio::join!(senders, moves);
    all_in_order(&pair).await;
    assert_eq!(*pair.passage.lost.lock().unwrap(), 0, "nobody was fenced");
}

#[actix_rt::test]
async fn an_owner_that_lost_its_shards_unknowingly_hands_over_what_it_has() {
    let pair = Pair::build().await;
    profiles(&pair).await;
    let senders = futures_util::future::join_all((0..INSTANCES).map(|number| send(&pair, number)));
    let moves = async {
        for round in 0..40u32 {
            pair.some_progress(round).await;
            pair.wrest(round % SHARDS).await;
        }
    };
    tokio::join!(senders, moves);
    all_in_order(&pair).await;
    assert!(*pair.passage.lost.lock().unwrap() > 0 && *pair.passage.handed.lock().unwrap() > 0);
}

#[actix_rt::test]
async fn a_closed_shard_refuses_at_once_where_nobody_takes_over() {
    let pair = Pair::build().await;
    let key = key(0);
    let shard = pair.sides[0].shards.shard_of(&key);
    pair.sides[0].shards.close(shard, Duration::from_secs(5)).await;
    assert!(!pair.sides[0].shards.has(&key));
    let (waiter, end) = Waiter::new(Until::Decided, None);
    let back = pair.sides[0].shards.tell(&key, What::Deliver(stimulus(0), None, waiter)).err().unwrap();
    back.refuse(Error::Fenced);
    assert!(matches!(end.await, Ok(Err(Error::Fenced))));
}
