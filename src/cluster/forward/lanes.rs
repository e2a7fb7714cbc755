//! The lanes of forwarded work: what one sender has for one instance of another node, in its order. Pure.
//!
//! Owns: which batch is where, and what follows from an answer, a refusal, a loss, a deadline, a change of owner. Not here:
//! sending, lodging, waiting for decisions ([`Act`] says what the shell has to do).
//!
//! Invariants:
//! - One batch of a lane is under way at a time. It is over when each stimulus of it is durable, decided or refused; only
//!   then the next goes, so that no stimulus overtakes an earlier one of its sender, wherever either of them goes.
//! - What may have reached an owner goes to the store under the same repeatable id, so that it is decided once.
//! - A stimulus that is refused was not taken anywhere, unless the refusal says that this is not known.
//! - What waits is bounded, by count and by bytes.
//!
//! Tests: at the foot.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    cluster::bus::{
        self,
        message::{Fate, Item, Outcome, Refusal, Work},
    },
    instance::{
        Error, Receipt, Until,
        inbox::{BARRED, BEHIND, Waiter, Waiting},
    },
    store::{self, Known, Rejection},
    types::{InstanceKey, NodeId, Stimulus},
};

/// How often an owner is asked before a batch goes to the store.
const MOST_ASKED: u32 = 2;
/// Longest wait for this node to give a shard away. It is over in the time the store may take for what is in hand; a shard
/// that takes longer is stuck.
const LONGEST_LEAVE: Duration = Duration::from_secs(30);

/// Who has a shard, as far as this node knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// This node.
    Here,
    /// This node, which gives it away: what is in hand is being finished, what is new waits for a moment.
    Leaving,
    /// Another node.
    Node {
        /// Which.
        node: NodeId,
        /// Since which epoch.
        epoch: u64,
    },
    /// Nobody at present.
    Nobody,
}

/// Port: who owns what. Read for each batch, so it must be quick.
pub trait Owners: Send + Sync + 'static {
    /// The shard of an instance.
    fn shard_of(&self, key: &InstanceKey) -> u32;
    /// Who has it.
    fn owner(&self, shard: u32) -> Owner;
    /// The epoch under which this node last knew somebody to have it.
    fn epoch(&self, shard: u32) -> u64;
    /// Another node says that somebody else has it: the table may be old.
    fn doubt(&self, shard: u32);
}

/// Bounds.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most stimuli that wait or are under way.
    pub items: usize,
    /// Most bytes of them.
    pub bytes: usize,
    /// Most stimuli of a batch.
    pub batch_items: usize,
    /// Most bytes of a batch of more than one.
    pub batch_bytes: usize,
    /// How long an owner may take to answer.
    pub answer: Duration,
}

/// What the shell has to do.
#[derive(Debug)]
pub enum Act {
    /// Send a batch; tell [`Lanes::unsent`] if the bus does not take it.
    Send {
        /// To whom.
        to: NodeId,
        /// What.
        work: Work,
    },
    /// The owner is this node: deliver in order, then tell [`Lanes::delivered`].
    Deliver {
        /// The batch.
        call: u64,
        /// For whom.
        key: InstanceKey,
        /// What.
        batch: Vec<Waiting>,
    },
    /// Lodge in the store, then tell [`Lanes::lodged`].
    Lodge {
        /// The batch.
        call: u64,
        /// For whom.
        key: InstanceKey,
        /// Its shard.
        shard: u32,
        /// What.
        stimuli: Vec<Arc<Stimulus>>,
    },
    /// It is durable; tell those who wait for the decision when it is there.
    Await {
        /// Whose.
        key: InstanceKey,
        /// What, and who waits.
        waiting: Waiting,
        /// The batch and the place in it under which an owner will answer, when one has it.
        asked: Option<(u64, u16)>,
    },
    /// What became of a stimulus whose batch is over already: somebody may still await it.
    Settle(u64, u16, Outcome),
    /// The instance has something in the store's inbox.
    Wake(InstanceKey),
}

/// Where a stimulus stands among those of its lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It just came in: behind all.
    Last,
    /// It was on its way to the shard's actor, which is not here any more: before what came in meanwhile.
    Back,
    /// An instance that may not decide any more hands it over: before what this lane had for it.
    Earlier,
}

/// Whose stimuli, for whom.
type LaneKey = (InstanceKey, Option<String>);

/// The lanes of some instances.
pub struct Lanes {
    owners: Arc<dyn Owners>,
    bounds: Bounds,
    lanes: HashMap<LaneKey, Lane, ahash::RandomState>,
    calls: HashMap<u64, LaneKey, ahash::RandomState>,
    /// When batches are over due, soonest first.
    due: VecDeque<(Instant, u64)>,
    /// Batches that wait for a table without [`Owner::Leaving`], and since when.
    parked: Vec<(Instant, u64)>,
    last: u64,
    step: u64,
    items: usize,
    bytes: usize,
}

#[derive(Default)]
struct Lane {
    /// Handed over by an instance that may not decide any more: before what came later by the door.
    earlier: VecDeque<Waiting>,
    queue: VecDeque<Waiting>,
    flight: Option<Flight>,
    /// Whether something of this lane was lodged: the owner has to look there first.
    after_lodged: bool,
}

#[derive(Debug)]
struct Flight {
    /// 0 before it was anywhere.
    call: u64,
    stage: Stage,
    slots: Vec<Slot>,
    /// How often an owner was asked.
    asked: u32,
    /// Whether an owner may have it.
    unsure: bool,
    /// What an owner said who refused.
    told: Option<(NodeId, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// An owner has it.
    Asked(NodeId, u64),
    /// Nowhere yet. As the batch of a lane: an empty one, until this node has given the shard away.
    Parked,
    /// The shard's actor on this node has it.
    Delivered,
    /// The store has it.
    Lodging,
}

#[derive(Debug)]
enum Slot {
    Open(Waiting),
    /// Its owner did not want it.
    Again(Waiting),
    Done,
}

impl Lanes {
    /// No lanes. Batches are numbered `first`, `first + step`, ...; 0 is none of them.
    pub fn new(owners: Arc<dyn Owners>, bounds: Bounds, first: u64, step: u64) -> Self {
        Self {
            owners,
            bounds,
            lanes: HashMap::default(),
            calls: HashMap::default(),
            due: VecDeque::new(),
            parked: Vec::new(),
            last: first,
            step,
            items: 0,
            bytes: 0,
        }
    }

    /// Stimuli that wait or are under way.
    pub const fn len(&self) -> usize {
        self.items
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.items == 0
    }

    /// Lanes with something in them.
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// Whether something of this sender is here that must not be overtaken.
    pub fn holds(&self, key: &InstanceKey, sender: Option<&str>) -> bool {
        !self.lanes.is_empty() && self.lanes.contains_key(&(key.clone(), sender.map(String::from)))
    }

    /// Takes a stimulus. Those that come back, the last first.
    pub fn take(&mut self, key: &InstanceKey, mut waiting: Waiting, place: Place, now: Instant, out: &mut Vec<Act>) {
        if waiting.accepted {
            return out.push(Act::Await { key: key.clone(), waiting, asked: None });
        }
        let weight = waiting.stimulus.weight();
        if self.items >= self.bounds.items || self.bytes + weight > self.bounds.bytes {
            return waiting.tell(&Err(Error::Overloaded("too much waits for other nodes")));
        }
        if !waiting.stimulus.repeatable {
            // It may be sent and lodged: the store tells the two from its id.
            Arc::make_mut(&mut waiting.stimulus).repeatable = true;
        }
        self.items += 1;
        self.bytes += weight;
        let name = (key.clone(), waiting.stimulus.sender.clone());
        let lane = self.lanes.entry(name.clone()).or_default();
        match place {
            Place::Last => lane.queue.push_back(waiting),
            Place::Back => lane.queue.push_front(waiting),
            Place::Earlier => lane.earlier.push_back(waiting),
        }
        if lane.flight.is_none() {
            self.begin(&name, now, out);
        }
    }

    /// The bus did not take a batch.
    pub fn unsent(&mut self, call: u64, error: bus::Error, now: Instant, out: &mut Vec<Act>) {
        let Some((name, mut flight)) = self.lift(call, |stage| matches!(stage, Stage::Asked(..))) else { return };
        if error == bus::Error::Overloaded && !flight.unsure {
            for waiting in flight.open() {
                self.tell(waiting, &Err(Error::Overloaded("the bus to other nodes is full")));
            }
            return self.begin(&name, now, out);
        }
        self.lodge(&name, flight, now, out);
    }

    /// An owner says what became of a batch, or of some of it.
    pub fn results(&mut self, call: u64, from: &NodeId, fate: Fate, now: Instant, out: &mut Vec<Act>) {
        let asked = |stage: &Stage| matches!(stage, Stage::Asked(to, _) if to == from);
        let Some((name, mut flight)) = self.lift(call, asked) else {
            if let Fate::Each(each) = fate {
                out.extend(each.into_iter().map(|(index, outcome)| Act::Settle(call, index, outcome)));
            }
            return;
        };
        match fate {
            Fate::NotMine { owner, epoch } => {
                self.owners.doubt(self.owners.shard_of(&name.0));
                flight.told = owner.map(|owner| (owner, epoch));
                self.again(&name, flight, now, out);
            }
            Fate::Each(each) => {
                for (index, outcome) in each {
                    self.settle(&name.0, &mut flight, index, outcome, out);
                }
                if flight.slots.iter().any(|slot| matches!(slot, Slot::Open(_))) {
                    self.put(&name, flight);
                } else if flight.slots.iter().any(|slot| matches!(slot, Slot::Again(_))) {
                    self.again(&name, flight, now, out);
                } else {
                    self.begin(&name, now, out);
                }
            }
        }
    }

    /// What was sent to a node, or to any, may never have arrived.
    pub fn lost(&mut self, to: Option<&NodeId>, now: Instant, out: &mut Vec<Act>) {
        let lost =
            |_: &InstanceKey, stage: &Stage| matches!(stage, Stage::Asked(node, _) if to.is_none_or(|to| to == node));
        for call in self.calls_where(lost) {
            self.give_up(call, now, out);
        }
    }

    /// The table of owners changed: what waits for that goes on, and an earlier owner is not waited for.
    pub fn moved(&mut self, now: Instant, out: &mut Vec<Act>) {
        self.unpark(now, out);
        let owners = self.owners.clone();
        let stale = |key: &InstanceKey, stage: &Stage| {
            let Stage::Asked(to, epoch) = stage else { return false };
            let shard = owners.shard_of(key);
            match owners.owner(shard) {
                Owner::Node { node, epoch: since } => node != *to && since > *epoch,
                Owner::Here | Owner::Leaving => true,
                Owner::Nobody => owners.epoch(shard) >= *epoch,
            }
        };
        for call in self.calls_where(stale) {
            self.give_up(call, now, out);
        }
    }

    /// Time passed.
    pub fn tick(&mut self, now: Instant, out: &mut Vec<Act>) {
        while let Some((_, call)) = self.due.pop_front_if(|(due, _)| *due <= now) {
            self.give_up(call, now, out);
        }
        self.unpark(now, out);
    }

    /// The shard's actor on this node has the batch.
    pub fn delivered(&mut self, call: u64, now: Instant, out: &mut Vec<Act>) {
        if let Some((name, _)) = self.lift(call, |stage| *stage == Stage::Delivered) {
            self.begin(&name, now, out);
        }
    }

    /// The store said what became of a batch that was to be lodged.
    pub fn lodged(&mut self, call: u64, end: Result<(), Rejection>, now: Instant, out: &mut Vec<Act>) {
        let Some((name, mut flight)) = self.lift(call, |stage| *stage == Stage::Lodging) else { return };
        match end {
            Ok(()) => {
                if let Some(lane) = self.lanes.get_mut(&name) {
                    lane.after_lodged = true;
                }
                for waiting in flight.open() {
                    self.accepted(&name.0, waiting, None, out);
                }
                out.push(Act::Wake(name.0.clone()));
                self.begin(&name, now, out);
            }
            Err(Rejection::Duplicate { index, known }) => {
                if let Some(slot) = flight.slots.get_mut(index)
                    && let Slot::Open(waiting) = std::mem::replace(slot, Slot::Done)
                {
                    self.known(&name.0, waiting, known, flight.unsure, out);
                }
                self.lodge(&name, flight, now, out);
            }
            Err(Rejection::Barred { index }) => {
                if let Some(slot) = flight.slots.get_mut(index)
                    && let Slot::Open(waiting) = std::mem::replace(slot, Slot::Done)
                {
                    self.tell(waiting, &Err(Error::Overloaded(BARRED)));
                }
                self.lodge(&name, flight, now, out);
            }
            Err(rejection) => {
                let error = match rejection {
                    _ if flight.unsure => Error::Timeout(self.bounds.answer),
                    Rejection::Failed(error) => Error::Store(error),
                    _ => Error::Store(store::Error::Backend(String::from("it could not be lodged"))),
                };
                for waiting in flight.open() {
                    self.tell(waiting, &Err(error.clone()));
                }
                self.begin(&name, now, out);
            }
        }
    }

    // What happens to a batch.

    /// The next batch of a lane that has none under way, or the end of the lane.
    fn begin(&mut self, name: &LaneKey, now: Instant, out: &mut Vec<Act>) {
        let Some(lane) = self.lanes.get(name) else { return };
        if lane.earlier.is_empty() && lane.queue.is_empty() {
            self.lanes.remove(name);
            return;
        }
        // Read once: a new batch that met an owner and then one who leaves would be lodged past what is in hand.
        let owner = self.owners.owner(self.owners.shard_of(&name.0));
        if owner == Owner::Leaving {
            // Nothing is taken from the lane: what is handed over meanwhile goes first.
            let call = self.number(None);
            self.park(name, Flight::new(call), now);
        } else if let Some(flight) = self.fill(name, Flight::new(0)) {
            self.launch(name, flight, owner, now, out);
        } else {
            self.begin(name, now, out);
        }
    }

    /// Fills a batch from its lane; `None` when nothing there may go any more.
    fn fill(&mut self, name: &LaneKey, mut flight: Flight) -> Option<Flight> {
        let (batch, behind) = self.lanes.get_mut(name)?.batch(&self.bounds);
        for waiting in behind {
            self.tell(waiting, &Err(Error::Overloaded(BEHIND)));
        }
        flight.slots = batch;
        (!flight.slots.is_empty()).then_some(flight)
    }

    fn park(&mut self, name: &LaneKey, flight: Flight, since: Instant) {
        self.parked.push((since, flight.call));
        self.put(name, flight);
    }

    /// Brings a batch to whoever owns the instance now.
    fn launch(&mut self, name: &LaneKey, mut flight: Flight, mut owner: Owner, now: Instant, out: &mut Vec<Act>) {
        let shard = self.owners.shard_of(&name.0);
        let refused = match &flight.stage {
            Stage::Asked(node, epoch) => Some((node.clone(), *epoch)),
            _ => None,
        };
        // Whoever refused may know more than the table.
        if let Some((node, epoch)) = flight.told.take()
            && epoch > self.owners.epoch(shard)
            && !matches!(owner, Owner::Here | Owner::Leaving)
        {
            owner = Owner::Node { node, epoch };
        }
        match owner {
            Owner::Nobody | Owner::Leaving => self.lodge(name, flight, now, out),
            Owner::Here => {
                let batch = flight.open();
                batch.iter().for_each(|waiting| self.release(waiting));
                flight.stage = Stage::Delivered;
                flight.call = self.number(None);
                out.push(Act::Deliver { call: flight.call, key: name.0.clone(), batch });
                self.put(name, flight);
            }
            Owner::Node { node, epoch } if refused == Some((node.clone(), epoch)) => self.lodge(name, flight, now, out),
            Owner::Node { node, epoch } => {
                flight.slots = flight.open().into_iter().map(Slot::Open).collect();
                flight.call = self.number(Some(now));
                flight.asked += 1;
                flight.stage = Stage::Asked(node.clone(), epoch);
                let after_lodged = self.lanes.get(name).is_some_and(|lane| lane.after_lodged);
                let work = flight.work(&name.0, shard, epoch, after_lodged, self.bounds.answer);
                out.push(Act::Send { to: node, work });
                self.put(name, flight);
            }
        }
    }

    /// An owner refused a batch or some of it as not its own: once more to the newest owner, then to the store.
    fn again(&mut self, name: &LaneKey, flight: Flight, now: Instant, out: &mut Vec<Act>) {
        if flight.asked >= MOST_ASKED {
            self.lodge(name, flight, now, out)
        } else {
            let owner = self.owners.owner(self.owners.shard_of(&name.0));
            self.launch(name, flight, owner, now, out)
        }
    }

    /// Nobody answered in time, or nobody will.
    fn give_up(&mut self, call: u64, now: Instant, out: &mut Vec<Act>) {
        let asked = |stage: &Stage| matches!(stage, Stage::Asked(..));
        let Some((name, mut flight)) = self.lift(call, asked) else { return };
        flight.unsure = true;
        self.lodge(&name, flight, now, out);
    }

    /// Lanes that waited for this node to give a shard away: has it? Nothing of them goes to the store before, since what
    /// the node still has in hand comes earlier.
    fn unpark(&mut self, now: Instant, out: &mut Vec<Act>) {
        for (since, call) in std::mem::take(&mut self.parked) {
            let Some((name, flight)) = self.lift(call, |stage| *stage == Stage::Parked) else { continue };
            let is_leaving = self.owners.owner(self.owners.shard_of(&name.0)) == Owner::Leaving;
            if is_leaving && now < since + LONGEST_LEAVE {
                self.park(&name, flight, since);
                continue;
            }
            let stuck = if is_leaving { self.fill(&name, flight) } else { None };
            for waiting in stuck.map(|mut stuck| stuck.open()).unwrap_or_default() {
                self.tell(waiting, &Err(Error::Overloaded("its shard is stuck between two owners")));
            }
            self.begin(&name, now, out);
        }
    }

    /// Puts a batch into the store's inbox. What insists on a version cannot wait there.
    fn lodge(&mut self, name: &LaneKey, mut flight: Flight, now: Instant, out: &mut Vec<Act>) {
        let unknown = Error::Timeout(self.bounds.answer);
        let mut stimuli = Vec::new();
        for waiting in flight.open() {
            let refusal = if waiting.expected.is_some() {
                Error::Fenced
            } else if waiting.is_behind_a_refusal() {
                Error::Overloaded(BEHIND)
            } else {
                stimuli.push(waiting.stimulus.clone());
                flight.slots.push(Slot::Open(waiting));
                continue;
            };
            self.tell(waiting, &Err(if flight.unsure { unknown.clone() } else { refusal }));
        }
        if stimuli.is_empty() {
            return self.begin(name, now, out);
        }
        flight.stage = Stage::Lodging;
        flight.call = self.number(None);
        let shard = self.owners.shard_of(&name.0);
        out.push(Act::Lodge { call: flight.call, key: name.0.clone(), shard, stimuli });
        self.put(name, flight);
    }

    fn settle(&mut self, key: &InstanceKey, flight: &mut Flight, index: u16, outcome: Outcome, out: &mut Vec<Act>) {
        let asked = Some((flight.call, index));
        let after_again = flight.slots.iter().take(index.into()).any(|slot| matches!(slot, Slot::Again(_)));
        let Some(slot) = flight.slots.get_mut(usize::from(index)) else { return };
        let waiting = match std::mem::replace(slot, Slot::Done) {
            Slot::Open(waiting) => waiting,
            Slot::Done => return out.push(Act::Settle(flight.call, index, outcome)),
            again => {
                *slot = again;
                return;
            }
        };
        match outcome {
            Outcome::Refused(Refusal::Fenced | Refusal::Draining) => *slot = Slot::Again(waiting),
            Outcome::Refused(Refusal::Behind) if after_again => *slot = Slot::Again(waiting),
            Outcome::Taken => self.accepted(key, waiting, asked, out),
            Outcome::InStore => self.accepted(key, waiting, None, out),
            Outcome::Accepted { .. } if wants_decision(&waiting) => self.accepted(key, waiting, asked, out),
            outcome => self.tell(waiting, &end(outcome)),
        }
    }

    /// The store knows the id of a stimulus that was to be lodged.
    fn known(&mut self, key: &InstanceKey, waiting: Waiting, known: Known, unsure: bool, out: &mut Vec<Act>) {
        match known {
            Known::Waiting(_) => self.accepted(key, waiting, None, out),
            // What an owner decided for this very stimulus, unheard, is no repeat.
            Known::Decided(turn) => self.tell(waiting, &Ok(Receipt::Decided { turn, repeated: !unsure })),
            Known::Dead(letter) => self.tell(waiting, &Ok(Receipt::Dead(letter))),
        }
    }

    /// It is durable.
    fn accepted(&mut self, key: &InstanceKey, mut waiting: Waiting, asked: Option<(u64, u16)>, out: &mut Vec<Act>) {
        self.release(&waiting);
        waiting.accepted = true;
        waiting.tell_accepted();
        if !waiting.waiters.is_empty() {
            out.push(Act::Await { key: key.clone(), waiting, asked });
        }
    }

    /// At once, so that what follows in a broken line is seen to be behind.
    fn tell(&mut self, mut waiting: Waiting, end: &Result<Receipt, Error>) {
        self.release(&waiting);
        waiting.tell(end);
    }

    fn release(&mut self, waiting: &Waiting) {
        self.items -= 1;
        self.bytes -= waiting.stimulus.weight();
    }

    // Which batch is where.

    fn number(&mut self, due: Option<Instant>) -> u64 {
        self.last += self.step;
        if let Some(now) = due {
            self.due.push_back((now + self.bounds.answer, self.last));
        }
        self.last
    }

    /// Takes the batch of that number out of its lane, if it is at that stage.
    fn lift(&mut self, call: u64, at: impl FnOnce(&Stage) -> bool) -> Option<(LaneKey, Flight)> {
        let lane = self.lanes.get_mut(self.calls.get(&call)?)?;
        let flight = lane.flight.take_if(|flight| flight.call == call && at(&flight.stage))?;
        Some((self.calls.remove(&call)?, flight))
    }

    fn put(&mut self, name: &LaneKey, flight: Flight) {
        self.calls.insert(flight.call, name.clone());
        self.lanes.entry(name.clone()).or_default().flight = Some(flight);
    }

    fn calls_where(&self, pick: impl Fn(&InstanceKey, &Stage) -> bool) -> Vec<u64> {
        let stage = |name| Some(&self.lanes.get(name)?.flight.as_ref()?.stage);
        let picked = self.calls.iter().filter(|(_, name)| stage(*name).is_some_and(|stage| pick(&name.0, stage)));
        picked.map(|(call, _)| *call).collect()
    }
}

impl Lane {
    /// Takes what goes next, and apart from it what may not go any more.
    fn batch(&mut self, bounds: &Bounds) -> (Vec<Slot>, Vec<Waiting>) {
        let (mut batch, mut behind, mut bytes) = (Vec::new(), Vec::new(), 0);
        while batch.len() < bounds.batch_items {
            let queue = if self.earlier.is_empty() { &mut self.queue } else { &mut self.earlier };
            let room = |next: &mut Waiting| batch.is_empty() || bytes + next.stimulus.weight() <= bounds.batch_bytes;
            let Some(next) = queue.pop_front_if(room) else { break };
            if next.is_behind_a_refusal() {
                behind.push(next);
            } else {
                bytes += next.stimulus.weight();
                batch.push(Slot::Open(next));
            }
        }
        (batch, behind)
    }
}

impl Flight {
    const fn new(call: u64) -> Self {
        Self { call, stage: Stage::Parked, slots: Vec::new(), asked: 0, unsure: false, told: None }
    }

    /// Takes out what is not settled, in order.
    fn open(&mut self) -> Vec<Waiting> {
        let open = |slot| match slot {
            Slot::Open(waiting) | Slot::Again(waiting) => Some(waiting),
            Slot::Done => None,
        };
        self.slots.drain(..).filter_map(open).collect()
    }

    fn work(&self, key: &InstanceKey, shard: u32, epoch: u64, after_lodged: bool, within: Duration) -> Work {
        let item = |slot: &Slot| match slot {
            Slot::Open(waiting) | Slot::Again(waiting) => Some(Item {
                stimulus: waiting.stimulus.clone(),
                expected: waiting.expected,
                decided: wants_decision(waiting),
            }),
            Slot::Done => None,
        };
        Work {
            call: self.call,
            key: key.clone(),
            shard,
            epoch,
            within_ms: u32::try_from(within.as_millis()).unwrap_or(u32::MAX),
            after_lodged,
            items: self.slots.iter().filter_map(item).collect(),
        }
    }
}

fn wants_decision(waiting: &Waiting) -> bool {
    waiting.waiters.iter().map(Waiter::until).any(|until| until == Until::Decided)
}

/// What a waiter reads of an outcome that ends its wait.
pub fn end(outcome: Outcome) -> Result<Receipt, Error> {
    match outcome {
        Outcome::Decided { turn, repeated } => Ok(Receipt::Decided { turn: turn.0, repeated }),
        Outcome::Accepted { repeated } => Ok(Receipt::Accepted { repeated }),
        Outcome::Taken | Outcome::InStore => Ok(Receipt::Accepted { repeated: false }),
        Outcome::Dead(letter) => Ok(Receipt::Dead(Arc::new((*letter).into()))),
        Outcome::Refused(refusal) => Err(refusal.into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::{collections::HashSet, sync::Mutex};

    use proptest::prelude::*;
    use tokio::sync::oneshot;

    use super::*;
    use crate::{
        cluster::bus::message::Record,
        instance::inbox::Line,
        types::{Channel, InstanceId, Millis, Outcome as Ended, Source, StateChange, StimulusId, TenantId, TurnRecord},
    };

    /// A table with one shard.
    struct Table(Mutex<(Owner, u64)>);

    impl Table {
        fn new(owner: Owner) -> Arc<Self> {
            let epoch = if let Owner::Node { epoch, .. } = &owner { *epoch } else { 0 };
            Arc::new(Self(Mutex::new((owner, epoch))))
        }
        fn set(&self, owner: Owner) {
            let mut table = self.0.lock().unwrap();
            if let Owner::Node { epoch, .. } = &owner {
                table.1 = *epoch;
            }
            table.0 = owner;
        }
    }

    impl Owners for Table {
        fn shard_of(&self, _: &InstanceKey) -> u32 {
            0
        }
        fn owner(&self, _: u32) -> Owner {
            self.0.lock().unwrap().0.clone()
        }
        fn epoch(&self, _: u32) -> u64 {
            self.0.lock().unwrap().1
        }
        fn doubt(&self, _: u32) {}
    }

    const BOUNDS: Bounds =
        Bounds { items: 100, bytes: 100_000, batch_items: 4, batch_bytes: 10_000, answer: Duration::from_secs(1) };

    fn node(name: &str) -> NodeId {
        NodeId::new(name).unwrap()
    }

    fn at(name: &str, epoch: u64) -> Owner {
        Owner::Node { node: node(name), epoch }
    }

    fn key() -> InstanceKey {
        InstanceKey::new(TenantId::new("t").unwrap(), InstanceId::new("i").unwrap())
    }

    type End = oneshot::Receiver<Result<Receipt, Error>>;

    fn stimulus(id: &str, sender: &str) -> Stimulus {
        let mut stimulus = Stimulus::text(Source::Mqtt, Channel::new("c").unwrap(), "x", Millis(0));
        stimulus.id = StimulusId::new(id).unwrap();
        stimulus.sender = Some(sender.into());
        stimulus
    }

    fn waiting(id: &str, until: Until, line: Option<Line>) -> (Waiting, End) {
        let (waiter, end) = Waiter::new(until, line);
        (Waiting::arrived(stimulus(id, "s"), None, waiter), end)
    }

    fn decided(id: &StimulusId) -> Outcome {
        let mut stimulus = stimulus("x", "s");
        stimulus.id = id.clone();
        let turn = TurnRecord {
            turn: 1,
            version: 0,
            stimulus,
            outcome: Ended::Silent,
            reply: None,
            effects: Vec::new(),
            state: StateChange::None,
            episodes: Vec::new(),
            steps: 0,
            engine: "reflex".into(),
            model: None,
            usage: None,
            error: None,
            decided_at: Millis(0),
            epoch: 0,
        };
        Outcome::Decided { turn: Record(Arc::new(turn)), repeated: false }
    }

    /// Lanes, and what they asked for that nobody looked at yet.
    struct Bench {
        lanes: Lanes,
        table: Arc<Table>,
        now: Instant,
        out: Vec<Act>,
    }

    impl Bench {
        fn new(owner: Owner) -> Self {
            let table = Table::new(owner);
            Self { lanes: Lanes::new(table.clone(), BOUNDS, 0, 1), table, now: Instant::now(), out: Vec::new() }
        }

        fn take(&mut self, id: &str, until: Until) -> End {
            let (waiting, end) = waiting(id, until, None);
            self.lanes.take(&key(), waiting, Place::Last, self.now, &mut self.out);
            end
        }

        fn results(&mut self, work: &Work, from: &str, fate: Fate) {
            self.lanes.results(work.call, &node(from), fate, self.now, &mut self.out);
        }

        /// What is to be done.
        fn acts(&mut self) -> Vec<Act> {
            std::mem::take(&mut self.out)
        }

        fn sent(&mut self, to: &str) -> Work {
            match self.acts().pop() {
                Some(Act::Send { to: node, work }) => {
                    assert_eq!(node.as_str(), to);
                    work
                }
                other => panic!("a batch for {to} was due, not {other:?}"),
            }
        }

        fn lodging(&mut self) -> (u64, Vec<String>) {
            match self.acts().pop() {
                Some(Act::Lodge { call, stimuli, .. }) => (call, stimuli.iter().map(|s| s.id.to_string()).collect()),
                other => panic!("something to lodge was due, not {other:?}"),
            }
        }

        fn later(&mut self) {
            self.now += BOUNDS.answer;
            self.lanes.tick(self.now, &mut self.out);
        }
    }

    fn ids(work: &Work) -> Vec<&str> {
        work.items.iter().map(|item| item.stimulus.id.as_str()).collect()
    }

    #[test]
    fn one_batch_is_under_way_and_what_arrives_meanwhile_is_the_next() {
        let mut bench = Bench::new(at("b", 1));
        let mut first = bench.take("1", Until::Accepted);
        let work = bench.sent("b");
        assert!(ids(&work) == ["1"] && work.items[0].stimulus.repeatable && !work.items[0].decided);
        let _rest: Vec<End> = (2..=7).map(|n| bench.take(&n.to_string(), Until::Decided)).collect();
        assert!(bench.acts().is_empty() && bench.lanes.holds(&key(), Some("s")));
        bench.results(&work, "c", Fate::Each(vec![(0, decided(&work.items[0].stimulus.id))]));
        assert!(matches!(bench.acts()[..], [Act::Settle(..)]), "another node's answer is none");
        bench.results(&work, "b", Fate::Each(vec![(0, decided(&work.items[0].stimulus.id))]));
        let work = bench.sent("b");
        assert!(matches!(first.try_recv(), Ok(Ok(Receipt::Decided { repeated: false, .. }))));
        assert_eq!(ids(&work), ["2", "3", "4", "5"]);
        let taken = (0..4).map(|index| (index, Outcome::Taken)).collect();
        bench.results(&work, "b", Fate::Each(taken));
        assert_eq!(ids(&bench.sent("b")), ["6", "7"], "what is durable holds nobody up");
    }

    #[test]
    fn who_waits_for_the_decision_awaits_it_after_acceptance() {
        let mut bench = Bench::new(at("b", 1));
        let (mut accepted, mut decision) = (bench.take("1", Until::Accepted), bench.take("2", Until::Decided));
        let work = bench.sent_first();
        bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Accepted { repeated: false })]));
        let work = bench.sent("b");
        assert!(matches!(accepted.try_recv(), Ok(Ok(Receipt::Accepted { repeated: false }))));
        bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Taken)]));
        let acts = bench.acts();
        assert!(matches!(&acts[..], [Act::Await { asked: Some((call, 0)), .. }] if *call == work.call), "{acts:?}");
        assert!(decision.try_recv().is_err() && bench.lanes.is_empty());
        bench.results(&work, "b", Fate::Each(vec![(0, decided(&work.items[0].stimulus.id))]));
        assert!(matches!(&bench.acts()[..], [Act::Settle(call, 0, _)] if *call == work.call));
    }

    impl Bench {
        fn sent_first(&mut self) -> Work {
            match self.acts().into_iter().next() {
                Some(Act::Send { work, .. }) => work,
                other => panic!("a batch was due, not {other:?}"),
            }
        }
    }

    #[test]
    fn a_refusal_is_tried_again_at_the_newest_owner_and_then_lodged() {
        let mut bench = Bench::new(at("b", 1));
        let mut end = bench.take("1", Until::Accepted);
        let work = bench.sent("b");
        bench.results(&work, "b", Fate::NotMine { owner: Some(node("c")), epoch: 2 });
        let work = bench.sent("c");
        assert_eq!((work.epoch, ids(&work)), (2, vec!["1"]));
        bench.results(&work, "c", Fate::NotMine { owner: Some(node("d")), epoch: 3 });
        let (call, lodged) = bench.lodging();
        assert_eq!(lodged, ["1"]);
        bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
        assert!(matches!(&bench.acts()[..], [Act::Wake(_)]));
        assert!(matches!(end.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
        assert!(bench.lanes.is_empty() && !bench.lanes.holds(&key(), Some("s")));
    }

    #[test]
    fn an_owner_that_refuses_and_is_still_in_the_table_is_not_asked_again() {
        let mut bench = Bench::new(at("b", 1));
        let _end = bench.take("1", Until::Accepted);
        let work = bench.sent("b");
        bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Refused(Refusal::Draining))]));
        assert_eq!(bench.lodging().1, ["1"]);
    }

    #[test]
    fn what_is_lodged_is_marked_for_the_next_batch_and_known_ids_are_answered() {
        let mut bench = Bench::new(at("b", 1));
        let (mut one, mut two) = (bench.take("1", Until::Decided), bench.take("2", Until::Accepted));
        let work = bench.sent_first();
        bench.later();
        let (call, lodged) = bench.lodging();
        assert_eq!(lodged, ["1"]);
        let Outcome::Decided { turn, .. } = decided(&work.items[0].stimulus.id) else { panic!("decided") };
        let known = Rejection::Duplicate { index: 0, known: Known::Decided(turn.0) };
        bench.lanes.lodged(call, Err(known), bench.now, &mut bench.out);
        let second = bench.sent("b");
        assert!(matches!(one.try_recv(), Ok(Ok(Receipt::Decided { repeated: false, .. }))));
        assert_eq!((ids(&second), second.after_lodged), (vec!["2"], false));
        bench.lanes.lost(Some(&node("b")), bench.now, &mut bench.out);
        let (call, _) = bench.lodging();
        let _three = bench.take("3", Until::Accepted);
        bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
        let third = bench.sent("b");
        assert!(matches!(two.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
        assert_eq!((ids(&third), third.after_lodged), (vec!["3"], true));
    }

    #[test]
    fn what_is_barred_is_refused_and_the_rest_is_lodged() {
        let mut bench = Bench::new(Owner::Nobody);
        let mut one = bench.take("1", Until::Accepted);
        let (call, lodged) = bench.lodging();
        assert_eq!(lodged, ["1"]);
        let (mut two, mut three) = (bench.take("2", Until::Accepted), bench.take("3", Until::Accepted));
        bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
        assert!(matches!(one.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
        let (call, lodged) = bench.lodging();
        assert_eq!(lodged, ["2", "3"]);
        bench.lanes.lodged(call, Err(Rejection::Barred { index: 0 }), bench.now, &mut bench.out);
        assert!(matches!(two.try_recv(), Ok(Err(Error::Overloaded(BARRED)))));
        let (call, lodged) = bench.lodging();
        assert_eq!(lodged, ["3"]);
        bench.lanes.lodged(call, Ok(()), bench.now, &mut bench.out);
        assert!(matches!(three.try_recv(), Ok(Ok(Receipt::Accepted { .. }))));
        assert!(bench.lanes.is_empty());
    }

    #[test]
    fn what_insists_on_a_version_is_refused_rather_than_lodged() {
        let mut bench = Bench::new(Owner::Nobody);
        let (mut waiting, mut end) = waiting("1", Until::Decided, None);
        waiting.expected = Some(3);
        bench.lanes.take(&key(), waiting, Place::Last, bench.now, &mut bench.out);
        assert!(bench.acts().is_empty() && bench.lanes.is_empty());
        assert!(matches!(end.try_recv(), Ok(Err(Error::Fenced))));
    }

    #[test]
    fn a_full_bus_refuses_and_one_that_is_down_lodges() {
        let mut bench = Bench::new(at("b", 1));
        let mut end = bench.take("1", Until::Accepted);
        let work = bench.sent("b");
        bench.lanes.unsent(work.call, bus::Error::Overloaded, bench.now, &mut bench.out);
        bench.acts();
        assert!(matches!(end.try_recv(), Ok(Err(Error::Overloaded(_)))));
        let mut end = bench.take("2", Until::Accepted);
        let work = bench.sent("b");
        bench.lanes.unsent(work.call, bus::Error::Down, bench.now, &mut bench.out);
        let (call, _) = bench.lodging();
        let failed = Rejection::Failed(store::Error::Closed);
        bench.lanes.lodged(call, Err(failed), bench.now, &mut bench.out);
        bench.acts();
        assert!(
            matches!(end.try_recv(), Ok(Err(Error::Store(store::Error::Closed)))),
            "nothing was accepted, for certain"
        );
    }

    #[test]
    fn what_is_handed_over_goes_before_what_waited_for_the_handover() {
        let mut bench = Bench::new(Owner::Leaving);
        let _ends: Vec<End> = ["3", "4"].map(|id| bench.take(id, Until::Accepted)).into();
        assert!(bench.acts().is_empty());
        for id in ["1", "2"] {
            let (waiting, _end) = waiting(id, Until::Accepted, None);
            bench.lanes.take(&key(), waiting, Place::Earlier, bench.now, &mut bench.out);
        }
        bench.table.set(at("b", 2));
        bench.lanes.moved(bench.now, &mut bench.out);
        let work = bench.sent("b");
        assert_eq!(ids(&work), ["1", "2", "3", "4"]);
    }

    /// An owner at the first look of each pair, one who leaves at the second: a table that changes between two reads.
    struct Wavering(Mutex<bool>);

    impl Owners for Wavering {
        fn shard_of(&self, _: &InstanceKey) -> u32 {
            0
        }
        fn owner(&self, _: u32) -> Owner {
            let mut leaves = self.0.lock().unwrap();
            *leaves = !*leaves;
            if *leaves { at("b", 1) } else { Owner::Leaving }
        }
        fn epoch(&self, _: u32) -> u64 {
            1
        }
        fn doubt(&self, _: u32) {}
    }

    #[test]
    fn a_new_batch_is_not_lodged_past_an_owner_that_begins_to_leave() {
        let (mut lanes, mut out) = (Lanes::new(Arc::new(Wavering(Mutex::default())), BOUNDS, 0, 1), Vec::new());
        let (waiting, _end) = waiting("1", Until::Accepted, None);
        lanes.take(&key(), waiting, Place::Last, Instant::now(), &mut out);
        assert!(matches!(out[..], [Act::Send { .. }]), "{out:?}");
    }

    #[test]
    fn a_change_of_owner_ends_the_wait_for_the_earlier_one() {
        let mut bench = Bench::new(at("b", 1));
        let _end = bench.take("1", Until::Accepted);
        bench.sent("b");
        bench.lanes.moved(bench.now, &mut bench.out);
        assert!(bench.acts().is_empty());
        bench.table.set(at("c", 2));
        bench.lanes.moved(bench.now, &mut bench.out);
        assert_eq!(bench.lodging().1, ["1"]);
    }

    #[test]
    fn a_broken_line_lets_nothing_behind_it_pass() {
        let mut bench = Bench::new(at("b", 1));
        let line = Line::default();
        let mut ends = Vec::new();
        for id in ["1", "2", "3"] {
            let (waiting, end) = waiting(id, Until::Accepted, Some(line.clone()));
            bench.lanes.take(&key(), waiting, Place::Last, bench.now, &mut bench.out);
            ends.push(end);
        }
        let work = bench.sent_first();
        bench.results(&work, "b", Fate::Each(vec![(0, Outcome::Refused(Refusal::InboxFull(5)))]));
        assert!(bench.acts().is_empty());
        assert!(
            ends.iter_mut().all(|end| matches!(end.try_recv(), Ok(Err(Error::InboxFull(_) | Error::Overloaded(_)))))
        );
        assert!(bench.lanes.is_empty());
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut bench = Bench::new(at("b", 1));
        let mut ends: Vec<End> = (0..=BOUNDS.items).map(|n| bench.take(&n.to_string(), Until::Accepted)).collect();
        bench.acts();
        assert!(matches!(ends.pop().unwrap().try_recv(), Ok(Err(Error::Overloaded(_)))));
        assert!(ends.iter_mut().all(|end| end.try_recv().is_err()));
    }

    // The whole, against a world that decides in the order in which things reach it.

    /// A step of the world.
    #[derive(Debug, Clone)]
    enum Step {
        Take {
            sender: usize,
            decided: bool,
        },
        /// An owner works off a batch and answers; some results may come one by one, some only as acceptance.
        Work {
            pick: usize,
            answer: Reply,
        },
        Lodge {
            pick: usize,
            fails: bool,
        },
        Lost,
        Later,
        Move(u8),
    }

    #[derive(Debug, Clone, Copy)]
    enum Reply {
        All,
        OneByOne,
        Taken,
        NotMine,
        Draining,
        Overloaded,
        /// It decides, and nobody hears of it.
        Silence,
        /// The bus does not take it.
        Unsent,
    }

    fn step() -> impl Strategy<Value = Step> {
        let reply = prop_oneof![
            4 => Just(Reply::All),
            2 => Just(Reply::OneByOne),
            2 => Just(Reply::Taken),
            2 => Just(Reply::NotMine),
            1 => Just(Reply::Draining),
            1 => Just(Reply::Overloaded),
            2 => Just(Reply::Silence),
            1 => Just(Reply::Unsent),
        ];
        prop_oneof![
            8 => (0..2usize, any::<bool>()).prop_map(|(sender, decided)| Step::Take { sender, decided }),
            8 => (any::<usize>(), reply).prop_map(|(pick, answer)| Step::Work { pick, answer }),
            5 => (any::<usize>(), prop::bool::weighted(0.2)).prop_map(|(pick, fails)| Step::Lodge { pick, fails }),
            1 => Just(Step::Lost),
            2 => Just(Step::Later),
            2 => (0..4u8).prop_map(Step::Move),
        ]
    }

    struct World {
        bench: Bench,
        /// Ids in the order in which they became durable.
        log: Vec<StimulusId>,
        batches: Vec<(NodeId, Work)>,
        lodges: Vec<(u64, Vec<Arc<Stimulus>>)>,
        ends: Vec<(StimulusId, usize, End)>,
        awaited: HashSet<StimulusId>,
        epoch: u64,
    }

    impl World {
        fn durable(&mut self, id: &StimulusId) {
            if !self.log.contains(id) {
                self.log.push(id.clone());
            }
        }

        /// Does what the lanes ask for, as far as it is done at once.
        fn act(&mut self) {
            while !self.bench.out.is_empty() {
                for act in self.bench.acts() {
                    match act {
                        Act::Send { to, work } => self.batches.push((to, work)),
                        Act::Lodge { call, stimuli, .. } => self.lodges.push((call, stimuli)),
                        Act::Deliver { call, batch, .. } => {
                            for mut waiting in batch {
                                self.durable(&waiting.stimulus.id);
                                waiting.tell(&Ok(Receipt::Accepted { repeated: false }));
                            }
                            self.bench.lanes.delivered(call, self.bench.now, &mut self.bench.out);
                        }
                        Act::Await { waiting, .. } => {
                            self.awaited.insert(waiting.stimulus.id.clone());
                        }
                        Act::Settle(..) | Act::Wake(_) => {}
                    }
                }
            }
        }

        fn work(&mut self, pick: usize, reply: Reply) {
            if self.batches.is_empty() {
                return;
            }
            let (to, work) = self.batches.swap_remove(pick % self.batches.len());
            let all = |outcome: &dyn Fn(&StimulusId) -> Outcome| {
                work.items
                    .iter()
                    .enumerate()
                    .map(|(at, item)| (at as u16, outcome(&item.stimulus.id)))
                    .collect::<Vec<_>>()
            };
            let each = match reply {
                Reply::Unsent => {
                    let error = bus::Error::Down;
                    return self.bench.lanes.unsent(work.call, error, self.bench.now, &mut self.bench.out);
                }
                Reply::NotMine => {
                    let fate = Fate::NotMine { owner: Some(node("z")), epoch: self.epoch };
                    return self.bench.lanes.results(work.call, &to, fate, self.bench.now, &mut self.bench.out);
                }
                Reply::Draining => all(&|_| Outcome::Refused(Refusal::Draining)),
                Reply::Overloaded => all(&|_| Outcome::Refused(Refusal::Overloaded)),
                Reply::All | Reply::OneByOne | Reply::Silence | Reply::Taken => {
                    work.items.iter().for_each(|item| self.durable(&item.stimulus.id));
                    if matches!(reply, Reply::Taken) { all(&|_| Outcome::Taken) } else { all(&decided) }
                }
            };
            match reply {
                Reply::Silence => {}
                Reply::OneByOne => {
                    for one in each {
                        let fate = Fate::Each(vec![one]);
                        self.bench.lanes.results(work.call, &to, fate, self.bench.now, &mut self.bench.out);
                    }
                }
                _ => self.bench.lanes.results(work.call, &to, Fate::Each(each), self.bench.now, &mut self.bench.out),
            }
        }

        fn lodge(&mut self, pick: usize, fails: bool) {
            if self.lodges.is_empty() {
                return;
            }
            let (call, stimuli) = self.lodges.swap_remove(pick % self.lodges.len());
            let known = stimuli.iter().position(|stimulus| self.log.contains(&stimulus.id));
            let end = match known {
                _ if fails => Err(Rejection::Failed(store::Error::Overloaded)),
                Some(index) => Err(Rejection::Duplicate { index, known: Known::Waiting(stimuli[index].clone()) }),
                None => {
                    stimuli.iter().for_each(|stimulus| self.durable(&stimulus.id));
                    Ok(())
                }
            };
            self.bench.lanes.lodged(call, end, self.bench.now, &mut self.bench.out);
        }

        fn step(&mut self, step: Step, number: usize) {
            match step {
                Step::Take { sender, decided } => {
                    let (waiter, end) = Waiter::new(if decided { Until::Decided } else { Until::Accepted }, None);
                    let stimulus = stimulus(&format!("n{number}"), &format!("s{sender}"));
                    self.ends.push((stimulus.id.clone(), sender, end));
                    let waiting = Waiting::arrived(stimulus, None, waiter);
                    self.bench.lanes.take(&key(), waiting, Place::Last, self.bench.now, &mut self.bench.out);
                }
                Step::Work { pick, answer } => self.work(pick, answer),
                Step::Lodge { pick, fails } => self.lodge(pick, fails),
                Step::Lost => self.bench.lanes.lost(None, self.bench.now, &mut self.bench.out),
                Step::Later => self.bench.later(),
                Step::Move(to) => {
                    self.epoch += 1;
                    self.bench.table.set(match to {
                        0 => Owner::Nobody,
                        1 => Owner::Leaving,
                        2 => at("b", self.epoch),
                        _ => at("c", self.epoch),
                    });
                    self.bench.lanes.moved(self.bench.now, &mut self.bench.out);
                }
            }
            self.act();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]
        #[test]
        fn order_is_kept_and_everybody_hears_the_truth(steps in prop::collection::vec(step(), 1..80)) {
            let bench = Bench::new(at("b", 1));
            let mut world = World {
                bench,
                log: Vec::new(),
                batches: Vec::new(),
                lodges: Vec::new(),
                ends: Vec::new(),
                awaited: HashSet::new(),
                epoch: 1,
            };
            for (number, step) in steps.into_iter().enumerate() {
                world.step(step, number);
            }
            // In the end everything works, and what is left comes to an end.
            world.bench.table.set(Owner::Nobody);
            for _ in 0..1000 {
                world.bench.later();
                world.act();
                world.lodge(0, false);
                world.act();
            }
            // What still wandered about arrives after all.
            while !world.batches.is_empty() {
                world.work(0, Reply::Silence);
            }
            prop_assert!(world.bench.lanes.is_empty() && world.bench.lanes.bytes == 0);
            prop_assert!(world.bench.lanes.lanes.is_empty() && world.bench.lanes.calls.is_empty());
            let mut last = [0; 2];
            for (id, sender, mut end) in world.ends {
                let place = world.log.iter().position(|durable| *durable == id);
                match end.try_recv() {
                    Ok(Ok(_)) => {
                        let place = place.expect("what was acknowledged is durable") + 1;
                        prop_assert!(place > last[sender], "{id} of {sender} was overtaken");
                        last[sender] = place;
                    }
                    Ok(Err(Error::Timeout(_))) => {}
                    Ok(Err(_)) => prop_assert!(place.is_none(), "{id} was refused and is durable"),
                    Err(_) => {
                        prop_assert!(world.awaited.contains(&id) && place.is_some(), "nobody heard of {id}");
                        let place = place.unwrap() + 1;
                        prop_assert!(place > last[sender], "{id} of {sender} was overtaken");
                        last[sender] = place;
                    }
                }
            }
        }
    }
}
