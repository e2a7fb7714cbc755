//! Pools: how many may use something at once, how long the others wait, and what is seen of it. One vocabulary for all of them:
//! connections to PostgreSQL, readers of SQLite, calls of models and tools.
//!
//! Owns: [`Limits`] (size, overflow, wait, recycle age), places and those who wait for them ([`Places`]). Not here: what stands
//! behind a place (a connection, a thread, a permit), the pure judging of waits ([`pressure`]).
//! Invariants: places are given in the order of asking; a caller that stops waiting leaves no trace; never more than size and
//! overflow are out, but for those that were when the pool was made smaller. Tests: at the foot; `tests/it/settings.rs`.

pub mod pressure;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use self::pressure::{Pressure, Seen};
use crate::telemetry::metric;

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
    name: Arc<str>,
    free: Arc<Semaphore>,
    state: Mutex<State>,
    in_use: AtomicUsize,
    waiting: AtomicUsize,
    seen: Seen,
    figures: Figures,
}

#[derive(Debug)]
struct State {
    limits: Limits,
    /// Places to be withdrawn as soon as they come back.
    surplus: usize,
    pressure: Pressure,
}

/// Handles of what is counted.
#[derive(Debug)]
struct Figures {
    size: metrics::Gauge,
    in_use: metrics::Gauge,
    waiting: metrics::Gauge,
    seconds: metrics::Histogram,
    saturated: metrics::Gauge,
    full: metrics::Counter,
    late: metrics::Counter,
}

impl Figures {
    fn of(pool: &str) -> Self {
        let pool = String::from(pool);
        let refused = |reason| metrics::counter!(metric::POOL_REFUSED, "pool" => pool.clone(), "reason" => reason);
        Self {
            full: refused("full"),
            late: refused("late"),
            size: metrics::gauge!(metric::POOL_SIZE, "pool" => pool.clone()),
            in_use: metrics::gauge!(metric::POOL_IN_USE, "pool" => pool.clone()),
            waiting: metrics::gauge!(metric::POOL_WAITING, "pool" => pool.clone()),
            seconds: metrics::histogram!(metric::POOL_WAIT_SECONDS, "pool" => pool.clone()),
            saturated: metrics::gauge!(metric::POOL_SATURATED, "pool" => pool),
        }
    }
}

/// A place, free again when it is dropped.
#[derive(Debug)]
pub struct Place {
    pool: Arc<Places>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let pool = &self.pool;
        pool.in_use.fetch_sub(1, Ordering::AcqRel);
        pool.figures.in_use.decrement(1.0);
        let mut state = pool.state();
        if state.surplus > 0
            && let Some(permit) = self.permit.take()
        {
            state.surplus -= 1;
            permit.forget();
        }
    }
}

/// One who waits; counted as long as it exists.
struct Waiter<'p>(&'p Places);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
        self.0.figures.waiting.decrement(1.0);
    }
}

impl Places {
    /// A pool of this name, from a closed set: it is a label.
    pub fn new(name: &str, limits: Limits) -> Arc<Self> {
        let figures = Figures::of(name);
        figures.size.set(count(limits.size));
        Arc::new(Self {
            name: Arc::from(name),
            free: Arc::new(Semaphore::new(limits.most())),
            state: Mutex::new(State { limits, surplus: 0, pressure: Pressure::default() }),
            in_use: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            seen: Seen::default(),
            figures,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its limits.
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    /// Places that are out.
    pub fn in_use(&self) -> usize {
        self.in_use.load(Ordering::Acquire)
    }

    /// A place, after a wait of at most the pool's. Cancel safe.
    ///
    /// # Errors
    /// [`Refused`].
    pub async fn take(self: &Arc<Self>) -> Result<Place, Refused> {
        if let Ok(permit) = self.free.clone().try_acquire_owned() {
            return Ok(self.give(permit, Duration::ZERO));
        }
        let limits = self.limits();
        if self.waiting.fetch_add(1, Ordering::AcqRel) >= limits.waiting {
            self.waiting.fetch_sub(1, Ordering::AcqRel);
            self.seen.refused();
            self.figures.full.increment(1);
            return Err(Refused::Full);
        }
        self.figures.waiting.increment(1.0);
        let waiter = Waiter(self);
        let began = Instant::now();
        let permit = tokio::time::timeout(limits.wait, self.free.clone().acquire_owned()).await;
        drop(waiter);
        match permit {
            Ok(Ok(permit)) => Ok(self.give(permit, began.elapsed())),
            Ok(Err(_)) => Err(Refused::Closed),
            Err(_) => {
                self.seen.refused();
                self.figures.late.increment(1);
                Err(Refused::Late)
            }
        }
    }

    fn give(self: &Arc<Self>, permit: OwnedSemaphorePermit, waited: Duration) -> Place {
        let in_use = self.in_use.fetch_add(1, Ordering::AcqRel) + 1;
        self.seen.waited(waited, in_use);
        self.figures.in_use.increment(1.0);
        self.figures.seconds.record(waited.as_secs_f64());
        Place { pool: self.clone(), permit: Some(permit) }
    }

    /// From here on these limits hold. Places that are out beyond them are withdrawn when they come back.
    pub fn resize(&self, limits: Limits) {
        let mut state = self.state();
        let (before, after) = (state.limits.most(), limits.most());
        if after > before {
            let more = after - before;
            let kept = more.min(state.surplus);
            state.surplus -= kept;
            self.free.add_permits(more - kept);
        } else {
            let less = before - after;
            state.surplus += less - self.free.forget_permits(less);
        }
        state.limits = limits;
        self.figures.size.set(count(limits.size));
    }

    /// No places from here on; who waits is told.
    pub fn close(&self) {
        self.free.close();
    }

    /// Judges the last minute; to be called about once a second. What should be logged, at most once a minute.
    pub fn look(&self, now: Instant) -> Option<String> {
        let mut state = self.state();
        let limits = state.limits;
        let told = state.pressure.look(now, &self.seen, &limits);
        let saturated = state.pressure.is_saturated();
        self.figures.saturated.set(f64::from(u8::from(saturated)));
        told.then(|| format!("{}; in use at present {}", state.pressure.words(&limits), self.in_use()))
    }

    /// Whether it was too small for what was asked of it in the last minute, in words.
    pub fn strain(&self) -> Option<String> {
        let state = self.state();
        state.pressure.is_saturated().then(|| format!("{}: {}", self.name, state.pressure.words(&state.limits)))
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
        assert_eq!((pool.in_use(), pool.waiting.load(Ordering::Acquire)), (0, 0));
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
