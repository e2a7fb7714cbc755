//! How many calls a provider gets at once, how many may wait for it, and who of them is next.
//!
//! Its places are counted as those of every pool (`scaling/pool`), under `model/NAME`.
//!
//! Invariants: never more calls than places, but for those under way when there came to be fewer; a place that falls free goes to whoever is next (`fair.rs`); a caller that stops
//! waiting leaves no trace; never more who wait than allowed: one more takes the place of the newest of whoever waits most.
//! Tests: at the foot.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;

use super::fair::{Fair, Ticket};
use crate::{
    cognition::Error,
    scaling::pool::{Limits, Refused, Tally},
    telemetry::metric,
    types::InstanceKey,
};

/// The places of one provider. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    provider: Arc<str>,
    tally: Arc<Tally>,
    waiting: metrics::Gauge,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Places to be withdrawn as soon as they come back.
    surplus: usize,
    queue: Fair<oneshot::Sender<Place>>,
}

/// The right to one call; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place(Option<Pool>);

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(pool) = self.0.take() {
            pool.0.tally.back();
            pool.pass_on();
        }
    }
}

/// One who waits; out of the queue when it is dropped.
struct Waiter<'p> {
    pool: &'p Pool,
    key: &'p InstanceKey,
    ticket: Ticket,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        let gone = state.queue.remove(self.key, self.ticket);
        self.pool.0.waiting.set(state.queue.len() as f64);
        drop(state);
        drop(gone);
    }
}

impl Pool {
    /// So many places, so many who wait.
    pub(super) fn new(provider: Arc<str>, limits: Limits) -> Self {
        let waiting = metrics::gauge!(metric::MODEL_QUEUE, "provider" => provider.to_string());
        let tally = Tally::new(&format!("model/{provider}"), limits);
        let state = Mutex::new(State { free: limits.most(), surplus: 0, queue: Fair::default() });
        Self(Arc::new(Inner { provider, tally, waiting, state }))
    }

    /// What is counted of it.
    pub(super) fn tally(&self) -> &Arc<Tally> {
        &self.0.tally
    }

    /// From here on these limits hold. Places that are out beyond them are withdrawn when they come back, those who wait
    /// beyond them wait on.
    pub(super) fn resize(&self, limits: Limits) {
        let mut more = {
            let mut state = self.lock();
            let (before, after) = (self.0.tally.limits().most(), limits.most());
            let more = after.saturating_sub(before);
            let kept = more.min(state.surplus);
            state.surplus -= kept;
            let less = before.saturating_sub(after);
            let idle = less.min(state.free);
            state.free -= idle;
            state.surplus += less - idle;
            self.0.tally.set_limits(limits);
            more - kept
        };
        while more > 0 {
            self.clone().pass_on();
            more -= 1;
        }
    }

    fn give(&self) -> Place {
        self.0.tally.taken();
        Place(Some(self.clone()))
    }

    /// A place for a call of about so many tokens. Waits without a deadline of its own. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when too many wait: at once, or later when others have a better right to wait.
    pub(super) async fn place(&self, key: &InstanceKey, tokens: u64) -> Result<Place, Error> {
        let overloaded = || {
            self.0.tally.refused(Refused::Full);
            Error::Overloaded(self.0.provider.to_string())
        };
        let max_waiting = self.0.tally.limits().waiting;
        let (sender, receiver) = oneshot::channel();
        let (ticket, displaced) = {
            let mut state = self.lock();
            if state.free > 0 && state.queue.len() == 0 {
                state.free -= 1;
                state.queue.charge(key, tokens);
                self.0.tally.waited(Duration::ZERO);
                return Ok(self.give());
            }
            let mut displaced = None;
            if state.queue.len() >= max_waiting {
                displaced = Some(state.queue.make_room(key).ok_or_else(overloaded)?);
            }
            let ticket = state.queue.put(key, tokens, sender);
            self.0.waiting.set(state.queue.len() as f64);
            (ticket, displaced)
        };
        // Whoever waits at its other end hears that it waits no longer.
        drop(displaced);
        let counted = self.0.tally.waits();
        let _waiter = Waiter { pool: self, key, ticket };
        let place = receiver.await;
        let waited = counted.end();
        let place = place.map_err(|_| overloaded())?;
        self.0.tally.waited(waited);
        Ok(place)
    }

    /// A place fell free: it goes to whoever is next and still there.
    fn pass_on(self) {
        let mut place = None;
        loop {
            let next = {
                let mut state = self.lock();
                if state.surplus > 0 {
                    state.surplus -= 1;
                    return self.keep(place);
                }
                let next = state.queue.next();
                if next.is_none() {
                    state.free += 1;
                }
                self.0.waiting.set(state.queue.len() as f64);
                next
            };
            let Some(next) = next else { return self.keep(place) };
            match next.send(place.take().unwrap_or_else(|| self.give())) {
                Ok(()) => return,
                Err(unheard) => place = Some(unheard),
            }
        }
    }

    /// A place nobody took is free or withdrawn, and passed on no more.
    fn keep(&self, place: Option<Place>) {
        if let Some(mut place) = place {
            place.0 = None;
            self.0.tally.back();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::{FutureExt, poll};

    use super::*;
    use crate::types::{InstanceId, TenantId};

    fn key(tenant: &str, instance: &str) -> InstanceKey {
        InstanceKey::new(TenantId::new(tenant).unwrap(), InstanceId::new(instance).unwrap())
    }

    fn limits(size: usize, waiting: usize) -> Limits {
        Limits { size, overflow: 0, waiting, ..Limits::default() }
    }

    fn pool(places: usize, max_waiting: usize) -> Pool {
        Pool::new(Arc::from("p"), limits(places, max_waiting))
    }

    #[tokio::test]
    async fn places_and_waiters_are_bounded_and_given_up_waiting_leaves_no_trace() {
        let (pool, a) = (pool(1, 2), key("t", "a"));
        let held = pool.place(&a, 1).await.unwrap();
        let mut first = Box::pin(pool.place(&a, 1));
        let mut second = Box::pin(pool.place(&a, 1));
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        assert!(matches!(pool.place(&a, 1).now_or_never(), Some(Err(Error::Overloaded(name))) if name == "p"));
        drop(first);
        let mut third = Box::pin(pool.place(&a, 1));
        assert!(poll!(&mut third).is_pending(), "the place in the queue of the first is free again");
        drop(held);
        let served = second.now_or_never().unwrap().unwrap();
        assert!(poll!(&mut third).is_pending(), "in the order of asking");
        drop(served);
        drop(third.now_or_never().unwrap().unwrap());
        let state = pool.lock();
        assert_eq!((state.free, state.queue.len()), (1, 0));
        assert_eq!((pool.tally().in_use(), pool.tally().waiting()), (0, 0));
    }

    #[tokio::test]
    async fn a_place_given_to_one_who_has_left_goes_to_the_next() {
        let (pool, a) = (pool(1, 8), key("t", "a"));
        let held = pool.place(&a, 1).await.unwrap();
        let mut left = Box::pin(pool.place(&a, 1));
        let mut stays = Box::pin(pool.place(&a, 1));
        assert!(poll!(&mut left).is_pending() && poll!(&mut stays).is_pending());
        drop(held);
        drop(left); // it was given the place and never looked
        let place = stays.now_or_never().unwrap().unwrap();
        drop(place);
        assert_eq!(pool.lock().free, 1);
    }

    #[tokio::test]
    async fn there_are_as_many_places_as_was_said_last() {
        let (pool, a) = (pool(1, 9), key("t", "a"));
        let first = pool.place(&a, 1).await.unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(pool.place(&a, 1))).collect();
        for one in &mut waiting {
            assert!(poll!(one).is_pending());
        }
        pool.resize(limits(3, 9));
        let second = waiting.remove(0).now_or_never().unwrap().unwrap();
        let third = waiting.remove(0).now_or_never().unwrap().unwrap();
        assert!(poll!(&mut waiting[0]).is_pending());
        pool.resize(limits(1, 9));
        drop((first, second));
        assert!(poll!(&mut waiting[0]).is_pending(), "two were too many");
        drop(third);
        drop(waiting.remove(0).now_or_never().unwrap().unwrap());
        pool.resize(limits(2, 9));
        let state = pool.lock();
        assert_eq!((state.free, state.surplus, pool.tally().in_use()), (2, 0, 0));
    }

    #[tokio::test]
    async fn a_tenant_that_fills_the_queue_makes_room_for_another() {
        let pool = pool(1, 3);
        let (busy, quiet) = (key("busy", "a"), key("quiet", "a"));
        let held = pool.place(&busy, 100).await.unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| Box::pin(pool.place(&busy, 100))).collect();
        for one in &mut waiting {
            assert!(poll!(one).is_pending());
        }
        let mut other = Box::pin(pool.place(&quiet, 100));
        assert!(poll!(&mut other).is_pending());
        let newest = waiting.pop().unwrap();
        assert!(matches!(newest.now_or_never(), Some(Err(Error::Overloaded(_)))), "the newest of the busy one");
        drop(held);
        let place = other.now_or_never().expect("the one that was served nothing is next").unwrap();
        assert!(poll!(&mut waiting[0]).is_pending());
        drop(place);
        assert!(waiting.remove(0).now_or_never().unwrap().is_ok());
    }
}
