//! The lanes of forwarded work: what one sender has for one instance of another node, in its order. Pure.
//!
//! Owns: which batch goes next, and what follows from an answer, a refusal, a loss, a deadline, a change of owner. Not here:
//! sending, lodging, waiting for decisions ([`Act`] says what the shell has to do).
//!
//! Invariants:
//! - One batch of a lane is under way at a time. It is over when each stimulus of it is durable, decided or refused; only
//!   then the next goes, so that no stimulus overtakes an earlier one of its sender, wherever either of them goes.
//! - What may have reached an owner goes to the store under the same repeatable id, so that it is decided once.
//! - A stimulus that is refused was not taken anywhere, unless the refusal says that this is not known.
//! - What waits is bounded, by count and by bytes.
//!
//! Tests: `lanes/tests.rs`.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    flight::{Flight, Slot, Stage, wants_decision},
    owner::{Owner, Owners},
};
use crate::{
    cluster::bus::{
        self,
        message::{Fate, Outcome, Refusal, Work},
    },
    instance::{
        Error, Receipt,
        inbox::{BARRED, BEHIND, Waiting},
    },
    store::{self, Known, Rejection},
    types::{InstanceKey, NodeId, Stimulus},
};

/// How often an owner is asked before a batch goes to the store.
const MOST_ASKED: u32 = 2;
/// Longest wait for this node to give a shard away. It is over in the time the store may take for what is in hand; a shard
/// that takes longer is stuck.
const LONGEST_LEAVE: Duration = Duration::from_secs(30);

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
mod tests;
