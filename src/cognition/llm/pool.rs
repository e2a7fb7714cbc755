//! How many calls a provider gets at once, and how many may wait for it.
//!
//! Invariants: places are given in the order of asking; a caller that stops waiting leaves no trace.
//! Tests: at the foot.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::{cognition::Error, telemetry::metric};

/// The places of one provider.
#[derive(Debug)]
pub(super) struct Pool {
    provider: Arc<str>,
    places: Semaphore,
    waiting: AtomicUsize,
    max_waiting: usize,
}

/// One who waits; counted as long as it exists.
struct Waiter<'p>(&'p Pool);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        metrics::gauge!(metric::MODEL_QUEUE, "provider" => self.0.provider.to_string()).decrement(1.0);
    }
}

impl Pool {
    /// So many places, so many who wait.
    pub(super) fn new(provider: Arc<str>, places: usize, max_waiting: usize) -> Self {
        let places = Semaphore::new(places.clamp(1, Semaphore::MAX_PERMITS));
        Self { provider, places, waiting: AtomicUsize::new(0), max_waiting }
    }

    /// A place, free again when it is dropped. Waits without a deadline of its own. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Overloaded`] at once when too many wait already.
    pub(super) async fn place(&self) -> Result<SemaphorePermit<'_>, Error> {
        let overloaded = || Error::Overloaded(self.provider.to_string());
        if let Ok(place) = self.places.try_acquire() {
            return Ok(place);
        }
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= self.max_waiting {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(overloaded());
        }
        metrics::gauge!(metric::MODEL_QUEUE, "provider" => self.provider.to_string()).increment(1.0);
        let waiter = Waiter(self);
        let place = self.places.acquire().await.map_err(|_| overloaded());
        drop(waiter);
        place
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::{FutureExt, poll};

    use super::*;

    #[tokio::test]
    async fn places_and_waiters_are_bounded_and_given_up_waiting_leaves_no_trace() {
        let pool = Pool::new(Arc::from("p"), 1, 2);
        let held = pool.place().await.unwrap();
        let mut first = Box::pin(pool.place());
        let mut second = Box::pin(pool.place());
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        assert!(matches!(pool.place().now_or_never(), Some(Err(Error::Overloaded(name))) if name == "p"));
        drop(first);
        let mut third = Box::pin(pool.place());
        assert!(poll!(&mut third).is_pending(), "the place in the queue of the first is free again");
        drop(held);
        let served = second.now_or_never().unwrap().unwrap();
        assert!(poll!(&mut third).is_pending(), "in the order of asking");
        drop(served);
        drop(third.now_or_never().unwrap().unwrap());
        assert_eq!(pool.waiting.load(Ordering::Acquire), 0);
    }
}
