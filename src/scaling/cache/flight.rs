//! Who loads what: one at a time for each key; the others wait for it, and one of them goes on when it gives up. Pure.
//!
//! Invariants: every one who joins is answered, by a lead, by an end, or by being dropped; a lead that was abandoned passes to
//! the next; nothing waits for a load that began too long ago. Tests: at the foot.

use std::{
    any::Any,
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::oneshot;

use super::{entry::Entry, slot::Slot};

/// Most who wait on a node; whoever comes beyond loads for themselves.
const MOST: usize = 65_536;
/// A load that takes longer is given up on: the next one who asks begins another.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// How a load ended, for those who waited.
#[derive(Clone)]
pub enum Outcome {
    /// With this.
    Entry(Entry),
    /// Look again: what was loaded is not for those who came later.
    Again,
    /// With this error.
    Failed(Arc<dyn Any + Send + Sync>),
}

/// What one who joins is told.
pub enum Turn<L> {
    /// Load it, and tell the end.
    Lead(L),
    /// Somebody else did.
    Ended(Outcome),
    /// Too many wait: load it for yourself.
    Alone,
}

/// Loads under way.
pub struct Flights<L> {
    flights: HashMap<Slot, Flight<L>, ahash::RandomState>,
    waiting: usize,
    last: u64,
}

struct Flight<L> {
    number: u64,
    began: Instant,
    waiting: Vec<oneshot::Sender<Turn<L>>>,
}

impl<L> Default for Flights<L> {
    fn default() -> Self {
        Self { flights: HashMap::default(), waiting: 0, last: 0 }
    }
}

impl<L> Flights<L> {
    /// Somebody wants a key. `lead` makes what the leader hands back with the end, from the number of the load. True when
    /// they wait for another.
    pub fn join(
        &mut self,
        slot: &Slot,
        now: Instant,
        answer: oneshot::Sender<Turn<L>>,
        lead: impl FnOnce(u64) -> L,
    ) -> bool {
        if let Some(flight) = self.flights.get_mut(slot)
            && now.saturating_duration_since(flight.began) < PATIENCE
        {
            if self.waiting >= MOST {
                drop(answer.send(Turn::Alone));
                return false;
            }
            self.waiting += 1;
            flight.waiting.push(answer);
            return true;
        }
        self.last += 1;
        let number = self.last;
        let old = self.flights.insert(slot.clone(), Flight { number, began: now, waiting: Vec::new() });
        // Those who waited too long already load for themselves.
        self.waiting -= old.map_or(0, |old| old.waiting.len());
        drop(answer.send(Turn::Lead(lead(number))));
        false
    }

    /// A load ended: all who wait are told.
    pub fn end(&mut self, slot: &Slot, number: u64, outcome: &Outcome) {
        if self.flights.get(slot).is_none_or(|flight| flight.number != number) {
            return;
        }
        let Some(flight) = self.flights.remove(slot) else { return };
        self.waiting -= flight.waiting.len();
        for answer in flight.waiting {
            drop(answer.send(Turn::Ended(outcome.clone())));
        }
    }

    /// A leader gave up without an end: the next one who still waits leads.
    pub fn abandon(&mut self, slot: &Slot, number: u64, now: Instant, lead: impl FnOnce(u64) -> L) {
        let Some(flight) = self.flights.get_mut(slot).filter(|flight| flight.number == number) else { return };
        let mut waiting = std::mem::take(&mut flight.waiting);
        self.waiting -= waiting.len();
        waiting.retain(|answer| !answer.is_closed());
        if waiting.is_empty() {
            self.flights.remove(slot);
            return;
        }
        let next = waiting.swap_remove(0);
        self.last += 1;
        let number = self.last;
        self.waiting += waiting.len();
        self.flights.insert(slot.clone(), Flight { number, began: now, waiting });
        drop(next.send(Turn::Lead(lead(number))));
    }

    /// Loads under way.
    #[cfg(test)]
    fn len(&self) -> usize {
        self.flights.len()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{scaling::cache::slot::Kind, types::TenantId};

    fn slot(id: &str) -> Slot {
        Slot::new(Kind::Answer, &TenantId::new("t").unwrap(), id)
    }

    fn join(flights: &mut Flights<u64>, id: &str, now: Instant) -> oneshot::Receiver<Turn<u64>> {
        let (answer, receiver) = oneshot::channel();
        flights.join(&slot(id), now, answer, |number| number);
        receiver
    }

    fn told(receiver: &mut oneshot::Receiver<Turn<u64>>) -> Option<Option<u64>> {
        match receiver.try_recv() {
            Ok(Turn::Lead(number)) => Some(Some(number)),
            Ok(Turn::Ended(_) | Turn::Alone) => Some(None),
            Err(_) => None,
        }
    }

    #[test]
    fn one_leads_and_all_others_are_told_its_end() {
        let (mut flights, now) = (Flights::default(), Instant::now());
        let mut first = join(&mut flights, "a", now);
        let mut others: Vec<_> = (0..100).map(|_| join(&mut flights, "a", now)).collect();
        let mut elsewhere = join(&mut flights, "b", now);
        let number = told(&mut first).flatten().unwrap();
        assert!(told(&mut elsewhere).flatten().is_some(), "another key has a leader of its own");
        assert!(others.iter_mut().all(|other| told(other).is_none()));
        flights.end(&slot("a"), number + 17, &Outcome::Again);
        assert!(others.iter_mut().all(|other| told(other).is_none()), "not by another load's end");
        flights.end(&slot("a"), number, &Outcome::Again);
        assert!(others.iter_mut().all(|other| told(other) == Some(None)));
        assert_eq!((flights.len(), flights.waiting), (1, 0));
    }

    #[test]
    fn a_lead_that_is_given_up_passes_to_the_next_who_still_waits() {
        let (mut flights, now) = (Flights::default(), Instant::now());
        let mut first = join(&mut flights, "a", now);
        let gone = join(&mut flights, "a", now);
        let mut next = join(&mut flights, "a", now);
        drop(gone);
        let number = told(&mut first).flatten().unwrap();
        flights.abandon(&slot("a"), number, now, |number| number);
        let second = told(&mut next).flatten().unwrap();
        flights.end(&slot("a"), number, &Outcome::Again);
        assert_eq!(flights.len(), 1, "an old end ends nothing");
        flights.abandon(&slot("a"), second, now, |number| number);
        assert_eq!((flights.len(), flights.waiting), (0, 0));
    }

    #[test]
    fn nobody_waits_for_a_load_that_hangs() {
        let (mut flights, now) = (Flights::default(), Instant::now());
        let mut first = join(&mut flights, "a", now);
        let mut waits = join(&mut flights, "a", now);
        let mut later = join(&mut flights, "a", now + PATIENCE);
        assert!(told(&mut first).flatten() < told(&mut later).flatten());
        assert!(matches!(waits.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert_eq!(flights.waiting, 0);
    }
}
