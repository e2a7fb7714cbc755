//! How many calls a provider gets at once, how many may wait for it, and who of them is next.
//!
//! Invariants: never more calls than places; a place that falls free goes to whoever is next (`fair.rs`); a caller that stops
//! waiting leaves no trace; never more who wait than allowed: one more takes the place of the newest of whoever waits most.
//! Tests: at the foot.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::fair::{Fair, Ticket};
use crate::{cognition::Error, telemetry::metric, types::InstanceKey};

/// The places of one provider. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    provider: Arc<str>,
    max_waiting: usize,
    waiting: metrics::Gauge,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    queue: Fair<oneshot::Sender<Place>>,
}

/// The right to one call; free again when it is dropped.
#[derive(Debug)]
pub(super) struct Place(Option<Pool>);

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(pool) = self.0.take() {
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
    pub(super) fn new(provider: Arc<str>, places: usize, max_waiting: usize) -> Self {
        let waiting = metrics::gauge!(metric::MODEL_QUEUE, "provider" => provider.to_string());
        let state = Mutex::new(State { free: places.max(1), queue: Fair::default() });
        Self(Arc::new(Inner { provider, max_waiting, waiting, state }))
    }

    /// A place for a call of about so many tokens. Waits without a deadline of its own. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Overloaded`] when too many wait: at once, or later when others have a better right to wait.
    pub(super) async fn place(&self, key: &InstanceKey, tokens: u64) -> Result<Place, Error> {
        let overloaded = || Error::Overloaded(self.0.provider.to_string());
        let (sender, receiver) = oneshot::channel();
        let (ticket, displaced) = {
            let mut state = self.lock();
            if state.free > 0 && state.queue.len() == 0 {
                state.free -= 1;
                state.queue.charge(key, tokens);
                return Ok(Place(Some(self.clone())));
            }
            let mut displaced = None;
            if state.queue.len() >= self.0.max_waiting {
                displaced = Some(state.queue.make_room(key).ok_or_else(overloaded)?);
            }
            let ticket = state.queue.put(key, tokens, sender);
            self.0.waiting.set(state.queue.len() as f64);
            (ticket, displaced)
        };
        // Whoever waits at its other end hears that it waits no longer.
        drop(displaced);
        let _waiter = Waiter { pool: self, key, ticket };
        receiver.await.map_err(|_| overloaded())
    }

    /// A place fell free: it goes to whoever is next and still there.
    fn pass_on(self) {
        let mut place = Place(Some(self.clone()));
        loop {
            let next = {
                let mut state = self.lock();
                let next = state.queue.next();
                if next.is_none() {
                    state.free += 1;
                }
                self.0.waiting.set(state.queue.len() as f64);
                next
            };
            let Some(next) = next else {
                place.0 = None;
                return;
            };
            match next.send(place) {
                Ok(()) => return,
                Err(unheard) => place = unheard,
            }
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

    fn pool(places: usize, max_waiting: usize) -> Pool {
        Pool::new(Arc::from("p"), places, max_waiting)
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
