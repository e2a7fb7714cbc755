//! Pools: how many may use something at once, how long the others wait, and what is seen of it. One vocabulary for all of them:
//! connections to PostgreSQL, readers of SQLite, calls of models and tools.
//!
//! Owns: [`Limits`] (size, overflow, wait, recycle age), places given in the order of asking ([`Places`]), what is counted of every
//! pool ([`Tally`]), also of those that give their places in another order (models: fair between tenants). Not here: what stands
//! behind a place (a connection, a thread, a permit), the pure judging of waits ([`pressure`]).
//! Invariants: places are given in the order of asking; a caller that stops waiting leaves no trace; never more than size and
//! overflow are out, but for those that were when the pool was made smaller. Tests: at the foot; `tests/it/settings.rs`.

pub mod pressure;
mod tally;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use tally::{Tally, Waiter};

/// How large a pool is, and how patient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Places that are kept ready.
    pub size: usize,
    /// Further places for a while, given up when they are not used.
    pub overflow: usize,
    /// Longest wait for a place.
    pub wait: Duration,
    /// What stands behind a place is replaced when it is older.
    pub recycle: Duration,
    /// Most who wait; beyond it callers are refused at once.
    pub waiting: usize,
}

impl Limits {
    /// Most who wait, where nobody says otherwise.
    pub const WAITING: usize = 16_384;

    /// Places in all.
    pub const fn most(&self) -> usize {
        let most = self.size.saturating_add(self.overflow);
        if most == 0 { 1 } else { most }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            size: 20,
            overflow: 10,
            wait: Duration::from_secs(30),
            recycle: Duration::from_secs(3600),
            waiting: Self::WAITING,
        }
    }
}

/// Why there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// As many wait as may.
    #[error("too many wait for a place already")]
    Full,
    /// None was free in time.
    #[error("no place was free in time")]
    Late,
    /// The pool is closed.
    #[error("the pool is closed")]
    Closed,
}

/// The places of one pool.
#[derive(Debug)]
pub struct Places {
    free: Arc<Semaphore>,
    /// Places to be withdrawn as soon as they come back.
    surplus: Mutex<usize>,
    tally: Arc<Tally>,
}

/// A place, free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    pool: Arc<Places>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.pool.tally.back();
        let mut surplus = self.pool.surplus();
        if *surplus > 0
            && let Some(permit) = self.permit.take()
        {
            *surplus -= 1;
            permit.forget();
        }
    }
}

impl Places {
    /// A pool of this name, from a closed set: it is a label.
    pub fn new(name: &str, limits: Limits) -> Arc<Self> {
        let free = Arc::new(Semaphore::new(limits.most()));
        Arc::new(Self { free, surplus: Mutex::new(0), tally: Tally::new(name, limits) })
    }

    fn surplus(&self) -> MutexGuard<'_, usize> {
        self.surplus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is counted of it.
    pub const fn tally(&self) -> &Arc<Tally> {
        &self.tally
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.tally.limits()
    }

    /// Places that are out.
    pub fn in_use(&self) -> usize {
        self.tally.in_use()
    }

    /// A place, after a wait of at most the pool's. Cancel safe.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn take(self: &Arc<Self>) -> Result<Place, Refused> {
        if let Ok(permit) = self.free.clone().try_acquire_owned() {
            return Ok(self.give(permit, Duration::ZERO));
        }
        let (limits, waiter) = (self.limits(), self.tally.waits());
        if self.tally.waiting() > limits.waiting {
            waiter.end();
            return Err(self.refuse(Refused::Full));
        }
        let permit = tokio::time::timeout(limits.wait, self.free.clone().acquire_owned()).await;
        let waited = waiter.end();
        match permit {
            Ok(Ok(permit)) => Ok(self.give(permit, waited)),
            Ok(Err(_)) => Err(Refused::Closed),
            Err(_) => Err(self.refuse(Refused::Late)),
        }
    }

    fn refuse(&self, why: Refused) -> Refused {
        self.tally.refused(why);
        why
    }

    fn give(self: &Arc<Self>, permit: OwnedSemaphorePermit, waited: Duration) -> Place {
        self.tally.taken();
        self.tally.waited(waited);
        Place { pool: self.clone(), permit: Some(permit) }
    }

    /// From here on these limits hold. Places that are out beyond them are withdrawn when they come back.
    pub fn resize(&self, limits: Limits) {
        let mut surplus = self.surplus();
        let (before, after) = (self.limits().most(), limits.most());
        if after > before {
            let more = after - before;
            let kept = more.min(*surplus);
            *surplus -= kept;
            self.free.add_permits(more - kept);
        } else {
            let less = before - after;
            *surplus += less - self.free.forget_permits(less);
        }
        self.tally.set_limits(limits);
    }

    /// No places from here on; who waits is told.
    pub fn close(&self) {
        self.free.close();
    }
}

#[allow(clippy::cast_precision_loss)] // a figure on a page
fn count(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use futures_util::{FutureExt, poll};
    use proptest::prelude::*;

    use super::*;

    fn limits(size: usize, overflow: usize) -> Limits {
        Limits { size, overflow, waiting: 2, ..Limits::default() }
    }

    #[tokio::test]
    async fn places_and_waiters_are_bounded_and_given_up_waiting_leaves_no_trace() {
        let pool = Places::new("test", limits(1, 0));
        let held = pool.take().await.unwrap();
        let mut first = Box::pin(pool.take());
        let mut second = Box::pin(pool.take());
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        assert_eq!(pool.take().now_or_never().unwrap().unwrap_err(), Refused::Full);
        drop(first);
        let mut third = Box::pin(pool.take());
        assert!(poll!(&mut third).is_pending(), "the place in the queue of the first is free again");
        drop(held);
        let served = second.now_or_never().unwrap().unwrap();
        assert!(poll!(&mut third).is_pending(), "in the order of asking");
        drop(served);
        drop(third.now_or_never().unwrap().unwrap());
        assert_eq!((pool.in_use(), pool.tally().waiting()), (0, 0));
    }

    #[tokio::test]
    async fn who_waits_too_long_is_told_and_a_closed_pool_gives_none() {
        let pool = Places::new("test", limits(1, 0));
        let held = pool.take().await.unwrap();
        pool.resize(Limits { wait: Duration::ZERO, ..limits(1, 0) });
        assert_eq!(pool.take().await.unwrap_err(), Refused::Late);
        pool.resize(limits(1, 0));
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.take().await.map(drop) }
        });
        tokio::task::yield_now().await;
        pool.close();
        assert_eq!(waiting.await.unwrap(), Err(Refused::Closed));
        drop(held);
    }

    proptest! {
        /// However a pool is resized while places are out, as many are to be had in the end as its limits say.
        #[test]
        fn a_pool_ends_up_with_its_size(steps in prop::collection::vec((0_u8..3, 1_usize..9), 1..60)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _inside = runtime.enter();
            let pool = Places::new("test", limits(4, 1));
            let mut held = Vec::new();
            for (what, number) in steps {
                match what {
                    0 => held.extend(pool.take().now_or_never().and_then(Result::ok)),
                    1 if !held.is_empty() => drop(held.swap_remove(number % held.len())),
                    _ => pool.resize(limits(number, number % 3)),
                }
                prop_assert_eq!(pool.in_use(), held.len());
            }
            held.clear();
            let most = pool.limits().most();
            held.extend(std::iter::from_fn(|| pool.take().now_or_never().and_then(Result::ok)).take(64));
            prop_assert_eq!(held.len(), most);
        }
    }
}
