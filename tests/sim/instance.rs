//! A shard's instances as the simulation has them. Real: the queue (`instance::inbox`), the record of a turn
//! (`instance::turn::conclude`), everything the store answers. Modelled after `instance::actor`, because that needs actix and
//! its threads: the loop, and what each end of a unit leads to.

use std::{collections::BTreeMap, sync::Arc};

use sophont::{
    instance::{
        Error, Receipt,
        inbox::{Inbox, Waiter, Waiting},
        turn::{self, Author, Standing},
    },
    store::{Committed, Head, Known, Loaded, Rejection, Work},
    types::{InstanceKey, Millis, StateDoc, Stimulus, StimulusId, TurnRecord},
};

use crate::random::Random;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Cold,
    Activating,
    Active,
}

enum Out {
    Turns(Vec<(Waiting, Arc<TurnRecord>)>),
    Accept(Vec<StimulusId>),
}

/// What an instance asks of the world. Each call has a number, so that an answer that was given up is not taken for another's.
pub enum Wish {
    Load(u64),
    Commit { call: u64, work: Work, lodged: u64 },
    Think,
    Pause,
}

/// One instance in memory.
pub struct Instance {
    phase: Phase,
    head: Head,
    standing: Standing,
    lodged: u64,
    inbox: Inbox,
    out: Option<Out>,
    /// The number of the last call.
    call: u64,
    thinking: Option<Waiting>,
    pausing: bool,
}

/// A shard that is open on a node.
pub struct Home {
    pub epoch: u64,
    /// Stimuli lodged for it that are known of.
    pub lodged: u64,
    /// Being closed, since then.
    pub closing: Option<u64>,
    pub instances: BTreeMap<InstanceKey, Instance>,
}

impl Home {
    pub const fn new(epoch: u64) -> Self {
        Self { epoch, lodged: 0, closing: None, instances: BTreeMap::new() }
    }

    pub fn is_idle(&self) -> bool {
        self.instances.values().all(Instance::is_idle)
    }
}

impl Default for Instance {
    fn default() -> Self {
        Self {
            phase: Phase::Cold,
            head: Head::default(),
            standing: Standing { turn: 0, version: 0, since_full: 0 },
            lodged: 0,
            inbox: Inbox::default(),
            out: None,
            call: 0,
            thinking: None,
            pausing: false,
        }
    }
}

impl Instance {
    fn is_idle(&self) -> bool {
        self.phase != Phase::Activating && self.out.is_none() && self.thinking.is_none() && self.inbox.is_empty()
    }

    pub fn deliver(&mut self, stimulus: &Stimulus, waiter: Waiter, lodged: u64, random: &mut Random) -> Option<Wish> {
        let in_hand = self.thinking.as_mut().filter(|waiting| waiting.stimulus.id == stimulus.id);
        if let Some(earlier) = in_hand.or_else(|| self.inbox.find(&stimulus.id)) {
            if earlier.accepted && waiter.until() == sophont::instance::Until::Accepted {
                waiter.tell(Ok(Receipt::Accepted { repeated: true }));
            } else {
                earlier.waiters.push(waiter);
            }
        } else {
            let mut waiting = Waiting::accepted(Arc::new(stimulus.clone()));
            waiting.accepted = false;
            waiting.waiters.push(waiter);
            self.inbox.push(waiting);
        }
        self.wake(lodged, random)
    }

    pub fn wake(&mut self, lodged: u64, random: &mut Random) -> Option<Wish> {
        if self.phase == Phase::Cold {
            self.phase = Phase::Activating;
            self.lodged = lodged;
            self.call += 1;
            return Some(Wish::Load(self.call));
        }
        self.go_on(random)
    }

    /// Somebody says that stimuli wait in the store: one that has nothing to do reads them.
    pub fn called(&mut self, lodged: u64, random: &mut Random) -> Option<Wish> {
        if self.phase == Phase::Active && self.is_idle() {
            self.reload(lodged, random)
        } else {
            self.wake(lodged, random)
        }
    }

    fn reload(&mut self, lodged: u64, random: &mut Random) -> Option<Wish> {
        self.phase = Phase::Cold;
        self.wake(lodged, random)
    }

    pub fn loaded(&mut self, call: u64, loaded: Option<Loaded>, random: &mut Random) -> Option<Wish> {
        if self.phase != Phase::Activating || call != self.call {
            return None;
        }
        let Some(loaded) = loaded else {
            self.phase = Phase::Cold;
            self.refuse_all(&Error::Overloaded("it could not be loaded"));
            return None;
        };
        self.phase = Phase::Active;
        self.head = loaded.head;
        self.standing =
            Standing { turn: loaded.head.turn, version: loaded.state.version, since_full: loaded.turns_since_full };
        let in_hand = self.thinking.as_ref().map(|waiting| waiting.stimulus.id.clone());
        self.inbox.restore(loaded.inbox.into_iter().filter(|stimulus| Some(&stimulus.id) != in_hand.as_ref()));
        self.go_on(random)
    }

    pub fn go_on(&mut self, random: &mut Random) -> Option<Wish> {
        if self.phase != Phase::Active || self.out.is_some() {
            return None;
        }
        if self.thinking.is_some() || self.pausing {
            return self.accept();
        }
        let first = self.inbox.pop()?;
        if random.percent(30) {
            // The slow path: a durable place first, then the thought.
            if !first.accepted {
                self.inbox.put_back(first);
                return self.accept();
            }
            self.thinking = Some(first);
            return Some(Wish::Think);
        }
        let mut batch = vec![first];
        while batch.len() < 4 && random.percent(60) {
            let Some(next) = self.inbox.pop() else { break };
            batch.push(next);
        }
        Some(self.conclude(batch))
    }

    fn conclude(&mut self, batch: Vec<Waiting>) -> Wish {
        let mut standing = self.standing;
        let mut decided = Vec::new();
        for waiting in batch {
            let author = Author { engine: "scripted", ..Author::default() };
            let state = &mut StateDoc::default();
            let record = turn::conclude(standing, &waiting.stimulus, state, Ok(Vec::new()), author, false, Millis(1));
            standing = standing.after(&record);
            decided.push((waiting, Arc::new(record)));
        }
        self.standing = standing;
        let turns = decided.iter().map(|(_, record)| record.clone()).collect();
        self.out = Some(Out::Turns(decided));
        self.call += 1;
        Wish::Commit { call: self.call, work: Work::Turns { head: self.head, turns }, lodged: self.lodged }
    }

    fn accept(&mut self) -> Option<Wish> {
        let stimuli: Vec<_> = self.inbox.unaccepted().map(|waiting| waiting.stimulus.clone()).collect();
        if stimuli.is_empty() {
            return None;
        }
        self.out = Some(Out::Accept(stimuli.iter().map(|stimulus| stimulus.id.clone()).collect()));
        self.call += 1;
        Some(Wish::Commit { call: self.call, work: Work::Accept { stimuli }, lodged: self.lodged })
    }

    pub fn thought(&mut self, random: &mut Random) -> Option<Wish> {
        if self.phase != Phase::Active || self.out.is_some() {
            return None; // it is asked again when that is over
        }
        match self.thinking.take() {
            Some(waiting) => Some(self.conclude(vec![waiting])),
            None => self.go_on(random),
        }
    }

    pub fn rested(&mut self, random: &mut Random) -> Option<Wish> {
        self.pausing = false;
        self.go_on(random)
    }

    pub const fn thinks(&self) -> bool {
        self.thinking.is_some()
    }

    /// The end of a unit. `Err` without a rejection: the epoch is over, and with it everything here.
    pub fn ended(
        &mut self,
        call: u64,
        end: Result<Committed, Rejection>,
        tenure_lodged: &mut u64,
        random: &mut Random,
    ) -> Result<Vec<Wish>, ()> {
        let Some(out) = self.out.take_if(|_| call == self.call) else { return Ok(Vec::new()) };
        let wish = match end {
            Ok(committed) => {
                self.head = committed.head;
                self.settle(out);
                self.go_on(random)
            }
            Err(Rejection::Fenced) => {
                self.put_back(out);
                return Err(());
            }
            Err(Rejection::Behind { lodged }) => {
                self.put_back(out);
                *tenure_lodged = (*tenure_lodged).max(lodged);
                self.reload(*tenure_lodged, random)
            }
            Err(Rejection::Duplicate { index, known }) => {
                self.repeated(out, index, known);
                self.reload(*tenure_lodged, random)
            }
            // No session of the simulation has a hold.
            Err(Rejection::NotFound | Rejection::Barred { .. }) => self.go_on(random),
            Err(Rejection::Failed(error)) => {
                self.give_back(out, &Error::Store(error));
                let mut wishes: Vec<Wish> = self.reload(*tenure_lodged, random).into_iter().collect();
                if !self.pausing {
                    self.pausing = true;
                    wishes.push(Wish::Pause);
                }
                return Ok(wishes);
            }
        };
        Ok(wish.into_iter().collect())
    }

    fn settle(&mut self, out: Out) {
        match out {
            Out::Turns(decided) => {
                for (mut waiting, turn) in decided {
                    waiting.tell(&Ok(Receipt::Decided { turn, repeated: false }));
                }
            }
            Out::Accept(ids) => {
                for id in ids {
                    if let Some(waiting) = self.inbox.find(&id) {
                        waiting.accepted = true;
                        waiting.tell_accepted();
                    }
                }
            }
        }
    }

    fn put_back(&mut self, out: Out) {
        if let Out::Turns(decided) = out {
            decided.into_iter().rev().for_each(|(waiting, _)| self.inbox.put_back(waiting));
        }
    }

    fn give_back(&mut self, out: Out, error: &Error) {
        match out {
            Out::Turns(decided) => {
                for (mut waiting, _) in decided.into_iter().rev() {
                    if waiting.accepted {
                        self.inbox.put_back(waiting);
                    } else {
                        waiting.tell(&Err(error.clone()));
                    }
                }
            }
            Out::Accept(ids) => {
                for mut waiting in self.inbox.extract(|w| !w.accepted && ids.contains(&w.stimulus.id)) {
                    waiting.tell(&Err(error.clone()));
                }
            }
        }
    }

    fn repeated(&mut self, out: Out, index: usize, known: Known) {
        let receipt = match known {
            Known::Waiting(_) => Receipt::Accepted { repeated: true },
            Known::Decided(turn) => Receipt::Decided { turn, repeated: true },
            Known::Dead(letter) => Receipt::Dead(letter),
        };
        match out {
            Out::Turns(mut decided) => {
                if index < decided.len() {
                    let (mut waiting, _) = decided.remove(index);
                    waiting.tell(&Ok(receipt));
                }
                decided.into_iter().rev().for_each(|(waiting, _)| self.inbox.put_back(waiting));
            }
            Out::Accept(ids) => {
                let repeated = ids.get(index);
                for mut waiting in self.inbox.extract(|w| Some(&w.stimulus.id) == repeated && !w.accepted) {
                    waiting.tell(&Ok(receipt.clone()));
                }
            }
        }
    }

    fn refuse_all(&mut self, error: &Error) {
        while let Some(mut waiting) = self.inbox.pop() {
            waiting.tell(&Err(error.clone()));
        }
        if let Some(mut waiting) = self.thinking.take() {
            waiting.tell(&Err(error.clone()));
        }
    }

    /// It leaves memory: what the store does not have is refused.
    pub fn end(mut self) {
        if let Some(out) = self.out.take() {
            self.put_back(out);
        }
        self.refuse_all(&Error::Fenced);
    }
}
