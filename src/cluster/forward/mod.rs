//! Forwarding: getting a stimulus to the node that owns its instance, or into the store when that node cannot be had.
//!
//! Owns: the shell around the [`lanes`] (bus, store, clock), work that other nodes forward (`serve`), those who wait for a
//! decision made elsewhere (`await_decision`), questions to owners. Not here: who owns what ([`Owners`]), what a shard does
//! with a stimulus ([`Here`]).
//!
//! Invariants: whoever hands something in is answered, by the owner, by the store, or by its own deadline; nothing here
//! waits without a bound; losing the bus costs time and never a stimulus.
//! Tests: `lanes/tests.rs`; `tests/it/forward.rs`.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore},
};

use super::{
    bus::{
        Bus, Inbound, Inlet, Message,
        message::{Ask, Outcome, Question, Refusal, Told},
    },
    calls::{Calls, Unanswered},
};
use crate::{
    instance::{
        Error,
        inbox::{Waiter, Waiting},
        tenure::Elsewhere,
    },
    runtime::drain::Drain,
    store::{Done, Fence, Rejection, Store, Unit, Work},
    telemetry::metric,
    types::{InstanceKey, NodeId, Stimulus, limits::MAX_BUS_MESSAGE_BYTES},
};

mod await_decision;
mod flight;
pub mod lanes;
mod local;
mod owner;
mod serve;

use lanes::{Act, Bounds, Lanes, Place};
pub use local::{Local, News};
pub use owner::{Owner, Owners};

/// Lanes are kept apart by instance, so that threads rarely meet.
const STRIPES: usize = 16;
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(20);
/// Most stimuli that wait or are under way, over all stripes.
const MOST_ITEMS: usize = 65_536;
/// Most bytes of them.
const MOST_BYTES: usize = 256 * 1024 * 1024;
/// Most stimuli of a batch.
const BATCH_ITEMS: usize = 128;
/// Most bytes of a batch of more than one.
const BATCH_BYTES: usize = MAX_BUS_MESSAGE_BYTES / 8;
/// Most questions to other nodes at once, and of other nodes here.
const MOST_QUESTIONS: usize = 1024;
/// A question whose answer may be repeated is asked again after this long.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// A stimulus for an instance that lives here.
#[derive(Debug)]
pub struct Delivery {
    /// The stimulus.
    pub stimulus: Stimulus,
    /// State version it insists on.
    pub expected: Option<u64>,
    /// Who waits for it.
    pub waiter: Waiter,
}

/// Port: the instances that live on this node.
#[async_trait]
pub trait Here: Send + Sync + 'static {
    /// Delivers to the instance, in the order of the calls. Must not block.
    ///
    /// # Errors
    /// The delivery, when the shard is not here.
    fn deliver(&self, key: &InstanceKey, delivery: Delivery) -> Result<(), Box<Delivery>>;
    /// The instance has something in the store's inbox.
    fn wake(&self, key: &InstanceKey);
    /// Answers a question about an instance of this node.
    ///
    /// # Errors
    /// Why it is refused; [`Error::Fenced`] when the shard is not here.
    async fn ask(&self, key: &InstanceKey, question: Question) -> Result<Told, Error>;
    /// Takes a message that is neither work nor a question: invalidations, load reports, watches and events, relays.
    fn hear(&self, from: NodeId, age_ms: u64, message: Message);
    /// What was sent to a node, or to any, and is not answered may never have arrived.
    fn lost(&self, to: Option<&NodeId>);
}

/// What forwarding stands on.
pub struct Parts {
    /// The way to other nodes.
    pub bus: Arc<dyn Bus>,
    /// Who owns what.
    pub owners: Arc<dyn Owners>,
    /// The truth.
    pub store: Arc<dyn Store>,
    /// How long an owner may take to answer.
    pub answer: Duration,
    /// Where tasks run.
    pub handle: Handle,
}

/// The way to instances of other nodes. Cheap to clone.
#[derive(Clone)]
pub struct Forwarder(Arc<Inner>);

struct Inner {
    bus: Arc<dyn Bus>,
    owners: Arc<dyn Owners>,
    store: Arc<dyn Store>,
    answer: Duration,
    handle: Handle,
    here: OnceLock<Arc<dyn Here>>,
    stripes: Vec<Mutex<Lanes>>,
    /// Lanes of all stripes, read without a lock.
    lanes: AtomicUsize,
    questions: Calls<Told>,
    served: Arc<Semaphore>,
    awaited: await_decision::Awaited,
    moved: Notify,
    counts: Counts,
}

impl Forwarder {
    /// Forwarding that takes nothing from the bus yet: see [`Forwarder::serve`].
    pub fn new(parts: Parts) -> Self {
        let Parts { bus, owners, store, answer, handle } = parts;
        let bounds = Bounds {
            items: MOST_ITEMS / STRIPES,
            bytes: MOST_BYTES / STRIPES,
            batch_items: BATCH_ITEMS,
            batch_bytes: BATCH_BYTES,
            answer,
        };
        let lanes = |stripe| Mutex::new(Lanes::new(owners.clone(), bounds, stripe as u64, STRIPES as u64));
        Self(Arc::new(Inner {
            stripes: (0..STRIPES).map(lanes).collect(),
            lanes: AtomicUsize::new(0),
            bus,
            owners,
            store,
            answer,
            handle,
            here: OnceLock::new(),
            questions: Calls::new(MOST_QUESTIONS),
            served: Arc::new(Semaphore::new(MOST_QUESTIONS)),
            awaited: await_decision::Awaited::default(),
            moved: Notify::new(),
            counts: Counts::default(),
        }))
    }

    /// From here on other nodes are served, until the drain says stop.
    pub fn serve(&self, inlet: Inlet, here: Arc<dyn Here>, drain: &Drain) {
        if self.0.here.set(here).is_err() {
            return tracing::error!("forwarding serves already");
        }
        let (receiver, ticker) = (self.clone(), self.clone());
        let (until, stopped) = (drain.clone(), drain.clone());
        self.0.handle.spawn(async move {
            tokio::select! { () = receiver.receive(inlet) => {}, () = until.stopped() => {} }
        });
        self.0.handle.spawn(async move {
            tokio::select! { () = ticker.tick() => {}, () = stopped.stopped() => {} }
        });
    }

    /// Takes a stimulus for an instance of another node, with those who wait for it. Returns at once.
    pub fn forward(&self, key: &InstanceKey, waiting: Waiting) {
        self.take_in(key, waiting, Place::Last);
    }

    /// Whether something of this sender is on its way to the instance: what follows must go this way, too, so that it does
    /// not overtake. Cheap while nothing is on its way at all.
    pub fn holds(&self, key: &InstanceKey, sender: Option<&str>) -> bool {
        self.0.lanes.load(Ordering::Acquire) > 0 && self.lanes(stripe_of(key)).holds(key, sender)
    }

    /// Returns when nothing is on its way, provided that nothing new comes. Cancel safe.
    pub async fn idle(&self) {
        while !self.is_empty() {
            tokio::time::sleep(TICK).await;
        }
    }

    /// Stimuli that wait or are under way.
    pub fn len(&self) -> usize {
        (0..STRIPES).map(|stripe| self.lanes(stripe).len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The table of owners changed.
    pub fn moved(&self) {
        self.0.moved.notify_waiters();
        self.on_all(|lanes, now, out| lanes.moved(now, out));
    }

    /// Who owns an instance, as far as this node knows.
    pub fn owner_of(&self, key: &InstanceKey) -> Owner {
        self.0.owners.owner(self.0.owners.shard_of(key))
    }

    /// The way to other nodes, for broadcasts and relays.
    pub fn bus(&self) -> &Arc<dyn Bus> {
        &self.0.bus
    }

    /// Asks the owner of an instance, wherever it is.
    ///
    /// # Errors
    /// What the owner refuses with; [`Error::Fenced`] when the bus is down, [`Error::Timeout`] when nobody answered: whether
    /// it was done is not known then.
    pub async fn ask(&self, key: &InstanceKey, question: Question, within: Duration) -> Result<Told, Error> {
        let deadline = Instant::now() + within;
        let shard = self.0.owners.shard_of(key);
        let mut refused = None;
        loop {
            let moved = self.0.moved.notified();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout(within));
            }
            match (self.0.owners.owner(shard), self.0.here.get()) {
                (Owner::Here, Some(here)) => match here.ask(key, question.clone()).await {
                    Err(Error::Fenced) => {}
                    end => return end,
                },
                (Owner::Node { node, epoch }, _) if refused != Some((node.clone(), epoch)) => {
                    match self.ask_node(&node, key, &question, left).await {
                        Ok(Told::NotMine { .. } | Told::Refused(Refusal::Fenced | Refusal::Draining)) => {
                            self.0.owners.doubt(shard);
                            refused = Some((node, epoch));
                        }
                        Ok(Told::Refused(refusal)) => return Err(refusal.into()),
                        Ok(told) => return Ok(told),
                        Err(Error::Timeout(_)) if question == Question::Observe => {}
                        Err(error) => return Err(error),
                    }
                }
                _ => {}
            }
            // Until the table changes, or a little later: a hint may be lost.
            let _ = tokio::time::timeout(left.min(ASK_AGAIN), moved).await;
        }
    }

    async fn ask_node(
        &self,
        node: &NodeId,
        key: &InstanceKey,
        question: &Question,
        left: Duration,
    ) -> Result<Told, Error> {
        let full = |_| Error::Overloaded("too many questions to other nodes");
        let call = self.0.questions.open(node).map_err(full)?;
        let within_ms = u32::try_from(left.as_millis()).unwrap_or(u32::MAX);
        let ask = Ask { call: call.id(), key: key.clone(), within_ms, what: question.clone() };
        self.0.bus.send(node, &Message::Ask(ask)).map_err(|_| Error::Fenced)?;
        let answer = call.within(if *question == Question::Observe { left.min(self.0.answer) } else { left }).await;
        answer.map_err(|unanswered| match unanswered {
            Unanswered::Full => Error::Overloaded("too many questions to other nodes"),
            Unanswered::Lost | Unanswered::Timeout(_) => Error::Timeout(left),
        })
    }

    fn lanes(&self, stripe: usize) -> MutexGuard<'_, Lanes> {
        self.0.stripes[stripe % STRIPES].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_in(&self, key: &InstanceKey, waiting: Waiting, place: Place) {
        self.on(stripe_of(key), |lanes, now, out| lanes.take(key, waiting, place, now, out));
    }

    /// Changes the lanes of a stripe, then does what follows from it, without their lock.
    fn on(&self, stripe: usize, change: impl FnOnce(&mut Lanes, Instant, &mut Vec<Act>)) {
        let mut acts = Vec::new();
        let mut lanes = self.lanes(stripe);
        let before = lanes.lanes();
        change(&mut lanes, Instant::now(), &mut acts);
        // Under the lock: while a lane is there the count is not zero.
        let after = lanes.lanes();
        self.0.lanes.fetch_add(after.wrapping_sub(before), Ordering::AcqRel);
        drop(lanes);
        for act in acts {
            self.act(stripe, act);
        }
    }

    fn on_all(&self, mut change: impl FnMut(&mut Lanes, Instant, &mut Vec<Act>)) {
        (0..STRIPES).for_each(|stripe| self.on(stripe, &mut change));
    }

    fn act(&self, stripe: usize, act: Act) {
        match act {
            Act::Send { to, work } => {
                let (call, items) = (work.call, work.items.len());
                match self.0.bus.send(&to, &Message::Work(work)) {
                    Ok(()) => self.0.counts.sent.increment(items as u64),
                    Err(error) => self.on(stripe, |lanes, now, out| lanes.unsent(call, error, now, out)),
                }
            }
            Act::Deliver { call, key, batch } => self.deliver(stripe, call, &key, batch),
            Act::Lodge { call, key, shard, stimuli } => self.lodge(stripe, call, key, shard, Work::Lodge { stimuli }),
            Act::Await { key, waiting, asked } => self.await_decision(key, waiting, asked),
            Act::Settle(call, index, outcome) => self.settle(call, index, outcome),
            Act::Wake(key) => self.wake(&key),
        }
    }

    /// The owner turned out to be this node.
    fn deliver(&self, stripe: usize, call: u64, key: &InstanceKey, batch: Vec<Waiting>) {
        let mut back = Vec::new();
        for mut waiting in batch {
            for waiter in waiting.waiters.drain(..) {
                let stimulus = (*waiting.stimulus).clone();
                let delivery = Delivery { stimulus, expected: waiting.expected, waiter };
                let delivered = match self.0.here.get() {
                    Some(here) => here.deliver(key, delivery),
                    None => Err(Box::new(delivery)),
                };
                back.extend(delivered.err());
            }
        }
        let all_here = back.is_empty();
        for delivery in back.into_iter().rev() {
            let Delivery { stimulus, expected, waiter } = *delivery;
            self.take_in(key, Waiting::arrived(stimulus, expected, waiter), Place::Back);
        }
        if all_here {
            self.on(stripe, |lanes, now, out| lanes.delivered(call, now, out));
        } else {
            // The shard went the moment it came: look again when the table is right.
            let forwarder = self.clone();
            self.0.handle.spawn(async move {
                tokio::time::sleep(TICK).await;
                forwarder.on(stripe, |lanes, now, out| lanes.delivered(call, now, out));
            });
        }
    }

    fn lodge(&self, stripe: usize, call: u64, key: InstanceKey, shard: u32, work: Work) {
        let count = if let Work::Lodge { stimuli } = &work { stimuli.len() as u64 } else { 0 };
        let (done, end) = Done::channel();
        self.0.store.submit(Unit { key, fence: Fence { shard, ..Fence::default() }, work, done });
        let forwarder = self.clone();
        self.0.handle.spawn(async move {
            let end = end.await.unwrap_or(Err(Rejection::Failed(crate::store::Error::Closed)));
            if end.is_ok() {
                forwarder.0.counts.lodged.increment(count);
            }
            forwarder.on(stripe, |lanes, now, out| lanes.lodged(call, end.map(drop), now, out));
        });
    }

    /// Tells the owner of an instance that something waits for it in the store. A hint.
    pub fn wake(&self, key: &InstanceKey) {
        match self.owner_of(key) {
            Owner::Node { node, .. } => self.0.bus.hint(&node, &Message::Wake(vec![key.clone()])),
            Owner::Here => {
                if let Some(here) = self.0.here.get() {
                    here.wake(key);
                }
            }
            // Whoever opens the shard looks for what waits.
            Owner::Leaving | Owner::Nobody => {}
        }
    }

    fn settle(&self, call: u64, index: u16, outcome: Outcome) {
        self.0.awaited.settle(call, index, outcome);
    }

    async fn receive(&self, mut inlet: Inlet) {
        while let Some(inbound) = inlet.next().await {
            match inbound {
                Inbound::Lost { to } => {
                    self.on_all(|lanes, now, out| lanes.lost(to.as_ref(), now, out));
                    self.0.questions.lost(to.as_ref());
                    if let Some(here) = self.0.here.get() {
                        here.lost(to.as_ref());
                    }
                }
                Inbound::Message { from, age_ms, message } => self.hear(from, age_ms, message),
            }
        }
    }

    fn hear(&self, from: NodeId, age_ms: u64, message: Message) {
        match message {
            Message::Work(work) => self.work(from, age_ms, work),
            Message::Results(results) => {
                let stripe = (results.call % STRIPES as u64) as usize;
                self.on(stripe, |lanes, now, out| lanes.results(results.call, &from, results.what, now, out));
            }
            Message::Ask(ask) => self.answer(from, age_ms, ask),
            Message::Answer(answer) => {
                self.0.questions.answer(&from, answer.call, answer.what);
            }
            Message::Wake(keys) => {
                if let Some(here) = self.0.here.get() {
                    keys.iter().for_each(|key| here.wake(key));
                }
            }
            message => {
                if let Some(here) = self.0.here.get() {
                    here.hear(from, age_ms, message);
                }
            }
        }
    }

    async fn tick(&self) {
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            self.on_all(|lanes, now, out| lanes.tick(now, out));
            self.0.counts.waiting.set(self.len() as f64);
        }
    }
}

impl Elsewhere for Forwarder {
    fn take(&self, key: &InstanceKey, waiting: Waiting) {
        self.take_in(key, waiting, Place::Earlier);
    }

    fn lost(&self, shard: u32, _: u64) {
        self.0.owners.doubt(shard);
    }
}

/// Not the bits the shard is made of: a shard's instances spread over all stripes.
fn stripe_of(key: &InstanceKey) -> usize {
    (key.stable_hash() >> 40) as usize % STRIPES
}

/// Handles of the figures, looked up once.
struct Counts {
    sent: metrics::Counter,
    lodged: metrics::Counter,
    waiting: metrics::Gauge,
    taken: metrics::Counter,
    not_mine: metrics::Counter,
    late: metrics::Counter,
}

impl Default for Counts {
    fn default() -> Self {
        let forwarded = |way| metrics::counter!(metric::FORWARDED, "way" => way);
        let served = |result| metrics::counter!(metric::SERVED, "result" => result);
        Self {
            sent: forwarded("sent"),
            lodged: forwarded("lodged"),
            waiting: metrics::gauge!(metric::FORWARDING),
            taken: served("taken"),
            not_mine: served("not_mine"),
            late: served("late"),
        }
    }
}
